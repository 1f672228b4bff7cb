"""`jaxid run occlusion`: how much answers need the subject's pixels (Figure 8 b)."""

import dataclasses
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import plots
from jaxid.data.coco_boxes import PlacedItem
from jaxid.errors import DataError, InputError, JaxidError
from jaxid.experiments import occlusion
from jaxid.experiments.deviation import rank_test
from jaxid.experiments.relations import axis_of, prepare
from jaxid.io import read_json, read_table, reading
from jaxid.prompts.pictures import open_picture
from jaxid.runs.common import PUBLISHED_SUFFIX, Columns, Run, RunConfig, about, filled, joined
from jaxid.runs.deviation import placed_by_axis, placed_items, usable

VARIANTS = len(occlusion.KINDS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OcclusionConfig(RunConfig):
    """Options of occlusion.

    Attributes:
        radius: of the blur, in pixels.
        deviation: folder of a finished deviation run, whose margins the sensitivities are compared with.
    """

    radius: float = occlusion.RADIUS
    deviation: Path | None = None

    def __post_init__(self) -> None:
        """Checks what does not need the model.

        Raises:
            InputError: for an option out of its range.
        """
        super().__post_init__()
        if not (math.isfinite(self.radius) and self.radius > 0):
            raise InputError(f"radius must be a number of pixels above 0, not {self.radius}.")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Occluded:
    """An item and its boxes (left, upper, right, lower pixel edge): of subject and object, and those elsewhere."""

    placed: PlacedItem
    objects: np.ndarray
    elsewhere: np.ndarray

    @property
    def key(self) -> str:
        """The item's."""
        return self.placed.key

    def pictures(self, radius: float) -> list[np.ndarray]:
        """The variants that the model is shown."""
        picture = np.asarray(open_picture(self.placed.item.picture))
        return occlusion.variants(picture, self.objects[0], self.elsewhere, radius)


def run(config: OcclusionConfig) -> dict[str, Any]:
    """Blurs subjects and places elsewhere in COCO-Spatial pictures; writes parts, table, summary and figures.

    Returns:
        The summary.
    """
    margins = None if config.deviation is None else read_margins(config.deviation)
    job = Run(config, "occlusion")
    template = config.text("{query}" + PUBLISHED_SUFFIX)
    items = usable(job, placed_items(job), lambda placed: placed.key, lambda placed: occluded(placed, config.seed))
    settings = {"template": template, "radius": config.radius}
    model = job.begin(
        items,
        lambda one: one.key,
        settings,
        lambda one: [prepare(job.model, [one.placed.item], template=template, case=job.case)],
        [
            next(one for one in items if one.placed is group[0])
            for group in placed_by_axis([one.placed for one in items])
        ],
    )
    together = job.batch_size(0)
    batch_size = max(1, together // VARIANTS)

    def compute(chunk: list[Occluded]) -> Columns:
        tables = []
        by_key = {one.key: one for one in chunk}
        for axis in placed_by_axis([one.placed for one in chunk]):
            group = [by_key[placed.key] for placed in axis]
            pictures = filled([one.pictures(config.radius) for one in group], batch_size)
            found = occlusion.run(
                model,
                [one.placed.item for one in filled(group, batch_size)],
                pictures,
                template=template,
                case=job.case,
                together=min(together, batch_size * VARIANTS),
                compat=config.compat,
            )
            job.note_unknown(found.unknown[: len(group)])
            tables.append(occlusion_rows(found, group, model.name))
        return joined(tables)

    table, summary = job.finish(compute, batch_size=batch_size)
    rows = {name: values[table["variant"] == 0] for name, values in table.items()}
    del summary["words_of_several_tokens"]  # no word's activation is read
    summary |= statistics(table)
    own = None
    if margins is not None:
        own = np.array([margins.get(key, np.nan) for key in rows["item"]])
        summary["margins"] = correlation(rows["sensitivity"], own)
    _draw(config, rows, own, summary)
    summary["example"] = _draw_example(config, items, table, rows, about(summary))
    return job.write_summary(summary)


def occluded(placed: PlacedItem, seed: int) -> Occluded:
    """An item with its boxes, those elsewhere drawn by the seed and the item's key.

    Raises:
        DataError: if there is no room for them.
    """
    objects = occlusion.pixels(placed.boxes, placed.size)
    rng = np.random.default_rng((seed, zlib.crc32(placed.key.encode())))
    elsewhere = occlusion.random_boxes(rng, placed.size, objects[0], objects)
    return Occluded(placed=placed, objects=objects, elsewhere=elsewhere)


def occlusion_rows(found: occlusion.Occlusion, items: Sequence[Occluded], model: str) -> Columns:
    """A row for each item and variant; the original's box is the subject's."""
    count = len(items)
    boxes = np.stack([np.concatenate([one.objects[:1], one.objects[:1], one.elsewhere]) for one in items])
    shape = (count, VARIANTS)

    def spread(values: Any) -> np.ndarray:
        """A column of values that go over the axes item and variant, or are the same along one."""
        return np.broadcast_to(np.asarray(values), shape).ravel()

    def of_items(values: Sequence[Any] | np.ndarray) -> np.ndarray:
        return spread(np.asarray(values)[:, None])

    right, wrong = found.right[:count], found.wrong[:count]
    sources = [one.placed.item for one in items]
    return {
        "model": spread(model),
        "item": of_items([one.key for one in items]),
        "image_id": of_items([item.image_id for item in sources]),
        "subject": of_items([item.subject for item in sources]),
        "object": of_items([item.object for item in sources]),
        "relation": of_items([item.relation for item in sources]),
        "axis": of_items([axis_of(item) for item in sources]),
        "variant": spread(np.arange(VARIANTS)),
        "kind": spread(occlusion.KINDS),
        **{edge: spread(boxes[..., n]) for n, edge in enumerate(("left", "upper", "right", "lower"))},
        "logp_correct": spread(right),
        "logp_wrong": spread(wrong),
        "correct": of_items(right[:, 0] > wrong[:, 0]),
        "sensitivity": of_items(found.sensitivity[:count]),
        "drop": of_items(found.drop[:count]),
        "random_drop": of_items(found.random_drop[:count]),
    }


def statistics(table: Columns) -> dict[str, Any]:
    """Of a run's table: accuracy by kind of picture, and what blurs do to items answered rightly and wrongly."""
    first = table["variant"] == 0
    correct = table["correct"][first].astype(bool)
    still = table["logp_correct"] > table["logp_wrong"]
    kinds = {kind: float(still[table["kind"] == kind].mean()) for kind in dict.fromkeys(occlusion.KINDS)}
    sensitivity = table["sensitivity"][first]
    named = {name: table[name][first] for name in ("sensitivity", "drop", "random_drop")}
    groups = {"all": np.ones(len(correct), bool), "right": correct, "wrong": ~correct}
    return {
        "accuracy": kinds["original"],
        "accuracy_by_kind": kinds,
        "share_sensitive": float((sensitivity > 0).mean()),
        **{
            name: {group: _moments(values[chosen]) for group, chosen in groups.items()}
            for name, values in named.items()
        },
        "mann_whitney": rank_test(sensitivity[correct], sensitivity[~correct]),
    }


def _moments(values: np.ndarray) -> dict[str, Any]:
    some = len(values) > 0
    return {
        "count": len(values),
        "mean": float(values.mean()) if some else None,
        "median": float(np.median(values)) if some else None,
    }


def read_margins(folder: Path) -> dict[str, float]:
    """Margins of a finished deviation run at its reported layer, by item.

    Raises:
        DataError: if the folder does not hold one.
    """
    try:
        with reading(folder, "one", DataError):
            summary = read_json(folder / "summary.json", DataError)
            if summary["experiment"] != "deviation":
                raise ValueError(f"it is of a run of {summary['experiment']}")
            table = read_table(folder / "table.parquet")
            columns = {name: table[name].to_numpy(zero_copy_only=False) for name in ("layer", "role", "item", "margin")}
            chosen = (columns["layer"] == summary["layer"]) & (columns["role"] == "subject")
            pairs = zip(columns["item"][chosen].tolist(), columns["margin"][chosen].astype(float), strict=True)
            return {str(item): margin for item, margin in pairs}
    except JaxidError as error:
        raise DataError(f"{folder} holds no finished jaxid run deviation: {error}") from error


def correlation(sensitivity: np.ndarray, margins: np.ndarray) -> dict[str, Any]:
    """Spearman's rank correlation over the items that have a margin (others NaN)."""
    known = np.isfinite(margins)
    count = int(known.sum())
    # Constant values have no ranks to compare.
    if count < 3 or np.ptp(margins[known]) == 0 or np.ptp(sensitivity[known]) == 0:
        return {"items": count, "spearman": None, "p": None}
    from scipy import stats

    found: Any = stats.spearmanr(margins[known], sensitivity[known])
    return {"items": count, "spearman": float(found.statistic), "p": float(found.pvalue)}


def _draw(config: OcclusionConfig, rows: Columns, margins: np.ndarray | None, summary: dict[str, Any]) -> None:
    note = ""
    if margins is not None and summary["margins"]["spearman"] is not None:
        note = f"rank correlation {summary['margins']['spearman']:+.2f}, p = {summary['margins']['p']:.2g}"
    figure = plots.sensitivities(
        rows["sensitivity"],
        rows["drop"],
        rows["random_drop"],
        rows["correct"].astype(bool),
        margins=margins if margins is not None and np.isfinite(margins).any() else None,
        note=note,
        about=about(summary, note=f"blurred by {config.radius:g} pixels"),
    )
    plots.save(figure, config.out / "occlusion.png")


def _draw_example(
    config: OcclusionConfig, items: Sequence[Occluded], table: Columns, rows: Columns, shown: plots.About
) -> str:
    """Draws the most sensitive item, of those answered rightly where there are any; returns its key."""
    chosen = np.flatnonzero(rows["correct"].astype(bool)) if rows["correct"].any() else np.arange(len(rows["item"]))
    key = rows["item"][chosen[rows["sensitivity"][chosen].argmax()]]
    one = next(item for item in items if item.key == key)
    item = one.placed.item
    own = table["item"] == key
    sensitivity = float(table["sensitivity"][own][0])
    figure = plots.occlusion_example(
        one.pictures(config.radius),
        one.objects[0],
        one.objects[1],
        one.elsewhere,
        table["logp_correct"][own],
        (item.subject, item.object),
        f"{item.query} {item.relation.capitalize()}. The most sensitive item, by {sensitivity:.2f} nats",
        about=dataclasses.replace(shown, items=f"1 of {shown.items}", note=f"blurred by {config.radius:g} pixels"),
    )
    plots.save(figure, config.out / "occlusion_example.png")
    return key
