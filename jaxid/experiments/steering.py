"""Steering: IDs push the subject's word to each of the 16 cells ([ID] arXiv 2601.12626, Figure 6)."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.data.grid import GRID, near_far_items
from jaxid.data.three_objects import read_three_objects
from jaxid.errors import DataError
from jaxid.experiments.base import Reading, Summary, WithLayers, WithSpatialIDs, WithStrength
from jaxid.experiments.published import RAW_CAPITALS, fill, is_raw
from jaxid.experiments.relations import RelationBatch, prepare_questions
from jaxid.experiments.session import (
    Columns,
    Keyed,
    Later,
    Session,
    as_array,
    on_host,
    require_same_model,
    scaled,
    spread,
)
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.interventions import add
from jaxid.interp.trace import rerun, trace
from jaxid.io import tidy
from jaxid.nn.sites import AnyArray, Intervention
from jaxid.prompts.pictures import Picture
from jaxid.stats import mean_interval

PUBLISHED_LAYERS = (12, 13, 14)
"""Layers of the published sweeps over cells, of 32."""

CELLS = {"x": range(GRID), "y": range(GRID)}
"""The axes of a sweep over cells, as `jaxid.io.tidy` takes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steered:
    """Log-probabilities of the two answers.

    Attributes:
        control: without an intervention.
        steered: with interventions; their sweep axes lead.
    """

    control: Float[AnyArray, "B 2"]
    steered: Float[AnyArray, "*S B 2"]

    @property
    def change(self) -> Float[AnyArray, "*S B 2"]:
        """Log p(steered) - log p(control)."""
        return self.steered - self.control


def steer(model: Model, batch: RelationBatch, edit: Intervention, *, fetch: bool = True) -> Steered:
    """The answers to prepared questions without and with an intervention, whose sweep axes lead in `steered`.

    Args:
        model: the model.
        batch: prepared questions.
        edit: the intervention.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.
    """
    recorded = trace(model, batch.prompts)
    found = Steered(control=batch.read(recorded), steered=batch.read(rerun(model, recorded, edit)))
    return on_host(found) if fetch else found


def cell_vectors(ids: SpatialIDs, axis: str, layers: Sequence[int]) -> Float[Array, "L X Y D"]:
    """U(x, y) less the ID of the mirrored cell: (3 - x, y) for left/right, (x, 3 - y) for above/below."""
    universal = ids.universal[np.asarray(layers)]
    return universal - jnp.flip(universal, axis=1 if axis == "horizontal" else 2)


def steer_to_cells(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    strength: float = 5.0,
    positions: Int[np.ndarray, "B P"] | None = None,
    columns: Sequence[int] = range(GRID),
    fetch: bool = True,
) -> Steered:
    """Steers the subject to each cell, at each layer.

    Args:
        model: the model.
        batch: prepared questions of one axis.
        ids: the model's spatial IDs.
        layers: layers after which the vectors are added.
        strength: factor of the vectors, which are not rescaled; m of the published procedure.
        positions: positions where the vectors are added; the subject's word by default.
        columns: columns of the cells; all by default.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.

    Returns:
        Log-probabilities; `steered` is Float[L, X, Y, B, 2].

    Raises:
        InputError: if the IDs are of another model, or a layer is out of range.
    """
    require_same_model(model, ids)
    vectors = cell_vectors(ids, batch.axis, layers)[:, np.asarray(columns)]
    sweep = np.broadcast_to(np.asarray(layers)[:, None, None], vectors.shape[:3])
    positions = batch.words[:, :1] if positions is None else positions
    return steer(model, batch, add(sweep, positions, vectors, strength), fetch=fetch)


# --- the questions ---------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """A kind of question about objects.

    Attributes:
        text: the question, with placeholders for the objects' names, the steered one first.
        answers: the two answer words.
        axis: axis of the picture along which the subject is steered.
    """

    text: str
    answers: Sequence[str]
    axis: str


KINDS = {
    "left-right": Kind("Is the {0} to the left or right of the {1}?", ANSWERS["horizontal"], "horizontal"),
    "above-below": Kind("Is the {0} above or below the {1}?", ANSWERS["vertical"], "vertical"),
    "near-far": Kind("Is the {0} near or far from the {1}?", ("near", "far"), "horizontal"),
    "between": Kind("Is the {0} in between {1} and {2}?", ("yes", "no"), "vertical"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A picture and its objects, the steered one first.

    Attributes:
        key: a unique name.
        picture: the picture.
        names: names of the objects.
        place: where the steered object is, if results are to be told apart by that.
    """

    key: str
    picture: Picture
    names: tuple[str, ...]
    place: str = ""


def about_items(items: Sequence[SpatialItem]) -> list[Question]:
    """Questions about the two objects of COCO-Spatial items."""
    return [Question(key=item.key, picture=item.picture, names=(item.subject, item.object)) for item in items]


def ask(session: Session, kind: Kind, questions: Sequence[Question]) -> RelationBatch:
    """The prompts of questions of one kind."""
    prompt = session.prompt
    return prepare_questions(
        session.model,
        [question.picture for question in questions],
        [fill(prompt, kind.text.format(*question.names), kind.answers) for question in questions],
        [question.names for question in questions],
        axis=kind.axis,
        answers=kind.answers,
        truth=[-1] * len(questions),
        case=session.case,
        raw=is_raw(prompt),
    )


# --- the experiments -------------------------------------------------------------------------------------------------

Item = TypeVar("Item", bound=Keyed)
Batch = TypeVar("Batch")
SummaryT = TypeVar("SummaryT", bound=Summary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering(WithLayers[Item, Batch, SummaryT], WithStrength[Item, Batch, SummaryT]):
    """Base class of experiments that steer words: a row for each layer, swept value, item and answer."""

    published_text: ClassVar[str] = RAW_CAPITALS
    reading: ClassVar[Reading] = Reading(axes=("layer", "x", "y"), before="control", after="steered")

    def default_layers(self, model: Model) -> Sequence[int]:
        """Layers at the same depths as the published ones."""
        return scaled(PUBLISHED_LAYERS, model.num_layers)

    def swept(self, session: Session) -> Mapping[str, Sequence[object]]:
        """The axes that are swept besides the layers, as `jaxid.io.tidy` takes them."""
        return {}

    def rows(self, session: Session) -> int:
        """Every swept value at every layer."""
        return math.prod(len(values) for values in self.swept(session).values()) * len(session.layers)

    def positions(self, batch: RelationBatch, words: int = 1) -> Int[np.ndarray, "B W"]:
        """Where the vectors are added: at the question's first words."""
        return batch.words[:, :words]

    def edited(self, batch: Batch) -> Mapping[str, Int[np.ndarray, "B P"]]:
        """The steered words."""
        return {"": self.positions(self.asked(batch)[0])}

    def change(self, found: Steered) -> Float[AnyArray, "*S B 2"]:
        """The change of log-probabilities that is reported."""
        return found.change

    def rows_of(self, session: Session, items: Sequence[Item], answers: Sequence[str], found: Steered) -> Columns:
        """The table's rows of items, once they are computed."""
        count, found = len(items), on_host(found)
        steered = found.steered[..., :count, :]
        axes = {
            "layer": session.layers,
            **self.swept(session),
            "item": [item.key for item in items],
            "word": answers,
        }
        return tidy(steered, axes, name="steered") | {
            "model": spread(session.model.name, steered.shape),
            "control": spread(found.control[:count], steered.shape),
            "change": np.asarray(self.change(found))[..., :count, :].ravel(),
        }

    def changes(self, session: Session, table: Columns, answers: Sequence[str]) -> Float[np.ndarray, "L *S B 2"]:
        """Changes of log-probability in a table in which all items have the same answers."""
        return as_array(table, "change", self.sweep_axes(session, table, answers))

    def sweep_axes(self, session: Session, table: Columns, answers: Sequence[str]) -> dict[str, Sequence[object]]:
        """The axes of a table's rows, as `as_array` takes them."""
        items = list(dict.fromkeys(table["item"].tolist()))
        return {"layer": session.layers, **self.swept(session), "item": items, "word": answers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToCells(Steering[Question, Batch, SummaryT], WithSpatialIDs[Question, Batch, SummaryT]):
    """Base class of experiments that steer the subject to every cell."""

    columns: ClassVar[Sequence[int]] = CELLS["x"]
    """Columns of the cells."""

    def swept(self, session: Session) -> Mapping[str, Sequence[object]]:
        """Every cell."""
        return CELLS | {"x": self.columns}

    def steered(self, session: Session, batch: RelationBatch) -> Steered:
        """The answers with the subject at every cell, on the device."""
        return steer_to_cells(
            session.model,
            batch,
            session.ids,
            layers=session.layers,
            strength=self.strength,
            positions=self.positions(batch),
            columns=self.columns,
            fetch=False,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerSummary(Summary):
    """Summary of steering to every cell.

    Attributes:
        layers: ascending.
        words: the answers.
        change: mean change of their log-probabilities by layer, cell (x, y) and word.
        change_interval: half-widths of the means' 95 % intervals.
        answered: number of items to which each answer was the more probable one without steering.
        change_of_answered: mean changes of these items, by answer; None of no items.
        placed: number of items by place of the steered object, where results are told apart by that: near-far by the
            end of the row at which it stands, between by whether it is in between.
        change_of_placed: mean changes of these items.
    """

    layers: list[int]
    words: list[str]
    change: Float[np.ndarray, "L X Y 2"]
    change_interval: Float[np.ndarray, "L X Y 2"]
    answered: dict[str, int]
    change_of_answered: dict[str, Float[np.ndarray, "L X Y 2"] | None]
    placed: dict[str, int]
    change_of_placed: dict[str, Float[np.ndarray, "L X Y 2"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steer(ToCells[RelationBatch, SteerSummary]):
    """Steer subjects to every cell of the grid (Figure 6).

    Attributes:
        relation: the kind of question. left-right and above-below need COCO-Spatial, near-far needs grid pictures,
            between needs pictures of three objects.
    """

    name: ClassVar[str] = "steer"
    split: ClassVar[bool] = False
    """Whether there is a figure for the items of each original answer, instead of one for all."""

    relation: Literal["left-right", "above-below", "near-far", "between"] = "left-right"

    def items(self, session: Session) -> list[Question]:
        """The items of the relation, from the data set that holds them."""
        kind = KINDS[self.relation]
        if self.relation in ("left-right", "above-below"):
            return about_items(session.spatial_items(kind.axis))
        if self.relation == "near-far":
            questions = [
                Question(
                    key=item.key,
                    picture=item.picture,
                    names=item.names,
                    place="at the left"
                    if (item.cell_a if item.about == "a" else item.cell_b)[0] == 0
                    else "at the right",
                )
                for item in near_far_items(self.data)
            ]
        else:
            items = read_three_objects(self.data, bad=session.bad_rows())
            questions = [
                Question(
                    key=one.key,
                    picture=one.picture,
                    names=(one.c, one.a, one.b),
                    place="in between" if one.between else "elsewhere",
                )
                for one in items
            ]
        if not questions:
            raise DataError(f"{self.data} holds no {self.relation} items.")
        return session.sample(questions)

    def prepare(self, session: Session, items: Sequence[Question]) -> RelationBatch:
        """The relation's question about every item."""
        return ask(session, KINDS[self.relation], items)

    def pictured(self, item: Question) -> Picture:
        """The item's picture."""
        return item.picture

    def compute(self, session: Session, items: Sequence[Question], batch: RelationBatch) -> Later:
        """A row for each layer, cell, item and word."""
        found = self.steered(session, batch)

        def fetch() -> Columns:
            rows = self.rows_of(session, items, batch.answers, found)
            shape = (*found.steered.shape[:3], len(items), len(batch.answers))
            return {**rows, "place": spread([item.place for item in items], shape, 3)}

        return fetch

    def summarise(self, session: Session, table: Columns) -> SteerSummary:
        """Mean changes by layer and cell."""
        words = list(KINDS[self.relation].answers)
        found = self.changes(session, table, words)
        places = dict(zip(table["item"].tolist(), table["place"].tolist(), strict=True))
        own_place = np.array(list(places.values()))
        told_apart = [place for place in dict.fromkeys(places.values()) if place]
        control = as_array(table, "control", self.sweep_axes(session, table, words))[0, 0, 0]
        groups = {word: control.argmax(axis=-1) == index for index, word in enumerate(words)}
        return SteerSummary(
            **session.facts,
            layers=session.layers,
            words=words,
            change=found.mean(axis=-2),
            change_interval=mean_interval(found, axis=-2),
            answered={word: int(own.sum()) for word, own in groups.items()},
            change_of_answered={
                word: found[..., own, :].mean(axis=-2) if own.any() else None for word, own in groups.items()
            },
            placed={place: int((own_place == place).sum()) for place in told_apart},
            change_of_placed={place: found[..., own_place == place, :].mean(axis=-2) for place in told_apart},
        )

    def figures(self, session: Session, table: Columns, summary: SteerSummary) -> Iterator[tuple[str, Figure]]:
        """The mean over layers, cell by cell."""
        several = "mean of layers" if len(summary.layers) > 1 else "layer"
        asked = KINDS[self.relation].text.format("subject", "object", "other")
        title = f"{asked}\n{summary.model}, {several} {', '.join(map(str, summary.layers))}"
        name = f"steering_{self.relation.replace('-', '_')}"
        if self.split:
            groups, counts, note = summary.change_of_answered, summary.answered, "originally answered “{}”"
        else:
            groups, counts, note = summary.change_of_placed, summary.placed, "the steered object is {}"
        if not groups:
            about = summary.about(self.strength, plots.means_note(summary.change_interval))
            yield name, plots.steering_maps(summary.change.mean(axis=0), summary.words, title, about=about)
        for group, change in groups.items():
            if change is not None:
                about = summary.about(self.strength, note.format(group), counts[group])
                figure = plots.steering_maps(change.mean(axis=0), summary.words, title, about=about)
                yield f"{name}_{group.replace(' ', '_')}", figure

    def report(self, summary: SteerSummary) -> Iterator[str]:
        """The change of the difference of log-probabilities, laid out as the grid."""
        first, second = summary.words
        yield (
            f"change of log p({first}) - log p({second}) by cell, mean of {summary.items} items{summary.skipped_note}"
        )
        for place, change in (summary.change_of_placed or {"": summary.change}).items():
            if place:
                yield f"{summary.placed[place]} items in which the steered object is {place}:"
            for row in (change[..., 0] - change[..., 1]).mean(axis=0).T:
                yield "   ".join(f"{value:+6.2f}" for value in row)
