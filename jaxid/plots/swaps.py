"""Figures of belief swaps (Figures 2 and 9) and activation swaps (Figure 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.plots.names import place_names
from jaxid.plots.style import (
    BLUE,
    CHANCE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    RULE,
    STYLE,
    VERMILLION,
    WILSON,
    About,
    block_axis,
    captioned,
    chance_line,
    check_shapes,
    finished,
    finite,
    finite_items,
    label_ends,
    new_figure,
)
from jaxid.stats import centre_and_spread


@rc_context(STYLE)
def belief_swap_by_layer(
    layers: Int[np.ndarray, "L"],
    belief: Float[np.ndarray, "R L"],
    noise: Float[np.ndarray, "R L"],
    relation_names: Sequence[str],
    *,
    belief_intervals: Float[np.ndarray, "R L 2"] | None = None,
    noise_intervals: Float[np.ndarray, "R L 2"] | None = None,
    factor: float | None = None,
    factors: Float[np.ndarray, "F"] | None = None,
    belief_by_factor: Float[np.ndarray, "F"] | None = None,
    noise_by_factor: Float[np.ndarray, "F"] | None = None,
    factor_layer: int | None = None,
    about: About | None = None,
) -> Figure:
    """How often swapped IDs turn the answer round, beside noise of the same norm ([ID] arXiv 2601.12626, Figure 2).

    One panel a relation, one for their mean (if there are several), and one over factors (if given).

    Args:
        layers: the blocks.
        belief: share of beliefs swapped by IDs, 0 to 1, by relation and block.
        noise: the same by noise.
        relation_names: of the R relations.
        belief_intervals: lower and upper bound (95 %) of `belief`, drawn as a band.
        noise_intervals: likewise of `noise`.
        factor: norm of the added vector over the activation's, at which `belief` and `noise` were measured.
        factors: other factors, above 0.
        belief_by_factor: mean share swapped by IDs at each of `factors`.
        noise_by_factor: likewise by noise.
        factor_layer: the block at which the factors were tried.
        about: what was measured on what; stands below the panels.

    Raises:
        InputError: The arrays do not fit each other, only some of the three over factors are given, or a
            factor is not above 0.
    """
    check_shapes(
        layers=(layers, "L"),
        belief=(belief, "R L"),
        noise=(noise, "R L"),
        relation_names=(relation_names, "R"),
        belief_intervals=(belief_intervals, "R L 2"),
        noise_intervals=(noise_intervals, "R L 2"),
        factors=(factors, "F"),
        belief_by_factor=(belief_by_factor, "F"),
        noise_by_factor=(noise_by_factor, "F"),
    )
    (belief, noise, belief_by_factor, noise_by_factor), gaps = finite(
        belief=belief, noise=noise, belief_by_factor=belief_by_factor, noise_by_factor=noise_by_factor
    )
    over_factors = [values for values in (factors, belief_by_factor, noise_by_factor) if values is not None]
    if len(over_factors) not in (0, 3):
        raise InputError("factors, belief_by_factor and noise_by_factor go together: give all three or none.")
    if factors is not None and np.min(factors) <= 0:
        raise InputError(f"factors must be above 0 for their logarithmic axis, not {np.min(factors):g}.")
    relations = len(relation_names)
    panels = relations + (relations > 1) + bool(over_factors)
    figure = new_figure(2.35 * panels + 0.4, 2.75)
    row = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for rates, bounds, color in ((noise, noise_intervals, GREY), (belief, belief_intervals, BLUE)):
        for number, name in enumerate(relation_names):
            row[number].plot(layers, rates[number], color=color, marker="o")
            row[number].set_title(name)
            if bounds is not None:
                row[number].fill_between(layers, *bounds[number].T, color=color, alpha=0.2, linewidth=0)
        if relations > 1:
            row[relations].plot(layers, rates.mean(axis=0), color=color, marker="o")
            row[relations].set_title("mean")
    for axes in row[: relations + (relations > 1)]:
        block_axis(axes, "" if factor is None else f", at factor {factor:g}")
    if factors is not None and belief_by_factor is not None and noise_by_factor is not None:
        axes = row[-1]
        axes.plot(factors, noise_by_factor, color=GREY, marker="o")
        axes.plot(factors, belief_by_factor, color=BLUE, marker="o")
        axes.set_xscale("log")
        axes.set_xticks(factors, [f"{value:g}" for value in factors])
        axes.minorticks_off()
        if factor is not None:
            axes.axvline(factor, color=RULE, linewidth=6, zorder=0)
        place = "" if factor_layer is None else f", block {factor_layer}"
        axes.set(title=f"by factor{place}", xlabel="factor (norm over activation's)")
    row[0].set(ylim=(-0.02, 1.02), ylabel="beliefs swapped")
    row[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in row:
        chance_line(axes)
    lines = row[-1].get_lines()
    names = ["IDs", "noise of the same norm"]
    figure.legend([lines[1], lines[0]], names, loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    bands = "" if belief_intervals is None and noise_intervals is None else f"bands: {WILSON}"
    return captioned(figure, about, bands, CHANCE, gaps)


@rc_context(STYLE)
def swap_scores(
    scores: Mapping[str, Float[np.ndarray, "L B 2"]],
    words: Sequence[str],
    *,
    layers: Int[np.ndarray, "L"] | None = None,
    robust: bool = False,
    about: About | None = None,
) -> Figure:
    """How far swapped activations carry the answers, by block ([ID] arXiv 2601.12626, Figure 4).

    One panel an answer word; lines are means over items, bands one standard deviation to each side. Bands may
    leave the panel: the score of an item whose answers hardly change is a quotient of two small numbers. Items with a
    score that is not finite are left out.

    Args:
        scores: token set ("image", "text", "words", or others) -> score by block, item and word; 0 where the
            answer stays that of the control run, 1 where it becomes that of the other picture.
        words: the two words.
        layers: the blocks that were swapped; 0 to L - 1 by default.
        robust: medians and quartiles instead, which a few such quotients do not move.
        about: what was measured on what; stands below the panels.

    Raises:
        InputError: The scores are empty, of different shapes, not of two words, of more than four token sets, or no
            item's are finite.
    """
    colors = (BLUE, VERMILLION, GREEN, PURPLE)
    names = {"image": "image tokens", "text": "text tokens", "words": "the two words"}
    if not 1 <= len(scores) <= len(colors):
        raise InputError(f"scores holds {len(scores)} token sets; from one to {len(colors)} can be drawn.")
    check_shapes(
        words=(words, "2"),
        **{f"scores[{name!r}]": (values, "L B 2") for name, values in scores.items()},
        layers=(layers, "L"),
    )
    known, lost = finite_items(1, **scores)
    drawn = {name: np.stack(centre_and_spread(values[:, known], 1, robust=robust)) for name, values in scores.items()}
    layers = np.arange(len(next(iter(scores.values())))) if layers is None else layers
    low = min(-0.2, *(float(centre.min()) - 0.1 for centre, _, _ in drawn.values()))
    high = max(1.2, *(float(centre.max()) + 0.1 for centre, _, _ in drawn.values()))
    figure = new_figure(7.4, 2.9)
    pair = figure.subplots(1, 2, sharey=True)
    for number, (axes, word) in enumerate(zip(pair, words, strict=True)):
        for (centre, *band), color in zip((parts[..., number] for parts in drawn.values()), colors, strict=False):
            axes.fill_between(layers, *band, color=color, alpha=0.14, linewidth=0)
            axes.plot(layers, centre, color=color, marker="o")
        axes.set(title=f"“{word}”", ylim=(low, high))
        block_axis(axes)
    ends = zip(drawn.items(), colors, strict=False)
    label_ends(pair[1], layers, {names.get(name, name): (parts[0, -1, 1], color) for (name, parts), color in ends})
    pair[0].set_ylabel("swap score (median)" if robust else "swap score (mean)")
    meaning = "lines: medians, bands: quartiles" if robust else "lines: means, bands: one standard deviation"
    wide = any((parts < low).any() or (parts > high).any() for parts in drawn.values())
    return captioned(figure, about, meaning + (", which leave the panel" if wide else ""), lost, items=int(known.sum()))


@rc_context(STYLE)
def belief_swap_bars(
    names: Sequence[str],
    belief: Float[np.ndarray, "M"],
    belief_std: Float[np.ndarray, "M"],
    noise: Float[np.ndarray, "M"],
    noise_std: Float[np.ndarray, "M"],
    *,
    belief_interval: Float[np.ndarray, "M 2"] | None = None,
    noise_interval: Float[np.ndarray, "M 2"] | None = None,
    about: About | None = None,
) -> Figure:
    """Beliefs swapped by IDs beside noise of the same norm, model by model ([ID] arXiv 2601.12626, Figure 2).

    Args:
        names: of the models.
        belief: share of beliefs swapped by IDs, the mean over each model's best blocks.
        belief_std: its standard deviation over those blocks.
        noise: the same of noise at the same blocks.
        noise_std: likewise.
        belief_interval: lower and upper bound (95 %) of `belief`, drawn as whiskers in place of the deviations.
        noise_interval: likewise of `noise`; both or none are given.
        about: what was measured on what; stands below the panel.

    Raises:
        InputError: The arrays do not fit each other, are empty, or hold something that is not finite.
    """
    values = {"belief": belief, "belief_std": belief_std, "noise": noise, "noise_std": noise_std}
    check_shapes(names=(names, "M"), **{name: (array, "M") for name, array in values.items()})
    check_shapes(names=(names, "M"), belief_interval=(belief_interval, "M 2"), noise_interval=(noise_interval, "M 2"))
    for name, array in values.items():
        check_finite(name, array)
    places = np.arange(len(names))
    figure = new_figure(max(3.0, 1.1 + 0.75 * len(names)), 3.0)
    axes = figure.add_subplot()
    error: dict[str, Any] = {"ecolor": INK, "capsize": 2.5, "error_kw": {"elinewidth": 0.9}}
    known = belief_interval is not None and noise_interval is not None
    for shift, heights, spread, interval, color, label in (
        (-0.19, belief, belief_std, belief_interval, BLUE, "IDs"),
        (0.19, noise, noise_std, noise_interval, "#b3b3b3", "noise of the same norm"),
    ):
        # A share cannot leave 0 to 1, whatever its standard deviation.
        bounds = np.stack([np.minimum(spread, heights), np.minimum(spread, 1 - heights)])
        if known and interval is not None:
            bounds = np.abs(interval.T - heights)
        axes.bar(places + shift, heights, 0.36, yerr=bounds, color=color, label=label, **error)
        for place, height, up in zip(places + shift, heights, bounds[1], strict=True):
            axes.annotate(
                f"{100 * height:.0f}",
                (place, height + up),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    turned = len(names) > 4 or max(map(len, names)) > 12
    axes.set_xticks(places, names, rotation=35 if turned else 0, ha="right" if turned else "center")
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1.1), ylabel="beliefs swapped", xlim=(-0.6, len(names) - 0.4))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    chance_line(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.0)
    whiskers = f"whiskers: {WILSON}" if known else "whiskers: one standard deviation over the best blocks"
    return captioned(figure, about, "bars: mean of the best blocks", whiskers, CHANCE)


@rc_context(STYLE)
def accuracy_against_steerability(
    names: Sequence[str],
    accuracy: Float[np.ndarray, "M"],
    drop: Float[np.ndarray, "M"],
    *,
    accuracy_interval: Float[np.ndarray, "M 2"] | None = None,
    about: About | None = None,
) -> Figure:
    """Do models that answer well also follow their IDs more? ([ID] arXiv 2601.12626, Figure 9).

    Args:
        names: of the models.
        accuracy: share of right answers without steering.
        drop: how much of it steering takes away, the mean over the steered blocks.
        accuracy_interval: lower and upper bound (95 %) of `accuracy`, drawn as whiskers.
        about: what was measured on what; stands below the panel.

    Raises:
        InputError: The arrays do not fit each other, are empty, or hold something that is not finite.
    """
    check_shapes(names=(names, "M"), accuracy=(accuracy, "M"), drop=(drop, "M"))
    check_shapes(names=(names, "M"), accuracy_interval=(accuracy_interval, "M 2"))
    check_finite("accuracy", accuracy)
    check_finite("drop", drop)
    figure = new_figure(4.8, 3.6)
    axes = figure.add_subplot()
    axes.grid(axis="x")
    axes.plot(accuracy, drop, "o", color=BLUE, markersize=6)
    axes.set(xlabel="accuracy without steering", ylabel="mean drop of accuracy under steering")
    axes.margins(0.18)
    if len(names) == 1:
        axes.set_xlim(max(-0.02, accuracy[0] - 0.1), min(1.04, accuracy[0] + 0.1))
        axes.set_ylim(min(0, 1.4 * drop[0]), max(0.1, 1.4 * drop[0]))
    if accuracy_interval is not None:
        axes.hlines(drop, *np.clip(accuracy_interval.T, *axes.get_xlim()), color=BLUE, linewidth=0.8, alpha=0.5)
    low, high = axes.get_xlim()
    if low < 0.5 < high:
        chance_line(axes, across=False)
    axes.set_xticks([tick for tick in axes.get_xticks() if max(0, low) <= tick <= min(1, high)])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda share, _: f"{round(100 * share, 6):g}%")
    whiskers = "" if accuracy_interval is None else f"whiskers: {WILSON}, cut at the panel's edge"
    captioned(figure, about, "drop: mean over blocks", whiskers, "chance: 50 %")
    place_names(axes, names, np.stack([accuracy, drop], axis=1))
    return finished(figure)
