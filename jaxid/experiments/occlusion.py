"""Occlusion: blurring the subject, beside blurring as much elsewhere ([ID] arXiv 2601.12626, Figure 8 b; D-RISE)."""

import dataclasses
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure

from jaxid import plots
from jaxid.data.coco_boxes import PlacedItem
from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments.base import Experiment, Summary
from jaxid.experiments.deviation import placed_items, rows_at
from jaxid.experiments.relations import Case, RelationBatch, prepare
from jaxid.experiments.session import Columns, Session, by_axis, item_columns, padded, spread
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.io import read_json, read_table, reading, tidy
from jaxid.prompts.pictures import open_picture
from jaxid.stats import moments, rank_test

RADIUS = 20.0
"""Of the published blur, in pixels of COCO's pictures."""

RANDOM = 10
"""Boxes blurred elsewhere."""

TRIES = 500
"""Places tried for each of them."""

KINDS = ("original", "object", *["random"] * RANDOM)
"""What was done to the picture of each variant."""


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
    tries: int = TRIES,
) -> Int[np.ndarray, "N 4"]:
    """Boxes at random places of a picture that touch none of some boxes; they may overlap each other.

    Args:
        rng: chooses the places.
        size: width and height of the picture.
        like: the box whose size they have; all boxes are left, upper, right and lower pixel edges.
        avoid: the boxes that they keep clear of.
        count: how many.
        tries: places tried for each.

    Raises:
        DataError: if there is no room for one within its tries.
    """
    extent = like[2:] - like[:2]
    room = np.array(size) - extent
    found = []
    for _ in range(count):
        for _ in range(tries):
            corner = rng.integers(0, room + 1)
            if not (((corner < avoid[:, 2:]) & (corner + extent > avoid[:, :2])).all(axis=1)).any():
                found.append([*corner, *(corner + extent)])
                break
        else:
            raise DataError(
                f"the picture of {size[0]} x {size[1]} pixels is too crowded: no place for a box of {extent[0]} x "
                f"{extent[1]} beside the two objects' boxes was found in {tries} tries; leave the item out."
            )
    return np.array(found, np.int64).reshape(-1, 4)


def blurred(
    picture: UInt8[np.ndarray, "Y X 3"], boxes: Int[np.ndarray, "M 4"], radius: float = RADIUS
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """Copies of a picture, each with one box (left, upper, right, lower edge) of it blurred.

    The box gets that part of the wholly blurred picture, so that colours from around it run in.

    Raises:
        InputError: for a radius that is not above 0.
    """
    from PIL import Image, ImageFilter

    if not (math.isfinite(radius) and radius > 0):
        raise InputError(f"a blur's radius is a number of pixels above 0, not {radius}.")
    soft = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
    copies = []
    for left, upper, right, lower in boxes.tolist():
        copy = picture.copy()
        copy[upper:lower, left:right] = soft[upper:lower, left:right]
        copies.append(copy)
    return copies


def variants(
    picture: UInt8[np.ndarray, "Y X 3"],
    subject: Int[np.ndarray, "4"],
    elsewhere: Int[np.ndarray, "N 4"],
    radius: float = RADIUS,
) -> list[UInt8[np.ndarray, "Y X 3"]]:
    """The picture, then with the subject blurred, then with each of the other boxes blurred."""
    return [picture, *blurred(picture, np.concatenate([subject[None], elsewhere]), radius)]


def ask(
    model: Model,
    items: Sequence[SpatialItem],
    pictures: Sequence[Sequence[UInt8[np.ndarray, "Y X 3"]]],
    *,
    template: str = "{query}",
    case: Case = "lower",
    together: int | None = None,
) -> list[RelationBatch]:
    """Questions about all variants of every item: about all first variants, then all second ones, and so on.

    Args:
        model: the model.
        items: of one axis.
        pictures: each item's variants, as many as `KINDS` has.
        template: the user's text with a place for the {query}.
        case: which form of the answer words is read.
        together: prompts of a batch, to which the last one is padded; all prompts by default.

    Raises:
        InputError: if the items are of both axes, or have another number of variants.
        PromptError: if a question does not hold a word, or an answer has no token of its own.
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
    batches = [prepare(model, part, template=template, case=case) for part in parts]
    # No word is read.
    return [dataclasses.replace(batch, names=[()] * size, words=batch.words[:, :0]) for batch in batches]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occluded:
    """Log-probabilities of the right and the wrong answer, of the variants as in `KINDS`.

    Attributes:
        right: of the true answer, Float[B, 12].
        wrong: of the other one, Float[B, 12].
    """

    right: Float[np.ndarray, "B V"]
    wrong: Float[np.ndarray, "B V"]

    @property
    def drop(self) -> Float[np.ndarray, "B"]:
        """How much log p(correct) falls when the subject is blurred."""
        return self.right[:, 0] - self.right[:, 1]

    @property
    def random_drop(self) -> Float[np.ndarray, "B"]:
        """How much it falls when as much is blurred elsewhere, the mean over all random boxes."""
        return self.right[:, 0] - self.right[:, 2:].mean(axis=1)

    def sensitivity(self, first: int = 0, last: int = 3) -> Float[np.ndarray, "B"]:
        """Log p(correct) of the worst of some random blurs, the first four by default, less that of the subject's."""
        return self.right[:, 2 + first : 3 + last].min(axis=1) - self.right[:, 1]


def occlude(model: Model, batches: Sequence[RelationBatch], count: int) -> Occluded:
    """Reads the answers about all variants of items.

    Args:
        model: the model.
        batches: made by `ask`.
        count: how many items they were made of.
    """
    logs = np.concatenate([np.asarray(batch.read(forward(model, batch.prompts))) for batch in batches])
    truth = np.concatenate([batch.truth for batch in batches])
    rows = np.arange(count * len(KINDS))
    right, wrong = (logs[rows, answer[rows]].reshape(len(KINDS), count).T for answer in (truth, 1 - truth))
    return Occluded(right=right, wrong=wrong)


# --- the experiment --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OcclusionItem:
    """An item and its boxes (left, upper, right, lower pixel edge): of subject and object, and those elsewhere."""

    placed: PlacedItem
    objects: Int[np.ndarray, "2 4"]
    elsewhere: Int[np.ndarray, "N 4"]

    @property
    def key(self) -> str:
        """The item's."""
        return self.placed.key

    def pictures(self, radius: float) -> list[UInt8[np.ndarray, "Y X 3"]]:
        """The variants that the model is shown."""
        picture = np.asarray(open_picture(self.placed.item.picture))
        return variants(picture, self.objects[0], self.elsewhere, radius)


def with_boxes(placed: PlacedItem, seed: int) -> OcclusionItem:
    """An item with its boxes, those elsewhere drawn by the seed and the item's key.

    Raises:
        DataError: if there is no room for them.
    """
    objects = pixels(placed.boxes, placed.size)
    rng = np.random.default_rng((seed, zlib.crc32(placed.key.encode())))
    elsewhere = random_boxes(rng, placed.size, objects[0], objects)
    return OcclusionItem(placed=placed, objects=objects, elsewhere=elsewhere)


Groups = dict[str, dict[str, Any]]
"""Count, mean and median of "all" items, and of those answered "right" and "wrong"."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcclusionSummary(Summary):
    """What blurs do to answers.

    Attributes:
        accuracy: about the pictures themselves.
        accuracy_by_kind: about original, object and random.
        share_sensitive: of items with a sensitivity above 0.
        sensitivity: log p(correct) of the worst of the compared random blurs, less that of the blurred subject.
        drop: fall of log p(correct) when the subject is blurred.
        random_drop: when as much is blurred elsewhere.
        mann_whitney: rank test of the sensitivity of items answered right and wrong.
        margins: rank correlation of the sensitivity with the margins of a deviation run, if one is given.
        example: the item that is drawn.
    """

    accuracy: float
    accuracy_by_kind: dict[str, float]
    share_sensitive: float
    sensitivity: Groups
    drop: Groups
    random_drop: Groups
    mann_whitney: dict[str, Any]
    margins: dict[str, Any] | None
    example: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Occlusion(Experiment[OcclusionItem, Sequence[RelationBatch], OcclusionSummary]):
    """Blur subjects, and as much elsewhere: how much do answers need them? (Figure 8 b).

    Attributes:
        radius: of the blur, in pixels.
        deviation: folder of a finished deviation run, whose margins the sensitivities are compared with.
    """

    name: ClassVar[str] = "occlusion"
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
        self.margins()
        return session.usable(
            placed_items(session), lambda placed: placed.key, lambda placed: with_boxes(placed, self.seed)
        )

    def groups(self, items: Sequence[OcclusionItem]) -> list[list[OcclusionItem]]:
        """The items of each axis."""
        return by_axis(items, lambda one: one.placed.item)

    def prepare(self, session: Session, items: Sequence[OcclusionItem]) -> list[RelationBatch]:
        """The published questions about all variants."""
        return ask(
            session.model,
            [one.placed.item for one in items],
            [one.pictures(self.radius) for one in items],
            template=session.template,
            case=session.case,
            together=min(session.prompts_together, len(items) * len(KINDS)),
        )

    def asked(self, batch: Sequence[RelationBatch]) -> Sequence[RelationBatch]:
        """All of them, the first of which begins with the pictures themselves."""
        return batch

    def sensitivity(self, found: Occluded) -> Float[np.ndarray, "B"]:
        """What is reported as an item's sensitivity."""
        return found.sensitivity()

    def compute(self, session: Session, items: Sequence[OcclusionItem], batch: Sequence[RelationBatch]) -> Columns:
        """A row for each item and variant; the original's box is the subject's."""
        count, found = len(items), occlude(session.model, batch, session.batch_size)
        right, wrong = found.right[:count], found.wrong[:count]
        shape = right.shape
        boxes = np.stack([np.concatenate([one.objects[:1], one.objects[:1], one.elsewhere]) for one in items])
        return {
            "model": spread(session.model.name, shape),
            **tidy(right, {"item": [one.key for one in items], "variant": range(len(KINDS))}, name="logp_correct"),
            "logp_wrong": wrong.ravel(),
            **item_columns([one.placed.item for one in items], shape, axis=0),
            "kind": spread(KINDS, shape),
            **{edge: spread(boxes[..., n], shape) for n, edge in enumerate(("left", "upper", "right", "lower"))},
            "correct": spread(right[:, 0] > wrong[:, 0], shape, 0),
            "sensitivity": spread(self.sensitivity(found)[:count], shape, 0),
            "drop": spread(found.drop[:count], shape, 0),
            "random_drop": spread(found.random_drop[:count], shape, 0),
        }

    def margins(self) -> dict[str, float]:
        """Margins of the given deviation run at its reported layer, by item; none without a run.

        Raises:
            DataError: if the folder does not hold one.
        """
        folder = self.deviation
        if folder is None:
            return {}
        try:
            with reading(folder, "one", DataError):
                summary = read_json(folder / "summary.json", DataError)
                if summary["experiment"] != "deviation":
                    raise ValueError(f"it is of a run of {summary['experiment']}")
                table = read_table(folder / "table.parquet")
                names = ("layer", "role", "item", "margin")
                rows = rows_at({name: table[name].to_numpy(zero_copy_only=False) for name in names}, summary["layer"])
                return dict(zip(rows["item"].tolist(), rows["margin"].astype(float).tolist(), strict=True))
        except JaxidError as error:
            raise DataError(f"{folder} holds no finished jaxid run deviation: {error}") from error

    def own_margins(self, rows: Columns) -> Float[np.ndarray, "B"]:
        """The margin of each item, NaN where there is none."""
        margins = self.margins()
        return np.array([margins.get(key, np.nan) for key in rows["item"].tolist()])

    def summarise(self, session: Session, table: Columns) -> OcclusionSummary:
        """Accuracy by kind of picture, and what blurs do to items answered right and wrong."""
        rows = originals(table)
        correct, sensitivity = rows["correct"].astype(bool), rows["sensitivity"]
        still = table["logp_correct"] > table["logp_wrong"]
        kinds = {kind: float(still[table["kind"] == kind].mean()) for kind in dict.fromkeys(KINDS)}
        groups = {"all": np.ones(len(correct), bool), "right": correct, "wrong": ~correct}

        def moments_of(name: str) -> Groups:
            return {group: moments(rows[name][chosen]) for group, chosen in groups.items()}

        # Of the items answered correctly, where there are any.
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
        """What blurs do to all items, and to the most sensitive one."""
        rows, about = originals(table), summary.about(note=f"blurred by {self.radius:g} pixels")
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
        item, own = one.placed.item, table["item"] == summary.example
        figure = plots.occlusion_example(
            one.pictures(self.radius),
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
        """How much answers need the subjects."""
        means = (one["all"]["mean"] for one in (summary.drop, summary.random_drop, summary.sensitivity))
        drop, elsewhere, sensitivity = (round(mean, 2) + 0.0 for mean in means)  # no "-0.00"
        right = summary.accuracy_by_kind
        yield (
            f"{summary.items} items, {right['original']:.1%} answered correctly, {right['object']:.1%} with the "
            f"subject blurred; log p(correct) falls by {drop:.2f} then, by {elsewhere:.2f} with as much blurred "
            f"elsewhere; sensitivity {sensitivity:+.2f}{summary.skipped_note}"
        )


def originals(table: Columns) -> Columns:
    """The table's columns, one row an item."""
    first = table["variant"] == 0
    return {name: values[first] for name, values in table.items()}


def correlation(sensitivity: Float[np.ndarray, "B"], margins: Float[np.ndarray, "B"]) -> dict[str, Any]:
    """Spearman's rank correlation over the items that have a margin (others NaN)."""
    known = np.isfinite(margins)
    count = int(known.sum())
    # Constant values have no ranks to compare.
    if count < 3 or np.ptp(margins[known]) == 0 or np.ptp(sensitivity[known]) == 0:
        return {"items": count, "spearman": None, "p": None}
    from scipy import stats

    found: Any = stats.spearmanr(margins[known], sensitivity[known])
    return {"items": count, "spearman": float(found.statistic), "p": float(found.pvalue)}
