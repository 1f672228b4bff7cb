"""The house style: colours, settings, and what the figures share; `save` writes a figure as PNG."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.patches import Polygon
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from jaxid.errors import InputError, OutputError
from jaxid.io import whole_file

# Okabe and Ito's palette, which colour-blind readers can tell apart, in the order in which it is used.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b5578f"
INK, GREY, RULE = "#262626", "#767676", "#d9d9d9"
CELLS = 4
"""Columns and rows of the grid."""

_CAPTION_SIZE, _CAPTION_LINE, _LETTERS = 6.5, 0.115, 18.5
"""Of the line below a figure: size in points, height of a line in inches, letters an inch."""

_NAMES: dict[str, Any] = {
    "force_text": (0.5, 0.5),
    "force_static": (0.2, 0.3),
    "force_explode": (0.2, 0.5),
    "expand": (1.25, 1.8),
    "max_move": (30, 30),
    "prevent_crossings": False,  # it exchanges names of unequal lengths, which then overlap
    "iter_lim": 500,
}
"""How names repel each other, so that a dozen models of one accuracy can be named."""

_TICKS = {"color": GREY, "labelcolor": INK, "labelsize": 8}

STYLE: dict[Any, Any] = {
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class About:
    """What a figure was measured on, written in the line below it.

    Attributes:
        model: its name.
        items: how many items the numbers come from; figures that are given every item count these themselves.
        unit: what an item is.
        strength: of what was added to the activations.
        note: whatever else a reader must know, such as how layers were chosen.
    """

    model: str = ""
    items: int | str | None = None
    unit: str = "items"
    strength: float | str | None = None
    note: str = ""


def save(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG, 200 pixels an inch, atomically; makes missing folders.

    Raises:
        OutputError: The name does not end in `.png`, or the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(f"{path} cannot be written: figures are PNG files, so the name must end in .png.")
    with whole_file(path) as temporary, rc_context(STYLE):
        figure.savefig(temporary, format="png", dpi=200)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finished(figure: Figure) -> Figure:
    """The figure laid out once: what Matplotlib makes late (ticks) is then in the house style too."""
    figure.draw_without_rendering()
    return figure


def captioned(figure: Figure, about: About | None, *parts: str, items: int | None = None) -> Figure:
    """The figure with a line below it, which says what it was measured on, and laid out.

    Args:
        figure: with its panels.
        about: what the caller knows.
        parts: what the figure knows, such as what its bands are; empty ones are dropped.
        items: how many items are drawn, where the figure counts them.
    """
    about = about or About()
    count = about.items if items is None else items
    strength = about.strength if isinstance(about.strength, str) else f"{about.strength or 0:g}"
    text = "; ".join(
        part
        for part in (
            about.model,
            "" if count is None else f"n = {count} {about.unit}",
            "" if about.strength is None else f"strength {strength}",
            *parts,
            about.note,
        )
        if part
    )
    if text:
        width, height = figure.get_size_inches()
        lines = wrapped(text, int(_LETTERS * width))
        figure.set_size_inches(width, height + 0.06 + _CAPTION_LINE * len(lines.split("\n")))
        figure.supxlabel(lines, x=0.02, ha="left", fontsize=_CAPTION_SIZE, color=GREY, parse_math=False)
    return finished(figure)


def finite(**arrays: Any) -> tuple[list[Any], str]:
    """Arrays with NaN for everything that is not finite, and a note of how many values are not drawn.

    Args:
        **arrays: by name; None stays None.

    Raises:
        InputError: if nothing of an array is finite.
    """
    given = {name: np.asarray(array, np.float64) for name, array in arrays.items() if array is not None}
    known = {name: np.isfinite(values) for name, values in given.items()}
    for name, values in given.items():
        if not known[name].any():
            raise InputError(f"none of the {values.size} values of {name} is finite; there is nothing to draw.")
    shown = {name: np.where(known[name], values, np.nan) for name, values in given.items()}
    total = sum(values.size for values in given.values())
    lost = total - sum(int(own.sum()) for own in known.values())
    return [shown.get(name) for name in arrays], f"{lost} of {total} values not finite, not drawn" if lost else ""


def finite_items(axis: int, /, **arrays: Any) -> tuple[np.ndarray, str]:
    """Which items (indices along an axis that all arrays share) are finite throughout, and a note of the others.

    Raises:
        InputError: if none is.
    """
    known: Any = True
    for array in arrays.values():
        moved = np.moveaxis(np.asarray(array), axis, 0)
        known = known & np.isfinite(moved).all(axis=tuple(range(1, moved.ndim)))
    lost = int((~known).sum())
    if lost == len(known):
        raise InputError(f"none of the {lost} items of {', '.join(arrays)} is finite; there is nothing to draw.")
    return known, f"{lost} of {len(known)} items not finite, skipped" if lost else ""


def means_note(half_widths: Any) -> str:
    """The widest 95 % interval of the means in a figure, given half of each; empty if none is known."""
    known = np.asarray(half_widths)[np.isfinite(half_widths)]
    return f"95 % intervals of the means within ±{known.max():.2g}" if known.size else ""


def last(values: np.ndarray) -> float:
    """The last value that is finite."""
    return float(values[np.isfinite(values)][-1])


def chance_line(axes: Axes, *, chance: float = 0.5, across: bool = True) -> None:
    """A dotted line at the share that guessing gives, across a panel or, for accuracies on the x-axis, up it.

    The panel's limits are set before; a line across is always in them.
    """
    ends = [(0.0, chance), (1.0, chance)] if across else [(chance, 0.0), (chance, 1.0)]
    transform = axes.get_yaxis_transform() if across else axes.get_xaxis_transform()
    # A patch: the lines of a panel are its data.
    line = Polygon(ends, closed=False, fill=False, edgecolor=GREY, linewidth=0.9, linestyle=":", transform=transform)
    line.set_zorder(0.8)
    axes.add_artist(line)
    if across:
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, chance - 0.02), max(high, chance + 0.02))


def zero_line(axes: Axes) -> None:
    """A rule at zero, across a panel."""
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)


def shares(*axes: Axis) -> None:
    """Writes the ticks of axes as percentages."""
    for axis in axes:
        axis.set_major_formatter(lambda share, _: f"{round(100 * share, 6):g}%")


def curve(axes: Axes, x: Any, y: Any, color: Any, band: Any = None, *, marker: str = "o", **options: Any) -> None:
    """A line with a dot at every value, over a band of lower and upper bounds [..., 2] if those are given."""
    if band is not None:
        axes.fill_between(x, *np.asarray(band).T, color=color, alpha=0.16, linewidth=0)
    axes.plot(x, y, color=color, marker=marker, **options)


def color_bar(figure: Figure, mappable: ScalarMappable, axes: Any, label: str, **options: Any) -> Colorbar:
    """A bar beside panels that says what their colours mean."""
    bar = figure.colorbar(mappable, ax=axes, label=label, aspect=26, **options)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return bar


CHANCE = "dotted: chance, 50 %"
WILSON = "95 % Wilson intervals"


def bands_note(*bounds: object) -> str:
    """What bands of intervals are, if there are any."""
    return f"bands: {WILSON}" if any(one is not None for one in bounds) else ""


def gradient(count: int) -> list[tuple[float, float, float, float]]:
    """`count` colours that rank, dark to light, none too pale for lines on white."""
    return [colormaps["viridis"](place) for place in np.linspace(0.05, 0.8, count)]


def layer_axis(axes: Axes, note: str = "") -> None:
    """Names the axis of decoder layers and gives it whole numbers."""
    axes.set_xlabel(f"layer{note}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def label_ends(axes: Axes, x: np.ndarray, ends: Mapping[str, tuple[Any, str]]) -> None:
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
        # Rules run on to the edge of the panel, behind the names.
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])


def name_points(axes: Axes, names: Sequence[str], x: Float[np.ndarray, "M"], y: Float[np.ndarray, "M"]) -> None:
    """Writes every name near its point, over no other name or point; a thin line leads to those further away.

    Args:
        axes: the panel, laid out, with its points and limits.
        names: one a point.
        x: of the points.
        y: of the points.
    """
    from adjustText import adjust_text  # it imports pyplot

    points = zip(x.tolist(), y.tolist(), names, strict=True)
    labels = [axes.text(across, up, name, parse_math=False) for across, up, name in points]
    for label in labels:
        label.set_in_layout(False)
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # whiskers may run behind
    adjust_text(
        labels,
        x,
        y,
        ax=axes,
        **_NAMES,
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 0, "zorder": 1},
    )


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` letters; line breaks in it stay."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def check_shapes(**arrays: tuple[np.ndarray | Sequence[Any] | None, str]) -> None:
    """Checks arrays (or lists; None is passed over) against shapes in which a letter is one size above 0 throughout."""
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
