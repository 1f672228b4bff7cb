"""Figures of steering to every cell (Figures 6 and 7)."""

import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from jaxid.plots.style import (
    BLUE,
    CELLS,
    GREY,
    INK,
    STYLE,
    VERMILLION,
    block_axis,
    check_shapes,
    finished,
    gradient,
    label_ends,
    new_figure,
)


@rc_context(STYLE)
def steering_by_column(
    layers: Int[np.ndarray, "L"],
    change_first: Float[np.ndarray, "L 4"],
    change_second: Float[np.ndarray, "L 4"],
    words: Sequence[str] = ("left", "right"),
    along: str = "column",
) -> Figure:
    """What steering the subject to each column does to both answers ([ID] arXiv 2601.12626, Figure 6).

    One panel an answer word, one line a block, from dark (early) to light (late).

    Args:
        layers: the blocks, rising.
        change_first: log p(steered) - log p(control) of the first word, by block and column.
        change_second: likewise of the second word.
        words: the two words.
        along: "column" or "row": what the subject was steered along.

    Raises:
        InputError: The arrays do not fit each other, or there are not two words.
    """
    check_shapes(layers=(layers, "L"), change_first=(change_first, "L 4"), change_second=(change_second, "L 4"))
    check_shapes(words=(words, "2"))
    colors = gradient(len(layers))
    figure = new_figure(6.6, 3.0)
    pair = figure.subplots(1, 2, sharey=True)
    for axes, change, word in zip(pair, (change_first, change_second), words, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        for values, color in zip(change, colors, strict=True):
            axes.plot(range(CELLS), values, color=color, marker="o")
        axes.set(title=f"“{word}”", xlabel=f"subject steered to {along}", xticks=range(CELLS), xlim=(-0.2, 3.2))
    pair[0].set_ylabel("change of log p")
    step = -(-len(layers) // 12)  # no more than a dozen blocks are named
    bar = figure.colorbar(
        ScalarMappable(BoundaryNorm(np.arange(len(layers) + 1) - 0.5, len(layers)), ListedColormap(colors)),
        ax=pair,
        ticks=range(0, len(layers), step),
        aspect=26,
        label="block",
    )
    bar.minorticks_off()
    bar.ax.set_yticklabels([str(layer) for layer in layers[::step]])
    bar.outline.set_visible(False)
    return finished(figure)


@rc_context(STYLE)
def steering_map(change: Float[np.ndarray, "4 4 2"], words: Sequence[str], layer: int) -> Figure:
    """Which answer steering to each of the 16 cells favours, at one block ([ID] arXiv 2601.12626, Figure 6).

    Args:
        change: log p(steered) - log p(control) of both words, by cell (x, y).
        words: the two words.
        layer: the block.

    Raises:
        InputError: `change` is not Float[4, 4, 2], or there are not two words.
    """
    check_shapes(change=(change, "4 4 2"), words=(words, "2"))
    preference = (change[..., 0] - change[..., 1]).T  # rows of the picture run down
    limit = max(float(np.abs(preference).max()), 1e-12)
    figure = new_figure(4.0, 3.5)
    axes = figure.add_subplot()
    image = axes.imshow(preference, cmap="PuOr", vmin=-limit, vmax=limit)
    for (y, x), value in np.ndenumerate(preference):
        color = "white" if abs(value) > 0.6 * limit else INK
        axes.text(x, y, f"{value:+.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="column", ylabel="row", xticks=range(CELLS), yticks=range(CELLS))
    axes.set_title(f"Subject steered to each cell, block {layer}")
    bar = figure.colorbar(image, ax=axes, aspect=26, label=f"change of log p({words[0]}) - log p({words[1]})")
    bar.outline.set_visible(False)
    return finished(figure)


@rc_context(STYLE)
def steering_maps(change: Float[np.ndarray, "4 4 2"], words: Sequence[str], title: str = "") -> Figure:
    """What steering the subject to each of the 16 cells does to both answers ([ID] arXiv 2601.12626, Figure 6 a-c).

    Args:
        change: log p(steered) - log p(control) by cell (x, y) and word.
        words: the two words.
        title: above the figure.

    Raises:
        InputError: `change` is not Float[4, 4, 2], or there are not two words.
    """
    check_shapes(change=(change, "4 4 2"), words=(words, "2"))
    limit = max(float(np.abs(change).max()), 1e-12)
    figure = new_figure(6.4, 3.3 + 0.16 * title.count("\n"))
    pair = figure.subplots(1, 2, sharey=True)
    image = None
    for number, (axes, word) in enumerate(zip(pair, words, strict=True)):
        image = axes.imshow(change[..., number].T, cmap="PuOr", vmin=-limit, vmax=limit)
        for (y, x), value in np.ndenumerate(change[..., number].T):
            color = "white" if abs(value) > 0.6 * limit else INK
            axes.text(x, y, f"{value:+.2f}", ha="center", va="center", color=color, fontsize=8)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set(title=f"“{word}”", xlabel="column", xticks=range(CELLS), yticks=range(CELLS))
    pair[0].set_ylabel("row")
    bar = figure.colorbar(image, ax=pair, aspect=26, label="change of log p")
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, parse_math=False)
    return finished(figure)


@rc_context(STYLE)
def steering_by_layer(
    layers: Int[np.ndarray, "L"],
    change: Float[np.ndarray, "L 2"],
    words: Sequence[str],
    *,
    picture: UInt8[np.ndarray, "Y X 3"] | None = None,
    title: str = "",
) -> Figure:
    """One picture steered at every block in turn ([ID] arXiv 2601.12626, Figure 6 d).

    Args:
        layers: the blocks.
        change: log p(steered) - log p(control) by block and word.
        words: the two words.
        picture: shown beside the curves.
        title: the question.

    Raises:
        InputError: The arrays do not fit each other, or there are not two words.
    """
    check_shapes(layers=(layers, "L"), change=(change, "L 2"), words=(words, "2"))
    figure = new_figure(4.6 if picture is None else 6.6, 2.8)
    if picture is None:
        axes = figure.add_subplot()
        axes.set_title(title, parse_math=False)
    else:
        shown, axes = figure.subplots(1, 2, width_ratios=(1, 2.1))
        shown.imshow(picture, interpolation="lanczos")
        shown.set(xticks=[], yticks=[])
        shown.spines[:].set_visible(False)
        shown.set_xlabel(textwrap.fill(title, 26), parse_math=False)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    for number, color in enumerate((BLUE, VERMILLION)):
        axes.plot(layers, change[:, number], color=color, marker="o")
    axes.set_ylabel("change of log p")
    block_axis(axes, " steered")
    label_ends(axes, layers, {word: (change[-1, n], (BLUE, VERMILLION)[n]) for n, word in enumerate(words)})
    return finished(figure)


@rc_context(STYLE)
def depth_by_row(
    layers: Int[np.ndarray, "L"],
    height: Float[np.ndarray, "L 4 2"],
    depth: Float[np.ndarray, "L 4 2"],
    height_words: Sequence[str],
    depth_words: Sequence[str],
) -> Figure:
    """Steering along the vertical axis under two questions ([ID] arXiv 2601.12626, Figure 7).

    A panel a question: the change of log p(first word) - log p(second word), by the row steered to; a line a block.

    Args:
        layers: the blocks.
        height: change of log-probability under the question about height, by block, row and word.
        depth: likewise under the question about depth.
        height_words: the two words of the one.
        depth_words: the two words of the other.

    Raises:
        InputError: The arrays do not fit each other, or there are not two words each.
    """
    check_shapes(layers=(layers, "L"), height=(height, "L 4 2"), depth=(depth, "L 4 2"))
    check_shapes(height_words=(height_words, "2"), depth_words=(depth_words, "2"))
    figure = new_figure(6.8, 3.0)
    pair = figure.subplots(1, 2, sharey=True)
    colors = gradient(len(layers))
    panels = {"height": (height, height_words), "depth": (depth, depth_words)}
    for axes, (name, (change, words)) in zip(pair, panels.items(), strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        for values, color, layer in zip(change, colors, layers, strict=True):
            axes.plot(range(CELLS), values[:, 0] - values[:, 1], color=color, marker="o", label=f"block {layer}")
        axes.set(title=f"{name}: “{words[0]}” over “{words[1]}”", xlabel="subject steered to row", xticks=range(CELLS))
    pair[0].set_ylabel("change of the log-ratio")
    shown = slice(None) if len(layers) <= 6 else slice(None, None, -(-len(layers) // 6))
    figure.legend(handles=pair[0].get_lines()[1:][shown], loc="outside right center", frameon=False, handlelength=1.4)
    return finished(figure)
