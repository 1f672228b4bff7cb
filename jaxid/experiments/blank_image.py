"""Blank image, a control: which answers, spatial IDs and belief swaps remain when there is nothing to see?

The questions of the belief swap are asked about the picture itself and about two blank ones of the same size: a grey
one, and the mean picture of the data set.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from matplotlib.figure import Figure
from PIL import Image

from jaxid import plots
from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.errors import JaxidError
from jaxid.experiments.base import Reading, Summary, WithLayers, WithSpatialIDs, WithStrength
from jaxid.experiments.belief_swap import BeliefSwap, Swapped, swap_beliefs
from jaxid.experiments.deviation import gap
from jaxid.experiments.relations import RelationBatch, prepare
from jaxid.experiments.session import Columns, Later, Session, as_array, by_axis, item_columns, on_host, padded, spread
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.trace import Trace, residuals_at, trace
from jaxid.io import tidy
from jaxid.prompts.pictures import Picture, open_picture
from jaxid.stats import confidence_interval, mean_interval

PICTURES = ("original", "grey", "mean")
COORDINATES = ("subject_x", "subject_y", "object_x", "object_y")
GREY = 128


def mean_picture(pictures: Iterable[Picture]) -> UInt8[np.ndarray, "Y X 3"]:
    """The mean of pictures' pixels, all resized to the size of the first one.

    Pictures that cannot be opened are skipped; asking about them raises the error.
    """
    total, count, size = np.full((1, 1, 3), GREY, float), 0, (1, 1)
    for picture in pictures:
        with contextlib.suppress(JaxidError):
            opened = open_picture(picture)
            if not count:
                total, size = np.zeros((opened.height, opened.width, 3)), opened.size
            total, count = total + np.asarray(opened.resize(size)), count + 1
    return np.rint(total / max(count, 1)).astype(np.uint8)


def blank_like(picture: Picture, kind: str, mean: UInt8[np.ndarray, "Y X 3"]) -> Picture:
    """The picture itself, or a blank one of the same size and therefore with as many tokens.

    Args:
        picture: the picture.
        kind: one of `PICTURES`.
        mean: the data set's mean picture.
    """
    if kind == "original":
        return picture
    size = open_picture(picture).size
    return Image.new("RGB", size, (GREY, GREY, GREY)) if kind == "grey" else Image.fromarray(mean).resize(size)


def place_words(batch: RelationBatch, recorded: Trace, ids: SpatialIDs) -> Float[Array, "L B 2 2"]:
    """The deviations of the subject's and the object's word, in every layer's plane of the spatial IDs.

    A deviation is an activation less the one in the same question without a picture, as in Figure 8 a.
    """
    text = recorded.model.prepare(None, list(batch.prompts.questions), raw=batch.prompts.raw)
    alone = residuals_at(recorded.model, text, text.words(batch.names)[:, :2])
    added = recorded.at(batch.words[:, :2]).astype(jnp.float32) - alone.astype(jnp.float32)
    return ids.plane_coordinates(added[1:])


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankItem:
    """A question, and the data set's mean picture."""

    key: str
    item: SpatialItem
    mean: UInt8[np.ndarray, "Y X 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankImageSummary(Summary):
    """Answers, IDs and swaps by kind of picture, with 95 % intervals.

    Attributes:
        pictures: the kinds.
        accuracy: share of correct answers.
        accuracy_interval: Wilson's interval of the accuracy.
        agreement: share of items with the same answer as for the original picture.
        lead: mean of log p(true answer) - log p(other answer).
        lead_interval: half-width of Student's interval of the lead.
        layers: ascending.
        id_norm: root mean square distance of the words' deviations (`place_words`) from their mean over the items of an
            axis, by layer. The mean holds what any picture adds; places are in the distance from it.
        gap: mean distance from subject to object along the asked axis, in the true direction, by layer. Made-up places
            have a norm but a gap of about 0.
        gap_interval: half-width of Student's interval of the gap.
        swapped: share of beliefs swapped by IDs, by layer.
        swapped_interval: Wilson's interval of that share.
        noise: share swapped by noise of the same norm, by layer.
    """

    pictures: Sequence[str]
    accuracy: Float[np.ndarray, "P"]
    accuracy_interval: Float[np.ndarray, "P 2"]
    agreement: Float[np.ndarray, "P"]
    lead: Float[np.ndarray, "P"]
    lead_interval: Float[np.ndarray, "P"]
    layers: list[int]
    id_norm: Float[np.ndarray, "P L"]
    gap: Float[np.ndarray, "P L"]
    gap_interval: Float[np.ndarray, "P L"]
    swapped: Float[np.ndarray, "P L"]
    swapped_interval: Float[np.ndarray, "P L 2"]
    noise: Float[np.ndarray, "P L"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankImage(
    WithSpatialIDs[BlankItem, Mapping[str, RelationBatch], BlankImageSummary],
    WithLayers[BlankItem, Mapping[str, RelationBatch], BlankImageSummary],
    WithStrength[BlankItem, Mapping[str, RelationBatch], BlankImageSummary],
):
    """Ask about blank pictures: what is left of answers, spatial IDs and belief swaps (a control)."""

    name: ClassVar[str] = "blank-image"
    prompts_per_item: ClassVar[int] = len(PICTURES)
    reading: ClassVar[Reading] = Reading(
        axes=("picture", "layer"),
        before=("control_correct", "control_wrong"),
        values={
            "swapped": "belief swapped by IDs (1) or kept (0)",
            "swapped_by_noise": "belief swapped by noise (1) or kept (0)",
        },
    )
    default_layers = BeliefSwap.default_layers

    def items(self, session: Session) -> list[BlankItem]:
        """Questions of both axes, with the mean of their pictures."""
        items = session.spatial_items()
        mean = mean_picture({item.image_id: item.picture for item in items}.values())
        return [BlankItem(key=item.key, item=item, mean=mean) for item in items]

    def groups(self, items: Sequence[BlankItem]) -> list[list[BlankItem]]:
        """The items of each axis."""
        return by_axis(items, lambda one: one.item)

    def rows(self, session: Session) -> int:
        """IDs and noise at every layer."""
        return 2 * len(session.layers)

    def prepare(self, session: Session, items: Sequence[BlankItem]) -> dict[str, RelationBatch]:
        """The published questions about every kind of picture."""

        def shown(kind: str) -> list[SpatialItem]:
            pictures = [blank_like(one.item.picture, kind, one.mean) for one in items]
            return [dataclasses.replace(one.item, picture=new) for one, new in zip(items, pictures, strict=True)]

        return {
            kind: prepare(session.model, shown(kind), prompt=session.prompt, case=session.case) for kind in PICTURES
        }

    def pictured(self, item: BlankItem) -> Picture:
        """The original picture."""
        return item.item.picture

    def edited(self, batch: Mapping[str, RelationBatch]) -> dict[str, Int[np.ndarray, "B 2"]]:
        """Both words."""
        return {"": batch["original"].words[:, :2]}

    def asked(self, batch: Mapping[str, RelationBatch]) -> list[RelationBatch]:
        """The questions about every kind of picture."""
        return list(batch.values())

    def compute(self, session: Session, items: Sequence[BlankItem], batch: Mapping[str, RelationBatch]) -> Later:
        """A row for each kind of picture, layer and item."""
        swaps, words = [], []
        indices = np.array(padded([session.index[one.key] for one in items], session.batch_size))
        options = {"layers": session.layers, "strengths": (self.strength,), "seed": self.seed, "indices": indices}
        for asked in batch.values():
            recorded = trace(session.model, asked.prompts)
            swaps.append(swap_beliefs(session.model, asked, session.ids, recorded=recorded, fetch=False, **options))
            words.append(place_words(asked, recorded, session.ids))
        return partial(self.rows_of, session, items, swaps, words)

    def rows_of(
        self,
        session: Session,
        items: Sequence[BlankItem],
        found: Sequence[Swapped],
        placed: Sequence[Float[Array, "L B 2 2"]],
    ) -> Columns:
        """The table's rows of items, once they are computed."""
        count, swaps = len(items), [on_host(one) for one in found]
        words = [np.asarray(one)[session.layers, :count] for one in placed]
        swapped = np.stack([found.swapped[:, :, 0, :count] for found in swaps], axis=1)  # [2, P, L, B]
        control, truth = np.stack([found.control[:count] for found in swaps]), swaps[0].truth[:count]
        axes = {"picture": PICTURES, "layer": session.layers, "item": [one.key for one in items]}
        shape, places = swapped.shape[1:], np.stack(words).reshape(-1, len(COORDINATES))
        return {
            **tidy(swapped[0], axes, name="swapped"),
            "swapped_by_noise": swapped[1].ravel(),
            "control_correct": spread(control[:, np.arange(count), truth], shape, 0, 2),
            "control_wrong": spread(control[:, np.arange(count), 1 - truth], shape, 0, 2),
            **dict(zip(COORDINATES, places.T, strict=True)),
            **item_columns([one.item for one in items], shape, 2),
            "model": spread(session.model.name, shape),
        }

    def summarise(self, session: Session, table: Columns) -> BlankImageSummary:
        """What is left, by kind of picture."""
        axes = {"picture": PICTURES, "layer": session.layers, "item": list(dict.fromkeys(table["item"].tolist()))}
        columns = {name: as_array(table, name, axes) for name in table if name not in axes}  # [P, L, B]
        lead = (columns["control_correct"] - columns["control_wrong"])[:, 0]
        words = np.stack([columns[name] for name in COORDINATES], axis=-1).reshape(*columns["axis"].shape, 2, 2)
        gaps, centred = np.empty(words.shape[:3]), np.empty(words.shape)
        for axis, answers in ANSWERS.items():
            own = columns["axis"][0, 0] == axis
            truth = (columns["relation"][0, 0, own] == answers[1]).astype(int)
            gaps[:, :, own] = gap(words[:, :, own], axis, truth)
            centred[:, :, own] = words[:, :, own] - words[:, :, own].mean(axis=2, keepdims=True) if own.any() else 0
        return BlankImageSummary(
            **session.facts,
            pictures=PICTURES,
            accuracy=(lead > 0).mean(axis=-1),
            accuracy_interval=_intervals(lead > 0),
            agreement=((lead > 0) == (lead[0] > 0)).mean(axis=-1),
            lead=lead.mean(axis=-1),
            lead_interval=mean_interval(lead, axis=-1),
            layers=session.layers,
            id_norm=np.sqrt(np.square(centred).sum(axis=-1).mean(axis=(2, 3))),
            gap=gaps.mean(axis=-1),
            gap_interval=mean_interval(gaps, axis=-1),
            swapped=columns["swapped"].mean(axis=-1),
            swapped_interval=_intervals(columns["swapped"]),
            noise=columns["swapped_by_noise"].mean(axis=-1),
        )

    def figures(self, session: Session, table: Columns, summary: BlankImageSummary) -> Iterator[tuple[str, Figure]]:
        """What is left, picture beside picture."""
        figure = plots.blank_image(
            np.array(summary.layers),
            summary.accuracy,
            summary.accuracy_interval,
            summary.id_norm,
            summary.gap,
            summary.gap_interval,
            summary.swapped,
            summary.swapped_interval,
            summary.noise,
            about=summary.about(self.strength),
        )
        yield "blank_image", figure

    def report(self, summary: BlankImageSummary) -> Iterator[str]:
        """A line for each kind of picture, at the layer at which IDs swap most beliefs about the pictures."""
        best = int(summary.swapped[0].argmax())
        norm = summary.id_norm[:, best] / summary.id_norm[0, best]
        for row, kind in enumerate(summary.pictures):
            yield (
                f"{kind:8s} {summary.accuracy[row]:6.1%} correct, {summary.agreement[row]:6.1%} as about the picture; "
                f"layer {summary.layers[best]}: {norm[row]:6.1%} of the IDs' norm, beliefs swapped "
                f"{summary.swapped[row, best]:6.1%} by IDs, {summary.noise[row, best]:6.1%} by noise"
            )
        yield f"{summary.items} items{summary.skipped_note}"


def _intervals(hits: np.ndarray) -> Float[np.ndarray, "*S 2"]:
    """Wilson's interval of the share along the last axis."""
    return np.apply_along_axis(lambda own: np.array(confidence_interval(int(own.sum()), own.size)), -1, hits)
