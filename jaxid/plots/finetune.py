"""Figures of fine-tuning: one run's curves, and runs with and without the ID loss: accuracy and geometry."""

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
    GREEN,
    GREY,
    INK,
    PURPLE,
    STYLE,
    VERMILLION,
    About,
    bands_note,
    captioned,
    chance_line,
    curve,
    finite,
    new_figure,
    zero_line,
)
from jaxid.stats import mean_interval

_COLORS = (BLUE, VERMILLION)

_KINDS = {"with_ids": BLUE, "other_ids": GREEN, "without_ids": VERMILLION}
"""Kinds of runs, in the order in which they are drawn."""

_PAIRED = {
    "with_ids - without_ids": (BLUE, "o"),
    "other_ids - without_ids": (GREEN, "o"),
    "other_ids - with_ids": (PURPLE, "s"),
}
"""Colours and markers of differences."""

_APART = 0.012
"""How far whiskers at the same step are moved apart, as a share of the axis."""

_TICKS = 7
"""Up to so many evaluations have a tick each."""

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
    differences: Mapping[str, Mapping[str, Float[np.ndarray, "R C"]]] | None = None,
    *,
    other: str = "",
    about: About | None = None,
) -> Figure:
    """Accuracy by step with and without the ID loss, and below it the differences of runs with the same seed.

    Args:
        steps: at which runs were evaluated.
        sets: by evaluation set, by "with_ids", "other_ids" and "without_ids", a row for each run.
        differences: by evaluation set, by two kinds joined by " - ", a row for each seed; drawn if there are any.
        other: the other model whose IDs were used.
        about: what was measured on what.
    """
    tables = [kinds for given in (sets, differences or {}) for kinds in given.values()]
    if not sets or any(rows.shape[1:] != steps.shape for kinds in tables for rows in kinds.values()):
        raise InputError("finetune_comparison needs a row of as many values as steps for every run.")
    paired = {name: kinds for name, kinds in (differences or {}).items() if kinds}
    figure = new_figure(3.8 * len(sets), 5.6 if paired else 3.0)
    panels = figure.subplots(2 if paired else 1, len(sets), squeeze=False)
    for panel, (name, kinds) in zip(panels[0], sets.items(), strict=True):
        _runs(panel, name, steps, kinds, other)
        _evaluation(panel, name)
        _steps(panel, steps)
    for panel, (name, kinds) in zip(panels[-1], paired.items(), strict=False):
        zero_line(panel)
        for place, (kind, rows) in enumerate(kinds.items()):
            check_finite(f"{name}, {kind},", rows)
            mean, half = rows.mean(axis=0), mean_interval(rows)
            color, marker = _PAIRED.get(kind, (INK, "o"))
            at = steps + (place - (len(kinds) - 1) / 2) * _APART * np.ptp(steps)
            panel.errorbar(
                at,
                mean,
                None if len(rows) < 2 else half,
                color=color,
                marker=marker,
                capsize=2,
                linewidth=1.2,
                label=_pair(kind, other),
            )
        panel.set(ylabel="difference of shares", title=f"{name}: seed by seed")
        _steps(panel, steps)
        _legend_above(panel)
    meaning = "thick: mean of the runs, bands and whiskers: Student's 95 % interval of it, thin: single runs"
    return captioned(figure, about, meaning, CHANCE)


@rc_context(STYLE)
def finetune_geometry(
    steps: Int[np.ndarray, "C"] | Float[np.ndarray, "C"],
    measures: Mapping[str, Mapping[str, Float[np.ndarray, "R C"]]],
    gains: Mapping[str, Float[np.ndarray, "R 2"]] | None = None,
    *,
    other: str = "",
    about: About | None = None,
) -> Figure:
    """What fine-tuning does to the geometry of activations, by step, and whether it goes with accuracy.

    Args:
        steps: at which runs were evaluated.
        measures: by name, by kind of run as in `finetune_comparison`, a row for each run.
        gains: by kind of run with the ID loss, for each seed: what the run has more than the one without the ID loss,
            of the cosine with the IDs that it was trained on, and of accuracy.
        other: the other model whose IDs were used.
        about: what was measured on what.
    """
    if not measures or any(rows.shape[1:] != steps.shape for kinds in measures.values() for rows in kinds.values()):
        raise InputError("finetune_geometry needs a row of as many values as steps for every run.")
    count = len(measures) + bool(gains)
    columns = 2 if count > 1 else 1
    figure = new_figure(3.8 * columns, 2.8 * -(-count // columns))
    panels = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
    for panel, (name, kinds) in zip(panels, measures.items(), strict=False):
        _runs(panel, name, steps, kinds, other)
        panel.set(ylabel="share" if "variance" in name else "mean cosine", title=name)
        _steps(panel, steps)
        _legend_above(panel)
    if gains:
        panel = panels[len(measures)]
        zero_line(panel)
        panel.axvline(0, color=GREY, linewidth=0.8, zorder=1)
        for kind, rows in gains.items():
            check_finite(f"gains of {kind}", rows)
            panel.plot(*rows.T, "o", color=_KINDS[kind], label=_name(kind, other))
        panel.set(
            xlabel="difference of the cosine with the IDs trained on",
            ylabel="difference of shares",
            title="run by run, minus answers alone",
        )
        _legend_above(panel)
    for panel in panels[count:]:
        panel.set_axis_off()
    return captioned(figure, about, "thick: mean of the runs, bands: Student's 95 % interval of it, thin: single runs")


def _runs(panel: Axes, name: str, steps: np.ndarray, kinds: Mapping[str, Float[np.ndarray, "R C"]], other: str) -> None:
    """Every run of every kind, their mean and its interval."""
    for kind, color in _KINDS.items():
        if kind not in kinds:
            continue
        rows = kinds[kind]
        check_finite(f"{name}, {kind},", rows)
        mean, half = rows.mean(axis=0), mean_interval(rows)
        panel.plot(steps, rows.T, color=color, linewidth=0.5, alpha=0.35)
        # Two or three runs can have an interval that no share or cosine can be in.
        band = np.clip(np.stack([mean - half, mean + half], axis=-1), -1 if (rows < 0).any() else 0, 1)
        curve(
            panel,
            steps,
            mean,
            color,
            band if len(rows) > 1 else None,
            label=f"{_name(kind, other)}, {len(rows)} seed{'s' * (len(rows) > 1)}",
        )


def _name(kind: str, other: str) -> str:
    """What the legend calls a kind of run."""
    if kind == "without_ids":
        return "answers alone"
    if kind == "other_ids":
        return f"ID loss, IDs of {other or 'another model'}"
    return "ID loss, own IDs"


def _pair(difference: str, other: str) -> str:
    """What the legend calls a difference of two kinds."""
    return " minus ".join(_name(kind, other).removeprefix("ID loss, ") for kind in difference.split(" - "))


def _evaluation(axes: Axes, title: str) -> None:
    """Labels a panel of accuracies by step."""
    axes.set(xlabel="step", ylabel="share of correct answers", title=title)
    chance_line(axes)
    _legend_above(axes)


def _steps(axes: Axes, steps: np.ndarray) -> None:
    """Ticks at the evaluations, if these are few."""
    axes.set_xlabel("step")
    if len(steps) <= _TICKS:
        axes.set_xticks(steps)


def _legend_above(axes: Axes) -> None:
    """The legend has room of its own above the curves."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.14 * len(handles) * (high - low))
        axes.set_yticks([tick for tick in axes.get_yticks() if low <= tick <= min(1, high)])
        axes.legend(handles, names, frameon=False, loc="upper right")
