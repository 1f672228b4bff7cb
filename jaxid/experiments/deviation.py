"""Deviation: where a model errs, do its words encode another place than the true one?

A word's deviation is its activation in a question with the picture, less its activation in the same question without
it. It is compared with the ID of the object's true place, in the plane of the spatial IDs ([ID] arXiv 2601.12626,
Figure 8 a).
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar, TypedDict

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.checks import Range
from jaxid.data.coco_boxes import Boxes, Instances, PlacedItem, find_instances, read_instances
from jaxid.errors import InputError
from jaxid.experiments.base import Reading, Summary, WithLayers, WithSpatialIDs
from jaxid.experiments.relations import RelationBatch, answer_of, prepare, verdicts
from jaxid.experiments.session import (
    Columns,
    Later,
    Session,
    by_axis,
    item_columns,
    on_host,
    padded,
    parse_layers,
    require_same_model,
    rows_where,
    scaled,
    spread,
)
from jaxid.families.base import Model
from jaxid.families.registry import published
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.forward import forward
from jaxid.interp.generate import generate
from jaxid.interp.trace import residuals_at
from jaxid.io import tidy, write_json
from jaxid.kernels import probing
from jaxid.nn.sites import AnyArray, Capture
from jaxid.prompts.pictures import Picture
from jaxid.prompts.processor import Prompts
from jaxid.stats import Moments, RankTest, confidence_interval, moments, rank_test

ROLES = ("subject", "object")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviations:
    """Coordinates of words and of ground truth in the plane of the IDs.

    Attributes:
        control: log-probabilities of the two answers.
        said: index of the answer that the model gave: the word that it wrote, -1 if it wrote neither or both; or the
            more probable one, if nothing was generated.
        texts: what it wrote; empty strings if nothing was generated.
        truth: index of the true answer.
        words: coordinates of the words' deviations by layer, item, object (subject first) and direction (x, y).
        places: coordinates of the ground-truth IDs.
        axis: the axis of the picture that the questions are about, "horizontal" or "vertical".
        layers: the layers after which activations were read.
    """

    control: Float[AnyArray, "B 2"]
    said: Int[AnyArray, "B"]
    texts: np.ndarray
    truth: Int[np.ndarray, "B"]
    words: Float[AnyArray, "L B 2 2"]
    places: Float[AnyArray, "L B 2 2"]
    axis: str
    layers: Int[np.ndarray, "L"]

    @property
    def correct(self) -> Bool[AnyArray, "B"]:
        """Whether the model gave the true answer."""
        return self.said == self.truth

    @property
    def gaps(self) -> Float[AnyArray, "L B"]:
        """How far apart the two words are along the asked axis, in the direction of the true answer."""
        return gap(self.words, self.axis, self.truth)

    @property
    def true_gaps(self) -> Float[AnyArray, "L B"]:
        """How far apart the ground-truth IDs are, in the same direction."""
        return gap(self.places, self.axis, self.truth)

    @property
    def margins(self) -> Float[AnyArray, "L B"]:
        """The words' gaps less the true ones: above 0, the words are further apart than the objects."""
        return self.gaps - self.true_gaps


def gap(coordinates: Float[AnyArray, "*L B 2 2"], axis: str, truth: Int[np.ndarray, "B"]) -> Float[AnyArray, "*L B"]:
    """The subject's coordinate less the object's along the asked axis, negated where the first answer is true.

    The first answers, left and above, are at smaller coordinates, so the gap is above 0 for a subject that is where it
    should be.

    Args:
        coordinates: by item, object (subject first) and direction (x, y).
        axis: "horizontal" or "vertical".
        truth: index of the true answer.
    """
    along = coordinates[..., 0 if axis == "horizontal" else 1]
    return (along[..., 0] - along[..., 1]) * np.where(truth == 1, 1, -1).astype(along.dtype)


def easy(margins: Float[np.ndarray, "B"]) -> Bool[np.ndarray, "B"]:
    """Which items are in the half with larger margins, including the middle one; ties are ranked in their order."""
    ranks = np.argsort(np.argsort(margins, kind="stable"), kind="stable")
    return ranks >= len(margins) // 2


TrueIDs = Callable[[SpatialIDs, Int[np.ndarray, "L"], Float[np.ndarray, "B 2 4"]], Float[Array, "L B 2 D"]]
"""Makes ground-truth IDs from IDs, layers, and boxes (x, y, width, height) as shares of the picture."""

Locate = Callable[[Prompts, Sequence[tuple[str, ...]]], Int[np.ndarray, "B W"]]
"""Finds the positions of every prompt's names."""


def measure_deviations(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    boxes: Float[np.ndarray, "B 2 4"],
    *,
    layers: Sequence[int] | None = None,
    true_ids: TrueIDs = SpatialIDs.at_box,
    locate: Locate = Prompts.words,
    max_new_tokens: int = 0,
    said: Callable[[str, Sequence[str]], int] = answer_of,
    fetch: bool = True,
) -> Deviations:
    """Deviations and ground truth of every item: all layers from one pass with pictures and one without.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        boxes: (x, y, width, height) of subject and object, as shares of the picture's width and height.
        layers: layers after which activations are read; all by default.
        true_ids: makes the ground-truth IDs; the IDs of the boxes' centres by default.
        locate: finds the words in the questions with pictures and in those without.
        max_new_tokens: if above 0, answers of at most so many tokens are generated, and judged in place of the more
            probable word.
        said: finds the index of the answer word in such a text, -1 if it holds neither word or both.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.

    Raises:
        InputError: if the IDs are of another model, a layer is out of range, or there is not one pair of boxes an item.
    """
    require_same_model(model, ids)
    count = len(batch.prompts)
    if boxes.shape != (count, 2, 4):
        raise InputError(f"{count} items need boxes of shape [{count}, 2, 4], not {list(boxes.shape)}.")
    chosen = np.arange(model.num_layers) if layers is None else np.asarray(layers)
    truths = true_ids(ids, chosen, boxes)
    positions = jnp.asarray(locate(batch.prompts, batch.names)[:, :2])
    shown = forward(model, batch.prompts, capture=Capture(("resid_post",), positions=positions))
    text = model.prepare(None, list(batch.prompts.questions), raw=batch.prompts.raw)
    alone = residuals_at(model, text, locate(text, batch.names)[:, :2])[1:]
    deviations = shown.captured["resid_post"].astype(jnp.float32) - alone.astype(jnp.float32)
    u, v = (direction[chosen] for direction in ids.plane())
    control, texts = batch.read(shown), np.full(count, "", object)
    answers = jnp.where(control[:, 1] > control[:, 0], 1, 0)
    if max_new_tokens:
        texts = generate(model, batch.prompts, max_new_tokens=max_new_tokens).texts
        answers = np.array([said(text, batch.answers) for text in texts])
    found = Deviations(
        control=control,
        said=answers,
        texts=texts,
        truth=batch.truth,
        words=probing.plane_coordinates(deviations[chosen], u, v),
        places=probing.plane_coordinates(truths, u, v),
        axis=batch.axis,
        layers=chosen,
    )
    return on_host(found) if fetch else found


# --- the experiment --------------------------------------------------------------------------------------------------


class Half(TypedDict):
    """Accuracy of some items with its Wilson interval; None of no items."""

    count: int
    accuracy: float | None
    interval: tuple[float, float] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Separation:
    """How well margins at a layer tell right from wrong answers; items without an answer are in no group.

    Attributes:
        layer: the layer.
        accuracy: over all items; one without an answer counts as wrong.
        margin: margins of "right" and "wrong" answers.
        mann_whitney: rank test of the two.
        halves: the "easy" half, with larger margins, and the "hard" one.
    """

    layer: int
    accuracy: float
    margin: dict[str, Moments]
    mann_whitney: RankTest
    halves: dict[str, Half]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviationSummary(Separation, Summary):
    """Summary of a deviation run: the separation at the reported layer, and further ones.

    Attributes:
        answered_items: items whose answer is exactly one of the two words.
        by_axis: separation of the items of each axis, at the reported layer.
        by_layer: separation at every layer.
        boxes_against_relation: items whose boxes contradict the relation in their caption.
    """

    answered_items: int
    by_axis: dict[str, Separation]
    by_layer: list[Separation]
    boxes_against_relation: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deviation(
    WithLayers[PlacedItem, RelationBatch, DeviationSummary], WithSpatialIDs[PlacedItem, RelationBatch, DeviationSummary]
):
    """Compare where words place objects with where they are (Figure 8 a); split items into easy and hard.

    Attributes:
        layer: the layer that is reported; the published one, or one as deep, by default.
        max_new_tokens: length of the answers that are generated and judged; 0 judges by the more probable of the two
            words. By default 0, with the reference bugs 250 as published.
    """

    name: ClassVar[str] = "deviation"
    published_text: ClassVar[str] = "{query} Answer {first} or {second} only."
    reporting: ClassVar[frozenset[str]] = frozenset({"layer"})
    reading: ClassVar[Reading] = Reading(
        axes=("role", "layer"),
        before=("control_correct", "control_wrong"),
        values={
            "margin": "margin: distance of the two decoded places in the true direction, less the true distance",
            "x": "decoded x",
            "y": "decoded y",
            "true_x": "x of the box",
            "true_y": "y of the box",
        },
    )
    true_ids: ClassVar[TrueIDs] = staticmethod(SpatialIDs.at_box)
    object_boxes: ClassVar[Boxes] = staticmethod(Instances.boxes)
    locate: ClassVar[Locate] = staticmethod(Prompts.words)
    said: ClassVar[Callable[[str, Sequence[str]], int]] = staticmethod(answer_of)
    default_new_tokens: ClassVar[int] = 0

    layer: int | None = None
    max_new_tokens: Annotated[int, Range(0)] | None = None

    def chosen_layer(self, model: Model) -> int:
        """The layer that is reported.

        Raises:
            InputError: if the model does not have it.
        """
        if self.layer is not None:
            return parse_layers(str(self.layer), model, ())[0]
        found = published(self.model).deviation
        return scaled([11], model.num_layers)[0] if found is None else found

    def chosen_layers(self, model: Model) -> list[int]:
        """The given layers, and the one that is reported."""
        return sorted({*super().chosen_layers(model), self.chosen_layer(model)})

    def items(self, session: Session) -> list[PlacedItem]:
        """Questions of both axes, and the boxes of their objects."""
        return placed_items(session, self.object_boxes)

    def groups(self, items: Sequence[PlacedItem]) -> list[list[PlacedItem]]:
        """The items of each axis."""
        return by_axis(items, lambda placed: placed.item)

    def prepare(self, session: Session, items: Sequence[PlacedItem]) -> RelationBatch:
        """The published questions."""
        return prepare(session.model, [placed.item for placed in items], prompt=session.prompt, case=session.case)

    def pictured(self, item: PlacedItem) -> Picture:
        """The item's picture."""
        return item.item.picture

    def compute(self, session: Session, items: Sequence[PlacedItem], batch: RelationBatch) -> Later:
        """A row for each layer, item and object."""
        shares = np.stack([placed.shares for placed in padded(items, len(batch.prompts))])
        found = measure_deviations(
            session.model,
            batch,
            session.ids,
            shares,
            layers=session.layers,
            true_ids=self.true_ids,
            locate=self.locate,
            max_new_tokens=self.default_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            said=self.said,
            fetch=False,
        )
        return partial(self.rows_of, session, items, found)

    def rows_of(self, session: Session, items: Sequence[PlacedItem], found: Deviations) -> Columns:
        """The table's rows of items, once they are computed."""
        count, found = len(items), on_host(found)
        words, places, truth = found.words[:, :count], found.places[:, :count], found.truth[:count]
        shape = words.shape[:-1]
        rows, boxes = np.arange(count), np.stack([placed.boxes for placed in items])
        sources = [placed.item for placed in items]
        axes = {"layer": found.layers.tolist(), "item": [item.key for item in sources], "role": ROLES}
        return {
            **tidy(words[..., 0], axes, name="x"),
            "y": words[..., 1].ravel(),
            "true_x": places[..., 0].ravel(),
            "true_y": places[..., 1].ravel(),
            "model": spread(session.model.name, shape),
            **item_columns(sources, shape, axis=1),
            "name": spread([[item.subject, item.object] for item in sources], shape),
            **{f"box_{name}": spread(boxes[..., n], shape) for n, name in enumerate(("x", "y", "width", "height"))},
            "picture_width": spread([placed.size[0] for placed in items], shape, 1),
            "picture_height": spread([placed.size[1] for placed in items], shape, 1),
            "control_correct": spread(found.control[rows, truth], shape, 1),
            "control_wrong": spread(found.control[rows, 1 - truth], shape, 1),
            "correct": spread(found.correct[:count], shape, 1),
            "verdict": spread(verdicts(found.said[:count], truth), shape, 1),
            "text": spread(found.texts[:count].astype(str), shape, 1),
            "gap": spread(found.gaps[:, :count], shape, 0, 1),
            "true_gap": spread(found.true_gaps[:, :count], shape, 0, 1),
            "margin": spread(found.margins[:, :count], shape, 0, 1),
        }

    def summarise(self, session: Session, table: Columns) -> DeviationSummary:
        """Separations by margin; writes the items of each half to `easy.json` and `hard.json`."""
        layer = self.chosen_layer(session.model)
        rows = answered(rows_at(table, layer))
        halves = easy(rows["margin"])
        for name, chosen in (("easy", halves), ("hard", ~halves)):
            write_json(self.out / f"{name}.json", rows["item"][chosen].tolist())
        by_layer = [separation(table, k) for k in session.layers]
        used = set(table["item"].tolist())
        return DeviationSummary(
            **session.facts,
            **vars(by_layer[session.layers.index(layer)]),
            answered_items=len(rows["item"]),
            by_axis={
                axis: separation(rows_where(table, table["axis"] == axis), layer)
                for axis in dict.fromkeys(rows_at(table, layer)["axis"].tolist())
            },
            by_layer=by_layer,
            boxes_against_relation=[one.key for one in session.items if one.against_relation and one.key in used],
        )

    def figures(self, session: Session, table: Columns, summary: DeviationSummary) -> Iterator[tuple[str, Figure]]:
        """Margins at the reported layer; for two items or more also accuracies by layer."""
        rows, tested = answered(rows_at(table, summary.layer)), summary.mann_whitney
        if not len(rows["item"]):
            return
        note = ""
        if tested["auc"] is not None:
            note = f"AUC {tested['auc']:.2f}, Mann-Whitney U p = {tested['p_two_sided']:.2g}"
        about = summary.about(items=summary.answered_items)
        yield (
            "deviation",
            plots.margin_histogram(
                rows["margin"], rows["correct"].astype(bool), note, layer=summary.layer, about=about
            ),
        )
        halves = {name: [one.halves[name] for one in summary.by_layer] for name in ("easy", "hard")}
        if any(half["accuracy"] is None for half in [*halves["easy"], *halves["hard"]]):
            return  # with a single item, one half is empty
        auc = [one.mann_whitney["auc"] for one in summary.by_layer]
        figure = plots.margins_by_layer(
            np.array(session.layers),
            None if None in auc else np.array(auc),
            *(np.array([half["accuracy"] for half in own]) for own in halves.values()),
            easy_intervals=np.array([half["interval"] for half in halves["easy"]]),
            hard_intervals=np.array([half["interval"] for half in halves["hard"]]),
            layer=summary.layer,
            about=about,
        )
        yield "deviation_by_layer", figure

    def report(self, summary: DeviationSummary) -> Iterator[str]:
        """How well margins tell right from wrong answers."""
        parts = [f"{summary.items} items, {summary.accuracy:.1%} answered correctly; layer {summary.layer}"]
        tested = summary.mann_whitney
        if summary.answered_items < summary.items:
            parts.append(f"{summary.items - summary.answered_items} without an answer")
        if tested["auc"] is None:
            parts.append("nothing to compare, as all answers are right or all are wrong")
        else:
            parts.append(
                f"AUC of right over wrong answers {tested['auc']:.2f} (Mann-Whitney U p = {tested['p_two_sided']:.2g})"
            )
        parts += [
            f"{name} half {half['accuracy']:.1%} correct"
            for name, half in summary.halves.items()
            if half["accuracy"] is not None
        ]
        yield ", ".join(parts) + summary.skipped_note


def placed_items(session: Session, boxes: Boxes = Instances.boxes) -> list[PlacedItem]:
    """The run's COCO-Spatial items with their boxes, from the instances file of the data folder.

    Args:
        session: the run.
        boxes: as in `Instances.locate`.

    Raises:
        DataError: if an item's objects cannot be located, unless bad items are skipped; or if no item is left.
    """
    items, instances = session.spatial_items(), read_instances(find_instances(session.experiment.data))
    return session.usable(items, lambda item: item.key, lambda item: instances.locate(item, boxes))


def rows_at(table: Columns, layer: int) -> Columns:
    """The table at a layer, one row an item."""
    return rows_where(table, (table["layer"] == layer) & (table["role"] == "subject"))


def answered(rows: Columns) -> Columns:
    """The rows of items whose answer is exactly one of the two words."""
    return rows_where(rows, rows["verdict"] != "nonsense")


def separation(table: Columns, layer: int) -> Separation:
    """How well the margins in a table tell right from wrong answers at a layer."""
    whole = rows_at(table, layer)
    rows = answered(whole)
    margins, correct = rows["margin"], rows["correct"].astype(bool)
    halves = easy(margins)
    groups = {"right": margins[correct], "wrong": margins[~correct]}
    return Separation(
        layer=layer,
        accuracy=float(whole["correct"].mean()),
        margin={name: moments(values) for name, values in groups.items()},
        mann_whitney=rank_test(groups["right"], groups["wrong"]),
        halves={name: _half(correct[chosen]) for name, chosen in (("easy", halves), ("hard", ~halves))},
    )


def _half(correct: Bool[np.ndarray, "N"]) -> Half:
    if not len(correct):
        return Half(count=0, accuracy=None, interval=None)
    interval = confidence_interval(int(correct.sum()), len(correct))
    return Half(count=len(correct), accuracy=float(correct.mean()), interval=interval)
