"""Figures of dense similarity maps: maps over the picture, training curves, benchmarks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.plots.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    PURPLE,
    STYLE,
    VERMILLION,
    WILSON,
    About,
    captioned,
    check_shapes,
    color_bar,
    finite,
    new_figure,
    wrapped,
)

_SHOWN_TOKENS = 9
"""Most caption tokens that a row of maps shows."""


@rc_context(STYLE)
def caption_maps(
    picture: UInt8[np.ndarray, "Y X 3"],
    maps: Float[np.ndarray, "M I T"],
    tokens: Sequence[Sequence[tuple[int, str, bool]]],
    captions: Sequence[str],
    scores: Float[np.ndarray, "M"],
    cosines: Float[np.ndarray, "M"],
    grid: tuple[int, int],
    *,
    about: About | None = None,
) -> Figure:
    """Heat maps of the picture for every caption token ([DCSM] arXiv 2503.08723, Figure 1).

    One row a caption, one panel a token; functional words, whose columns are fixed, are named in grey without a map.

    Args:
        picture: as the encoder sees it.
        maps: cosine of image and caption tokens.
        tokens: of every caption: column, text, and whether the word is functional.
        captions: the texts.
        scores: of every caption.
        cosines: of the pooled picture and every caption.
        grid: first patch among the image tokens, and patches a side.
        about: what was measured on what.

    Raises:
        InputError: The image tokens do not form a grid of patches.
    """
    check_shapes(
        maps=(maps, "M I T"),
        tokens=([""] * len(tokens), "M"),
        captions=(captions, "M"),
        scores=(scores, "M"),
        cosines=(cosines, "M"),
    )
    first, side = grid
    if first + side * side != maps.shape[1]:
        raise InputError(f"{maps.shape[1]} image tokens are not {first} and {side} x {side} patches.")
    columns = min(_SHOWN_TOKENS, max(len(row) for row in tokens))
    patches = maps[:, first:].reshape(len(maps), side, side, -1)
    shown = [[column for column, _, functional in row[:columns] if not functional] for row in tokens]
    values = np.concatenate([patches[row][..., chosen].ravel() for row, chosen in enumerate(shown)])
    check_finite("the maps", values)
    check_finite("the scores", scores)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    figure = new_figure(1.75 + 0.85 * columns, 0.2 + 0.98 * len(maps))
    axes = figure.subplots(len(maps), columns + 1, squeeze=False, width_ratios=[1.7] + [1.0] * columns)
    heat = ScalarMappable(Normalize(low, high), "magma")
    best = int(np.argmax(scores))
    for row, (line, caption) in enumerate(zip(axes, captions, strict=True)):
        for panel in line:
            panel.set_axis_off()
        weight = "bold" if row == best else "normal"
        text = f"{wrapped(caption, 24)}\nscore {scores[row]:+.2f}   cosine {cosines[row]:.3f}"
        line[0].text(0, 0.5, text, va="center", ha="left", fontsize=7.5, weight=weight, transform=line[0].transAxes)
        for panel, (column, word, functional) in zip(line[1:], tokens[row], strict=False):
            color = GREY if functional else INK
            panel.set_title(word, loc="center", fontsize=7.5, color=color, pad=3)
            panel.set_box_aspect(1)
            if functional:
                panel.text(0.5, 0.5, "fixed\nvector", ha="center", va="center", fontsize=6.5, color=GREY)
                continue
            panel.imshow(picture, extent=(0, side, side, 0))
            panel.imshow(
                patches[row, :, :, column], extent=(0, side, side, 0), cmap="magma", vmin=low, vmax=high, alpha=0.72
            )
    color_bar(figure, heat, axes[:, -1].tolist(), "cosine of patch and word", fraction=0.12, pad=0.04)
    return captioned(figure, about, "bold: the greatest score")


@rc_context(STYLE)
def training_curves(
    epoch: Float[np.ndarray, "N"],
    loss: Float[np.ndarray, "N"],
    accuracy: Float[np.ndarray, "N"],
    *,
    about: About | None = None,
) -> Figure:
    """Loss and accuracy of a scorer's training, as recorded and as running means.

    Args:
        epoch: passes over the largest data set.
        loss: both directions' cross-entropy.
        accuracy: share of pictures whose caption scores highest in the batch.
        about: what was trained on what.
    """
    check_shapes(epoch=(epoch, "N"), loss=(loss, "N"), accuracy=(accuracy, "N"))
    (loss, accuracy), lost = finite(loss=loss, accuracy=accuracy)
    figure = new_figure(6.6, 2.6)
    window = max(1, len(epoch) // 25)
    for axes, values, title, color in zip(
        figure.subplots(1, 2),
        (loss, accuracy),
        ("two-way cross-entropy", "correct within the batch"),
        (BLUE, GREEN),
        strict=True,
    ):
        # A line of few points is hard to see, and one point is no line.
        axes.plot(epoch, values, ".-" if len(epoch) < 25 else "-", color=color, alpha=0.4, linewidth=0.8)
        mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
        axes.plot(epoch[window - 1 :], mean, color=color)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_ylim(0, 1 if values is accuracy else None)
        axes.set_xlim(0, 1.02 * float(epoch.max()) or 1)
    means = f"dark: running means of {window} records" if window > 1 else ""
    return captioned(figure, about, f"{len(epoch)} records, each of one batch", means, lost)


@rc_context(STYLE)
def benchmark_bars(
    names: Sequence[str],
    benchmarks: Sequence[str],
    accuracy: Float[np.ndarray, "R B"],
    interval: Float[np.ndarray, "R 2 B"],
    *,
    chance: Sequence[float] | None = None,
    about: About | None = None,
) -> Figure:
    """Shares of correct answers, a group of bars for every benchmark, with 95 % intervals.

    Args:
        names: of the rows: model and method.
        benchmarks: of the columns.
        accuracy: NaN where there is none.
        interval: lower and upper ends.
        chance: what guessing would give in each benchmark.
        about: what was measured on what.
    """
    check_shapes(
        names=(names, "R"),
        benchmarks=(benchmarks, "B"),
        accuracy=(accuracy, "R B"),
        interval=(interval, "R 2 B"),
        chance=(chance, "B"),
    )
    figure = new_figure(max(4.2, 1.4 + 0.22 * accuracy.size + 0.4 * len(benchmarks)), 3.2)
    axes = figure.subplots()
    width = 0.8 / len(names)
    palette = [GREY, BLUE, VERMILLION, GREEN, PURPLE, INK]
    for row, name in enumerate(names):
        x = np.arange(len(benchmarks)) + (row - (len(names) - 1) / 2) * width
        error = np.abs(interval[row] - accuracy[row])
        axes.bar(
            x,
            accuracy[row],
            0.92 * width,
            color=palette[row % len(palette)],
            label=name,
            yerr=error,
            error_kw={"elinewidth": 0.8, "ecolor": INK},
        )
    if chance is not None:
        places = np.arange(len(benchmarks))
        axes.hlines(chance, places - 0.47, places + 0.47, colors=INK, linestyles="dotted", linewidth=1.2)
    axes.set_xticks(np.arange(len(benchmarks)), [wrapped(name.replace("-", " "), 12) for name in benchmarks])
    axes.set_ylim(0, 1)
    axes.set_ylabel("correct answers")
    figure.legend(loc="outside upper center", ncols=min(2, len(names)), frameon=False)
    guess = "" if chance is None else "dotted: chance"
    return captioned(figure, about, "bars: share of questions answered correctly", f"whiskers: {WILSON}", guess)
