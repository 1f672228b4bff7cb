"""The demo's report in Markdown, with the summary's numbers and the figures."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

GEOMETRY = {
    "explained_variance": "two axes explain",
    "column_share": "column",
    "row_share": "row",
    "id_agreement": "agreement",
    "column_correlation": "corr. column",
    "row_correlation": "corr. row",
    "axes_cosine": "cosine of axes",
    "column_gap": "column gap",
    "row_gap": "row gap",
}
"""Keys of the IDs' geometry in the summary, and their headings in the report."""

MIRROR = {"image": "image tokens", "text": "text tokens", "words": "the two words"}


def _table(columns: Mapping[str, Collection[object]]) -> str:
    """A table of columns with headings."""
    rows = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _percent(values: Iterable[float]) -> list[str]:
    return [f"{100 * value:.1f} %" for value in values]


def _bounds(intervals: Iterable[Iterable[float]]) -> list[str]:
    return [" to ".join(_percent(interval)) for interval in intervals]


def _decimals(values: Iterable[float]) -> list[str]:
    return [f"{value:.3f}" for value in values]


def render(summary: Mapping[str, Any]) -> str:
    """The report as Markdown text; the figures are linked from `figures/` beside it."""
    layer, items = summary["best_layer"], summary["swap_items"]
    layers = {"layer": range(len(summary["belief_swap"]))}
    accuracy = _table(
        {
            "question": list(summary["accuracy"]),
            "correct": _percent(summary["accuracy"].values()),
            "95 % interval": _bounds([summary["accuracy_interval"][name] for name in summary["accuracy"]]),
        }
    )
    geometry = _table(layers | {title: _decimals(summary[name]) for name, title in GEOMETRY.items()})
    words = _table(
        layers
        | {
            name.replace("_", " to "): [f"{angle:.0f}" for angle in angles]
            for name, angles in summary["word_angles"].items()
        }
    )
    swaps = _table(
        layers
        | {
            "swapped by IDs": _percent(summary["belief_swap"]),
            "swapped by noise": _percent(summary["noise_swap"]),
        }
    )
    by_relation = summary["swap_by_relation"]
    belief, noise = ([entry[name] for entry in by_relation.values()] for name in ("belief", "noise"))
    relations = _table(
        {
            "relation": [name.replace("_", "/") for name in by_relation],
            f"swapped by IDs, layer {layer}": _percent([entry["rate"][layer] for entry in belief]),
            "their 95 % interval": _bounds([entry["interval"][layer] for entry in belief]),
            "by noise": _percent([entry["rate"][layer] for entry in noise]),
            "its 95 % interval": _bounds([entry["interval"][layer] for entry in noise]),
        }
    )
    by_strength = summary["swap_by_factor"]
    strengths = _table(
        {
            "strength": list(by_strength),
            "swapped by IDs": _percent([entry["belief"] for entry in by_strength.values()]),
            "swapped by noise": _percent([entry["noise"] for entry in by_strength.values()]),
        }
    )
    steering = _table(
        layers
        | {
            f"{name.replace('_', '/')}: correlation, monotone": [
                f"{correlation:.3f}, {'yes' if monotone else 'no'}"
                for correlation, monotone in zip(entry["correlation"], entry["monotone"], strict=True)
            ]
            for name, entry in summary["steering"].items()
        }
    )
    mirror = _table(layers | {title: _decimals(summary["mirror_swap"][name]) for name, title in MIRROR.items()})
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return f"""# Spatial IDs of {summary["model"]}

Layers are counted from 0. Answers, swaps and steering are measured on scenes with pairs of objects, or of places, that
the model was not trained on. The IDs are read from newly drawn grid pictures of all places.
Took {summary["seconds"]} s.

## Answers

![Scenes with the model's answers](figures/scenes.png)

{accuracy}

## The IDs

The 16 cells of one object in the plane of the two axes (Figure 5), and how much of the IDs' variance the plane holds.

![The ID plane](figures/id_plane.png)

![Explained variance](figures/variance.png)

{geometry}

A gap is the smallest distance between neighbouring columns (rows) of any object, in mean steps: above 0 if they are in
order and apart, 1 if they are evenly spaced.

The words for places, read inside the question without a picture: the largest angle, over one question about each
object, between the step from one word to the other and its axis, in degrees.

{words}

## Belief swap

IDs, or noise of the same norm, are added to both words to swap the answer (Figure 2). Layer and
strength were chosen on {items["choosing"]} items per relation; all rates are of the other {items["reported"]}. The
strength is the vector's norm divided by that of the word's activation: here {summary["best_factor"]}, as published 5.

![Belief swap](figures/belief_swap.png)

{swaps}

{relations}

At layer {layer}, by strength:

{strengths}

## Steering to every cell

Change of the answers' log-probabilities when the subject's word is steered to each column (Figure 6).

![Steering by column](figures/steering.png)

![Steering to all cells](figures/steering_map.png)

{steering}

## Mirror swap: which tokens hold places

How far the answers follow when activations of the mirrored picture replace those of the control run (Figure 4):
medians over items, and the mean of both words' medians below.

![Mirror swap](figures/mirror_swap.png)

{mirror}

---
{versions}; model fingerprint {summary["fingerprint"]}
"""
