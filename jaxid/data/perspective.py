"""Scenes with depth: objects on a ground plane in perspective, and scenes in which a single cue tells the depth.

Cues are an object's size, the height of its foot in the picture, and what covers what. Slots are ordered from the
farthest object to the nearest, so that nearer ones are drawn over farther ones. Names, colours and places from left
to right say nothing about depth.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxid.data.backgrounds import horizons
from jaxid.data.objects import TEMPLATE_REACH, TEMPLATE_SIZE, half_sides, templates
from jaxid.data.relations import MIN_DISTANCE
from jaxid.data.scenes import OBJECTS, VARIED, Scenes, dress
from jaxid.errors import InputError

CUES = ("all", "size", "height", "overlap")
"""What can tell the depth of a scene's objects."""

SIZES = (0.15, 0.42)
"""The smallest and the largest side of an object, in picture fractions."""
RATIO = 1.3
"""Two objects of a scene differ in depth by at least this factor, except for the bystander of an overlapping pair."""
MOST_HIDDEN = 0.45
"""The most of an object's bounding square (cue "all") or silhouette (cue "overlap") that others hide."""

_TRUE_SIZES = (0.85, 1.15)  # of objects on a ground plane, relative to the usual one
_EYE = (0.9, 3.0)  # the viewer's height above the ground, in usual sizes of an object
_GAP = 0.02  # least free space between two objects that do not overlap
_MARGIN = 0.02  # least free space above and below objects on the ground
_FOOT_STEP = 0.08  # with the cue "height": least difference of two feet, visible in small pictures
_FACING = (0.2, 0.6)  # with the cue "overlap": horizontal overlap of the squares, as a share of their side
_LEAST_HIDDEN = 0.03  # with the cue "overlap": what the silhouettes share, as a share of the square's area
_PROPOSALS = 384  # arrangements drawn together
_LATTICE = 12  # points along a square's side at which silhouettes are compared


class _Proposals(NamedTuple):
    """Arrangements of objects, slots ordered from the farthest to the nearest, empty ones last."""

    objects: Int[np.ndarray, "P K"]
    depths: Float[np.ndarray, "P K"]
    sizes: Float[np.ndarray, "P K"]
    centers: Float[np.ndarray, "P K 2"]
    angles: Float[np.ndarray, "P K"]
    valid: Bool[np.ndarray, "P"]


class _Given(NamedTuple):
    """What an arrangement starts from."""

    objects: Int[np.ndarray, "P K"]
    angles: Float[np.ndarray, "P K"]
    mirrored: Bool[np.ndarray, "P"]
    horizon: Float[np.ndarray, "P 1"]

    @property
    def present(self) -> Bool[np.ndarray, "P K"]:
        return self.objects >= 0


def sample_perspective(
    rng: np.random.Generator,
    count: int,
    *,
    num_objects: tuple[int, int] = (2, 3),
    cues: str = "all",
    max_angle: float = 10.0,
) -> tuple[Scenes, Float[np.ndarray, "N K"]]:
    """Scenes of different objects whose depth can be seen.

    - "all": objects of about equal true size stand on a ground plane. At distance z, the size is proportional to 1 / z
      and the foot is at horizon + c / z. Nearer ones may cover a part of farther ones. The centres of every two are
      clearly apart along an axis.
    - "size": the larger is nearer; centres are at one height, without ground and overlap.
    - "height": the one whose foot is lower is nearer; sizes are equal, on a ground, without overlap.
    - "overlap": of two objects of equal size at one height, the nearer one covers a part of the other. A third object
      stands apart, neither in front nor behind. On a ground in every other scene on average.

    Half of the scenes are drawn reversed left to right.

    Args:
        rng: source of randomness.
        count: number of scenes.
        num_objects: least and most objects in a scene, 2 or 3.
        cues: what tells the depth.
        max_angle: objects are rotated by up to this many degrees either way.

    Returns:
        The scenes, and every object's distance from the viewer, 0 in empty slots; see `relations.is_in_front`. At
        distance 1, an object of the usual true size is as large as the largest in a picture (`SIZES`).

    Raises:
        InputError: if an argument is out of range.
    """
    least, most = num_objects
    if not 2 <= least <= most <= 3:
        raise InputError(f"num_objects must be (least, most) with 2 <= least <= most <= 3, got {num_objects}.")
    if cues not in CUES:
        raise InputError(f"cues must be one of {', '.join(CUES)}; got {cues!r}.")
    numbers = rng.integers(least, most + 1, size=count)
    mirrored = rng.random(count) < 0.5
    seeds = rng.integers(2**31 - 1, size=count, dtype=np.int32)
    found = _arrange(rng, _LAYOUTS[cues], numbers, most, mirrored, horizons(seeds), max_angle)
    backgrounds = {"size": VARIED, "overlap": (*VARIED, *["ground"] * len(VARIED))}.get(cues, ("ground",))
    scenes = dress(rng, found.objects, found.centers, found.sizes, found.angles, backgrounds, 0.0)
    return dataclasses.replace(scenes, mirrored=mirrored, background_seeds=seeds), found.depths.astype(np.float32)


def _arrange(
    rng: np.random.Generator,
    layout: Callable[[np.random.Generator, _Given], _Proposals],
    numbers: Int[np.ndarray, "N"],
    slots: int,
    mirrored: Bool[np.ndarray, "N"],
    horizon: Float[np.ndarray, "N"],
    max_angle: float,
) -> _Proposals:
    """Draws whole arrangements, names included, until every scene has a valid one.

    An arrangement stays valid if near and far objects change their names, or if it is reversed left to right; so
    rejection ties no name to a depth or a side. The number of objects, the horizon and the reversal are given.
    """
    count = len(numbers)
    result: list[np.ndarray] = [
        np.zeros((count, slots), np.int64),
        *(np.zeros((count, slots, *shape)) for shape in ((), (), (2,), ())),
        np.zeros(count, bool),
    ]
    pending = np.arange(count)
    while len(pending):
        tries = max(1, _PROPOSALS // len(pending))
        rows = np.repeat(pending, tries)
        names = rng.random((len(rows), len(OBJECTS))).argsort(axis=1)[:, :slots]
        present = np.arange(slots) < numbers[rows, None]
        angles = np.where(present, rng.uniform(-max_angle, max_angle, size=present.shape), 0)
        given = _Given(np.where(present, names, -1), angles, mirrored[rows], horizon[rows, None])
        drawn = layout(rng, given)
        valid = drawn.valid.reshape(-1, tries)
        done, chosen = valid.any(axis=1), valid.argmax(axis=1)
        for whole, part in zip(result, drawn, strict=True):
            whole[pending[done]] = part.reshape(len(pending), tries, *part.shape[1:])[done, chosen[done]]
        pending = pending[~done]
    return _Proposals(*result)


def _finish(
    given: _Given,
    depths: Float[np.ndarray, "P K"],
    sizes: Float[np.ndarray, "P K"],
    x: Float[np.ndarray, "P K"],
    y: Float[np.ndarray, "P K"],
    valid: Bool[np.ndarray, "P"],
) -> _Proposals:
    """Clears empty slots."""
    centers = np.stack([x, y], axis=-1)
    shown = given.present
    return _Proposals(
        given.objects,
        np.where(shown, depths, 0),
        np.where(shown, sizes, 0),
        np.where(shown[..., None], centers, 0),
        given.angles,
        valid,
    )


# --- layouts -------------------------------------------------------------------------------------------------------


def _all_cues(rng: np.random.Generator, given: _Given) -> _Proposals:
    usual = _ascending(_log_uniform(rng, given.present.shape), given.present)
    sizes = usual * rng.uniform(*_TRUE_SIZES, size=usual.shape)
    nearest = np.where(given.present, usual, 0).max(axis=1, keepdims=True)
    # The eye is no higher than leaves the nearest foot in the picture.
    highest = np.minimum(_EYE[1], (1 - _MARGIN - given.horizon) / nearest)
    eye = rng.uniform(_EYE[0], np.maximum(highest, _EYE[0]))
    feet = given.horizon + eye * usual
    x = _within(rng, sizes)
    y = feet - sizes / 2
    first, second = np.triu_indices(usual.shape[1], 1)
    both = given.present[:, first] & given.present[:, second]
    apart = [np.abs(place[:, first] - place[:, second]) for place in (x, y)]
    sums = (sizes[:, first] + sizes[:, second]) / 2
    smaller = np.minimum(sizes[:, first], sizes[:, second])
    common = np.prod([np.clip(sums - distance, 0, smaller) for distance in apart], axis=0)
    hidden = np.stack(
        [np.where(both & (first == slot), common, 0).sum(axis=1) for slot in range(usual.shape[1])], axis=1
    )
    fits = (
        (highest >= _EYE[0])
        & (sizes >= SIZES[0])
        & (sizes <= SIZES[1])
        & (feet - sizes >= _MARGIN)
        & (feet <= 1 - _MARGIN)
        & (hidden <= MOST_HIDDEN * sizes**2)
    )
    told_apart = ((np.maximum(*apart) > MIN_DISTANCE) | ~both).all(axis=1)
    valid = (fits | ~given.present).all(axis=1) & told_apart & _spaced(usual, given.present)
    return _finish(given, SIZES[1] / usual, sizes, x, y, valid)


def _size_alone(rng: np.random.Generator, given: _Given) -> _Proposals:
    sizes = _ascending(_log_uniform(rng, given.present.shape), given.present)
    x, fits = _side_by_side(rng, np.where(given.present, sizes, 0), given.present)
    y = _within(rng, np.where(given.present, sizes, 0).max(axis=1, keepdims=True))
    valid = fits & _spaced(sizes, given.present)
    return _finish(given, SIZES[1] / sizes, sizes, x, np.broadcast_to(y, x.shape), valid)


def _height_alone(rng: np.random.Generator, given: _Given) -> _Proposals:
    sizes = np.broadcast_to(rng.uniform(SIZES[0], 0.3, size=(len(given.objects), 1)), given.present.shape)
    lowest = 1 - _MARGIN - given.horizon
    below = _ascending(rng.uniform(_FOOT_STEP, lowest, size=given.present.shape), given.present)
    x, y = _within(rng, sizes), given.horizon + below - sizes / 2
    first, second = np.triu_indices(sizes.shape[1], 1)
    both = given.present[:, first] & given.present[:, second]
    apart = np.maximum(np.abs(x[:, first] - x[:, second]), np.abs(y[:, first] - y[:, second]))
    clear = (apart >= sizes[:, :1] + _GAP) & (np.abs(below[:, first] - below[:, second]) >= _FOOT_STEP)
    inside = (y - sizes / 2 >= _MARGIN) | ~given.present
    valid = (clear | ~both).all(axis=1) & inside.all(axis=1) & _spaced(below, given.present)
    return _finish(given, np.mean(_EYE) * SIZES[1] / below, sizes, x, y, valid)


def _overlap_alone(rng: np.random.Generator, given: _Given) -> _Proposals:
    count, slots = given.objects.shape
    third = given.present.sum(axis=1) == 3
    near = np.where(third, 2, 1)  # slots: the covered one, the bystander if there is one, the covering one
    rows = np.arange(count)
    sizes = rng.uniform(0.24, np.where(third, 0.36, SIZES[1]))
    share, side = rng.uniform(*_FACING, size=count), rng.choice([-1, 1], size=count)
    pair = sizes * (2 - share)
    widths = np.stack([pair, np.where(third, sizes, 0)], axis=1)
    places, fits = _side_by_side(rng, widths, np.stack([third | True, third], axis=1))
    x = np.zeros((count, slots))
    x[:, 1] = places[:, 1]
    x[:, 0] = places[:, 0] - side * (pair - sizes) / 2
    x[rows, near] = places[:, 0] + side * (pair - sizes) / 2
    # The foot is below the horizon, which is drawn in half of the scenes.
    foot = rng.uniform(np.maximum(given.horizon[:, 0] + 0.05, sizes + _MARGIN), 1 - _MARGIN)
    y = np.broadcast_to((foot - sizes / 2)[:, None], x.shape)
    depths = np.ones((count, slots))
    depths[:, 0] = np.sqrt(RATIO)
    depths[rows, near] = 1 / np.sqrt(RATIO)
    depths *= (SIZES[1] / sizes)[:, None]
    pair_objects = given.objects[rows, [0 * near, near]].T
    pair_angles = given.angles[rows, [0 * near, near]].T
    common, smaller = _common(pair_objects, pair_angles, given.mirrored, share, side)
    valid = fits & (common >= _LEAST_HIDDEN) & (common <= MOST_HIDDEN * smaller)
    return _finish(given, depths, np.broadcast_to(sizes[:, None], x.shape), x, y, valid)


_LAYOUTS: dict[str, Callable[[np.random.Generator, _Given], _Proposals]] = {
    "all": _all_cues,
    "size": _size_alone,
    "height": _height_alone,
    "overlap": _overlap_alone,
}


def _log_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Sizes such that every ratio of two sizes is as likely among small as among large ones."""
    return np.exp(rng.uniform(*np.log(SIZES), size=shape))


def _within(rng: np.random.Generator, sizes: Float[np.ndarray, "P J"]) -> Float[np.ndarray, "P J"]:
    """Centres, along one axis, of squares that lie within the picture."""
    return sizes / 2 + rng.random(sizes.shape) * (1 - sizes)


def _ascending(values: Float[np.ndarray, "P K"], present: Bool[np.ndarray, "P K"]) -> Float[np.ndarray, "P K"]:
    """Sorts the values of the slots that hold objects, which come first."""
    return np.sort(np.where(present, values, 9.0), axis=1)


def _spaced(ascending: Float[np.ndarray, "P K"], present: Bool[np.ndarray, "P K"]) -> Bool[np.ndarray, "P"]:
    """Whether each value is clearly larger than the one before."""
    return np.all((ascending[:, 1:] >= RATIO * ascending[:, :-1]) | ~present[:, 1:], axis=1)


def _side_by_side(
    rng: np.random.Generator, widths: Float[np.ndarray, "P J"], present: Bool[np.ndarray, "P J"]
) -> tuple[Float[np.ndarray, "P J"], Bool[np.ndarray, "P"]]:
    """Centres of intervals in random order with random gaps, and whether they fit; absent ones are 0 wide."""
    count, parts = widths.shape
    free = 1 - (widths + _GAP * present).sum(axis=1) + _GAP
    cuts = np.sort(rng.random((count, parts)), axis=1) * np.maximum(free, 0)[:, None]
    order = rng.random((count, parts)).argsort(axis=1)
    taken = np.take_along_axis(widths + _GAP * present, order, axis=1)
    # A cut is the free space before the interval in that place; absent intervals take none.
    starts = cuts + np.cumsum(taken, axis=1) - taken
    result = np.zeros_like(widths)
    np.put_along_axis(result, order, starts, axis=1)
    return result + widths / 2, free >= 0


def _common(
    objects: Int[np.ndarray, "P 2"],
    angles: Float[np.ndarray, "P 2"],
    mirrored: Bool[np.ndarray, "P"],
    share: Float[np.ndarray, "P"],
    side: Int[np.ndarray, "P"],
) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """What the silhouettes of two objects of equal size at equal height have in common.

    Args:
        objects: the two objects.
        angles: in degrees.
        mirrored: drawn reversed left to right.
        share: horizontal overlap of the two squares, as a share of their side.
        side: 1 if the second one is to the right, -1 if it is to the left.

    Returns:
        The common area and the smaller of the silhouettes' areas, as shares of the bounding square.
    """
    ticks = (np.arange(_LATTICE) + 0.5) / _LATTICE
    deep, down = (axis.ravel()[None] for axis in np.meshgrid(ticks[::2], ticks))
    # The places in the strip that both squares cover, as either of them sees it.
    x = side[:, None] * (1 - 2 * share[:, None] * deep)
    y = 2 * down - 1
    step = (2 * side * (1 - share))[:, None]
    one = _inside(objects[:, 0], angles[:, 0], mirrored, x, y)
    other = _inside(objects[:, 1], angles[:, 1], mirrored, x - step, y)
    scale = half_sides()[objects, np.rint(angles).astype(np.int64) % 360]
    return (one & other).mean(axis=1) * share, (_areas()[objects] / scale**2).min(axis=1)


@lru_cache
def _areas() -> Float[np.ndarray, "O"]:
    """Areas of the upright silhouettes, as shares of their bounding squares."""
    return (templates()[..., 0] < 0).mean(axis=(1, 2)) * TEMPLATE_REACH**2


def _inside(
    objects: Int[np.ndarray, "P"],
    angles: Float[np.ndarray, "P"],
    mirrored: Bool[np.ndarray, "P"],
    x: Float[np.ndarray, "#P Q"],
    y: Float[np.ndarray, "#P Q"],
) -> Bool[np.ndarray, "P Q"]:
    """Which points lie inside the objects' silhouettes, in units of half a bounding square, as they are drawn."""
    x = np.where(mirrored[:, None], -x, x)
    scale = half_sides()[objects, np.rint(angles).astype(np.int64) % 360][:, None]
    turn = np.deg2rad(angles)[:, None]
    across, down = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    step = (TEMPLATE_SIZE - 1) / (2 * TEMPLATE_REACH)
    column, row = (
        np.clip(np.rint((scale * axis + TEMPLATE_REACH) * step), 0, TEMPLATE_SIZE - 1).astype(np.int64)
        for axis in (across, down)
    )
    return templates()[objects[:, None], row, column, 0] < 0
