"""The sixteen drawn objects as signed-distance functions, and the templates that the renderer samples.

Every object can be recognised by its silhouette alone, down to about 12 pixels. Coordinates are (x, y), y counted
downwards; distances are negative inside.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from jaxid.errors import InputError

Points: TypeAlias = Float[np.ndarray, "*S 2"]
Distance: TypeAlias = Float[np.ndarray, "*S"]
Shape: TypeAlias = Callable[[Points], Distance]
"""Gives the signed distance of points from an outline."""

TEMPLATE_SIZE = 128
"""Rows and columns of a template."""
TEMPLATE_REACH = 1.2
"""Templates cover -reach..reach in units of half the object's box side."""

_FAR = 9.0  # distance to a detail that an object does not have


def _circle(center: tuple[float, float], radius: float) -> Shape:
    return lambda points: np.linalg.norm(points - np.asarray(center), axis=-1) - radius


def _box(center: tuple[float, float], half: tuple[float, float]) -> Shape:
    def distance(points: Points) -> Distance:
        offset = np.abs(points - np.asarray(center)) - np.asarray(half)
        return np.linalg.norm(np.maximum(offset, 0), axis=-1) + np.minimum(offset.max(-1), 0)

    return distance


def _polygon(*vertices: tuple[float, float]) -> Shape:
    """Exact distance to a simple polygon; the sign comes from counting the edges crossed by a ray."""
    corners = np.asarray(vertices, float)

    def distance(points: Points) -> Distance:
        nearest = np.full(points.shape[:-1], np.inf)
        inside = np.zeros(points.shape[:-1], bool)
        for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            edge, offset = end - start, points - start
            along = np.clip(offset @ edge / (edge @ edge), 0, 1)
            nearest = np.minimum(nearest, ((offset - along[..., None] * edge) ** 2).sum(-1))
            crosses = (start[1] > points[..., 1]) != (end[1] > points[..., 1])
            if edge[1] != 0:
                inside ^= crosses & (points[..., 0] < start[0] + (points[..., 1] - start[1]) * edge[0] / edge[1])
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    return distance


def _union(*shapes: Shape) -> Shape:
    return lambda points: np.minimum.reduce([shape(points) for shape in shapes])


def _intersection(*shapes: Shape) -> Shape:
    return lambda points: np.maximum.reduce([shape(points) for shape in shapes])


def _without(shape: Shape, removed: Shape) -> Shape:
    return lambda points: np.maximum(shape(points), -removed(points))


def _star() -> Shape:
    turns = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return _polygon(*zip(radii * np.sin(turns), -radii * np.cos(turns), strict=True))


_DISC = _circle((0, 0), 1)
_SHAPES: dict[str, Shape] = {
    "circle": _DISC,
    "triangle": _polygon((0, -0.9), (1, 0.85), (-1, 0.85)),
    "square": _box((0, 0), (1, 1)),
    "star": _star(),
    "heart": _union(
        *(_circle((side, -0.36), 0.52) for side in (-0.48, 0.48)),
        _polygon((-0.9, -0.05), (0, -0.45), (0.9, -0.05), (0, 0.95)),
    ),
    "cross": _union(_box((0, 0), (1, 0.3)), _box((0, 0), (0.3, 1))),
    "moon": _without(_DISC, _circle((0.55, -0.1), 0.78)),
    "ring": _without(_DISC, _circle((0, 0), 0.48)),
    "house": _union(
        _polygon((0, -1), (1.05, -0.12), (-1.05, -0.12)),
        _box((0, 0.4), (0.72, 0.55)),
        _box((0.58, -0.6), (0.15, 0.38)),
    ),
    "tree": _union(
        _polygon((0, -1), (0.46, -0.32), (-0.46, -0.32)),
        _polygon((0, -0.62), (0.62, 0.14), (-0.62, 0.14)),
        _polygon((0, -0.2), (0.78, 0.62), (-0.78, 0.62)),
        _box((0, 0.8), (0.16, 0.25)),
    ),
    "fish": _union(  # a lens with pointed ends, where two circles overlap, and a tail
        _intersection(_circle((-0.2, 0.32), 0.9), _circle((-0.2, -0.32), 0.9)),
        _polygon((0.35, 0), (1.05, -0.62), (0.88, 0), (1.05, 0.62)),
    ),
    "cup": _union(
        _polygon((-0.95, -0.75), (0.45, -0.75), (0.25, 0.75), (-0.75, 0.75)),
        _without(_circle((0.45, -0.15), 0.52), _circle((0.45, -0.15), 0.28)),
    ),
    "key": _union(
        _without(_circle((-0.48, 0), 0.58), _circle((-0.52, 0), 0.24)),
        _box((0.45, 0), (0.57, 0.19)),
        _box((0.4, 0.35), (0.14, 0.3)),
        _box((0.86, 0.35), (0.16, 0.3)),
    ),
    "bolt": _polygon((-0.05, -1), (-0.75, 0.2), (-0.15, 0.2), (-0.4, 1), (0.75, -0.33), (0.15, -0.33), (0.65, -1)),
    "hourglass": _polygon((-0.8, -1), (0.8, -1), (0.17, 0), (0.8, 1), (-0.8, 1), (-0.17, 0)),
    "mushroom": _union(
        _intersection(_DISC, lambda points: points[..., 1]),  # its upper half
        _polygon((-0.3, -0.1), (0.3, -0.1), (0.36, 0.85), (-0.36, 0.85)),
    ),
}
_DETAILS: dict[str, Shape] = {"house": _box((0, 0.62), (0.22, 0.34)), "fish": _circle((-0.6, -0.1), 0.13)}

OBJECTS: tuple[str, ...] = tuple(_SHAPES)
"""Names of the drawn objects; `Scenes.objects` holds indices into this tuple."""


def check_pairs(pairs: Sequence[tuple[str, str]], names: Sequence[str] = OBJECTS) -> None:
    """Raises an InputError unless every pair consists of two different ones of the names."""
    for pair in pairs:
        if len(set(pair)) != 2 or not set(pair) <= set(names):
            raise InputError(f"a pair must be two different names out of {', '.join(names)}; got {pair!r}.")


def _lattice(reach: float, size: int) -> Points:
    ticks = np.linspace(-reach, reach, size)
    return np.stack(np.meshgrid(ticks, ticks), axis=-1)


@lru_cache
def _rasterised() -> tuple[Float[np.ndarray, "O S S 2"], Float[np.ndarray, "O 360"]]:
    spacing = 0.01
    coarse, fine = _lattice(1.3, 261), _lattice(TEMPLATE_REACH, TEMPLATE_SIZE)
    angles = np.deg2rad(np.arange(360))
    distances = np.full((len(OBJECTS), TEMPLATE_SIZE, TEMPLATE_SIZE, 2), _FAR, np.float32)
    halves = np.empty((len(OBJECTS), 360), np.float32)
    for index, (name, shape) in enumerate(_SHAPES.items()):
        distance = shape(coarse)
        inside = coarse[distance <= 0]
        low, high = inside.min(0), inside.max(0)
        middle, half = (low + high) / 2, (high - low).max() / 2
        points = fine * half + middle
        distances[index, ..., 0] = shape(points) / half
        if name in _DETAILS:
            distances[index, ..., 1] = _DETAILS[name](points) / half
        rim = (coarse[(distance <= 0) & (distance > -2 * spacing)] - middle) / half
        x, y = rim[:, 0], rim[:, 1]
        rotated = [
            np.outer(np.cos(angles), x) - np.outer(np.sin(angles), y),
            np.outer(np.sin(angles), x) + np.outer(np.cos(angles), y),
        ]
        halves[index] = np.abs(rotated).max(axis=(0, 2)) + spacing / 2
    distances.flags.writeable = halves.flags.writeable = False
    return distances, halves


def templates() -> Float[np.ndarray, "O S S 2"]:
    """Signed distances of every object (channel 0) and of its dark detail (channel 1), sampled on a square lattice.

    Objects are centred and scaled so that the larger side of the upright silhouette spans -1..1; distances are in
    the same unit (half the box side). The lattice spans -`TEMPLATE_REACH`..`TEMPLATE_REACH`, ends included.

    Returns:
        float32, one [S, S, 2] template per entry of `OBJECTS`, read-only.
    """
    return _rasterised()[0]


def half_sides() -> Float[np.ndarray, "O 360"]:
    """Half the side of the centred square that encloses each object rotated by 0..359 degrees, in template units."""
    return _rasterised()[1]


def sample_templates(
    objects: Int[np.ndarray, "N"], x: Float[np.ndarray, "N S S"], y: Float[np.ndarray, "N S S"]
) -> Float[np.ndarray, "N S S 2"]:
    """Bilinear lookup of the templates at (x, y) in template units; beyond the lattice, its border repeats."""
    step = np.float32((TEMPLATE_SIZE - 1) / (2 * TEMPLATE_REACH))
    last = np.float32(TEMPLATE_SIZE - 1.001)
    x = np.clip((x + np.float32(TEMPLATE_REACH)) * step, 0, last)
    y = np.clip((y + np.float32(TEMPLATE_REACH)) * step, 0, last)
    column, row = x.astype(np.int32), y.astype(np.int32)
    right, down = (x - column)[..., None].astype(np.float32), (y - row)[..., None].astype(np.float32)
    first = (objects[:, None, None] * TEMPLATE_SIZE + row) * TEMPLATE_SIZE + column
    table = templates().reshape(-1, 2)
    upper = table[first]
    upper += right * (table[first + 1] - upper)
    lower = table[first + TEMPLATE_SIZE]
    lower += right * (table[first + TEMPLATE_SIZE + 1] - lower)
    upper += down * (lower - upper)
    return upper
