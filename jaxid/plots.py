"""The figures: plain arrays in, a Matplotlib `Figure` out, in one house style; `save` writes it as PNG.

No function touches pyplot or leaves a setting changed. Arrays that do not fit each other raise `InputError`.
Layers are decoder blocks counted from 0; log-probabilities are in nats.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxid.errors import InputError, OutputError
from jaxid.results import whole_file

# Okabe and Ito's palette, which colour-blind readers can tell apart, in the order in which it is used.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b5578f"
INK, GREY, RULE = "#262626", "#767676", "#d9d9d9"
_CELLS = 4  # columns and rows of the grid
_TICKS = {"color": GREY, "labelcolor": INK, "labelsize": 8}

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlepad": 7,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "ytick.major.size": 0,
} | {f"{axis}tick.{part}": value for axis in "xy" for part, value in _TICKS.items()}


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, 200 pixels an inch, atomically; makes missing folders.

    Raises:
        OutputError: The name does not end in `.png`, or the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(f"{path} cannot be written: figures are PNG files, so the name must end in .png.")
    with whole_file(path) as temporary, rc_context(_STYLE):
        figure.savefig(temporary, format="png", dpi=200)


@rc_context(_STYLE)
def scenes_with_answers(
    pictures: UInt8[np.ndarray, "N Y X 3"], questions: Sequence[str], answers: Sequence[str], truths: Sequence[str]
) -> Figure:
    """A contact sheet, four scenes to a row: each with its question and the model's answer.

    A right answer has a green tick; a wrong one a red cross and the truth behind it.

    Args:
        pictures: the scenes; a dozen fit well.
        questions: one a picture.
        answers: what the model answered.
        truths: the right answers.

    Raises:
        InputError: There are no pictures, or not as many pictures as questions, answers and truths.
    """
    _check_shapes(
        pictures=(pictures, "N Y X 3"), questions=(questions, "N"), answers=(answers, "N"), truths=(truths, "N")
    )
    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure = _new_figure(1.85 * columns, 2.5 * rows)
    items = zip(pictures, questions, answers, truths, strict=True)
    for number, (picture, question, answer, truth) in enumerate(items, start=1):
        axes = figure.add_subplot(rows, columns, number)
        axes.imshow(picture, interpolation="lanczos")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        # A model may answer "$", which is no formula, or with blanks.
        plain: dict[str, Any] = {"parse_math": False, "loc": "left"}
        axes.set_title(textwrap.fill(question, 27), fontsize=7.5, pad=5, **plain)
        right, shown = answer == truth, " ".join(answer.split()) or "nothing"
        verdict = f"✓ {shown}" if right else f"✗ {shown} (truth: {truth})"
        color = GREEN if right else VERMILLION
        axes.set_xlabel(verdict, color=color, weight="bold", labelpad=4, **plain)
    return _finished(figure)


@rc_context(_STYLE)
def id_plane(
    coordinates: Float[np.ndarray, "4 4 2"], words: Mapping[str, Float[np.ndarray, "2"]], title: str
) -> Figure:
    """The 16 cells of one object in the plane of the two axes ([ID] arXiv 2601.12626, Figure 5).

    A column's cells are joined in the column's colour, a row's by a grey line; the y-axis runs down, as in the
    picture. Words much shorter or longer than the lattice are all drawn at one other scale, which is noted.

    Args:
        coordinates: cell (x, y) -> coordinates along the x-axis and the y-axis, in units of the activations.
        words: word -> its coordinates in the same plane, e.g. of "left" and "right"; may be empty.
        title: above the figure, e.g. the object and the block.

    Raises:
        InputError: The coordinates are not Float[4, 4, 2], or a word's are not Float[2].
    """
    _check_shapes(coordinates=(coordinates, "4 4 2"), **{f"word {word!r}": (at, "2") for word, at in words.items()})
    figure = _new_figure(4.8, 4.5)
    axes = figure.add_subplot()
    axes.grid(False)
    axes.axhline(0, color=RULE, linewidth=0.8, zorder=0)
    axes.axvline(0, color=RULE, linewidth=0.8, zorder=0)
    halo = [withStroke(linewidth=2, foreground="white")]
    for y in range(_CELLS):
        axes.plot(*coordinates[:, y].T, color=GREY, linewidth=0.8, alpha=0.7, zorder=1)
    for x, color in enumerate(_gradient(_CELLS)):
        axes.plot(*coordinates[x].T, color=color, marker="o", markersize=7, markeredgecolor="white")
        for y in range(_CELLS):
            label = axes.annotate(f"({x}, {y})", _pair(coordinates[x, y]), (5, 5), textcoords="offset points")
            label.set(fontsize=7.5, color=color, path_effects=halo, zorder=4)
    scale = _word_scale(coordinates, words)
    for word, at in words.items():
        tip = np.asarray(at, float) * scale
        length = max(float(np.linalg.norm(tip)), 1e-12)
        away = tip / length
        # Names stand beyond the cells, where nothing else is written; a dotted line leads there.
        beyond = away * max(1.08 * length, 1.3 * float((coordinates @ away).max()))
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", _pair(tip), (0, 0), arrowprops=arrow, zorder=1.5)
        axes.plot(*np.stack([tip, beyond]).T, color=INK, linewidth=1, linestyle=":", zorder=1.5)
        label = axes.annotate(
            word,
            _pair(beyond),
            (4 * away[0], -4 * away[1]),  # offsets point up, the axis runs down
            textcoords="offset points",
            ha="left" if away[0] > 0.4 else "right" if away[0] < -0.4 else "center",
            va="bottom" if away[1] < -0.4 else "top" if away[1] > 0.4 else "center",
        )
        label.set(weight="bold", fontsize=9.5, path_effects=halo, zorder=4)
    note = f"\nwords' arrows at {scale:g} of their length" if scale != 1 else ""
    axes.set(xlabel=f"x-axis coordinate{note}", ylabel="y-axis coordinate (down)", title=title)
    axes.margins(0.22 if words else 0.1)
    axes.set_aspect("equal", adjustable="datalim")
    axes.invert_yaxis()
    return _finished(figure)


@rc_context(_STYLE)
def variance_by_layer(
    two_axis: Float[np.ndarray, "L"],
    row_share: Float[np.ndarray, "L"],
    column_share: Float[np.ndarray, "L"],
    agreement: Float[np.ndarray, "L"],
) -> Figure:
    """How much of the IDs' variance the two axes hold, block by block, and how alike two objects' IDs are.

    Args:
        two_axis: share of the variance that lies in the plane of the two axes, 0 to 1.
        row_share: share that the row (y) accounts for.
        column_share: share that the column (x) accounts for.
        agreement: mean cosine between two objects' IDs of the same cell.

    Raises:
        InputError: The four differ in length, or are empty.
    """
    shares_of = {"two_axis": two_axis, "row_share": row_share, "column_share": column_share}
    _check_shapes(**{name: (values, "L") for name, values in (shares_of | {"agreement": agreement}).items()})
    layers = np.arange(len(two_axis))
    figure = _new_figure(7.6, 2.9)
    shares, alike = figure.subplots(1, 2)
    named = {"the two axes": (two_axis, INK), "column (x)": (column_share, BLUE), "row (y)": (row_share, VERMILLION)}
    for values, color in named.values():
        shares.plot(layers, values, color=color, marker="o")
    shares.set(title="Variance of the IDs explained by", ylim=(0, 1.02))
    shares.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label_ends(shares, layers, {name: (values[-1], color) for name, (values, color) in named.items()})
    alike.plot(layers, agreement, color=GREEN, marker="o")
    alike.set(title="Agreement of two objects' IDs (cosine)", ylim=(min(0, 1.1 * float(np.min(agreement))), 1.02))
    for axes in (shares, alike):
        _block_axis(axes)
    return _finished(figure)


@rc_context(_STYLE)
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

    Raises:
        InputError: The arrays do not fit each other, only some of the three over factors are given, or a
            factor is not above 0.
    """
    _check_shapes(
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
    over_factors = [values for values in (factors, belief_by_factor, noise_by_factor) if values is not None]
    if len(over_factors) not in (0, 3):
        raise InputError("factors, belief_by_factor and noise_by_factor go together: give all three or none.")
    if factors is not None and np.min(factors) <= 0:
        raise InputError(f"factors must be above 0 for their logarithmic axis, not {np.min(factors):g}.")
    relations = len(relation_names)
    panels = relations + (relations > 1) + bool(over_factors)
    figure = _new_figure(2.35 * panels + 0.4, 2.75)
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
        _block_axis(axes, "" if factor is None else f", at factor {factor:g}")
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
    last = row[-1].get_lines()
    names = ["IDs", "noise of the same norm"]
    figure.legend([last[1], last[0]], names, loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    return _finished(figure)


@rc_context(_STYLE)
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
    _check_shapes(layers=(layers, "L"), change_first=(change_first, "L 4"), change_second=(change_second, "L 4"))
    _check_shapes(words=(words, "2"))
    colors = _gradient(len(layers))
    figure = _new_figure(6.6, 3.0)
    pair = figure.subplots(1, 2, sharey=True)
    for axes, change, word in zip(pair, (change_first, change_second), words, strict=True):
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        for values, color in zip(change, colors, strict=True):
            axes.plot(range(_CELLS), values, color=color, marker="o")
        axes.set(title=f"“{word}”", xlabel=f"subject steered to {along}", xticks=range(_CELLS), xlim=(-0.2, 3.2))
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
    return _finished(figure)


@rc_context(_STYLE)
def steering_map(change: Float[np.ndarray, "4 4 2"], words: Sequence[str], layer: int) -> Figure:
    """Which answer steering to each of the 16 cells favours, at one block ([ID] arXiv 2601.12626, Figure 6).

    Args:
        change: log p(steered) - log p(control) of both words, by cell (x, y).
        words: the two words.
        layer: the block.

    Raises:
        InputError: `change` is not Float[4, 4, 2], or there are not two words.
    """
    _check_shapes(change=(change, "4 4 2"), words=(words, "2"))
    preference = (change[..., 0] - change[..., 1]).T  # rows of the picture run down
    limit = max(float(np.abs(preference).max()), 1e-12)
    figure = _new_figure(4.0, 3.5)
    axes = figure.add_subplot()
    image = axes.imshow(preference, cmap="PuOr", vmin=-limit, vmax=limit)
    for (y, x), value in np.ndenumerate(preference):
        color = "white" if abs(value) > 0.6 * limit else INK
        axes.text(x, y, f"{value:+.2f}", ha="center", va="center", color=color, fontsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="column", ylabel="row", xticks=range(_CELLS), yticks=range(_CELLS))
    axes.set_title(f"Subject steered to each cell, block {layer}")
    bar = figure.colorbar(image, ax=axes, aspect=26, label=f"change of log p({words[0]}) - log p({words[1]})")
    bar.outline.set_visible(False)
    return _finished(figure)


@rc_context(_STYLE)
def swap_scores(scores: Mapping[str, Float[np.ndarray, "L B 2"]], words: Sequence[str]) -> Figure:
    """How far swapped activations carry the answers, by block ([ID] arXiv 2601.12626, Figure 4).

    One panel an answer word; lines are means over items, bands one standard deviation to each side. Bands may
    leave the panel: the score of an item whose answers hardly change is a quotient of two small numbers.

    Args:
        scores: token set ("image", "text", "words", or others) -> score by block, item and word; 0 where the
            answer stays that of the control run, 1 where it becomes that of the other picture.
        words: the two words.

    Raises:
        InputError: The scores are empty, of different shapes, not of two words, or of more than four token sets.
    """
    colors = (BLUE, VERMILLION, GREEN, PURPLE)
    names = {"image": "image tokens", "text": "text tokens", "words": "the two words"}
    if not 1 <= len(scores) <= len(colors):
        raise InputError(f"scores holds {len(scores)} token sets; from one to {len(colors)} can be drawn.")
    _check_shapes(words=(words, "2"), **{f"scores[{name!r}]": (values, "L B 2") for name, values in scores.items()})
    means = {name: values.mean(axis=1) for name, values in scores.items()}
    layers = np.arange(len(next(iter(means.values()))))
    low = min(-0.2, *(float(mean.min()) - 0.1 for mean in means.values()))
    high = max(1.2, *(float(mean.max()) + 0.1 for mean in means.values()))
    figure = _new_figure(7.4, 2.9)
    pair = figure.subplots(1, 2, sharey=True)
    for number, (axes, word) in enumerate(zip(pair, words, strict=True)):
        for (name, values), color in zip(scores.items(), colors, strict=False):
            mean, spread = means[name][:, number], values[..., number].std(axis=1)
            axes.fill_between(layers, mean - spread, mean + spread, color=color, alpha=0.14, linewidth=0)
            axes.plot(layers, mean, color=color, marker="o")
        axes.set(title=f"“{word}”", ylim=(low, high))
        _block_axis(axes)
    drawn = zip(means.items(), colors, strict=False)
    _label_ends(pair[1], layers, {names.get(name, name): (mean[-1, 1], color) for (name, mean), color in drawn})
    pair[0].set_ylabel("swap score")
    return _finished(figure)


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _finished(figure: Figure) -> Figure:
    """The figure laid out once: what Matplotlib makes late (ticks) is then in the house style too."""
    figure.draw_without_rendering()
    return figure


def _gradient(count: int) -> list[tuple[float, float, float, float]]:
    """`count` colours that rank, dark to light, none too pale for lines on white."""
    return [colormaps["viridis"](place) for place in np.linspace(0.05, 0.8, count)]


def _pair(point: np.ndarray) -> tuple[float, float]:
    """A point as Matplotlib's annotations want it."""
    return float(point[0]), float(point[1])


def _block_axis(axes: Axes, note: str = "") -> None:
    axes.set_xlabel(f"block{note}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _word_scale(coordinates: np.ndarray, words: Mapping[str, np.ndarray]) -> float:
    """1 where the words fit the lattice; else one figure that makes the longest about as long as the lattice."""
    longest = max((float(np.linalg.norm(at)) for at in words.values()), default=0.0)
    lattice = float(np.linalg.norm(coordinates, axis=-1).max())
    if longest == 0 or lattice == 0 or 0.4 <= longest / lattice <= 1.5:
        return 1.0
    return float(f"{lattice / longest:.1g}")


def _label_ends(axes: Axes, x: np.ndarray, ends: Mapping[str, tuple[Any, str]]) -> None:
    """Names lines to the right of their last point, moved apart where they would overlap; set the limits first."""
    bottom, top = axes.get_ylim()
    gap = 0.08 * (top - bottom)
    ranked = sorted(ends, key=lambda name: ends[name][0])
    heights = [min(max(float(ends[name][0]), bottom), top) for name in ranked]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + gap)
    ceiling = top
    for number in reversed(range(len(heights))):
        heights[number] = min(heights[number], ceiling)
        ceiling = heights[number] - gap
    for name, height in zip(ranked, heights, strict=True):
        at, color = (float(x[-1]), height), ends[name][1]
        label = axes.annotate(name, at, (8, 0), textcoords="offset points", va="center", color=color)
        label.set_annotation_clip(False)


def _check_shapes(**arrays: tuple[np.ndarray | Sequence[str] | None, str]) -> None:
    """Checks arrays (or lists; None is let pass) against shapes in which a letter is one size above 0 throughout."""
    sizes: dict[str, int] = {}
    for name, (array, shape) in arrays.items():
        if array is None:
            continue
        found = np.shape(array)
        letters = shape.split()
        fits = len(found) == len(letters) and all(
            length > 0 and length == (int(letter) if letter.isdigit() else sizes.setdefault(letter, length))
            for letter, length in zip(letters, found, strict=True)
        )
        if not fits:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in letters)
            raise InputError(
                f"{name} is {list(found)}; this figure needs [{', '.join(letters)}]"
                f"{f' with {known}' if known else ''}, nothing empty."
            )
