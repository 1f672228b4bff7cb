"""`jaxid run belief-swap`: beliefs swapped by IDs and by noise, layer by layer (Figure 2), and against accuracy (9)."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import plots
from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import DataError, JaxidError, OutputError
from jaxid.experiments import belief_swap
from jaxid.experiments.relations import answer_of, axis_of, prepare
from jaxid.families.registry import ALIASES
from jaxid.io import ensure_output_folder, read_json, reading, write_json
from jaxid.runs.common import PUBLISHED_SUFFIX, Columns, Run, RunConfig, about, by_axis, filled, joined
from jaxid.stats import confidence_interval

PUBLISHED_LAYERS = {
    "llava-7b": (8, 20),
    "llava-13b": (10, 20),
    "qwen2-2b": (6, 16),
    "qwen-3b": (8, 18),
    "qwen-7b": (6, 16),
    "llama-11b": (10, 20),
    "internvl-1b": (6, 16),
    "internvl-2b": (6, 16),
    "internvl-8b": (6, 16),
    "internvl-14b": (12, 24),
    "gemma-4b": (10, 22),
    "gemma-12b": (10, 22),
}
"""First and last layer of the published sweeps, as Hugging Face counts hidden states: one more than the block."""

BEST = 3
"""Layers that Figure 2 averages over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeliefSwapConfig(RunConfig):
    """Options of the belief swap.

    Attributes:
        max_new_tokens: written by the control run and under every edit; 0 reads the first token alone.
    """

    max_new_tokens: int = 250


def run(config: BeliefSwapConfig) -> dict[str, Any]:
    """Swaps the beliefs of COCO-Spatial items; writes parts, table, summary and figure.

    An item takes part in the rates if its control answer is exactly one of the two words.

    Returns:
        The summary.
    """
    job = Run(config, "belief-swap")
    ids = job.ids()
    layers = job.layers(default_layers(config.model, job.model.num_layers))
    factor = 5.0 if config.factor is None else config.factor
    suffix = config.text("{query}" + PUBLISHED_SUFFIX)
    items = job.spatial_items()
    numbers = {item.key: number for number, item in enumerate(items)}
    settings = {"layers": layers, "factor": factor, "template": suffix, "max_new_tokens": config.max_new_tokens}
    model = job.begin_spatial(items, settings, suffix)
    batch_size = job.batch_size(2 * len(layers))

    def compute(chunk: list[SpatialItem]) -> Columns:
        tables = []
        for group in by_axis(chunk):
            full = filled(group, batch_size)
            batch = prepare(model, full, template=suffix, case=job.case)
            job.checked(batch, [(item.subject, item.object) for item in full], len(group))
            swap = belief_swap.run(
                model,
                batch,
                ids,
                layers=layers,
                factors=(factor,),
                seed=config.seed,
                numbers=np.array([numbers[item.key] for item in full]),
                max_new_tokens=config.max_new_tokens,
                compat=config.compat,
            )
            tables.append(_rows(model.name, group, batch.answers, swap))
        return joined(tables)

    table, summary = job.finish(compute, batch_size=batch_size)
    summary |= rates(table, layers, seed=config.seed, same_items=config.compat == "reference")
    plots.save(_bars({model.name: summary["best"]}, factor), config.out / "belief_swap.png")
    plots.save(_by_layer(summary, layers, factor), config.out / "belief_swap_by_layer.png")
    return job.write_summary(summary)


def default_layers(name: str, blocks: int) -> range:
    """The published blocks of a model; all of a small one, the second to fourth sixth of another."""
    alias = next((alias for alias, repository in ALIASES.items() if name in (alias, repository)), name)
    if alias in PUBLISHED_LAYERS:
        first, last = PUBLISHED_LAYERS[alias]
        return range(first - 1, last)
    return range(blocks) if blocks <= 12 else range(blocks // 4, blocks * 5 // 8 + 1)


def _rows(model: str, items: Sequence[SpatialItem], answers: Sequence[str], swap: belief_swap.BeliefSwap) -> Columns:
    """A row for each item, condition and layer."""
    columns: dict[str, list[Any]] = {}
    for row, item in enumerate(items):
        truth = int(swap.truth[row])
        control, said = swap.control[row], answer_of(swap.control_texts[row], answers)
        answered = said if swap.control_texts[row] else int(control.argmax())
        for place in np.ndindex(swap.steered.shape[:3]):
            steered, text = swap.steered[place][row], swap.steered_texts[place][row]
            verdict = answer_of(text, answers) if swap.control_texts[row] else int(steered.argmax())
            entry = {
                "model": model,
                "item": item.key,
                "image_id": item.image_id,
                "subject": item.subject,
                "object": item.object,
                "relation": item.relation,
                "axis": axis_of(item),
                "condition": belief_swap.CONDITIONS[place[0]],
                "layer": int(swap.layers[place[1]]),
                "factor": float(swap.factors[place[2]]),
                "control_correct": float(control[truth]),
                "control_wrong": float(control[1 - truth]),
                "steered_correct": float(steered[truth]),
                "steered_wrong": float(steered[1 - truth]),
                "swapped": bool((control[0] > control[1]) != (steered[0] > steered[1])),
                "control_verdict": _verdict(answered, truth),
                "verdict": _verdict(verdict, truth),
                "control_text": swap.control_texts[row],
                "text": text,
            }
            for name, value in entry.items():
                columns.setdefault(name, []).append(value)
    return columns


def _verdict(answer: int, truth: int) -> str:
    return "nonsense" if answer < 0 else "correct" if answer == truth else "wrong"


def rates(table: Columns, layers: Sequence[int], *, seed: int = 0, same_items: bool = False) -> dict[str, Any]:
    """Shares of a run's table: swapped beliefs and accuracies by condition and layer, the best layers, verdicts.

    The best layers are chosen on the items of one half of the pictures, drawn by the seed, and reported on the others,
    as shares of items that layers were chosen on are too large.

    Args:
        table: a row for each item, condition and layer.
        layers: in ascending order.
        seed: of the halves.
        same_items: choose and report on all items, as published.

    Raises:
        DataError: if no item was answered with one of the two words.
    """
    used = table["control_verdict"] != "nonsense"
    first = (table["condition"] == "belief") & (table["layer"] == layers[0])
    count = int((used & first).sum())
    if not count:
        raise DataError("no item was answered with exactly one of the two words; look at control_text in the table.")
    right = table["control_verdict"] == "correct"
    accuracy = float((right & first & used).sum() / count)
    swapped: dict[str, list[float]] = {}
    intervals: dict[str, list[Any]] = {}
    drops, verdicts = [], {}
    for condition in belief_swap.CONDITIONS:
        chosen = [used & (table["condition"] == condition) & (table["layer"] == layer) for layer in layers]
        swapped[condition] = [float(table["swapped"][rows].mean()) for rows in chosen]
        intervals[condition] = [
            confidence_interval(int(table["swapped"][rows].sum()), int(rows.sum())) for rows in chosen
        ]
        verdicts[condition] = [
            {name: float((table["verdict"][rows] == name).mean()) for name in ("correct", "wrong", "nonsense")}
            for rows in chosen
        ]
        if condition == "belief":
            drops = [accuracy - float((table["verdict"][rows] == "correct").mean()) for rows in chosen]
    by_axis_: dict[str, Any] = {}
    axis_intervals: dict[str, Any] = {}
    for axis in dict.fromkeys(table["axis"][used].tolist()):
        for condition in belief_swap.CONDITIONS:
            of_axis = used & (table["condition"] == condition) & (table["axis"] == axis)
            turned = [table["swapped"][of_axis & (table["layer"] == layer)] for layer in layers]
            by_axis_.setdefault(axis, {})[condition] = [float(values.mean()) for values in turned]
            axis_intervals.setdefault(axis, {})[condition] = [
                confidence_interval(int(values.sum()), len(values)) for values in turned
            ]
    return {
        "answered_items": count,
        "unanswered_items": int((~used & first).sum()),
        "accuracy": accuracy,
        "accuracy_interval": confidence_interval(round(accuracy * count), count),
        "layers": list(layers),
        "swapped": swapped,
        "swapped_interval": intervals,
        "swapped_by_axis": by_axis_,
        "swapped_by_axis_interval": axis_intervals,
        "verdicts": verdicts,
        "accuracy_drop": drops,
        "mean_accuracy_drop": float(np.mean(drops)),
        **_best(table, used, layers, seed, same_items),
    }


def _best(table: Columns, used: np.ndarray, layers: Sequence[int], seed: int, same_items: bool) -> dict[str, Any]:
    """The best layers and what is swapped there; which items they were chosen on, and which are reported."""
    pictures = np.unique(table["image_id"][used])
    order = np.random.default_rng((seed, 2)).permutation(len(pictures))
    choosing, reporting = used & np.isin(table["image_id"], pictures[order[: len(pictures) // 2]]), used
    if same_items or not choosing.any():
        choosing = used
    else:
        reporting = used & ~choosing

    def shares(rows: np.ndarray, condition: str) -> np.ndarray:
        rows = rows & (table["condition"] == condition)
        return np.array([table["swapped"][rows & (table["layer"] == layer)].mean() for layer in layers])

    best = np.argsort(shares(choosing, "belief"), kind="stable")[::-1][:BEST]
    keys = {
        name: list(dict.fromkeys(table["item"][rows].tolist()))
        for name, rows in (("choosing", choosing), ("reporting", reporting))
    }
    found: dict[str, Any] = {"layers": [int(layers[row]) for row in best]}
    count = len(keys["reporting"])
    for condition in belief_swap.CONDITIONS:
        picked = shares(reporting, condition)[best]
        found[condition], found[f"{condition}_std"] = float(picked.mean()), float(picked.std())
        found[f"{condition}_interval"] = confidence_interval(round(float(picked.mean()) * count), count)
    chosen_on = "same items" if choosing is used else "other items"
    return {"best": found | {"items": count, "chosen_on": chosen_on}, "selection": {"chosen_on": chosen_on, **keys}}


def _by_layer(summary: dict[str, Any], layers: Sequence[int], factor: float) -> Any:
    names = {"horizontal": "left/right", "vertical": "above/below"}
    shares, intervals = summary["swapped_by_axis"], summary["swapped_by_axis_interval"]
    belief, noise = (
        [np.array([one[condition] for one in found.values()]) for found in (shares, intervals)]
        for condition in belief_swap.CONDITIONS
    )
    return plots.belief_swap_by_layer(
        np.array(layers),
        belief[0],
        noise[0],
        [names[name] for name in shares],
        belief_intervals=belief[1],
        noise_intervals=noise[1],
        factor=factor,
        about=dataclasses.replace(about(summary), items=summary["answered_items"]),
    )


_PARTS = ("belief", "noise", "belief_std", "noise_std")


def _bars(best: Mapping[str, Mapping[str, Any]], strength: float | str) -> Any:
    """Figure 2 of the best layers of models: as published only if all of them were chosen on the same items."""
    values = [
        np.array([entry[part] for entry in best.values()]) for part in ("belief", "belief_std", "noise", "noise_std")
    ]
    same = [name for name, entry in best.items() if entry["chosen_on"] == "same items"]
    bounds, note = {}, "best blocks chosen on the same items"
    if len(same) < len(best):
        bounds = {
            f"{part}_interval": np.array([entry[f"{part}_interval"] for entry in best.values()])
            for part in belief_swap.CONDITIONS
        }
        note = (
            f"best blocks of {', '.join(same)} chosen on the same items"
            if same
            else "best blocks chosen on other items"
        )
    said = plots.About(
        model=", ".join(best) if len(best) == 1 else "",
        items=_spread(entry["items"] for entry in best.values()),
        strength=strength,
        note=note,
    )
    return plots.belief_swap_bars(list(best), *values, **bounds, about=said)


def _spread(counts: Iterable[Any]) -> str:
    """Numbers from the smallest to the largest."""
    ranked = sorted(set(counts))
    return f"{ranked[0]:g}" if len(ranked) == 1 else f"{ranked[0]:g} to {ranked[-1]:g}"


def _entry(folder: Path) -> dict[str, Any]:
    """What a finished run's summary says of it.

    Raises:
        DataError: if it is none.
    """
    path = folder / "summary.json"
    try:
        with reading(path, "its summary", DataError):
            summary = read_json(path, DataError)
            name, count, best = str(summary["model"]), int(summary["answered_items"]), dict(summary["best"])
            shares = {"accuracy": float(summary["accuracy"])} | {part: float(best[part]) for part in _PARTS}
            # Older summaries say no intervals; their best layers were chosen on the items that are reported.
            bounds = {
                part: confidence_interval(round(shares[part] * count), count) for part in ("accuracy", *_PARTS[:2])
            }
            given = {part: best[f"{part}_interval"] for part in _PARTS[:2] if f"{part}_interval" in best}
            bounds |= {part: (float(low), float(high)) for part, (low, high) in given.items()}
            drop, factor = float(summary["mean_accuracy_drop"]), float(summary["settings"]["factor"])
            numbers = np.array([*shares.values(), *(bound for pair in bounds.values() for bound in pair), abs(drop)])
            if not ((numbers >= 0) & (numbers <= 1)).all() or any(low > high for low, high in bounds.values()):
                raise ValueError("a share is not one from 0 to 1")
            return {
                "model": name,
                "accuracy": shares["accuracy"],
                "accuracy_interval": bounds["accuracy"],
                "mean_accuracy_drop": drop,
                "answered_items": count,
                "factor": factor,
                "best": {
                    **best,
                    **{part: shares[part] for part in _PARTS},
                    **{f"{part}_interval": bounds[part] for part in _PARTS[:2]},
                    "items": int(best.get("items", count)),
                    "chosen_on": str(best.get("chosen_on", "same items")),
                },
            }
    except JaxidError as error:
        raise DataError(f"{folder} holds no summary of a finished jaxid run belief-swap: {error}") from error


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Several belief-swap runs side by side: Figure 2 over models, and accuracy against steerability (Figure 9).

    Args:
        folders: of finished runs.
        out: gets `belief_swap.png`, `accuracy_against_steerability.png` and `comparison.json`.

    Returns:
        What was drawn, by name of the model.

    Raises:
        DataError: for a folder without a belief-swap summary.
        OutputError: if `out` is the folder of a run, or cannot be written to.
    """
    if (out / "settings.json").exists():
        raise OutputError(f"{out} holds a run, whose figure would be replaced; give another --out.")
    ensure_output_folder(out)
    found: dict[str, Any] = {}
    for folder in folders:
        entry = _entry(folder)
        name = entry.pop("model")
        labels = (name, f"{name} ({folder.name})", f"{name} ({folder.resolve()})")
        found[next((label for label in labels if label not in found), name)] = entry
    names = list(found)
    strength = _spread(entry["factor"] for entry in found.values())
    bars = _bars({name: entry["best"] for name, entry in found.items()}, strength)
    plots.save(bars, out / "belief_swap.png")
    accuracy = np.array([found[name]["accuracy"] for name in names])
    drop = np.array([found[name]["mean_accuracy_drop"] for name in names])
    figure = plots.accuracy_against_steerability(
        names,
        accuracy,
        drop,
        accuracy_interval=np.array([entry["accuracy_interval"] for entry in found.values()]),
        about=plots.About(items=_spread(entry["answered_items"] for entry in found.values()), strength=strength),
    )
    plots.save(figure, out / "accuracy_against_steerability.png")
    write_json(out / "comparison.json", found)
    return found
