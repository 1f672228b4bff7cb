"""Occlusion: blur the subject, or an equally large box elsewhere ([ID] arXiv 2601.12626, Figure 8 b; D-RISE)."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.data.coco_boxes import Boxes, Instances, PlacedItem
from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments.base import Displayed, Experiment, Reading, Summary
from jaxid.experiments.deviation import placed_items, rows_at
from jaxid.experiments.relations import Case, RelationBatch, prepare
from jaxid.experiments.session import (
    Columns,
    Later,
    Session,
    by_axis,
    item_columns,
    on_host,
    padded,
    rows_where,
    spread,
)
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.io import read_json, read_table, reading, tidy
from jaxid.nn.sites import AnyArray
from jaxid.prompts.pictures import Picture, open_picture
from jaxid.stats import Correlation, Moments, RankTest, correlation, moments, rank_test

RADIUS = 20.0
"""Radius of the published blur, in pixels of COCO's pictures."""

RANDOM = 10
"""How many boxes elsewhere are blurred."""

TRIES = 500
"""How many random places are tried for each of them."""

KINDS = ("original", "object", *["random"] * RANDOM)
"""What is blurred in each variant of a picture: nothing, the subject, a random box."""


def pixels(boxes: Float[np.ndarray, "*B 4"], size: tuple[int, int]) -> Int[np.ndarray, "*B 4"]:
    """Left, upper, right and lower pixel edge of boxes (x, y, width, height): every pixel that they touch."""
    limits = np.array(size)
    low = np.clip(np.floor(boxes[..., :2]), 0, limits - 1)
    high = np.clip(np.ceil(boxes[..., :2] + boxes[..., 2:]), low + 1, limits)
    return np.concatenate([low, high], axis=-1).astype(np.int64)


def random_boxes(
    rng: np.random.Generator,
    size: tuple[int, int],
    like: Int[np.ndarray, "4"],
    avoid: Int[np.ndarray, "M 4"],
    count: int = RANDOM,
) -> Int[np.ndarray, "N 4"]:
    """Boxes at random places of a picture that overlap none of the boxes to avoid, though perhaps each other.

    Args:
        rng: chooses the places.
        size: width and height of the picture.
        like: a box of the wanted size; all boxes are left, upper, right and lower pixel edges.
        avoid: the boxes to avoid.
        count: how many boxes.

    Raises:
        DataError: if no place for a box is found in `TRIES` tries.
    """
    extent = like[2:] - like[:2]
    room = np.array(size) - extent
    found = []
    for _ in range(count):
        for _ in range(TRIES):
            corner = rng.integers(0, room + 1)
            if not (((corner < avoid[:, 2:]) & (corner + extent > avoid[:, :2])).all(axis=1)).any():
                found.append([*corner, *(corner + extent)])
                break
        else:
            raise DataError(
                f"the picture of {size[0]} x {size[1]} pixels is too crowded: in {TRIES} tries, no place was found for "
                f"a box of {extent[0]} x {extent[1]} that overlaps neither object's box; remove the item."
            )
    return np.array(found, np.int64).reshape(-1, 4)


def blurred(
    picture: UInt8[np.ndarray, "Y X 3"], boxes: Int[np.ndarray, "M 4"], radius: float = RADIUS
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Copies of a picture, each with one box (left, upper, right and lower edge) blurred.

    The whole picture is blurred and the box cut out of that, so colours from around the box run into it.

    Raises:
        InputError: for a radius that is not above 0.
    """
    from PIL import Image, ImageFilter

    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"the radius must be a number of pixels above 0, not {radius}.")
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
    copies = []
    for left, upper, right, lower in boxes.tolist():
        copy = picture.copy()
        copy[upper:lower, left:right] = soft[upper:lower, left:right]
        copies.append(copy)
    return copies


Blur = Callable[[UInt8[np.ndarray, "Y X 3"], Int[np.ndarray, "M 4"], float], list[UInt8[np.ndarray, "Y X 3"]]]
"""Makes copies of a picture with one box blurred in each, from picture, boxes and radius."""


def variants(
    picture: UInt8[np.ndarray, "Y X 3"],
    subject: Int[np.ndarray, "4"],
    elsewhere: Int[np.ndarray, "N 4"],
    radius: float = RADIUS,
    blur: Blur = blurred,
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """The picture, the picture with the subject blurred, and the picture with each of the other boxes blurred."""
    return [picture, *blur(picture, np.concatenate([subject[None], elsewhere]), radius)]


def ask(
    model: Model,
    items: Sequence[SpatialItem],
    pictures: Sequence[Sequence[UInt8[np.ndarray, "Y X 3"]]],
    *,
    prompt: str = "{query}",
    case: Case = "lower",
    together: int | None = None,
) -> list[RelationBatch]:
    """Questions about all variants of every item: the first variants of all items, then the second ones, and so on.

    Args:
        model: the model.
        items: items of one axis.
        pictures: each item's variants, as many as `KINDS` has.
        prompt: the user's text with a place for the {query}.
        case: which form of the answer words is read.
        together: size of a batch, to which the last one is padded; all prompts by default.

    Raises:
        InputError: if the items are of both axes, or have another count of variants.
        PromptError: if a question does not contain a word, or an answer has no token of its own.
    """
    if len(pictures) != len(items) or any(len(own) != len(KINDS) for own in pictures):
        raise InputError(
            f"{len(items)} items need {len(KINDS)} pictures each, not {[len(own) for own in pictures]} pictures."
        )
    shown = [
        dataclasses.replace(item, picture=own[variant])
        for variant in range(len(KINDS))
        for item, own in zip(items, pictures, strict=True)
    ]
    size = len(shown) if together is None else together
    parts = [padded(shown[start : start + size], size) for start in range(0, len(shown), size)]
    batches = [prepare(model, part, prompt=prompt, case=case) for part in parts]
    # No activation at a word is read, so the words need not be located or counted.
    return [dataclasses.replace(batch, names=[()] * size, words=batch.words[:, :0]) for batch in batches]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occluded:
    """Log-probabilities of the right and the wrong answer, about each of the variants in `KINDS`."""

    right: Float[AnyArray, "B V"]
    wrong: Float[AnyArray, "B V"]

    @property
    def drop(self) -> Float[AnyArray, "B"]:
        """By how much log p(correct) falls when the subject is blurred."""
        return self.right[:, 0] - self.right[:, 1]

    @property
    def random_drop(self) -> Float[AnyArray, "B"]:
        """By how much it falls when a random box is blurred, the mean over all of them."""
        return self.right[:, 0] - self.right[:, 2:].mean(axis=1)

    def sensitivity(self, first: int = 0, last: int = 3) -> Float[AnyArray, "B"]:
        """The lowest log p(correct) with a random box blurred, less that with the subject blurred.

        Args:
            first: index of the first random box that is compared.
            last: index of the last one.
        """
        return self.right[:, 2 + first : 3 + last].min(axis=1) - self.right[:, 1]


def occlude(model: Model, batches: Sequence[RelationBatch], count: int, *, fetch: bool = True) -> Occluded:
    """Reads the answers about all variants of some items.

    Args:
        model: the model.
        batches: the questions, from `ask`.
        count: how many items they are about.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.
    """
    logs = jnp.concatenate([batch.read(forward(model, batch.prompts)) for batch in batches])
    truth = np.concatenate([batch.truth for batch in batches])
    rows = np.arange(count * len(KINDS))
    right, wrong = (logs[rows, answer[rows]].reshape(len(KINDS), count).T for answer in (truth, 1 - truth))
    found = Occluded(right=right, wrong=wrong)
    return on_host(found) if fetch else found


# --- the experiment --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OcclusionItem(PlacedItem):
    """An item with the boxes to blur.

    Attributes:
        objects: left, upper, right and lower pixel edge of the subject's and the object's box.
        elsewhere: edges of the random boxes.
    """

    objects: Int[np.ndarray, "2 4"]
    elsewhere: Int[np.ndarray, "N 4"]

    def pictures(self, radius: float, blur: Blur = blurred) -> list[UInt8[np.ndarray, "Y X 3"]]:
        """The variants that the model is shown."""
        picture = np.asarray(open_picture(self.item.picture))
        return variants(picture, self.objects[0], self.elsewhere, radius, blur)


def with_boxes(placed: PlacedItem, seed: int) -> OcclusionItem:
    """An item with its boxes; the random ones depend on the seed and the item's key.

    Raises:
        DataError: if there is no room for them.
    """
    objects = pixels(placed.boxes, placed.size)
    rng = np.random.default_rng((seed, zlib.crc32(placed.key.encode())))
    elsewhere = random_boxes(rng, placed.size, objects[0], objects)
    return OcclusionItem(**vars(placed), objects=objects, elsewhere=elsewhere)


Groups = dict[str, Moments]
"""Moments over "all" items, and over those answered "right" and "wrong"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcclusionSummary(Summary):
    """Summary of an occlusion run.

    Attributes:
        accuracy: with the pictures as they are.
        accuracy_by_kind: with each kind of variant: original, object and random.
        share_sensitive: share of the items with a sensitivity above 0.
        sensitivity: the lowest log p(correct) with one of the compared random boxes blurred, less that with the
            subject blurred.
        drop: fall of log p(correct) when the subject is blurred.
        random_drop: fall when a random box is blurred.
        mann_whitney: rank test of the sensitivities of items answered right and wrong.
        margins: rank correlation of the sensitivity with the margins of a deviation run, if one is given.
        example: key of the item that is drawn.
    """

    accuracy: float
    accuracy_by_kind: dict[str, float]
    share_sensitive: float
    sensitivity: Groups
    drop: Groups
    random_drop: Groups
    mann_whitney: RankTest
    margins: Correlation | None
    example: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occlusion(Experiment[OcclusionItem, Sequence[RelationBatch], OcclusionSummary]):
    """Blur the subject, or an equally large box elsewhere: how much do answers depend on it? (Figure 8 b).

    Attributes:
        radius: radius of the blur, in pixels.
        deviation: folder of a finished deviation run, with whose margins the sensitivities are compared.
    """

    name: ClassVar[str] = "occlusion"
    reading: ClassVar[Reading] = Reading(
        axes=("variant",),
        before=None,
        after=("logp_correct", "logp_wrong"),
        labels={"variant": ("original", "subject blurred", *(f"box {n} blurred" for n in range(1, RANDOM + 1)))},
    )
    published_text: ClassVar[str] = "{query} Answer {First} or {Second}."
    object_boxes: ClassVar[Boxes] = staticmethod(Instances.boxes)
    with_boxes: ClassVar[Callable[[PlacedItem, int], OcclusionItem]] = staticmethod(with_boxes)
    blur: ClassVar[Blur] = staticmethod(blurred)
    reporting: ClassVar[frozenset[str]] = frozenset({"deviation"})
    prompts_per_item: ClassVar[int] = len(KINDS)

    radius: float = RADIUS
    deviation: Path | None = None

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        if not self.radius > 0:
            raise InputError(f"radius must be a number of pixels above 0, not {self.radius}.")

    def items(self, session: Session) -> list[OcclusionItem]:
        """Questions of both axes, and the boxes to blur."""
        self.deviations()  # a folder without a finished run is refused at once
        return session.usable(
            placed_items(session, self.object_boxes),
            lambda placed: placed.key,
            lambda placed: self.with_boxes(placed, self.seed),
        )

    def groups(self, items: Sequence[OcclusionItem]) -> list[list[OcclusionItem]]:
        """The items of each axis."""
        return by_axis(items, lambda one: one.item)

    def prepare(self, session: Session, items: Sequence[OcclusionItem]) -> list[RelationBatch]:
        """The published questions about all variants."""
        return ask(
            session.model,
            [one.item for one in items],
            [one.pictures(self.radius, self.blur) for one in items],
            prompt=session.prompt,
            case=session.case,
            together=min(session.prompts_together, len(items) * len(KINDS)),
        )

    def pictured(self, item: OcclusionItem) -> Picture:
        """The item's picture."""
        return item.item.picture

    def displayed(self, session: Session, items: Sequence[OcclusionItem]) -> Displayed:
        """The questions about the original pictures."""
        asked = prepare(session.model, [one.item for one in items], prompt=session.prompt, case=session.case)
        return Displayed([asked], {}, [self.pictured(one) for one in items])

    def asked(self, batch: Sequence[RelationBatch]) -> Sequence[RelationBatch]:
        """All batches; the first begins with the original pictures."""
        return batch

    def sensitivity(self, found: Occluded) -> Float[AnyArray, "B"]:
        """The reported sensitivity of each item."""
        return found.sensitivity()

    def compute(self, session: Session, items: Sequence[OcclusionItem], batch: Sequence[RelationBatch]) -> Later:
        """A row for each item and variant; the original's box is that of the subject."""
        return partial(self.rows_of, session, items, occlude(session.model, batch, session.batch_size, fetch=False))

    def rows_of(self, session: Session, items: Sequence[OcclusionItem], found: Occluded) -> Columns:
        """The table's rows of items, once they are computed."""
        count, found = len(items), on_host(found)
        right, wrong = found.right[:count], found.wrong[:count]
        shape = right.shape
        boxes = np.stack([np.concatenate([one.objects[:1], one.objects[:1], one.elsewhere]) for one in items])
        return {
            "model": spread(session.model.name, shape),
            **tidy(right, {"item": [one.key for one in items], "variant": range(len(KINDS))}, name="logp_correct"),
            "logp_wrong": wrong.ravel(),
            **item_columns([one.item for one in items], shape, axis=0),
            "kind": spread(KINDS, shape),
            **{edge: spread(boxes[..., n], shape) for n, edge in enumerate(("left", "upper", "right", "lower"))},
            "correct": spread(right[:, 0] > wrong[:, 0], shape, 0),
            "sensitivity": spread(self.sensitivity(found)[:count], shape, 0),
            "drop": spread(found.drop[:count], shape, 0),
            "random_drop": spread(found.random_drop[:count], shape, 0),
        }

    def deviations(self) -> Columns:
        """Items, margins and verdicts of the given deviation run, at its reported layer; empty if none is given.

        Raises:
            DataError: if the folder holds no finished deviation run.
        """
        folder, names = self.deviation, ("layer", "role", "item", "margin", "verdict")
        if folder is None:
            return {name: np.zeros(0) for name in names}
        try:
            with reading(folder, "a deviation run", DataError):
                summary = read_json(folder / "summary.json", DataError)
                if summary["experiment"] != "deviation":
                    raise ValueError(f"it is of a run of {summary['experiment']}")
                table = read_table(folder / "table.parquet")
                return rows_at({name: table[name].to_numpy(zero_copy_only=False) for name in names}, summary["layer"])
        except JaxidError as error:
            raise DataError(f"{folder} holds no finished deviation run: {error}") from error

    def own_margins(self, rows: Columns) -> Float[np.ndarray, "B"]:
        """The margin of each item, NaN where the deviation run has none."""
        found = self.deviations()
        margins = dict(zip(found["item"].tolist(), found["margin"].astype(float).tolist(), strict=True))
        return np.array([margins.get(key, np.nan) for key in rows["item"].tolist()])

    def compared(self, table: Columns) -> Columns:
        """A row for each item that is compared, with whether it is among those answered right."""
        return rows_where(table, table["variant"] == 0)

    def summarise(self, session: Session, table: Columns) -> OcclusionSummary:
        """Accuracy by kind of variant, and the effect of blurs on items answered right and wrong."""
        rows = self.compared(table)
        correct, sensitivity = rows["correct"].astype(bool), rows["sensitivity"]
        still = table["logp_correct"] > table["logp_wrong"]
        kinds = {kind: float(still[table["kind"] == kind].mean()) for kind in dict.fromkeys(KINDS)}
        groups = {"all": np.ones(len(correct), bool), "right": correct, "wrong": ~correct}

        def moments_of(name: str) -> Groups:
            return {group: moments(rows[name][chosen]) for group, chosen in groups.items()}

        # The example is one that was answered correctly, where there is any.
        likely = np.flatnonzero(correct if correct.any() else ~correct)
        return OcclusionSummary(
            **session.facts,
            accuracy=kinds["original"],
            accuracy_by_kind=kinds,
            share_sensitive=float((sensitivity > 0).mean()),
            sensitivity=moments_of("sensitivity"),
            drop=moments_of("drop"),
            random_drop=moments_of("random_drop"),
            mann_whitney=rank_test(sensitivity[correct], sensitivity[~correct]),
            margins=None if self.deviation is None else correlation(sensitivity, self.own_margins(rows)),
            example=rows["item"][likely[sensitivity[likely].argmax()]],
        )

    def figures(self, session: Session, table: Columns, summary: OcclusionSummary) -> Iterator[tuple[str, Figure]]:
        """The effect of blurs on all items, and on the most sensitive one."""
        rows = self.compared(table)
        about = summary.about(items=len(rows["item"]), note=f"blurred by {self.radius:g} pixels")
        margins, found, note = self.own_margins(rows), summary.margins, ""
        if found is not None and found["spearman"] is not None:
            note = f"rank correlation {found['spearman']:+.2f}, p = {found['p']:.2g}"
        yield (
            "occlusion",
            plots.sensitivities(
                rows["sensitivity"],
                rows["drop"],
                rows["random_drop"],
                rows["correct"].astype(bool),
                margins=margins if np.isfinite(margins).any() else None,
                note=note,
                about=about,
            ),
        )
        one = session.items[session.index[summary.example]]
        item, own = one.item, table["item"] == summary.example
        figure = plots.occlusion_example(
            one.pictures(self.radius, self.blur),
            one.objects[0],
            one.objects[1],
            one.elsewhere,
            table["logp_correct"][own],
            (item.subject, item.object),
            f"{item.query} {item.relation.capitalize()}. The most sensitive item, by "
            f"{table['sensitivity'][own][0]:.2f} nats",
            about=dataclasses.replace(about, items=f"1 of {about.items}"),
        )
        yield "occlusion_example", figure

    def report(self, summary: OcclusionSummary) -> Iterator[str]:
        """How much answers depend on the subjects."""
        means = (one["all"]["mean"] or 0.0 for one in (summary.drop, summary.random_drop, summary.sensitivity))
        drop, elsewhere, sensitivity = (round(mean, 2) + 0.0 for mean in means)  # no "-0.00"
        right = summary.accuracy_by_kind
        yield (
            f"{summary.items} items, {right['original']:.1%} answered correctly, {right['object']:.1%} with the "
            f"subject blurred; log p(correct) falls by {drop:.2f} then, by {elsewhere:.2f} with an equal box elsewhere "
            f"blurred; sensitivity {sensitivity:+.2f}{summary.skipped_note}"
        )
