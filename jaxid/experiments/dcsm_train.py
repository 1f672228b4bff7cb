"""Trains a scorer of dense maps on data sets in their published layouts ([DCSM] arXiv 2503.08723, section 5)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from jaxid import plots
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checks import Count
from jaxid.dcsm import training
from jaxid.dcsm.datasets import Item, Layout, read_sets
from jaxid.dcsm.functional_words import read_lines
from jaxid.dcsm.scoring import SCORER_FILE
from jaxid.dcsm.training import Orders, TrainingConfig
from jaxid.errors import DataError
from jaxid.experiments.base import Command, write_config
from jaxid.io import ensure_output_folder, read_json
from jaxid.train.trackers import Trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """Outcome of a training run.

    Attributes:
        rows: rows of metrics, as in `metrics.json`.
        sets: how many items each data set has.
    """

    rows: Sequence[Mapping[str, object]]
    sets: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainScorer(TrainingConfig, Command[TrainingSummary]):
    """Train a scorer over a frozen encoder.

    Attributes:
        data: folder with spatial/, attributes/, sizes/, negation.json, or COCO-Spatial.
        out: folder of the run. A run that it holds is resumed if its settings agree.
        model: alias, Hugging Face id, folder, or OpenCLIP file.
        spatial: folder of pictures A_above_B in the data.
        attributes: folder of pictures c1_A_c2_B in the data.
        sizes: folder of pictures small_A_big_B in the data; they join the attributes.
        negation: file of pairs of pictures in the data; its paths are relative to the data.
        words: file of functional words, one a line, used instead of `vocabulary`; `jaxid dcsm words` writes one.
        mesh: devices that share the work, such as data=8; auto takes all of them. By default what is encoded once is
            encoded on one device, and all of them train.
        save_every: steps between saves.
        restart: discard the run that the folder holds, and begin anew.
        wandb: project of Weights & Biases to log to.
        torch_file: also write the scorer in the authors' layout, .pt.
        reference_bugs: choose items, word captions and put functional columns as the published code does: `token`
            becomes `replace`.
        progress: show progress bars, on terminals.
    """

    name: ClassVar[str] = "dcsm train"

    data: Path
    out: Path
    model: str = "tiny-clip"
    spatial: str = Layout.spatial
    attributes: str = Layout.attributes
    sizes: str = Layout.sizes
    negation: str = Layout.negation
    words: Path | None = None
    mesh: str | None = None
    save_every: Count = 100
    restart: bool = False
    wandb: str | None = None
    torch_file: Path | None = None
    reference_bugs: bool = False
    progress: bool = True

    orders: ClassVar[Orders] = staticmethod(training.own_orders)
    """Which items a step has."""

    def read_sets(self) -> dict[str, list[Item]]:
        """The data sets, with their captions."""
        return read_sets(self.data, self.layout)

    @property
    def layout(self) -> Layout:
        """The data sets' names."""
        return Layout(spatial=self.spatial, attributes=self.attributes, sizes=self.sizes, negation=self.negation)

    def run(self) -> TrainingSummary:
        """Trains, or resumes the run in the folder; writes the scorer with metrics and their curves.

        Raises:
            DataError: if no data set is found, or one is not in its published layout.
            InputError: for data sets that training cannot use, or if a package is missing.
            OutputError: if the folder holds another run, is in use, or cannot be written to.
            CheckpointError: if the encoder cannot be read.
        """
        if self.reference_bugs:
            from jaxid.experiments.reference import with_bugs  # it knows all experiments

            return with_bugs(self)._run()
        return self._run()

    def _run(self) -> TrainingSummary:
        config = self
        if self.words is not None:
            lines = dict.fromkeys(line.lower() for line in read_lines(self.words))
            config = dataclasses.replace(self, vocabulary=tuple(lines))
        sets = self.read_sets()
        training.check_sets(sets, config)
        ensure_output_folder(self.out)
        if self.torch_file is not None:
            from jaxid.checkpoints.torch_files import check_torch

            check_torch(f"Writing {self.torch_file}")
            ensure_output_folder(self.torch_file.parent)
        encoder = load_encoder(self.model, mesh=self.mesh)
        with Trackers(training.settings_of(config) | {"model": self.model}, wandb=self.wandb) as log:
            scorer = training.train(
                self.out,
                encoder,
                sets,
                config,
                save_every=self.save_every,
                restart=self.restart,
                progress=self.progress,
                log=log,
                started=lambda: write_config(self, self.out),
                orders=self.orders,
            )
        if self.torch_file is not None:
            scorer.export(self.torch_file)
        metrics = read_json(self.out / "metrics.json", DataError, expected=list)
        if metrics:
            columns = {name: np.array([row[name] for row in metrics]) for name in ("epoch", "loss", "accuracy")}
            counts = ", ".join(f"{len(items)} {name}" for name, items in sets.items())
            about = plots.About(model=self.model, items=counts, note=f"seed {self.seed}")
            plots.save(plots.training_curves(**columns, about=about), self.out / "curves.png")
        return TrainingSummary(rows=metrics, sets={name: len(items) for name, items in sets.items()})

    def report(self, result: TrainingSummary) -> Iterator[str]:
        """The data sets, the last loss, and the scorer's file."""
        last = f", loss {result.rows[-1]['loss']:.3f}" if result.rows else ""
        yield f"{sum(result.sets.values())} items of {', '.join(result.sets)}{last}"
        yield str(self.out / SCORER_FILE)
