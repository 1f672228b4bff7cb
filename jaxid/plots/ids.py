"""Figures of the spatial IDs: the plane of the axes (Figure 5) and shares of variance."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from jaxid.checks import check_finite
from jaxid.plots.style import (
    BLUE,
    CELLS,
    GREEN,
    GREY,
    INK,
    RULE,
    STYLE,
    VERMILLION,
    About,
    captioned,
    check_shapes,
    curve,
    finite,
    gradient,
    label_ends,
    last,
    layer_axis,
    new_figure,
    shares,
)


@rc_context(STYLE)
def id_plane(
    coordinates: Float[np.ndarray, "4 4 2"],
    words: Mapping[str, Float[np.ndarray, "2"]],
    title: str,
    *,
    about: About | None = None,
) -> Figure:
    """The 16 cells of one object in the plane of the two axes ([ID] arXiv 2601.12626, Figure 5).

    A column's cells are joined in the column's colour, a row's by a grey line; the y-axis runs down, as in the
    picture. Words much shorter or longer than the lattice are all drawn at one other scale, which is noted.

    Args:
        coordinates: cell (x, y) -> coordinates along the x-axis and the y-axis, in units of the activations.
        words: word -> its coordinates in the same plane, e.g. of "left" and "right"; may be empty.
        title: above the figure, e.g. the object and the layer.
        about: what was measured on what.
    """
    check_shapes(coordinates=(coordinates, "4 4 2"), **{f"word {word!r}": (at, "2") for word, at in words.items()})
    check_finite("coordinates", coordinates)
    for word, at in words.items():
        check_finite(f"word {word!r}", at)
    figure = new_figure(4.8, 4.5)
    axes = figure.add_subplot()
    axes.grid(False)
    axes.axhline(0, color=RULE, linewidth=0.8, zorder=0)
    axes.axvline(0, color=RULE, linewidth=0.8, zorder=0)
    halo = [withStroke(linewidth=2, foreground="white")]
    for y in range(CELLS):
        axes.plot(*coordinates[:, y].T, color=GREY, linewidth=0.8, alpha=0.7, zorder=1)
    for x, color in enumerate(gradient(CELLS)):
        axes.plot(*coordinates[x].T, color=color, marker="o", markersize=7, markeredgecolor="white")
    scale = _word_scale(coordinates, words)
    lines = [np.linspace(grid[:-1], grid[1:], 11) for grid in (coordinates, coordinates.swapaxes(0, 1))]
    taken = [points.reshape(-1, 2) for points in lines]
    for word, at in words.items():
        tip = np.asarray(at, float) * scale
        length = max(float(np.linalg.norm(tip)), 1e-12)
        away = tip / length
        # Names stand beyond the cells, where nothing else is written; a dotted line leads there.
        beyond = away * max(1.08 * length, 1.3 * float((coordinates @ away).max()))
        arrow = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", _pair(tip), (0, 0), arrowprops=arrow, zorder=1.5)
        axes.plot(*np.stack([tip, beyond]).T, color=INK, linewidth=1, linestyle=":", zorder=1.5)
        taken.append(np.linspace(np.zeros(2), beyond, 50))
        label = axes.annotate(
            word,
            _pair(beyond),
            (4 * away[0], -4 * away[1]),  # offsets point up, the axis runs down
            textcoords="offset points",
            ha="left" if away[0] > 0.4 else "right" if away[0] < -0.4 else "center",
            va="bottom" if away[1] < -0.4 else "top" if away[1] > 0.4 else "center",
        )
        label.set(weight="bold", fontsize=9.5, path_effects=halo, zorder=4)
    size = np.array([0.1, 0.045]) * max(np.ptp(np.concatenate(taken), axis=0).max(), 1e-12)  # of a label, about
    for (x, y), color in zip(np.ndindex(CELLS, CELLS), np.repeat(gradient(CELLS), CELLS, axis=0), strict=True):
        corner, middle = _free_corner(coordinates[x, y], size, np.concatenate(taken))
        taken.append(middle[None])
        across, up = 5 * corner[0], -5 * corner[1]  # offsets point up, the axis runs down
        label = axes.annotate(f"({x}, {y})", _pair(coordinates[x, y]), (across, up), textcoords="offset points")
        label.set(ha="right" if across < 0 else "left", va="top" if up < 0 else "bottom")
        label.set(fontsize=7.5, color=color, path_effects=halo, zorder=4)
    note = f"\nwords' arrows at {scale:g} times their length" if scale != 1 else ""
    axes.set(xlabel=f"x-axis coordinate{note}", ylabel="y-axis coordinate (down)", title=title)
    axes.margins(0.22 if words else 0.1)
    axes.set_aspect("equal", adjustable="datalim")
    axes.invert_yaxis()
    return captioned(figure, about, "colours: columns, grey lines: rows")


@rc_context(STYLE)
def variance_by_layer(
    two_axis: Float[np.ndarray, "L"],
    row_share: Float[np.ndarray, "L"],
    column_share: Float[np.ndarray, "L"],
    agreement: Float[np.ndarray, "L"],
    *,
    about: About | None = None,
) -> Figure:
    """How much of the IDs' variance the two axes hold, layer by layer, and how alike two objects' IDs are.

    Args:
        two_axis: share of the variance that lies in the plane of the two axes, 0 to 1.
        row_share: share that the row (y) accounts for.
        column_share: share that the column (x) accounts for.
        agreement: mean cosine between two objects' IDs of the same cell.
        about: what was measured on what.
    """
    shares_of = {"two_axis": two_axis, "row_share": row_share, "column_share": column_share}
    check_shapes(**{name: (values, "L") for name, values in (shares_of | {"agreement": agreement}).items()})
    (two_axis, row_share, column_share, agreement), gaps = finite(**shares_of, agreement=agreement)
    layers = np.arange(len(two_axis))
    figure = new_figure(7.6, 2.9)
    explained, alike = figure.subplots(1, 2)
    named = {"the two axes": (two_axis, INK), "column (x)": (column_share, BLUE), "row (y)": (row_share, VERMILLION)}
    for values, color in named.values():
        curve(explained, layers, values, color)
    explained.set(title="Variance of the IDs explained by", ylim=(0, 1.02))
    shares(explained.yaxis)
    label_ends(explained, layers, {name: (last(values), color) for name, (values, color) in named.items()})
    curve(alike, layers, agreement, GREEN)
    alike.set(title="Agreement of two objects' IDs (cosine)", ylim=(min(0, 1.1 * float(np.nanmin(agreement))), 1.02))
    for axes in (explained, alike):
        layer_axis(axes)
    return captioned(figure, about, gaps)


def _pair(point: np.ndarray) -> tuple[float, float]:
    """A point as Matplotlib's annotations want it."""
    return float(point[0]), float(point[1])


def _free_corner(point: np.ndarray, size: np.ndarray, taken: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The corner of a point, of four, where a label is farthest from the points taken, and the label's middle there."""
    corners = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    middles = point + 0.7 * size * corners
    room = np.abs((middles[:, None] - taken) / size).max(axis=-1).min(axis=-1)
    best = int(room.argmax())
    return corners[best], middles[best]


def _word_scale(coordinates: np.ndarray, words: Mapping[str, np.ndarray]) -> float:
    """1 where the words fit the lattice; else one figure that makes the longest about as long as the lattice."""
    longest = max((float(np.linalg.norm(at)) for at in words.values()), default=0.0)
    lattice = float(np.linalg.norm(coordinates, axis=-1).max())
    if longest == 0 or lattice == 0 or 0.4 <= longest / lattice <= 1.5:
        return 1.0
    return float(f"{lattice / longest:.1g}")
