"""Depth: are height and depth the same to the model? ([ID] arXiv 2601.12626, Figure 7)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.experiments.base import Summary
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Session, joined
from jaxid.experiments.steering import KINDS, Kind, Question, ToCells, about_items, ask
from jaxid.stats import mean_interval

QUESTIONS = {
    "height": KINDS["above-below"],
    "depth": Kind("Is the {0} in front or behind the {1}?", ("front", "behind"), "vertical"),
}
"""What is asked about the same pictures."""

Batches = Mapping[str, RelationBatch]
"""The same pictures and objects under both questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSummary(Summary):
    """What came of steering along the vertical axis under both questions.

    Attributes:
        layers: ascending.
        words: the answers, by question.
        change: of their log-probabilities by layer, cell (x, y) and word, by question: means over items.
        change_interval: half of the means' 95 % intervals.
        height_depth_correlation: of the two questions' change of log p(first word) - log p(second word), by layer and
            row: 0 if the model keeps height and depth apart, 1 if it takes them for the same.
    """

    layers: list[int]
    words: dict[str, list[str]]
    change: dict[str, Float[np.ndarray, "L X Y 2"]]
    change_interval: dict[str, Float[np.ndarray, "L X Y 2"]]
    height_depth_correlation: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(ToCells[Batches, DepthSummary]):
    """Ask whether height is taken for depth: one steering under two questions (Figure 7).

    Every subject is steered along the vertical axis, by U(x, y) - U(x, 3 - y). A model that keeps height and depth
    apart changes its answer to the question about height only.
    """

    name: ClassVar[str] = "depth"
    panels: ClassVar[tuple[str, str]] = ("height", "depth")
    """The questions whose changes are drawn under the names of height and depth."""

    def items(self, session: Session) -> list[Question]:
        """Above/below items."""
        return about_items(session.spatial_items("vertical"))

    def prepare(self, session: Session, items: Sequence[Question]) -> Batches:
        """Both questions about every item."""
        return {name: ask(session, kind, items) for name, kind in QUESTIONS.items()}

    def asked(self, batch: Batches) -> list[RelationBatch]:
        """Those about height, then those about depth."""
        return list(batch.values())

    def compute(self, session: Session, items: Sequence[Question], batch: Batches) -> Columns:
        """A row for each question, layer, cell, item and word."""
        tables = []
        for name, asked in batch.items():
            rows = self.rows_of(session, items, asked.answers, self.steered(session, asked))
            tables.append({**rows, "question": np.full(len(rows["change"]), name)})
        return joined(tables)

    def summarise(self, session: Session, table: Columns) -> DepthSummary:
        """Mean changes by question, layer and cell, and how alike they are by row."""
        found = {}
        for name, kind in QUESTIONS.items():
            rows = {column: values[table["question"] == name] for column, values in table.items()}
            found[name] = self.changes(session, rows, kind.answers)
        means = {name: values.mean(axis=-2) for name, values in found.items()}
        sides = [(mean[..., 0] - mean[..., 1]).mean(axis=1).ravel() for mean in means.values()]
        return DepthSummary(
            **session.facts,
            layers=session.layers,
            words={name: list(kind.answers) for name, kind in QUESTIONS.items()},
            change=means,
            change_interval={name: mean_interval(values, axis=-2) for name, values in found.items()},
            height_depth_correlation=float(np.corrcoef(*sides)[0, 1]),
        )

    def figures(self, session: Session, table: Columns, summary: DepthSummary) -> Iterator[tuple[str, Figure]]:
        """The changes by row, a panel a question."""
        note = plots.means_note(list(summary.change_interval.values()))
        figure = plots.depth_by_row(
            np.array(summary.layers),
            *(summary.change[name].mean(axis=1) for name in self.panels),
            *summary.words.values(),
            about=summary.about(self.strength, note),
        )
        yield "depth", figure

    def report(self, summary: DepthSummary) -> Iterator[str]:
        """How alike the two answers move."""
        yield (
            f"{summary.items} items: steering moves both answers alike with correlation "
            f"{summary.height_depth_correlation:+.2f}{summary.skipped_note}"
        )
