"""The house style: colours, settings, and what the figures share; `save` writes a figure as PNG."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from jaxid.errors import InputError, OutputError
from jaxid.results import whole_file

# Okabe and Ito's palette, which colour-blind readers can tell apart, in the order in which it is used.
BLUE, VERMILLION, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#b5578f"
INK, GREY, RULE = "#262626", "#767676", "#d9d9d9"
CELLS = 4
"""Columns and rows of the grid."""

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


def gradient(count: int) -> list[tuple[float, float, float, float]]:
    """`count` colours that rank, dark to light, none too pale for lines on white."""
    return [colormaps["viridis"](place) for place in np.linspace(0.05, 0.8, count)]


def block_axis(axes: Axes, note: str = "") -> None:
    """Names the axis of decoder blocks and gives it whole numbers."""
    axes.set_xlabel(f"block{note}")
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


def wrapped(text: str, width: int) -> str:
    """Text in lines of at most `width` letters; line breaks in it stay."""
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def check_shapes(**arrays: tuple[np.ndarray | Sequence[str] | None, str]) -> None:
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
