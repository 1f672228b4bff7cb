"""Figures of belief swaps (Figures 2 and 9) and activation swaps (Figure 4)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
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
    RULE,
    STYLE,
    VERMILLION,
    WILSON,
    About,
    bands_note,
    captioned,
    chance_line,
    check_shapes,
    curve,
    finished,
    finite,
    finite_items,
    label_ends,
    layer_axis,
    name_points,
    new_figure,
    shares,
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
    strength: float | None = None,
    strengths: Float[np.ndarray, "S"] | None = None,
    belief_by_strength: Float[np.ndarray, "S"] | None = None,
    noise_by_strength: Float[np.ndarray, "S"] | None = None,
    strength_layer: int | None = None,
    about: About | None = None,
) -> Figure:
    """How often swapped IDs reverse the answer, beside noise of the same norm ([ID] arXiv 2601.12626, Figure 2).

    One panel a relation, one for their mean (if there are several), and one over strengths (if given).

    Args:
        layers: indices of the layers.
        belief: share of beliefs swapped by IDs, 0 to 1, by relation and layer.
        noise: the same by noise.
        relation_names: of the R relations.
        belief_intervals: lower and upper bound (95 %) of `belief`, drawn as a band.
        noise_intervals: lower and upper bound (95 %) of `noise`.
        strength: norm of the added vector over the activation's, at which `belief` and `noise` were measured.
        strengths: further strengths, above 0.
        belief_by_strength: mean share swapped by IDs at each of `strengths`.
        noise_by_strength: mean share swapped by noise at each of `strengths`.
        strength_layer: the layer at which the strengths were tried.
        about: what was measured on what.

    Raises:
        InputError: Only some of the three over strengths are given, or a strength is not above 0.
    """
    check_shapes(
        layers=(layers, "L"),
        belief=(belief, "R L"),
        noise=(noise, "R L"),
        relation_names=(relation_names, "R"),
        belief_intervals=(belief_intervals, "R L 2"),
        noise_intervals=(noise_intervals, "R L 2"),
        strengths=(strengths, "S"),
        belief_by_strength=(belief_by_strength, "S"),
        noise_by_strength=(noise_by_strength, "S"),
    )
    (belief, noise, belief_by_strength, noise_by_strength), gaps = finite(
        belief=belief, noise=noise, belief_by_strength=belief_by_strength, noise_by_strength=noise_by_strength
    )
    over_strengths = [values is not None for values in (strengths, belief_by_strength, noise_by_strength)]
    if any(over_strengths) and not all(over_strengths):
        raise InputError("strengths, belief_by_strength and noise_by_strength go together: give all three or none.")
    if strengths is not None and np.min(strengths) <= 0:
        raise InputError(f"strengths must be above 0 for their logarithmic axis, not {np.min(strengths):g}.")
    relations = len(relation_names)
    panels = relations + (relations > 1) + (strengths is not None)
    figure = new_figure(2.35 * panels + 0.4, 2.75)
    row = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
    for rates, bounds, by_strength, color in (
        (noise, noise_intervals, noise_by_strength, GREY),
        (belief, belief_intervals, belief_by_strength, BLUE),
    ):
        for index, name in enumerate(relation_names):
            curve(row[index], layers, rates[index], color, None if bounds is None else bounds[index])
            row[index].set_title(name)
        if relations > 1:
            curve(row[relations], layers, rates.mean(axis=0), color)
            row[relations].set_title("mean")
        if strengths is not None:
            curve(row[-1], strengths, by_strength, color)
    for axes in row[: relations + (relations > 1)]:
        layer_axis(axes, "" if strength is None else f", at strength {strength:g}")
    if strengths is not None:
        axes = row[-1]
        axes.set_xscale("log")
        axes.set_xticks(strengths, [f"{value:g}" for value in strengths])
        axes.minorticks_off()
        if strength is not None:
            axes.axvline(strength, color=RULE, linewidth=6, zorder=0)
        place = "" if strength_layer is None else f", layer {strength_layer}"
        axes.set(title=f"by strength{place}", xlabel="strength (norm over activation's)")
    row[0].set(ylim=(-0.02, 1.02), ylabel="beliefs swapped")
    shares(row[0].yaxis)
    for axes in row:
        chance_line(axes)
    lines = row[-1].get_lines()
    names = ["IDs", "noise of the same norm"]
    figure.legend([lines[1], lines[0]], names, loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    return captioned(figure, about, bands_note(belief_intervals, noise_intervals), CHANCE, gaps)


@rc_context(STYLE)
def swap_scores(
    scores: Mapping[str, Float[np.ndarray, "L B 2"]],
    words: Sequence[str],
    *,
    layers: Int[np.ndarray, "L"] | None = None,
    robust: bool = False,
    about: About | None = None,
) -> Figure:
    """How far swapped activations carry the answers, by layer ([ID] arXiv 2601.12626, Figure 4).

    One panel an answer word; lines are means over items, bands one standard deviation to each side. Bands may
    leave the panel: the score of an item whose answers hardly change is a quotient of two small numbers. Items with a
    score that is not finite are skipped.

    Args:
        scores: token set ("image", "text", "words", or others) -> score by layer, item and word; 0 where the
            answer stays that of the control run, 1 where it becomes that of the other picture.
        words: the two words.
        layers: those that were swapped; 0 to L - 1 by default.
        robust: medians and quartiles instead, which a few such quotients do not move.
        about: what was measured on what.

    Raises:
        InputError: There are more than four token sets.
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
    for index, (axes, word) in enumerate(zip(pair, words, strict=True)):
        for (centre, *band), color in zip((parts[..., index] for parts in drawn.values()), colors, strict=False):
            curve(axes, layers, centre, color, np.stack(band, axis=-1))
        axes.set(title=f"“{word}”", ylim=(low, high))
        layer_axis(axes)
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
        belief: share of beliefs swapped by IDs, the mean over each model's best layers.
        belief_std: its standard deviation over those layers.
        noise: the same of noise at the same layers.
        noise_std: its standard deviation over those layers.
        belief_interval: lower and upper bound (95 %) of `belief`, drawn as whiskers in place of the deviations.
        noise_interval: the same for `noise`; give both or neither.
        about: what was measured on what.
    """
    values = {"belief": belief, "belief_std": belief_std, "noise": noise, "noise_std": noise_std}
    check_shapes(
        names=(names, "M"),
        **{name: (array, "M") for name, array in values.items()},
        belief_interval=(belief_interval, "M 2"),
        noise_interval=(noise_interval, "M 2"),
    )
    for name, array in values.items():
        check_finite(name, array)
    places = np.arange(len(names))
    figure = new_figure(max(3.0, 1.1 + 0.75 * len(names)), 3.0)
    axes = figure.add_subplot()
    known = belief_interval is not None and noise_interval is not None
    for shift, heights, spread, interval, color, label in (
        (-0.19, belief, belief_std, belief_interval, BLUE, "IDs"),
        (0.19, noise, noise_std, noise_interval, "#b3b3b3", "noise of the same norm"),
    ):
        # A share cannot leave 0 to 1, whatever its standard deviation.
        bounds = np.stack([np.minimum(spread, heights), np.minimum(spread, 1 - heights)])
        if known and interval is not None:
            bounds = np.abs(interval.T - heights)
        axes.bar(
            places + shift,
            heights,
            0.36,
            yerr=bounds,
            color=color,
            label=label,
            ecolor=INK,
            capsize=2.5,
            error_kw={"elinewidth": 0.9},
        )
        for place, height, up in zip(places + shift, heights, bounds[1], strict=True):
            axes.annotate(
                f"{100 * height:.0f}",
                (place, height + up),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
            )
    tilted = len(names) > 4 or max(map(len, names)) > 12
    axes.set_xticks(places, names, rotation=35 if tilted else 0, ha="right" if tilted else "center")
    axes.tick_params(axis="x", length=0)
    axes.set(ylim=(0, 1.1), ylabel="beliefs swapped", xlim=(-0.6, len(names) - 0.4))
    axes.set_yticks(np.linspace(0, 1, 6))
    shares(axes.yaxis)
    chance_line(axes)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.0)
    whiskers = f"whiskers: {WILSON}" if known else "whiskers: one standard deviation over the best layers"
    return captioned(figure, about, "bars: mean of the best layers", whiskers, CHANCE)


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
        accuracy: share of correct answers without steering.
        drop: how much of it steering takes away, the mean over the steered layers.
        accuracy_interval: lower and upper bound (95 %) of `accuracy`, drawn as whiskers.
        about: what was measured on what.
    """
    check_shapes(
        names=(names, "M"), accuracy=(accuracy, "M"), drop=(drop, "M"), accuracy_interval=(accuracy_interval, "M 2")
    )
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
    shares(axes.xaxis, axes.yaxis)
    whiskers = "" if accuracy_interval is None else f"whiskers: {WILSON}, cut at the panel's edge"
    captioned(figure, about, "drop: mean over layers", whiskers, "chance: 50 %")
    name_points(axes, names, accuracy, drop)
    return finished(figure)
