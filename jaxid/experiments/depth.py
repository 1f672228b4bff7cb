"""Depth: does the model tell height from depth? ([ID] arXiv 2601.12626, Figure 7)."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.experiments.base import Reading, Summary
from jaxid.experiments.published import RAW_CAPITALS
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Later, Session, rows_where
from jaxid.experiments.steering import KINDS, Kind, Question, ToCells, about_items, ask
from jaxid.io import joined
from jaxid.prompts.pictures import Picture
from jaxid.stats import mean_interval

QUESTIONS = {
    "height": KINDS["above-below"],
    "depth": Kind("Is the {0} in front or behind the {1}?", ("front", "behind"), "vertical"),
}
"""The questions about each picture."""

Batches = Mapping[str, RelationBatch]
"""The same pictures and objects under both questions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthSummary(Summary):
    """Summary of steering along the vertical axis under both questions.

    Attributes:
        layers: ascending.
        words: the answers, by question.
        change: mean change of their log-probabilities, by question, layer, cell (x, y) and word.
        change_interval: half-widths of the means' 95 % intervals.
        height_depth_correlation: correlation, over layers and rows, of the two questions' changes of
            log p(first word) - log p(second word): 0 if the model tells height from depth, 1 if it does not.
    """

    layers: list[int]
    words: dict[str, list[str]]
    change: dict[str, Float[np.ndarray, "L X Y 2"]]
    change_interval: dict[str, Float[np.ndarray, "L X Y 2"]]
    height_depth_correlation: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Depth(ToCells[Batches, DepthSummary]):
    """Test whether the model confuses height and depth: the same steering under two questions (Figure 7).

    Every subject is steered along the vertical axis, by U(x, y) - U(x, 3 - y). A model that tells height from
    depth changes only its answer to the question about height.
    """

    name: ClassVar[str] = "depth"
    published_text: ClassVar[str] = RAW_CAPITALS.replace("{query}", "{query} ")
    reading: ClassVar[Reading] = dataclasses.replace(ToCells.reading, split="question")
    panels: ClassVar[tuple[str, str]] = ("height", "depth")
    """The questions whose changes the figure shows as height and as depth."""

    def items(self, session: Session) -> list[Question]:
        """Above/below items."""
        return about_items(session.spatial_items("vertical"))

    def prepare(self, session: Session, items: Sequence[Question]) -> Batches:
        """Both questions about every item."""
        return {name: ask(session, kind, items) for name, kind in QUESTIONS.items()}

    def pictured(self, item: Question) -> Picture:
        """The item's picture."""
        return item.picture

    def asked(self, batch: Batches) -> list[RelationBatch]:
        """The questions about height, then those about depth."""
        return list(batch.values())

    def compute(self, session: Session, items: Sequence[Question], batch: Batches) -> Later:
        """A row for each question, layer, cell, item and word."""
        found = {name: (asked.answers, self.steered(session, asked)) for name, asked in batch.items()}

        def fetch() -> Columns:
            tables = []
            for name, (answers, steered) in found.items():
                rows = self.rows_of(session, items, answers, steered)
                tables.append({**rows, "question": np.full(len(rows["change"]), name)})
            return joined(tables)

        return fetch

    def summarise(self, session: Session, table: Columns) -> DepthSummary:
        """Mean changes by question, layer and cell, and the correlation of the questions."""
        found = {}
        for name, kind in QUESTIONS.items():
            found[name] = self.changes(session, rows_where(table, table["question"] == name), kind.answers)
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
        """The changes by row, with a panel for each question."""
        note = plots.means_note(list(summary.change_interval.values()))
        figure = plots.depth_by_row(
            np.array(summary.layers),
            *(summary.change[name].mean(axis=1) for name in self.panels),
            *summary.words.values(),
            about=summary.about(self.strength, note),
        )
        yield "depth", figure

    def report(self, summary: DepthSummary) -> Iterator[str]:
        """The correlation of the two questions' changes."""
        yield (
            f"{summary.items} items: steering moves both answers alike with correlation "
            f"{summary.height_depth_correlation:+.2f}{summary.skipped_note}"
        )
