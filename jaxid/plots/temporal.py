"""Figures of time in video models (Figure 10): IDs along a line, and steering over frames."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib import rc_context
from matplotlib.figure import Figure

from jaxid.checks import check_finite
from jaxid.plots.style import (
    BLUE,
    GREY,
    INK,
    STYLE,
    VERMILLION,
    About,
    captioned,
    check_shapes,
    curve,
    finite,
    finite_items,
    gradient,
    label_ends,
    layer_axis,
    new_figure,
    zero_line,
)


@rc_context(STYLE)
def temporal_line(
    coordinates: Float[np.ndarray, "L F"],
    frames: Int[np.ndarray, "F"],
    words: Mapping[str, Float[np.ndarray, "L"]],
    order: Float[np.ndarray, "L"],
    best: int,
    title: str = "",
    *,
    about: About | None = None,
) -> Figure:
    """Temporal IDs along their first principal component ([ID] arXiv 2601.12626, Figure 10 b).

    Left, one layer: where each frame's ID lies, with the words; right, the rank correlation with the frame by layer.

    Args:
        coordinates: 0 as the earliest, 1 as the latest, by layer and frame.
        frames: their indices.
        words: coordinates of words by layer.
        order: Spearman's rank correlation by layer.
        best: the layer on the left.
        title: of the figure.
        about: what was measured on what.
    """
    check_shapes(
        coordinates=(coordinates, "L F"),
        frames=(frames, "F"),
        order=(order, "L"),
        **{f"word {word!r}": (at, "L") for word, at in words.items()},
    )
    check_finite(f"coordinates, layer {best},", coordinates[best])
    for word, at in words.items():
        check_finite(f"word {word!r}, layer {best},", at[best])
    (order,), gaps = finite(order=order)
    figure = new_figure(7.4, 2.6)
    left, right = figure.subplots(1, 2, width_ratios=[1.7, 1.0])
    colors = gradient(len(frames))
    zero_line(left)
    for index, (at, frame) in enumerate(zip(coordinates[best], frames, strict=True)):
        left.plot([at], [0], marker="o", markersize=9, color=colors[index])
        # Neighbours may lie close to each other: their indices stand at different heights.
        left.annotate(
            str(frame), (at, 0), (0, 9 + 11 * (index % 2)), textcoords="offset points", ha="center", color=INK
        )
    # Words that lie close to each other are named to both sides.
    ranked = sorted(words, key=lambda word: words[word][best])
    sides = dict(zip(ranked, ("right", "left"), strict=False))
    for (word, at), color in zip(words.items(), (VERMILLION, BLUE), strict=False):
        left.plot([at[best]], [0], marker="^", markersize=7, color=color)
        place = {"textcoords": "offset points", "ha": sides.get(word, "center"), "color": color}
        left.annotate(f"“{word}”", (at[best], 0), (0, -20), **place)
    left.set(ylim=(-1, 1), yticks=[], xlabel="early to late", title=f"{title}, layer {best}".strip(", "))
    left.grid(False)
    left.spines["left"].set_visible(False)
    left.margins(x=0.12)
    curve(right, np.arange(len(order)), order, BLUE)
    right.axvline(best, color=GREY, linewidth=0.8, linestyle=":")
    right.set(ylim=(min(-0.05, float(np.nanmin(order)) - 0.05), 1.05), ylabel="rank correlation", title="ID and frame")
    layer_axis(right)
    return captioned(figure, about, "circles: frames", "triangles: words" if words else "", gaps)


@rc_context(STYLE)
def temporal_steering(
    frames: Int[np.ndarray, "F"],
    changes: Float[np.ndarray, "F B 2"],
    words: Sequence[str],
    title: str = "",
    *,
    about: About | None = None,
) -> Figure:
    """Change of both answers as the second scene is pushed to each frame ([ID] arXiv 2601.12626, Figure 10 c).

    Args:
        frames: their indices.
        changes: of log-probability, by frame, item and word.
        words: the two words.
        title: of the figure.
        about: what was measured on what.
    """
    check_shapes(frames=(frames, "F"), changes=(changes, "F B 2"), words=(words, "2"))
    known, lost = finite_items(1, changes=changes)
    changes = changes[:, known]
    figure = new_figure(4.6, 2.9)
    axes = figure.subplots()
    mean, spread = changes.mean(axis=1), changes.std(axis=1)
    bands = np.stack([mean - spread, mean + spread], axis=-1)
    for index, color in enumerate((VERMILLION, BLUE)):
        curve(axes, frames, mean[:, index], color, bands[:, index])
    zero_line(axes)
    axes.set(xlabel="second scene steered to frame", ylabel="change of log p", title=title, xticks=frames)
    ends = zip(words, mean[-1], (VERMILLION, BLUE), strict=True)
    label_ends(axes, frames, {f"“{word}”": (float(end), color) for word, end, color in ends})
    meaning = "lines: means, bands: one standard deviation over items"
    return captioned(figure, about, meaning, lost, items=changes.shape[1])
