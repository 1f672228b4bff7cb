"""`jaxid run deviation`: what words say about places, against the truth (Figure 8 a), and the easy/hard split."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxid import plots
from jaxid.data.coco_boxes import PlacedItem, find_instances, read_instances
from jaxid.errors import DataError
from jaxid.experiments import deviation
from jaxid.experiments.relations import axis_of, prepare
from jaxid.families.registry import ALIASES
from jaxid.io import tidy, write_json
from jaxid.runs.common import PUBLISHED_SUFFIX, Columns, Item, Run, RunConfig, about, filled, joined, parse_layers
from jaxid.runs.steer import scaled
from jaxid.stats import confidence_interval

Made = TypeVar("Made")

PUBLISHED_LAYERS = {"llava-7b": 12, "llama-11b": 14}
"""The published blocks."""

ROLES = ("subject", "object")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviationConfig(RunConfig):
    """Options of the deviation; `layers` are those in the table, all by default.

    Attributes:
        layer: the block that is reported; the published one, or one as deep, by default.
    """

    layer: int | None = None


def run(config: DeviationConfig) -> dict[str, Any]:
    """Measures the deviation of COCO-Spatial items; writes parts, table, split, summary and figures.

    Returns:
        The summary.
    """
    job = Run(config, "deviation")
    ids = job.ids()
    blocks = job.model.num_layers
    default = default_layer(config.model, blocks) if config.layer is None else config.layer
    (layer,) = parse_layers(str(default), job.model, ())
    layers = sorted({*job.layers(range(blocks)), layer})
    template = config.text("{query}" + PUBLISHED_SUFFIX)
    items = placed_items(job)
    settings = {"layers": layers, "template": template}
    model = job.begin(
        items,
        lambda placed: placed.key,
        settings,
        lambda placed: [prepare(job.model, [placed.item], template=template, case=job.case)],
        [group[0] for group in placed_by_axis(items)],
    )
    batch_size = job.batch_size(0)

    def compute(chunk: list[PlacedItem]) -> Columns:
        tables = []
        for group in placed_by_axis(chunk):
            full = filled(group, batch_size)
            names = [(placed.item.subject, placed.item.object) for placed in full]
            batch = prepare(model, [placed.item for placed in full], template=template, case=job.case)
            job.checked(batch, names, len(group))
            boxes = np.stack([placed.shares for placed in full])
            found = deviation.run(model, batch, ids, names, boxes, layers=layers, compat=config.compat)
            tables.append(deviation_rows(found, group, model.name))
        return joined(tables)

    table, summary = job.finish(compute, batch_size=batch_size)
    rows = _per_item(table, layer)
    halves = deviation.easy(rows["margin"])
    for name, chosen in (("easy", halves), ("hard", ~halves)):
        write_json(config.out / f"{name}.json", rows["item"][chosen].tolist())
    by_layer = {k: statistics(_per_item(table, k)) for k in layers}
    summary |= {"layer": layer, **by_layer[layer]}
    summary["by_axis"] = {
        axis: statistics({name: values[rows["axis"] == axis] for name, values in rows.items()})
        for axis in dict.fromkeys(rows["axis"].tolist())
    }
    summary["by_layer"] = [{"layer": k, **found} for k, found in by_layer.items()]
    used = set(rows["item"].tolist())
    summary["boxes_against_relation"] = [one.key for one in items if one.against_relation and one.key in used]
    _draw(config, summary, rows, layers)
    return job.write_summary(summary)


def default_layer(name: str, blocks: int) -> int:
    """The published block of a model, or the one that is as deep as block 12 of 32."""
    alias = next((alias for alias, repository in ALIASES.items() if name in (alias, repository)), name)
    return PUBLISHED_LAYERS[alias] if alias in PUBLISHED_LAYERS else scaled([12], blocks)[0]


def placed_items(job: Run) -> list[PlacedItem]:
    """The run's COCO-Spatial items and their boxes, from the instances file of the data folder.

    Raises:
        DataError: for an item whose objects cannot be located, unless bad items are skipped; or if none is left.
    """
    items = job.spatial_items()
    instances = read_instances(find_instances(job.data_folder()))
    return usable(job, items, lambda item: item.key, instances.locate)


def usable(job: Run, items: Sequence[Item], key: Callable[[Item], str], made: Callable[[Item], Made]) -> list[Made]:
    """What a function makes of every item, before any model runs; bad items are noted where they are to be skipped.

    Raises:
        DataError: for a bad item, unless those are skipped; or if none is left.
    """
    found, bad = [], job.bad_rows()
    for item in items:
        try:
            found.append(made(item))
        except DataError as error:
            if bad is None:
                text = str(error).rstrip(".")
                raise DataError(f"item {key(item)!r}: {text}; --skip-bad leaves such items out.") from error
            bad.append((key(item), error))
    if not found:
        raise DataError(f"no item of {job.data_folder()} could be used: {job.bad[-1][1]}")
    return found


def placed_by_axis(items: Sequence[PlacedItem]) -> list[list[PlacedItem]]:
    """The items of each axis."""
    axes = dict.fromkeys(axis_of(placed.item) for placed in items)
    return [[placed for placed in items if axis_of(placed.item) == axis] for axis in axes]


def deviation_rows(found: deviation.Deviation, items: Sequence[PlacedItem], model: str) -> Columns:
    """A row for each layer, item and object."""
    count = len(items)
    words, places = found.words[:, :count], found.places[:, :count]
    shape = words.shape[:-1]
    axes = {"layer": found.layers.tolist(), "item": [placed.key for placed in items], "role": ROLES}

    def spread(values: Any) -> np.ndarray:
        """A column of values that go over the axes layer, item and object, or are the same along some."""
        return np.broadcast_to(np.asarray(values), shape).ravel()

    def of_items(values: Sequence[Any] | np.ndarray) -> np.ndarray:
        return spread(np.asarray(values)[:, None])

    rows, truth = np.arange(count), found.truth[:count]
    boxes = np.stack([placed.boxes for placed in items])
    sources = [placed.item for placed in items]
    return {
        **tidy(words[..., 0], axes, name="x"),
        "y": spread(words[..., 1]),
        "true_x": spread(places[..., 0]),
        "true_y": spread(places[..., 1]),
        "model": spread(model),
        "image_id": of_items([item.image_id for item in sources]),
        "name": spread([[item.subject, item.object] for item in sources]),
        "relation": of_items([item.relation for item in sources]),
        "axis": of_items([axis_of(item) for item in sources]),
        **{f"box_{name}": spread(boxes[..., n]) for n, name in enumerate(("x", "y", "width", "height"))},
        "picture_width": of_items([placed.size[0] for placed in items]),
        "picture_height": of_items([placed.size[1] for placed in items]),
        "control_correct": of_items(found.control[rows, truth]),
        "control_wrong": of_items(found.control[rows, 1 - truth]),
        "correct": of_items(found.correct[:count]),
        "gap": spread(found.gaps[:, :count, None]),
        "true_gap": spread(found.true_gaps[:, :count, None]),
        "margin": spread(found.margins[:, :count, None]),
    }


def _per_item(table: Columns, layer: int) -> Columns:
    """The table's columns, one row an item, at a layer."""
    chosen = (table["layer"] == layer) & (table["role"] == "subject")
    return {name: values[chosen] for name, values in table.items()}


def statistics(rows: Columns) -> dict[str, Any]:
    """Of items at one layer: accuracy, margins of right and wrong answers compared, accuracy of either half."""
    margins, correct = rows["margin"], rows["correct"].astype(bool)
    halves = deviation.easy(margins)
    groups = {"right": margins[correct], "wrong": margins[~correct]}
    return {
        "accuracy": float(correct.mean()),
        "margin": {
            name: {
                "count": len(values),
                "mean": float(values.mean()) if len(values) else None,
                "median": float(np.median(values)) if len(values) else None,
            }
            for name, values in groups.items()
        },
        "mann_whitney": deviation.rank_test(groups["right"], groups["wrong"]),
        "halves": {name: _share(correct[chosen]) for name, chosen in (("easy", halves), ("hard", ~halves))},
    }


def _share(correct: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95 % interval."""
    if not len(correct):
        return {"count": 0, "accuracy": None, "interval": None}
    interval = confidence_interval(int(correct.sum()), len(correct))
    return {"count": len(correct), "accuracy": float(correct.mean()), "interval": interval}


def _draw(config: DeviationConfig, summary: dict[str, Any], rows: Columns, layers: Sequence[int]) -> None:
    """The figures: margins at the reported layer; and, of more layers and items, how the layers compare."""
    tested = summary["mann_whitney"]
    note = (
        f"AUC {tested['auc']:.2f}, Mann-Whitney U p = {tested['p_two_sided']:.2g}" if tested["auc"] is not None else ""
    )
    figure = plots.margin_histogram(
        rows["margin"], rows["correct"].astype(bool), note, layer=summary["layer"], about=about(summary)
    )
    plots.save(figure, config.out / "deviation.png")
    halves = {name: [entry["halves"][name] for entry in summary["by_layer"]] for name in ("easy", "hard")}
    if any(half["accuracy"] is None for half in [*halves["easy"], *halves["hard"]]):
        return  # of a single item, one half is empty
    auc = [entry["mann_whitney"]["auc"] for entry in summary["by_layer"]]
    figure = plots.margins_by_layer(
        np.array(layers),
        None if None in auc else np.array(auc),
        *(np.array([half["accuracy"] for half in halves[name]]) for name in ("easy", "hard")),
        easy_intervals=np.array([half["interval"] for half in halves["easy"]]),
        hard_intervals=np.array([half["interval"] for half in halves["hard"]]),
        layer=summary["layer"],
        about=about(summary),
    )
    plots.save(figure, config.out / "deviation_by_layer.png")
