"""`jaxid run belief-swap`: beliefs swapped by IDs and by noise, layer by layer (Figure 2), and against accuracy (9)."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import plots
from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import DataError
from jaxid.experiments import belief_swap
from jaxid.experiments.relations import answer_of, axis_of, prepare
from jaxid.models.registry import ALIASES
from jaxid.results import confidence_interval, ensure_output_folder, write_json
from jaxid.runs.common import PUBLISHED_SUFFIX, Columns, Run, RunConfig, by_axis, filled, joined

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
    model, ids = job.model, job.ids()
    belief_swap.require_same_model(model, ids)
    layers = job.layers(default_layers(config.model, model.num_layers))
    factor = 5.0 if config.factor is None else config.factor
    suffix = config.text("{query}" + PUBLISHED_SUFFIX)
    items = job.spatial_items()
    numbers = {item.key: number for number, item in enumerate(items)}
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

    settings = {"layers": layers, "factor": factor, "template": suffix, "max_new_tokens": config.max_new_tokens}
    table, summary = job.finish(items, lambda item: item.key, compute, batch_size=batch_size, settings=settings)
    summary |= rates(table, layers)
    figure = plots.belief_swap_bars(
        [model.name],
        *(np.array([summary["best"][name]]) for name in ("belief", "belief_std", "noise", "noise_std")),
    )
    plots.save(figure, config.out / "belief_swap.png")
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


def rates(table: Columns, layers: Sequence[int]) -> dict[str, Any]:
    """Shares of a run's table: swapped beliefs and accuracies by condition and layer, the best layers, verdicts."""
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
    best = np.argsort(swapped["belief"], kind="stable")[::-1][:BEST]
    picked = {name: np.array(swapped[name])[best] for name in belief_swap.CONDITIONS}
    by_axis_ = {}
    for axis in dict.fromkeys(table["axis"].tolist()):
        by_axis_[axis] = {
            condition: [
                float(table["swapped"][rows].mean())
                for layer in layers
                if (
                    rows := used
                    & (table["condition"] == condition)
                    & (table["layer"] == layer)
                    & (table["axis"] == axis)
                ).any()
            ]
            for condition in belief_swap.CONDITIONS
        }
    return {
        "answered_items": count,
        "unanswered_items": int((~used & first).sum()),
        "accuracy": accuracy,
        "layers": list(layers),
        "swapped": swapped,
        "swapped_interval": intervals,
        "swapped_by_axis": by_axis_,
        "verdicts": verdicts,
        "accuracy_drop": drops,
        "mean_accuracy_drop": float(np.mean(drops)),
        "best": {
            "layers": [int(layers[row]) for row in best],
            "belief": float(picked["belief"].mean()),
            "belief_std": float(picked["belief"].std()),
            "noise": float(picked["noise"].mean()),
            "noise_std": float(picked["noise"].std()),
        },
    }


def _by_layer(summary: dict[str, Any], layers: Sequence[int], factor: float) -> Any:
    axes = {name: value for name, value in summary["swapped_by_axis"].items() if len(value["belief"]) == len(layers)}
    names = {"horizontal": "left/right", "vertical": "above/below"}
    return plots.belief_swap_by_layer(
        np.array(layers),
        np.array([value["belief"] for value in axes.values()]),
        np.array([value["noise"] for value in axes.values()]),
        [names[name] for name in axes],
        factor=factor,
    )


def compare(folders: Sequence[Path], out: Path) -> dict[str, Any]:
    """Several belief-swap runs side by side: Figure 2 over models, and accuracy against steerability (Figure 9).

    Args:
        folders: of finished runs.
        out: gets `belief_swap.png`, `accuracy_against_steerability.png` and `comparison.json`.

    Returns:
        What was drawn, by name of the model.

    Raises:
        DataError: for a folder without a belief-swap summary.
    """
    ensure_output_folder(out)
    found: dict[str, Any] = {}
    for folder in folders:
        path = folder / "summary.json"
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            entry = {name: summary[name] for name in ("accuracy", "mean_accuracy_drop", "best", "answered_items")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no summary of a finished jaxid run belief-swap: {error!r}.") from error
        name = summary["model"] if summary["model"] not in found else f"{summary['model']} ({folder.name})"
        found[name] = entry
    names = list(found)
    best = [
        np.array([found[name]["best"][part] for name in names])
        for part in ("belief", "belief_std", "noise", "noise_std")
    ]
    plots.save(plots.belief_swap_bars(names, *best), out / "belief_swap.png")
    accuracy = np.array([found[name]["accuracy"] for name in names])
    drop = np.array([found[name]["mean_accuracy_drop"] for name in names])
    plots.save(plots.accuracy_against_steerability(names, accuracy, drop), out / "accuracy_against_steerability.png")
    write_json(out / "comparison.json", found)
    return found
