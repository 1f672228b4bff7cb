"""Writes a scorer of dense maps as the authors of [DCSM] arXiv 2503.08723 do."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from jaxid.dcsm.scoring import SCORER_FILE, Scorer
from jaxid.experiments.base import Command
from jaxid.io import ensure_output_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """A scorer and its file.

    Attributes:
        scorer: the scorer.
        path: the `.pt` file.
    """

    scorer: Scorer
    path: Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportScorer(Command[Exported]):
    """Write a scorer as a .pt checkpoint that the authors' code loads.

    Attributes:
        scorer: folder of a run of `jaxid dcsm train`, or a scorer's file.
        out: the checkpoint, .pt.
    """

    name: ClassVar[str] = "dcsm export"

    scorer: Path = dataclasses.field(kw_only=False)
    out: Path

    def run(self) -> Exported:
        """Reads the scorer and writes the checkpoint.

        Raises:
            CheckpointError: if the scorer cannot be read, or PyTorch is not installed.
            OutputError: if the checkpoint cannot be written.
        """
        scorer = Scorer.load(self.scorer / SCORER_FILE if self.scorer.is_dir() else self.scorer)
        ensure_output_folder(self.out.parent)
        scorer.export(self.out)
        return Exported(scorer=scorer, path=self.out)

    def report(self, result: Exported) -> Iterator[str]:
        """What the checkpoint holds, and what it cannot say."""
        scorer = result.scorer
        rows, columns = scorer.map_shape
        yield f"maps of {rows} x {columns} tokens, {len(scorer.vocabulary)} functional words"
        if scorer.placement == "token":
            yield (
                "the scorer was trained with words at their own tokens; the authors' code puts them elsewhere, and its "
                "scores will differ"
            )
        yield str(result.path)
