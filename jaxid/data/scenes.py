"""Procedural scenes: drawn objects of known place, size, angle and colour on varied backgrounds.

A `Scenes` says completely what is in its pictures; `render` is a pure function of it. Objects are told by shape alone:
colours, sizes and places are drawn independently of the object.
"""

import dataclasses
import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data.objects import OBJECTS, TEMPLATE_REACH, TEMPLATE_SIZE, half_sides, templates
from jaxid.errors import InputError, OutputError

__all__ = [
    "BACKGROUNDS",
    "COLORS",
    "OBJECTS",
    "Scenes",
    "concatenate",
    "mirror",
    "preview",
    "render",
    "sample_free",
    "sample_grid",
    "save_bytes",
    "save_picture",
]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.10, 0.12),
    "orange": (1.00, 0.53, 0.05),
    "yellow": (0.99, 0.87, 0.10),
    "green": (0.15, 0.62, 0.20),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.14, 0.30, 0.90),
    "purple": (0.52, 0.18, 0.72),
    "pink": (1.00, 0.52, 0.75),
}
"""Names of the object colours -> red, green, blue in 0..1; `Scenes.colors` holds indices in this order."""

BACKGROUNDS: tuple[str, ...] = ("white", "plain", "gradient", "noise", "texture")
"""Kinds of background; `Scenes.background_kinds` holds indices into this tuple."""

VARIED = BACKGROUNDS[1:]
"""The backgrounds of free scenes."""

_OUTLINE = 0.09  # width of the dark outline, in units of half the object's side
_INK = 0.22  # what remains of a colour under the outline and the dark details
_TILE = 256  # side of the periodic noise tiles behind the "noise" and "texture" backgrounds
_CHUNK = 32  # pictures drawn together: few enough to stay in a core's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """N scenes of up to K objects each; later objects are drawn over earlier ones.

    Places and sizes are fractions of the picture's side; slots without an object hold -1 in `objects` and `colors`
    and zeros elsewhere.
    """

    objects: Int[np.ndarray, "N K"]  # index in OBJECTS, -1 for none
    colors: Int[np.ndarray, "N K"]  # index in COLORS, -1 for none
    fills: Float[np.ndarray, "N K 3"]  # the jittered colour drawn, in 0..1
    centers: Float[np.ndarray, "N K 2"]  # (x to the right, y down) of the bounding square's centre
    sizes: Float[np.ndarray, "N K"]  # side of the bounding square, which holds the object at its angle
    angles: Float[np.ndarray, "N K"]  # degrees, clockwise
    mirrored: Bool[np.ndarray, "N"]  # drawn left-right reversed; `centers` are places in the picture as drawn
    background_kinds: Int[np.ndarray, "N"]  # index in BACKGROUNDS
    background_colors: Float[np.ndarray, "N 2 3"]  # the two colours that the background mixes
    background_seeds: Int[np.ndarray, "N"]  # chooses the direction of a gradient, the part of a noise or texture

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: slice | list[int] | np.ndarray) -> "Scenes":
        """The scenes at a slice, list or array of indices, or at the true places of a mask."""
        return Scenes(**{name: value[index] for name, value in _arrays(self).items()})

    @property
    def boxes(self) -> Float[np.ndarray, "N K 4"]:
        """Bounding squares (x, y, width, height) in picture fractions, x and y of the upper left corner."""
        sides = np.repeat(self.sizes[..., None], 2, axis=-1)
        return np.concatenate([self.centers - sides / 2, sides], axis=-1)


def _arrays(scenes: Scenes) -> dict[str, np.ndarray]:
    return {field.name: getattr(scenes, field.name) for field in dataclasses.fields(scenes)}


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    """All scenes of the parts in order; missing object slots are filled with "none".

    Raises:
        InputError: There are no parts.
    """
    if not parts:
        raise InputError("concatenate needs at least one Scenes, got none.")
    slots = max(part.objects.shape[1] for part in parts)

    def padded(name: str, value: np.ndarray) -> np.ndarray:
        if name not in ("objects", "colors", "fills", "centers", "sizes", "angles"):
            return value
        widths = [(0, 0), (0, slots - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, widths, constant_values=-1 if name in ("objects", "colors") else 0)

    columns = [_arrays(part) for part in parts]
    return Scenes(**{name: np.concatenate([padded(name, part[name]) for part in columns]) for name in columns[0]})


def mirror(scenes: Scenes) -> Scenes:
    """The scenes reversed left to right: `render(mirror(s), n)` is `render(s, n)[:, :, ::-1]`."""
    return dataclasses.replace(scenes, centers=_reversed(scenes.centers), mirrored=~scenes.mirrored)


def _reversed(centers: Float[np.ndarray, "N K 2"]) -> Float[np.ndarray, "N K 2"]:
    return np.stack([1 - centers[..., 0], centers[..., 1]], axis=-1).astype(np.float32)


# --- drawing -------------------------------------------------------------------------------------------------------


def render(scenes: Scenes, size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """Draws the scenes as square pictures with smooth edges.

    Args:
        scenes: What to draw.
        size: Rows and columns of a picture, in pixels.

    Raises:
        InputError: `size` is not positive.
    """
    if size < 1:
        raise InputError(f"A picture must have at least one pixel a side, got size={size}.")
    result = np.empty((len(scenes), size, size, 3), np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        part = scenes[start : start + _CHUNK]
        flip = part.mirrored
        centers = np.where(flip[:, None, None], _reversed(part.centers), part.centers)
        canvas = _draw_backgrounds(part, size)
        for slot in range(part.objects.shape[1]):
            _draw_objects(canvas, part, centers, slot)
        canvas[flip] = canvas[flip, :, ::-1]
        canvas *= 255
        canvas += 0.5
        result[start : start + _CHUNK] = canvas.astype(np.uint8)
    return result


def _draw_objects(
    canvas: Float[np.ndarray, "N S S 3"], scenes: Scenes, centers: Float[np.ndarray, "N K 2"], slot: int
) -> None:
    """Draws the objects of one slot over the canvas, in place, each within a small window around it."""
    size = canvas.shape[1]
    rows = np.flatnonzero((scenes.objects[:, slot] >= 0) & (scenes.sizes[:, slot] > 0))
    if len(rows) == 0:
        return
    objects, angles = scenes.objects[rows, slot], scenes.angles[rows, slot]
    sides = scenes.sizes[rows, slot].astype(np.float32) * np.float32(size)
    places = centers[rows, slot].astype(np.float32) * np.float32(size)
    window = min(int(np.ceil(sides.max())) + 2, size)
    corner = np.clip(np.floor(places - window / 2 + 0.5).astype(np.int64), 0, size - window)

    # Template units per pixel: the turned object just fills its bounding square.
    scale = 2 * half_sides()[objects, np.rint(angles).astype(np.int64) % 360] / sides
    turn = np.deg2rad(angles).astype(np.float32)
    cosine, sine = (scale * np.cos(turn))[:, None, None], (scale * np.sin(turn))[:, None, None]
    ticks = np.arange(window, dtype=np.float32) + np.float32(0.5)
    x = (ticks + (corner - places)[:, :1].astype(np.float32))[:, None, :]
    y = (ticks + (corner - places)[:, 1:].astype(np.float32))[:, :, None]
    distances = _sample_templates(objects, cosine * x + sine * y, cosine * y - sine * x)

    distances /= scale[:, None, None, None]
    outer, detail = distances[..., 0], distances[..., 1]
    outline = (_OUTLINE / scale)[:, None, None]
    cover = np.clip(np.float32(0.5) - outer, 0, 1)
    ink = np.clip(np.float32(0.5) + np.maximum(outer + outline, -detail), 0, 1)
    shade = 1 - np.float32(1 - _INK) * ink

    fills = scenes.fills[rows, slot].astype(np.float32)[:, None, None, :]
    for row, (left, top) in enumerate(corner):
        under = canvas[rows[row], top : top + window, left : left + window]
        under += cover[row, ..., None] * (shade[row, ..., None] * fills[row] - under)


def _sample_templates(
    objects: Int[np.ndarray, "N"], x: Float[np.ndarray, "N S S"], y: Float[np.ndarray, "N S S"]
) -> Float[np.ndarray, "N S S 2"]:
    """Bilinear lookup of the templates at (x, y) in template units; places beyond the lattice use its border."""
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


def _draw_backgrounds(scenes: Scenes, size: int) -> Float[np.ndarray, "N size size 3"]:
    """The empty pictures: every kind of background is a mix of its two colours with a weight per pixel."""
    kinds = scenes.background_kinds
    noise, texture = _tiles()
    weights = np.zeros((len(scenes), size, size), np.float32)
    ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    for index in np.flatnonzero(kinds > BACKGROUNDS.index("plain")):
        seed, kind = int(scenes.background_seeds[index]), BACKGROUNDS[kinds[index]]
        across, down = seed % _TILE, seed // _TILE % _TILE
        if kind == "gradient":
            turn = 2 * np.pi * across / _TILE
            # The direction's largest projection over the unit square, so that weights span 0..1.
            reach = abs(np.cos(turn)) + abs(np.sin(turn))
            weights[index] = np.cos(turn) / reach * (ticks - 0.5) + np.sin(turn) / reach * (ticks - 0.5)[:, None]
            weights[index] += 0.5
        else:
            # Noise keeps its grain in pixels; a texture keeps its place in the picture at every size.
            steps = np.arange(size) if kind == "noise" else np.arange(size) * 128 // size
            tile = noise if kind == "noise" else texture
            weights[index] = tile[np.ix_((steps + down) % _TILE, (steps + across) % _TILE)]
    first, second = np.moveaxis(scenes.background_colors.astype(np.float32), 1, 0)
    canvas = np.empty((len(scenes), size, size, 3), np.float32)
    canvas[:] = first[:, None, None]
    mixed = np.flatnonzero(kinds > BACKGROUNDS.index("plain"))
    canvas[mixed] += weights[mixed, ..., None] * (second - first)[mixed, None, None]
    return canvas


@lru_cache
def _tiles() -> tuple[Float[np.ndarray, "T T"], Float[np.ndarray, "T T"]]:
    """A fixed tile of white noise and one of smooth, cloudy noise, both periodic and in 0..1."""
    rng = np.random.default_rng(20_260_126)
    noise = rng.random((_TILE, _TILE), dtype=np.float32)
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]) * _TILE
    # Waves of 1 / 16 of the tile and longer, each octave with the same strength: cloudy, without fine grain.
    spectrum = np.where((frequency > 1.5) & (frequency < 16), 1 / np.maximum(frequency, 1), 0)
    cloud = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * spectrum, s=(_TILE, _TILE))
    cloud = np.clip(0.5 + 0.25 * cloud / cloud.std(), 0, 1).astype(np.float32)
    return noise, cloud


# --- sampling ------------------------------------------------------------------------------------------------------


def sample_free(
    rng: np.random.Generator,
    count: int,
    *,
    num_objects: tuple[int, int] = (1, 4),
    size_range: tuple[float, float] = (0.17, 0.25),
    min_gap: float = 0.02,
    distinct: bool = True,
    max_angle: float = 15.0,
    mirror_share: float = 0.5,
    backgrounds: Sequence[str] = VARIED,
    forbid: Bool[np.ndarray, "O O"] | None = None,
) -> Scenes:
    """Scenes of objects at random continuous places whose bounding squares do not overlap.

    Object, colour, number, size and place are independent draws; only the places of one scene depend on each other.

    Args:
        rng: Source of randomness.
        count: Number of scenes.
        num_objects: Least and most objects in a scene.
        size_range: Least and greatest side of an object, in picture fractions.
        min_gap: Least free space between two bounding squares, in picture fractions.
        distinct: Whether all objects of a scene differ.
        max_angle: Objects are turned by up to this many degrees either way.
        mirror_share: Share of the scenes that are drawn left-right reversed.
        backgrounds: Kinds of background to draw from (`BACKGROUNDS`).
        forbid: Symmetric table of object pairs that never share a scene.

    Raises:
        InputError: An argument is out of range, or that many objects of that size do not fit.
    """
    least, most = num_objects
    if not 0 <= least <= most or (distinct and most > len(OBJECTS)):
        raise InputError(f"num_objects must be (least, most) with 0 <= least <= most, got {num_objects}.")
    if not 0 < size_range[0] <= size_range[1] <= 1:
        raise InputError(f"size_range must be (least, most) within 0..1, got {size_range}.")
    present = np.arange(most) < rng.integers(least, most + 1, size=count)[:, None]
    objects = np.where(present, _draw_names(rng, present, distinct=distinct, forbid=forbid), -1)
    sizes = np.where(present, rng.uniform(*size_range, size=(count, most)), 0)
    centers = _draw_places(rng, present, sizes, min_gap)
    angles = np.where(present, rng.uniform(-max_angle, max_angle, size=(count, most)), 0)
    return _dress(rng, objects, centers, sizes, angles, backgrounds, mirror_share)


def sample_grid(
    rng: np.random.Generator,
    objects_a: Int[np.ndarray, "N"],
    cells_a: Int[np.ndarray, "N 2"],
    objects_b: Int[np.ndarray, "N"],
    cells_b: Int[np.ndarray, "N 2"],
    *,
    grid: int = 4,
    scale: float | Float[np.ndarray, "N"] = 1.0,
    jitter_size: float = 0.0,
    jitter_angle: float = 0.0,
    jitter_center: float = 0.0,
    mirror_share: float = 0.0,
    backgrounds: Sequence[str] = VARIED,
) -> Scenes:
    """Two-object scenes on a grid of cells ([ID] section 3, arXiv 2601.12626).

    Args:
        rng: Source of randomness for colours, backgrounds and jitter.
        objects_a: First object, index in `OBJECTS`.
        cells_a: Its cell (column, row), counted from the upper left.
        objects_b: Second object.
        cells_b: Its cell.
        grid: Cells a side.
        scale: Side of both objects in cells; the paper's are 224, 174, 124 and 74 of 224.
        jitter_size: Sides change by up to this share either way.
        jitter_angle: Objects are turned by up to this many degrees either way.
        jitter_center: Centres move by up to this many cells either way along each axis. Jitter of size and place is
            reduced where the objects would otherwise overlap, and objects stay in the picture.
        mirror_share: Share of the scenes drawn left-right reversed (each object still sits in its given cell).
        backgrounds: Kinds of background to draw from; ("white",) gives the paper's transparent setting.

    Raises:
        InputError: Lengths differ, a cell is outside the grid, an object is unknown, or both share a cell.
    """
    objects = np.stack([np.asarray(objects_a), np.asarray(objects_b)], axis=-1)
    cells = np.stack([np.asarray(cells_a), np.asarray(cells_b)], axis=1)
    count = len(objects)
    if objects.shape != (count, 2) or cells.shape != (count, 2, 2):
        raise InputError(f"Objects must be [N] and cells [N, 2]; got {objects.shape}, {cells.shape} stacked.")
    if count and not (objects.min() >= 0 and objects.max() < len(OBJECTS)):
        raise InputError(f"Objects are indices 0..{len(OBJECTS) - 1} in OBJECTS; got {objects.min()}..{objects.max()}.")
    if count and not (cells.min() >= 0 and cells.max() < grid):
        raise InputError(f"Cells are (column, row) in 0..{grid - 1}; got {cells.min()}..{cells.max()}.")
    if (cells[:, 0] == cells[:, 1]).all(-1).any():
        shared = int((cells[:, 0] == cells[:, 1]).all(-1).argmax())
        raise InputError(f"Scene {shared} has both objects in cell {tuple(cells[shared, 0].tolist())}.")

    sides = np.broadcast_to(np.asarray(scale, float).reshape(-1, 1) / grid, (count, 2))
    size_steps = rng.uniform(-jitter_size, jitter_size, size=(count, 2))
    steps = rng.uniform(-jitter_center, jitter_center, size=(count, 2, 2)) / grid
    strength = np.ones((count, 1))
    for kept in np.linspace(1, 0, 9):
        sizes = sides * (1 + strength * size_steps)
        half = np.minimum(sizes / 2, 0.5)[..., None]
        centers = np.clip((cells + 0.5) / grid + strength[..., None] * steps, half, 1 - half)
        apart = np.abs(centers[:, 0] - centers[:, 1]).max(-1) - sizes.mean(-1)
        strength = np.where((apart < 0)[:, None], kept, strength)
    angles = rng.uniform(-jitter_angle, jitter_angle, size=(count, 2))
    return _dress(rng, objects, centers, sizes, angles, backgrounds, mirror_share)


def _draw_names(
    rng: np.random.Generator, present: Bool[np.ndarray, "N K"], *, distinct: bool, forbid: np.ndarray | None
) -> Int[np.ndarray, "N K"]:
    """Object indices for every slot; scenes with a forbidden pair are drawn again as a whole."""
    count, slots = present.shape
    if not distinct and forbid is None:
        return rng.integers(len(OBJECTS), size=(count, slots))
    banned = np.zeros((len(OBJECTS),) * 2, bool) if forbid is None else np.asarray(forbid, bool)
    if banned.shape != (len(OBJECTS),) * 2:
        raise InputError(f"forbid must be [{len(OBJECTS)}, {len(OBJECTS)}], got {list(banned.shape)}.")
    result = np.zeros((count, slots), np.int64)
    pending = np.arange(count)
    for _ in range(1000):
        if len(pending) == 0:
            return result
        if distinct:
            drawn = rng.random((len(pending), len(OBJECTS))).argsort(axis=1)[:, :slots]
        else:
            drawn = rng.integers(len(OBJECTS), size=(len(pending), slots))
        result[pending] = drawn
        both = present[pending, :, None] & present[pending, None, :] & ~np.eye(slots, dtype=bool)
        pending = pending[(banned[drawn[:, :, None], drawn[:, None, :]] & both).any(axis=(1, 2))]
    raise InputError("forbid leaves too few allowed combinations of objects; forbid fewer pairs.")


def _draw_places(
    rng: np.random.Generator,
    present: Bool[np.ndarray, "N K"],
    sizes: Float[np.ndarray, "N K"],
    min_gap: float,
) -> Float[np.ndarray, "N K 2"]:
    """Uniform places among all those where no two squares come nearer than `min_gap`.

    All objects of a scene are drawn together and drawn again together, so that every slot has the same distribution.
    """
    count, slots = present.shape
    result = np.zeros((count, slots, 2), np.float32)
    first, second = np.triu_indices(slots, 1)
    reach = (sizes[:, first] + sizes[:, second]) / 2 + min_gap
    reach = np.where(present[:, first] & present[:, second], reach, -1).astype(np.float32)
    half = (sizes / 2).astype(np.float32)
    pending = np.arange(count)
    for _ in range(2000):
        if len(pending) == 0:
            return result
        # Few scenes left: several proposals for each, so that a round always does about the same work.
        tries = max(1, 2048 // len(pending))
        side = half[pending, None, :, None]
        drawn = side + rng.random((len(pending), tries, slots, 2), dtype=np.float32) * (1 - 2 * side)
        apart = np.abs(drawn[:, :, first] - drawn[:, :, second]).max(-1)
        valid = (apart >= reach[pending, None]).all(-1)
        done = valid.any(1)
        chosen = drawn[np.arange(len(pending)), valid.argmax(1)]
        result[pending[done]] = np.where(present[pending[done], :, None], chosen[done], 0)
        pending = pending[~done]
    raise InputError(
        f"{slots} objects with sides up to {float(sizes.max()):.2f} and gaps of {min_gap} do not fit in a picture; "
        "ask for fewer or smaller objects."
    )


def _dress(
    rng: np.random.Generator,
    objects: Int[np.ndarray, "N K"],
    centers: Float[np.ndarray, "N K 2"],
    sizes: Float[np.ndarray, "N K"],
    angles: Float[np.ndarray, "N K"],
    backgrounds: Sequence[str],
    mirror_share: float,
) -> Scenes:
    """Adds random colours and backgrounds to placed objects."""
    unknown = [kind for kind in backgrounds if kind not in BACKGROUNDS]
    if unknown or not backgrounds:
        raise InputError(f"backgrounds must name some of {', '.join(BACKGROUNDS)}; got {list(backgrounds)}.")
    count, slots = objects.shape
    present = objects >= 0
    colors = np.where(present, rng.integers(len(COLORS), size=(count, slots)), -1)
    base = np.asarray(list(COLORS.values()))[colors]
    # A common factor for brightness and a small change of each channel for hue.
    fills = base * rng.uniform(0.88, 1.08, size=(count, slots, 1)) + rng.uniform(-0.05, 0.05, size=(count, slots, 3))
    fills = np.where(present[..., None], np.clip(fills, 0, 1), 0)
    kinds = np.asarray([BACKGROUNDS.index(kind) for kind in backgrounds])[rng.integers(len(backgrounds), size=count)]
    # Pale or dark, never vivid: the saturated objects and their dark outlines stand out on both.
    dark = rng.random((count, 1, 1)) < 0.35
    gray = np.where(dark, rng.uniform(0.1, 0.32, size=(count, 2, 1)), rng.uniform(0.72, 0.98, size=(count, 2, 1)))
    pair = np.clip(gray + rng.uniform(-0.08, 0.08, size=(count, 2, 3)), 0, 1)
    pair = np.where((kinds == BACKGROUNDS.index("white"))[:, None, None], 1.0, pair)
    return Scenes(
        objects=objects.astype(np.int32),
        colors=colors.astype(np.int32),
        fills=fills.astype(np.float32),
        centers=centers.astype(np.float32),
        sizes=sizes.astype(np.float32),
        angles=angles.astype(np.float32),
        mirrored=rng.random(count) < mirror_share,
        background_kinds=kinds.astype(np.int32),
        background_colors=pair.astype(np.float32),
        background_seeds=rng.integers(2**31 - 1, size=count, dtype=np.int32),
    )


# --- files ---------------------------------------------------------------------------------------------------------


def save_bytes(path: str | Path, data: bytes) -> None:
    """Writes a whole file or nothing: a temporary name in the same folder, then a rename; makes missing folders.

    Raises:
        OutputError: The file cannot be written. A file that was there is then unharmed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written: {error}. Choose a folder you may write to.") from error


def save_picture(path: str | Path, picture: UInt8[np.ndarray, "Y X 3"]) -> None:
    """Writes a PNG or (quality 95) JPEG file, by the name's ending, atomically.

    Raises:
        OutputError: The name ends in neither `.png` nor `.jpg`, or the file cannot be written.
    """
    from PIL import Image

    kinds = {".png": ("PNG", {}), ".jpg": ("JPEG", {"quality": 95}), ".jpeg": ("JPEG", {"quality": 95})}
    if Path(path).suffix.lower() not in kinds:
        raise OutputError(f"{path} cannot be written: a picture's name must end in .png or .jpg.")
    kind, options = kinds[Path(path).suffix.lower()]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    save_bytes(path, buffer.getvalue())
