"""The demo's report: the summary's numbers and the figures, in Markdown."""

from pathlib import Path
from typing import Any

from jaxid.io import write_text


def write(path: Path, summary: dict[str, Any]) -> None:
    """Writes the report atomically; the figures are linked from `figures/` beside it."""
    write_text(path, render(summary))


def _table(header: list[str], rows: list[list[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def render(summary: dict[str, Any]) -> str:
    """The report as Markdown text."""
    layer, factor = summary["best_layer"], summary["best_factor"]
    layers = range(len(summary["explained_variance"]))
    intervals = summary["accuracy_interval"]
    items = summary["swap_items"]
    accuracy = _table(
        ["question", "right", "95 % interval"],
        [
            [name, _percent(value), f"{_percent(intervals[name][0])} to {_percent(intervals[name][1])}"]
            for name, value in summary["accuracy"].items()
        ],
    )
    geometry_names = {
        "explained_variance": "two axes explain",
        "column_share": "column",
        "row_share": "row",
        "id_agreement": "agreement",
        "column_correlation": "corr. column",
        "row_correlation": "corr. row",
        "axes_cosine": "cosine of axes",
    }
    geometry = _table(
        ["block", *geometry_names.values()],
        [[k, *(f"{summary[name][k]:.3f}" for name in geometry_names)] for k in layers],
    )
    swaps = _table(
        ["block", "swapped by IDs", "swapped by noise"],
        [[k, _percent(summary["belief_swap"][k]), _percent(summary["noise_swap"][k])] for k in layers],
    )
    relations = _table(
        ["relation", f"swapped by IDs, block {layer}", "95 % interval", "by noise", "95 % interval"],
        [
            [
                name.replace("_", "/"),
                *(
                    text
                    for condition in ("belief", "noise")
                    for text in (
                        _percent(entry[condition]["rate"][layer]),
                        " to ".join(_percent(bound) for bound in entry[condition]["interval"][layer]),
                    )
                ),
            ]
            for name, entry in summary["swap_by_relation"].items()
        ],
    )
    factors = _table(
        ["factor", "swapped by IDs", "swapped by noise"],
        [
            [name, _percent(entry["belief"]), _percent(entry["noise"])]
            for name, entry in summary["swap_by_factor"].items()
        ],
    )
    steering = _table(
        ["block", *(f"{name.replace('_', '/')}: correlation, monotone" for name in summary["steering"])],
        [
            [
                k,
                *(
                    f"{entry['correlation'][k]:.3f}, {'yes' if entry['monotone'][k] else 'no'}"
                    for entry in summary["steering"].values()
                ),
            ]
            for k in layers
        ],
    )
    mirror = _table(
        ["block", "image tokens", "text tokens", "the two words"],
        [[k, *(f"{summary['mirror_swap'][name][k]:.3f}" for name in ("image", "text", "words"))] for k in layers],
    )
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"""# Spatial IDs of {summary["model"]}

Blocks are counted from 0. Answers, swaps and steering are measured on scenes with pairs of objects, or of places, that
training never showed; the IDs are read from freshly drawn grid pictures of all places. Took {summary["seconds"]} s.

## What the model answers

![Scenes with the model's answers](figures/scenes.png)

{accuracy}

## The IDs

The 16 cells of one object in the plane of the two axes (Figure 5), and how much of the IDs' variance the plane holds.

![The ID plane](figures/id_plane.png)

![Explained variance](figures/variance.png)

{geometry}

## Belief swap

IDs added to both words so that the answer should turn round, beside noise of the same norm (Figure 2). Block and
factor were chosen on {items["choosing"]} items per relation; all rates are of the other {items["reported"]}. A
factor is the vector's norm over that of the word's activation; here {factor}, the published one is 5.

![Belief swap](figures/belief_swap.png)

{swaps}

{relations}

At block {layer}, by factor:

{factors}

## Steering to every cell

Change of the answers' log-probabilities when the subject's word is steered to each column (Figure 6).

![Steering by column](figures/steering.png)

![Steering to all cells](figures/steering_map.png)

{steering}

## Where the place sits: mirror swap

How far the answers follow when activations of the mirrored picture replace those of the control run (Figure 4):
medians over items, and the mean of both words' medians below.

![Mirror swap](figures/mirror_swap.png)

{mirror}

---
{versions}; model fingerprint {summary["fingerprint"]}
"""
