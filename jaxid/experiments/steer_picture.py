"""Steering of one picture: IDs push its two words apart at every layer ([ID] arXiv 2601.12626, Figure 6 d)."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TypedDict

import jax.numpy as jnp
import numpy as np
from cyclopts import Parameter
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.checks import Count
from jaxid.data.grid import GRID
from jaxid.errors import InputError
from jaxid.experiments.base import Reading, Summary, WithSpatialIDs
from jaxid.experiments.published import RAW, fill
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Later, Session, parse_layers, require_same_model, scaled, spread
from jaxid.experiments.steering import KINDS, Question, Steered, Steering, ask, steer
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.interventions import add
from jaxid.prompts.pictures import Picture, open_picture

PUBLISHED = (range(5, 20), 13)
"""Layers at which the words are pushed apart, and the one whose IDs are added, of 32."""


def steer_apart(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    cells: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (3, 0)),
    id_layer: int,
    strength: float = 5.0,
    positions: Int[np.ndarray, "B 2"] | None = None,
    fetch: bool = True,
) -> Steered:
    """Steers both words of a question apart with one layer's IDs, added at every layer in turn (Figure 6 d).

    The subject gets U(first cell) - U(second cell), the object the negative.

    Args:
        model: the model.
        batch: prepared questions.
        ids: the model's spatial IDs.
        layers: layers after which the vectors are added.
        cells: the cells of subject and object.
        id_layer: the layer whose IDs are used throughout.
        strength: factor of the vectors, which are not rescaled.
        positions: positions where the vectors are added; the words of subject and object by default.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.

    Returns:
        Log-probabilities; `steered` is Float[L, B, 2].

    Raises:
        InputError: if the IDs are of another model, or a layer or cell is out of range.
    """
    require_same_model(model, ids)
    first, second = (ids[id_layer, x, y] for x, y in cells)
    vectors = jnp.stack([first - second, second - first])  # [2, D]
    positions = batch.words[:, :2] if positions is None else positions
    vectors = jnp.broadcast_to(vectors, (len(layers), 1, *vectors.shape))
    return steer(model, batch, add(np.asarray(layers), positions, vectors, strength), fetch=fetch)


def parse_cells(text: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Parses two cells such as "0,0:3,0": column,row from the upper left.

    Raises:
        InputError: if the text is not of that form, or does not name two different cells of the grid.
    """
    try:
        (x1, y1), (x2, y2) = (map(int, cell.split(",")) for cell in text.split(":"))
    except ValueError as error:
        raise InputError(f"cells are given as column,row:column,row, such as 0,0:3,0; got {text!r}.") from error
    if (x1, y1) == (x2, y2) or not all(0 <= place < GRID for place in (x1, y1, x2, y2)):
        raise InputError(f"cells must be two different ones, with columns and rows from 0 to {GRID - 1}; got {text!r}.")
    return (x1, y1), (x2, y2)


class Target(TypedDict):
    """Name of an object, and the cell that it is steered to."""

    name: str
    cell: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerPictureSummary(Summary):
    """Summary of steering the two words of a picture apart.

    Attributes:
        question: the user's text.
        words: the answers.
        control: their log-probabilities without steering.
        layers: layers after which the IDs were added, ascending.
        id_layer: the layer whose IDs were added.
        subject: the subject and its cell.
        object: the object and its cell.
        change: change of the answers' log-probabilities, by layer and word.
    """

    question: str
    words: list[str]
    control: Float[np.ndarray, "2"]
    layers: list[int]
    id_layer: int
    subject: Target
    object: Target
    change: Float[np.ndarray, "L 2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SteerPicture(
    Steering[Question, RelationBatch, SteerPictureSummary],
    WithSpatialIDs[Question, RelationBatch, SteerPictureSummary],
):
    """Steer the two words of one picture apart, at every layer in turn (Figure 6 d).

    Attributes:
        picture: the file.
        subject: the object that the question names first. Its word gets the ID of its cell less that of the other's.
        object: the other object, whose word gets the opposite.
        relation: what is asked about the two.
        cells: of subject and object, as column,row:column,row from the upper left.
        id_layer: the layer whose IDs are added; as deep as layer 13 of 32 by default.
    """

    name: ClassVar[str] = "steer-picture"
    published_text: ClassVar[str] = RAW
    reading: ClassVar[Reading] = Reading(axes=("layer",), before="control", after="steered")

    # There is a picture instead of a data set.
    data: Annotated[None, Parameter(parse=False)] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    limit: Annotated[None, Parameter(parse=False)] = None
    batch_size: Count | None = 1
    picture: Path
    subject: str
    object: str
    relation: Literal["left-right", "above-below", "near-far"] = "left-right"
    cells: str = "0,0:3,0"
    id_layer: int | None = None

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        parse_cells(self.cells)

    def default_layers(self, model: Model) -> Sequence[int]:
        """Layers at the same depths as the published ones."""
        return scaled(PUBLISHED[0], model.num_layers)

    def chosen_id_layer(self, model: Model) -> int:
        """The layer whose IDs are added.

        Raises:
            InputError: if the model does not have it.
        """
        given = None if self.id_layer is None else str(self.id_layer)
        return parse_layers(given, model, scaled([PUBLISHED[1]], model.num_layers))[0]

    def items(self, session: Session) -> list[Question]:
        """The one question."""
        self.chosen_id_layer(session.model)
        picture = np.asarray(open_picture(self.picture))
        return [Question(key=self.picture.name, picture=picture, names=(self.subject, self.object))]

    def prepare(self, session: Session, items: Sequence[Question]) -> RelationBatch:
        """The relation's question about the picture."""
        return ask(session, KINDS[self.relation], items)

    def pictured(self, item: Question) -> Picture:
        """The picture."""
        return item.picture

    def edited(self, batch: RelationBatch) -> dict[str, Int[np.ndarray, "B P"]]:
        """Both words."""
        return {"": self.positions(batch, 2)}

    def compute(self, session: Session, items: Sequence[Question], batch: RelationBatch) -> Later:
        """A row for each layer and word."""
        cells = parse_cells(self.cells)
        found = steer_apart(
            session.model,
            batch,
            session.ids,
            layers=session.layers,
            cells=cells,
            id_layer=self.chosen_id_layer(session.model),
            strength=self.strength,
            positions=self.positions(batch, 2),
            fetch=False,
        )
        answers = batch.answers

        def fetch() -> Columns:
            rows = self.rows_of(session, items, answers, found)
            places = {
                f"{role}_{axis}": spread(place, rows["change"].shape)
                for role, cell in zip(("subject", "object"), cells, strict=True)
                for axis, place in zip("xy", cell, strict=True)
            }
            return {**rows, **places}

        return fetch

    def summarise(self, session: Session, table: Columns) -> SteerPictureSummary:
        """The changes, layer by layer."""
        kind, (own, other) = KINDS[self.relation], parse_cells(self.cells)
        return SteerPictureSummary(
            **session.facts,
            question=fill(session.prompt, kind.text.format(self.subject, self.object), kind.answers),
            words=list(kind.answers),
            control=table["control"][:2],
            layers=session.layers,
            id_layer=self.chosen_id_layer(session.model),
            subject=Target(name=self.subject, cell=own),
            object=Target(name=self.object, cell=other),
            change=self.changes(session, table, kind.answers)[:, 0],
        )

    def figures(self, session: Session, table: Columns, summary: SteerPictureSummary) -> Iterator[tuple[str, Figure]]:
        """The picture and the changes by layer."""
        own, other = summary.subject["cell"], summary.object["cell"]
        note = (
            f"{self.subject}: ID of cell {own} less that of {other}, layer {summary.id_layer}; {self.object}: the "
            "opposite; cells: (column, row) from the upper left"
        )
        figure = plots.steering_by_layer(
            np.array(summary.layers),
            summary.change,
            summary.words,
            picture=np.asarray(open_picture(self.picture)),
            title=summary.question,
            about=dataclasses.replace(summary.about(self.strength, note), unit="picture"),
        )
        yield "steering_picture", figure

    def report(self, summary: SteerPictureSummary) -> Iterator[str]:
        """The changes by layer."""
        places = (
            f"{one['name']} to cell {one['cell'][0]},{one['cell'][1]}" for one in (summary.subject, summary.object)
        )
        yield (
            f"{', '.join(places)} (column, row from the upper left), by IDs of layer {summary.id_layer} after each "
            "layer; change of log p"
        )
        first, second = summary.words
        for layer, change in zip(summary.layers, summary.change, strict=True):
            yield f"layer {layer:3d}   {first} {change[0]:+.2f}   {second} {change[1]:+.2f}"
