"""Metrics to further places while something trains: Weights & Biases, TensorBoard."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxid.errors import InputError


class Trackers:
    """A context whose value takes rows of metrics, or None if there is no place for them.

    Raises:
        InputError: where a package is missing.
    """

    def __init__(self, settings: Mapping[str, Any], *, wandb: str | None = None, tensorboard: Path | None = None):
        """Takes the run's settings, a project of Weights & Biases, and a folder for TensorBoard."""
        self.settings, self.project, self.folder = settings, wandb, tensorboard
        self.wandb = None if wandb is None else _package("wandb", "--wandb", "Weights & Biases")
        self.tensorboard = None if tensorboard is None else _package("tensorboardX", "--tensorboard", "tensorboardX")
        self.run: Any = None
        self.writer: Any = None

    def __enter__(self) -> Callable[[dict[str, Any]], None] | None:
        """Begins."""
        if self.wandb is not None:
            self.run = self.wandb.init(project=self.project, config=dict(self.settings))
        if self.tensorboard is not None:
            self.writer = self.tensorboard.SummaryWriter(str(self.folder))
        return None if self.run is None and self.writer is None else self.log

    def log(self, row: dict[str, Any]) -> None:
        """Sends one row: its numbers, at its step."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
        if self.run is not None:
            self.run.log({"step": row["step"], **numbers}, step=row["step"])
        if self.writer is not None:
            for name, value in numbers.items():
                self.writer.add_scalar(name, value, row["step"])

    def __exit__(self, *_: object) -> None:
        """Ends."""
        if self.run is not None:
            self.run.finish()
        if self.writer is not None:
            self.writer.close()


def _package(name: str, option: str, shown: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "tensorboard" if name == "tensorboardX" else name
        raise InputError(f"{option} needs {shown}: pip install 'jaxid-vlm[{extra}]'.") from error
