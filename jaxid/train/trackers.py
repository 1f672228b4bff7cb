"""Sends training metrics to Weights & Biases and TensorBoard."""

import contextlib
import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

from jaxid.errors import InputError
from jaxid.train.folder import Row


class Trackers:
    """A context whose value logs rows of metrics; it is None if no tracker was asked for.

    Raises:
        InputError: if a package is missing.
    """

    def __init__(self, settings: Mapping[str, object], *, wandb: str | None = None, tensorboard: Path | None = None):
        """Takes the run's settings, a project of Weights & Biases, and a folder for TensorBoard."""
        self.settings, self.project, self.folder = settings, wandb, tensorboard
        self.wandb = None if wandb is None else _package("wandb", "--wandb", "Weights & Biases")
        self.tensorboard = None if tensorboard is None else _package("tensorboardX", "--tensorboard", "tensorboardX")
        self.stack = contextlib.ExitStack()
        self.senders: list[Callable[[Mapping[str, float], int], object]] = []

    def __enter__(self) -> Callable[[Row], None] | None:
        """Starts the trackers."""
        if self.wandb is not None:
            run = self.wandb.init(project=self.project, config=dict(self.settings))
            self.stack.callback(run.finish)
            self.senders.append(lambda numbers, step: run.log({"step": step, **numbers}, step=step))
        if self.tensorboard is not None:
            writer = self.tensorboard.SummaryWriter(str(self.folder))
            self.stack.callback(writer.close)
            self.senders.append(lambda numbers, step: [writer.add_scalar(*item, step) for item in numbers.items()])
        return self.log if self.senders else None

    def log(self, row: Row) -> None:
        """Sends the numbers of a row, at its step."""
        numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, int | float)}
        for send in self.senders:
            send(numbers, int(row["step"]))

    def __exit__(self, *_: object) -> None:
        """Ends the trackers."""
        self.stack.close()


def _package(name: str, option: str, shown: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "tensorboard" if name == "tensorboardX" else name
        raise InputError(f"{option} needs {shown}: pip install 'jaxid-vlm[{extra}]'.") from error
