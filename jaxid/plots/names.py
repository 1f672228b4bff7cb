"""Names beside the points of a scatter, kept apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

from jaxid.plots.style import GREY

_DISTANCES = np.array([6, 12, 19, 27, 36, 48, 62, 78, 96, 116, 138])  # of a name from its point
_TURNS = np.arange(32) / 16 * np.pi  # directions, the first to the right
_LED = 10  # from this distance on, a line leads to the name
_NEAR = 60  # points as near as this push a name away
_ROUNDS = 8


def place_names(axes: Axes, names: Sequence[str], points: Float[np.ndarray, "M 2"]) -> None:
    """Writes every name near its point, over no other name or point where there is room; set the limits first.

    Names that find no room beside their points stand further off, at the end of a thin line.

    Args:
        axes: the panel, with its points.
        names: one a point.
        points: in the data's coordinates.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()  # the panel has its final size only now
    renderer, unit = figure.canvas.get_renderer(), figure.dpi / 72
    options: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "parse_math": False}
    labels = [axes.annotate(str(name), _pair(at), (0, 0), **options) for name, at in zip(names, points, strict=True)]
    extents = [label.get_window_extent(renderer) for label in labels]
    halves = np.array([(extent.width, extent.height) for extent in extents]) / 2 / unit
    frame = np.asarray(axes.get_window_extent(renderer).get_points()) / unit
    marks = axes.transData.transform(points) / unit
    for label, mark, (offset, end) in zip(labels, marks, offsets(marks, halves, frame), strict=True):
        label.set_position(_pair(offset))
        label.set_in_layout(False)
        label.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # whiskers may run behind
        if end.any():
            line = axes.transData.inverted().transform(np.stack([mark, mark + end]) * unit)
            axes.plot(*line.T, color=GREY, linewidth=0.7, zorder=1, scalex=False, scaley=False)


def offsets(
    marks: Float[np.ndarray, "M 2"], halves: Float[np.ndarray, "M 2"], frame: Float[np.ndarray, "2 2"]
) -> Float[np.ndarray, "M 2 2"]:
    """Where names stand: every name in turn takes its best place beside the others, until none moves any more.

    Args:
        marks: the points.
        halves: half the width and height of each name.
        frame: lower left and upper right corner of the panel.

    Returns:
        From each point to the centre of its name, and to the end of its line (0 without one).
    """
    way = np.stack([np.cos(_TURNS), np.sin(_TURNS)], axis=-1)
    steps = (_DISTANCES[:, None, None] * way).reshape(-1, 2)
    # Near the axes a name is centred on the direction; towards the diagonals its corner faces the point.
    sides = np.clip(1.5 * np.tile(way, (len(_DISTANCES), 1)), -1, 1)
    distances, turns = np.repeat(_DISTANCES, len(_TURNS)), np.tile(_TURNS, len(_DISTANCES))
    ends = np.where((distances >= _LED)[:, None], steps, 0.0)
    centers = steps + sides * halves[:, None]  # [M, C, 2]
    chosen = np.full(len(marks), -1)
    own = np.stack([_own_cost(number, marks, centers, halves, frame) for number in range(len(marks))])
    own += distances + 4 * _apart(turns, _outwards(marks)[:, None])
    for _ in range(_ROUNDS):
        before = chosen.copy()
        for number in np.argsort(own.min(axis=1), kind="stable"):
            cost = own[number].copy()
            for other in np.flatnonzero(chosen >= 0):
                if other != number:
                    box, end = centers[other, chosen[other]] + marks[other], ends[chosen[other]]
                    cost += _shared_cost(
                        marks[number], centers[number], ends, halves[number], marks[other], box, end, halves[other]
                    )
            chosen[number] = cost.argmin()
        if (chosen == before).all():
            break
    return np.stack([centers[np.arange(len(marks)), chosen], ends[chosen]], axis=1)


def _own_cost(
    number: int, marks: np.ndarray, centers: np.ndarray, halves: np.ndarray, frame: np.ndarray
) -> Float[np.ndarray, "C"]:
    """Of each place of a name by itself: outside the panel, or over another point."""
    at, half = marks[number] + centers[number], halves[number] + 1
    outside = ((at - half < frame[0]) | (at + half > frame[1])).any(axis=-1)
    others = np.delete(marks, number, axis=0)
    covered = (np.abs(at[:, None] - others) < half + 3).all(axis=-1).sum(axis=-1)
    return 3000.0 * outside + 1000 * covered


def _shared_cost(
    mark: np.ndarray,
    centers: np.ndarray,
    ends: np.ndarray,
    half: np.ndarray,
    other_mark: np.ndarray,
    other_center: np.ndarray,
    other_end: np.ndarray,
    other_half: np.ndarray,
) -> Float[np.ndarray, "C"]:
    """Of each place of a name beside another that is placed: overlaps, and lines over names, points and lines."""
    at, along = mark + centers, np.linspace(0, 1, 24)[:, None]
    overlap = (np.abs(at - other_center) < half + other_half + 1.5).all(axis=-1)
    line, other_line = mark + ends[:, None] * along, other_mark + other_end * along
    over = (np.abs(line - other_center) < other_half + 1).all(axis=-1).any(axis=-1)
    under = (np.abs(other_line - at[:, None]) < half + 1).all(axis=-1).any(axis=-1)
    led = ends.any(axis=-1)
    if np.linalg.norm(mark - other_mark) > 4:
        through = (np.linalg.norm(line - other_mark, axis=-1) < 4).any(axis=-1) & led
    else:
        through = np.zeros(len(ends), bool)
    crossed = _cross(mark, mark + ends, other_mark, other_mark + other_end)
    return 1000.0 * overlap + 600 * (over + under) + 300 * crossed + 100 * through


def _cross(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> Bool[np.ndarray, "C"]:
    """Whether the lines from a to each of b cross the one from c to d."""

    def side(start: np.ndarray, end: np.ndarray, point: np.ndarray) -> np.ndarray:
        first, second = end - start, point - start
        return np.asarray(first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0])

    return (side(a, b, c) * side(a, b, d) < 0) & (side(c, d, a) * side(c, d, b) < 0)


def _outwards(marks: Float[np.ndarray, "M 2"]) -> Float[np.ndarray, "M"]:
    """The direction away from the points near each; to the right where there are none, or on all sides."""
    apart = marks[:, None] - marks
    near = (np.linalg.norm(apart, axis=-1) < _NEAR)[..., None]
    away = (near * apart).sum(axis=1)
    return np.where(np.linalg.norm(away, axis=-1) < 1, 0.0, np.arctan2(away[:, 1], away[:, 0]))


def _apart(turns: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The angle between directions, 0 to pi."""
    return np.abs((turns - other + np.pi) % (2 * np.pi) - np.pi)


def _pair(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])
