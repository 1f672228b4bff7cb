"""Figures of steering to every cell (Figures 6 and 7)."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from jaxid.errors import InputError
from jaxid.plots.style import (
    BLUE,
    CELLS,
    INK,
    RULE,
    STYLE,
    VERMILLION,
    About,
    captioned,
    check_shapes,
    color_bar,
    curve,
    finite,
    gradient,
    label_ends,
    last,
    layer_axis,
    new_figure,
    wrapped,
    zero_line,
)


@rc_context(STYLE)
def steering_by_column(
    layers: Int[np.ndarray, "L"],
    change_first: Float[np.ndarray, "L 4"],
    change_second: Float[np.ndarray, "L 4"],
    words: Sequence[str] = ("left", "right"),
    along: str = "column",
    *,
    about: About | None = None,
) -> Figure:
    """What steering the subject to each column does to both answers ([ID] arXiv 2601.12626, Figure 6).

    One panel an answer word, one line a layer, from dark (early) to light (late).

    Args:
        layers: ascending.
        change_first: log p(steered) - log p(control) of the first word, by layer and column.
        change_second: the same for the second word.
        words: the two words.
        along: "column" or "row": what the subject was steered along.
        about: what was measured on what.
    """
    check_shapes(
        layers=(layers, "L"),
        change_first=(change_first, "L 4"),
        change_second=(change_second, "L 4"),
        words=(words, "2"),
    )
    (change_first, change_second), gaps = finite(change_first=change_first, change_second=change_second)
    colors = gradient(len(layers))
    figure = new_figure(6.6, 3.0)
    pair = figure.subplots(1, 2, sharey=True)
    for axes, change, word in zip(pair, (change_first, change_second), words, strict=True):
        zero_line(axes)
        for values, color in zip(change, colors, strict=True):
            curve(axes, range(CELLS), values, color)
        axes.set(title=f"“{word}”", xlabel=f"subject steered to {along}", xticks=range(CELLS), xlim=(-0.2, 3.2))
    pair[0].set_ylabel("change of log p")
    step = -(-len(layers) // 12)  # no more than a dozen layers are named
    ranks = ScalarMappable(BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers)), ListedColormap(colors))
    bar = color_bar(figure, ranks, pair, "layer", ticks=range(0, len(layers), step))
    bar.minorticks_off()
    bar.ax.set_yticklabels([str(layer) for layer in layers[::step]])
    return captioned(figure, about, "lines: means over items", gaps)


@rc_context(STYLE)
def steering_map(
    change: Float[np.ndarray, "4 4 2"], words: Sequence[str], layer: int, *, about: About | None = None
) -> Figure:
    """Which answer steering to each of the 16 cells favours, at one layer ([ID] arXiv 2601.12626, Figure 6).

    Args:
        change: log p(steered) - log p(control) of both words, by cell (x, y).
        words: the two words.
        layer: the one layer.
        about: what was measured on what.
    """
    check_shapes(change=(change, "4 4 2"), words=(words, "2"))
    (preference,), gaps = finite(change=change[..., 0] - change[..., 1])
    figure = new_figure(4.0, 3.5)
    axes = figure.add_subplot()
    image = _cell_map(axes, preference, float(np.nanmax(np.abs(preference))))
    axes.set_ylabel("row")
    axes.set_title(f"Subject steered to each cell, layer {layer}")
    color_bar(figure, image, axes, f"change of log p({words[0]}) - log p({words[1]})")
    return captioned(figure, about, "cells: means over items", gaps)


@rc_context(STYLE)
def steering_maps(
    change: Float[np.ndarray, "4 4 2"],
    words: Sequence[str],
    title: str = "",
    *,
    marks: Mapping[str, tuple[int, int]] | None = None,
    about: About | None = None,
) -> Figure:
    """What steering the subject to each of the 16 cells does to both answers ([ID] arXiv 2601.12626, Figure 6 a-c).

    Args:
        change: log p(steered) - log p(control) by cell (x, y) and word.
        words: the two words.
        title: above the figure.
        marks: name -> cell (x, y) of objects that stay where they are; framed and named.
        about: what was measured on what.

    Raises:
        InputError: A marked cell is not on the grid.
    """
    check_shapes(change=(change, "4 4 2"), words=(words, "2"))
    marks = {} if marks is None else marks
    for name, cell in marks.items():
        if len(cell) != 2 or not all(0 <= place < CELLS for place in cell):
            raise InputError(f"{name!r} is marked at {cell}; cells are (column, row), each 0 to {CELLS - 1}.")
    (change,), gaps = finite(change=change)
    text = wrapped(title, 84)
    figure = new_figure(6.4, 3.05 + (0.1 + 0.16 * len(text.split("\n")) if title else 0))
    pair = figure.subplots(1, 2, sharey=True)
    limit = float(np.nanmax(np.abs(change)))
    images = [_cell_map(axes, change[..., number], limit) for number, axes in enumerate(pair)]
    for axes, word in zip(pair, words, strict=True):
        axes.set_title(f"“{word}”")
        for name, (x, y) in marks.items():
            frame = Rectangle((x - 0.45, y - 0.45), 0.9, 0.9, fill=False, edgecolor=INK, linewidth=1.2)
            frame.set_path_effects([withStroke(linewidth=3, foreground="white")])
            axes.add_patch(frame)
            label = axes.text(x, y + 0.29, textwrap.shorten(name, 12, placeholder="…"), ha="center", va="center")
            plate = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            label.set(fontsize=6, parse_math=False, bbox=plate)
    pair[0].set_ylabel("row")
    color_bar(figure, images[0], pair, "change of log p")
    if title:
        figure.suptitle(text, x=0.01, ha="left", fontsize=9.5, parse_math=False)
    return captioned(figure, about, gaps)


def _cell_map(axes: Axes, values: Float[np.ndarray, "4 4"], limit: float) -> AxesImage:
    """The grid in the orientation of the picture: a colour and a number for each cell (x, y), from -`limit` to `limit`.

    Cells without a value are grey and say "none".
    """
    limit = max(limit, 1e-12)
    image = axes.imshow(values.T, cmap=colormaps["PuOr"].with_extremes(bad=RULE), vmin=-limit, vmax=limit)
    for (x, y), value in np.ndenumerate(values):
        color = "white" if abs(value) > 0.6 * limit else INK
        number = f"{value:+.2f}" if np.isfinite(value) else "none"
        axes.text(x, y, number, ha="center", va="center", color=color, fontsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="column", xticks=range(CELLS), yticks=range(CELLS))
    return image


@rc_context(STYLE)
def steering_by_layer(
    layers: Int[np.ndarray, "L"],
    change: Float[np.ndarray, "L 2"],
    words: Sequence[str],
    *,
    picture: UInt8[np.ndarray, "Y X 3"] | None = None,
    title: str = "",
    about: About | None = None,
) -> Figure:
    """One picture steered at every layer in turn ([ID] arXiv 2601.12626, Figure 6 d).

    Args:
        layers: indices of the layers.
        change: log p(steered) - log p(control) by layer and word.
        words: the two words.
        picture: shown beside the curves.
        title: the question; placed below the picture when one is given, otherwise above the curves.
        about: what was measured on what.
    """
    check_shapes(layers=(layers, "L"), change=(change, "L 2"), words=(words, "2"))
    curves, gaps = finite(**{f"change of {word!r}": change[:, n] for n, word in enumerate(words)})
    figure = new_figure(4.6 if picture is None else 6.6, 2.8)
    if picture is None:
        axes = figure.add_subplot()
        axes.set_title(wrapped(title, 58), parse_math=False)
    else:
        shown, axes = figure.subplots(1, 2, width_ratios=(1, 2.1))
        shown.imshow(picture, interpolation="lanczos")
        shown.set(xticks=[], yticks=[])
        shown.spines[:].set_visible(False)
        shown.set_xlabel(wrapped(title, 26), parse_math=False)
    zero_line(axes)
    ends = {}
    for word, values, color in zip(words, curves, (BLUE, VERMILLION), strict=True):
        curve(axes, layers, values, color)
        ends[word] = last(values), color
    axes.set_ylabel("change of log p")
    layer_axis(axes, " steered")
    label_ends(axes, layers, ends)
    return captioned(figure, about, gaps)


@rc_context(STYLE)
def depth_by_row(
    layers: Int[np.ndarray, "L"],
    height: Float[np.ndarray, "L 4 2"],
    depth: Float[np.ndarray, "L 4 2"],
    height_words: Sequence[str],
    depth_words: Sequence[str],
    *,
    about: About | None = None,
) -> Figure:
    """Steering along the vertical axis under two questions ([ID] arXiv 2601.12626, Figure 7).

    A panel a question: the change of log p(first word) - log p(second word), by the row steered to; a line a layer.

    Args:
        layers: indices of the layers.
        height: change of log-probability under the question about height, by layer, row and word.
        depth: the same under the question about depth.
        height_words: the two words of the one.
        depth_words: the two words of the other.
        about: what was measured on what.
    """
    check_shapes(
        layers=(layers, "L"),
        height=(height, "L 4 2"),
        depth=(depth, "L 4 2"),
        height_words=(height_words, "2"),
        depth_words=(depth_words, "2"),
    )
    (height, depth), gaps = finite(height=height, depth=depth)
    figure = new_figure(6.8, 3.0)
    pair = figure.subplots(1, 2, sharey=True)
    colors = gradient(len(layers))
    panels = {"height": (height, height_words), "depth": (depth, depth_words)}
    for axes, (name, (change, words)) in zip(pair, panels.items(), strict=True):
        zero_line(axes)
        for values, color, layer in zip(change, colors, layers, strict=True):
            curve(axes, range(CELLS), values[:, 0] - values[:, 1], color, label=f"layer {layer}")
        axes.set(title=f"{name}: “{words[0]}” over “{words[1]}”", xlabel="subject steered to row", xticks=range(CELLS))
    pair[0].set_ylabel("change of the log-ratio")
    shown = slice(None) if len(layers) <= 6 else slice(None, None, -(-len(layers) // 6))
    figure.legend(handles=pair[0].get_lines()[1:][shown], loc="outside right center", frameon=False, handlelength=1.4)
    return captioned(figure, about, "lines: means over items and columns", gaps)
