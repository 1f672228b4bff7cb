"""Figures of fine-tuning: one run's curves, and runs with and without the ID loss."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.plots.style import (
    BLUE,
    CHANCE,
    STYLE,
    VERMILLION,
    About,
    bands_note,
    captioned,
    chance_line,
    curve,
    finite,
    new_figure,
)
from jaxid.stats import mean_interval

_COLORS = (BLUE, VERMILLION)

_FEW = 30
"""Up to so many values of a curve are drawn as points too: of one value, a line shows nothing."""


@rc_context(STYLE)
def finetune_curves(
    losses: Mapping[str, Float[np.ndarray, "S 2"]],
    accuracies: Mapping[str, Float[np.ndarray, "C 2"]],
    title: str = "",
    *,
    intervals: Mapping[str, Float[np.ndarray, "C 2"]] | None = None,
    about: About | None = None,
) -> Figure:
    """Losses and accuracies of one run by step.

    Args:
        losses: by name, rows of step and value.
        accuracies: by evaluation set, rows of step and accuracy.
        title: of the figure.
        intervals: by evaluation set, lower and upper bound (95 %) at every step, drawn as bands.
        about: what was measured on what.
    """
    if not losses or not all(len(rows) for rows in (*losses.values(), *accuracies.values())):
        raise InputError("finetune_curves needs one or more losses, and a row of step and value for each curve.")
    curves, gaps = finite(**{name: rows[:, 1] for name, rows in losses.items()})
    shares, more = finite(**{name: rows[:, 1] for name, rows in accuracies.items()})
    figure = new_figure(7.0, 2.8)
    left, right = figure.subplots(1, 2)
    for color, (name, rows), values in zip(_COLORS, losses.items(), curves, strict=False):
        marker = "o" if len(rows) <= _FEW else ""
        curve(left, rows[:, 0], values, color, marker=marker, label=name.replace("_", " "))
    left.set(xlabel="step", ylabel="loss", title=title)
    left.set_ylim(0, 1.2 * left.get_ylim()[1])  # room for the names
    left.legend(frameon=False, loc="upper right", ncols=2)
    for color, (name, rows), share in zip(_COLORS, accuracies.items(), shares, strict=False):
        curve(right, rows[:, 0], share, color, (intervals or {}).get(name), label=name)
    _evaluation(right, "evaluation")
    return captioned(
        figure,
        about,
        bands_note(intervals or None),
        CHANCE,
        f"losses: {gaps}" if gaps else "",
        f"shares: {more}" if more else "",
    )


@rc_context(STYLE)
def finetune_comparison(
    steps: Int[np.ndarray, "C"] | Float[np.ndarray, "C"],
    sets: Mapping[str, Mapping[str, Float[np.ndarray, "R C"]]],
    *,
    about: About | None = None,
) -> Figure:
    """Accuracy by step with and without the ID loss: every run, their mean and Student's 95 % interval.

    Args:
        steps: at which runs were evaluated.
        sets: by evaluation set, by "with_ids" and "without_ids", a row for each run.
        about: what was measured on what.
    """
    if not sets or any(rows.shape[1:] != steps.shape for kinds in sets.values() for rows in kinds.values()):
        raise InputError("finetune_comparison needs a row of as many values as steps for every run.")
    figure = new_figure(3.8 * len(sets), 3.0)
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for panel, (name, kinds) in zip(panels, sets.items(), strict=True):
        for color, kind, shown in (
            (BLUE, "with_ids", "with ID loss"),
            (VERMILLION, "without_ids", "answers alone"),
        ):
            rows = kinds[kind]
            check_finite(f"{name}, {shown},", rows)
            mean, half = rows.mean(axis=0), mean_interval(rows)
            panel.plot(steps, rows.T, color=color, linewidth=0.6, alpha=0.5)
            band = np.stack([mean - half, mean + half], axis=-1) if len(rows) > 1 else None
            curve(panel, steps, mean, color, band, label=f"{shown}, {len(rows)} seeds")
        _evaluation(panel, name)
    meaning = "thick: mean of the runs, bands: Student's 95 % interval of it, thin: single runs"
    return captioned(figure, about, meaning, CHANCE)


def _evaluation(axes: Axes, title: str) -> None:
    """Labels a panel of accuracies by step; the legend has room of its own above the curves."""
    axes.set(xlabel="step", ylabel="share of correct answers", title=title)
    chance_line(axes)
    handles, names = axes.get_legend_handles_labels()
    if handles:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.14 * len(handles) * (high - low))
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(1, high)])
        axes.legend(handles, names, frameon=False, loc="upper right")
