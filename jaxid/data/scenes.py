"""Procedural scenes: drawn objects of known position, size, angle and colour on varied backgrounds.

A `Scenes` describes its pictures completely; `render` is a pure function of it. Objects differ in shape alone: colours,
sizes and positions are drawn independently of the object.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.data.backgrounds import BACKGROUNDS, draw_backgrounds
from jaxid.data.files import save_picture
from jaxid.data.objects import OBJECTS, half_sides, sample_templates
from jaxid.errors import InputError

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.10, 0.12),
    "orange": (1.00, 0.53, 0.05),
    "yellow": (0.99, 0.87, 0.10),
    "green": (0.16, 0.68, 0.22),
    "cyan": (0.15, 0.85, 0.90),
    "blue": (0.15, 0.34, 0.95),
    "purple": (0.60, 0.24, 0.85),
    "pink": (1.00, 0.52, 0.75),
}
"""Names of the object colours -> red, green, blue in 0..1; `Scenes.colors` indexes them in this order."""

GRID = 4
"""Cells along each side of a grid scene."""

VARIED = BACKGROUNDS[1:5]
"""The backgrounds of free scenes: all but white and the ground plane."""

_OUTLINE = 0.09  # width of the dark outline, in units of half the object's side
_INK = 0.22  # what remains of a colour under the outline and the dark details
_GAP = 0.02  # least free space between two bounding squares, in picture fractions
_CHUNK = 32  # pictures drawn together: few enough to stay in a core's cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scenes:
    """N scenes of up to K objects each; later objects are drawn over earlier ones.

    Positions and sizes are fractions of the picture's side. Slots without an object hold -1 in `objects` and `colors`
    and zeros elsewhere.
    """

    objects: Int[np.ndarray, "N K"]  # index into OBJECTS, -1 for none
    colors: Int[np.ndarray, "N K"]  # index into COLORS, -1 for none
    fills: Float[np.ndarray, "N K 3"]  # the jittered colour drawn, in 0..1
    centers: Float[np.ndarray, "N K 2"]  # (x to the right, y down) of the bounding square's centre
    sizes: Float[np.ndarray, "N K"]  # side of the bounding square, which holds the object at its angle
    angles: Float[np.ndarray, "N K"]  # degrees, clockwise
    mirrored: Bool[np.ndarray, "N"]  # drawn reversed left to right; `centers` describe the picture as drawn
    background_kinds: Int[np.ndarray, "N"]  # index into BACKGROUNDS
    background_colors: Float[np.ndarray, "N 2 3"]  # the two colours that the background blends
    background_seeds: Int[np.ndarray, "N"]  # a gradient's direction, the part of a texture shown, a ground's horizon

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: slice | list[int] | np.ndarray) -> "Scenes":
        """The scenes at a slice, a list or array of indices, or a boolean mask."""
        return Scenes(**{name: value[index] for name, value in _arrays(self).items()})

    @property
    def boxes(self) -> Float[np.ndarray, "N K 4"]:
        """Bounding squares (x, y, width, height) in picture fractions; (x, y) is the upper left corner."""
        sides = np.repeat(self.sizes[..., None], 2, axis=-1)
        return np.concatenate([self.centers - sides / 2, sides], axis=-1)


SLOT_FIELDS = ("objects", "colors", "fills", "centers", "sizes", "angles")
"""The fields of `Scenes` that have an axis of object slots."""


def _arrays(scenes: Scenes) -> dict[str, np.ndarray]:
    return {field.name: getattr(scenes, field.name) for field in dataclasses.fields(scenes)}


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    """All scenes of the parts in order, padded with empty object slots to the same number.

    Raises:
        InputError: if there are no parts.
    """
    if not parts:
        raise InputError("concatenate needs at least one Scenes, got none.")
    slots = max(part.objects.shape[1] for part in parts)

    def padded(name: str, value: np.ndarray) -> np.ndarray:
        if name not in SLOT_FIELDS:
            return value
        widths = [(0, 0), (0, slots - value.shape[1])] + [(0, 0)] * (value.ndim - 2)
        return np.pad(value, widths, constant_values=-1 if name in ("objects", "colors") else 0)

    columns = [_arrays(part) for part in parts]
    return Scenes(**{name: np.concatenate([padded(name, part[name]) for part in columns]) for name in columns[0]})


# --- drawing -------------------------------------------------------------------------------------------------------


def render(scenes: Scenes, size: int) -> UInt8[np.ndarray, "N size size 3"]:
    """Draws the scenes as square pictures with smooth edges.

    Args:
        scenes: the scenes to draw.
        size: side of a picture, in pixels.

    Raises:
        InputError: if `size` is not positive.
    """
    if size < 1:
        raise InputError(f"a picture needs at least one pixel per side; got size={size}.")
    result = np.empty((len(scenes), size, size, 3), np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        part = scenes[start : start + _CHUNK]
        flip = part.mirrored
        centers = part.centers.astype(np.float32)
        centers[flip, :, 0] = 1 - centers[flip, :, 0]
        canvas = draw_backgrounds(part.background_kinds, part.background_colors, part.background_seeds, size)
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

    # Template units per pixel: the rotated object exactly fills its bounding square.
    scale = 2 * half_sides()[objects, np.rint(angles).astype(np.int64) % 360] / sides
    turn = np.deg2rad(angles).astype(np.float32)
    cosine, sine = (scale * np.cos(turn))[:, None, None], (scale * np.sin(turn))[:, None, None]
    ticks = np.arange(window, dtype=np.float32) + np.float32(0.5)
    x = (ticks + (corner - places)[:, :1].astype(np.float32))[:, None, :]
    y = (ticks + (corner - places)[:, 1:].astype(np.float32))[:, :, None]
    distances = sample_templates(objects, cosine * x + sine * y, cosine * y - sine * x)

    distances /= scale[:, None, None, None]
    outer, detail = distances[..., 0], distances[..., 1]
    outline = (_OUTLINE / scale)[:, None, None]
    # Nothing is drawn outside the bounding square, where the lookup only repeats the templates' border.
    near = (np.abs(x) < sides[:, None, None] / 2 + np.float32(0.5)) & (
        np.abs(y) < sides[:, None, None] / 2 + np.float32(0.5)
    )
    cover = np.where(near, np.clip(np.float32(0.5) - outer, 0, 1), np.float32(0))
    ink = np.clip(np.float32(0.5) + np.maximum(outer + outline, -detail), 0, 1)
    shade = 1 - np.float32(1 - _INK) * ink

    fills = scenes.fills[rows, slot].astype(np.float32)[:, None, None, :]
    for row, (left, top) in enumerate(corner):
        under = canvas[rows[row], top : top + window, left : left + window]
        under += cover[row, ..., None] * (shade[row, ..., None] * fills[row] - under)


# --- sampling ------------------------------------------------------------------------------------------------------


def sample_free(
    rng: np.random.Generator,
    count: int,
    *,
    num_objects: tuple[int, int] = (1, 4),
    size_range: tuple[float, float] = (0.17, 0.25),
    max_angle: float = 15.0,
    backgrounds: Sequence[str] = VARIED,
) -> Scenes:
    """Scenes of different objects at random continuous positions, whose bounding squares do not overlap.

    Half of them are drawn reversed left to right. Object, colour, number, size and position are drawn independently;
    only the positions within a scene depend on each other.

    Args:
        rng: source of randomness.
        count: number of scenes.
        num_objects: least and most objects in a scene.
        size_range: smallest and largest side of an object, in picture fractions.
        max_angle: objects are rotated by up to this many degrees either way.
        backgrounds: kinds of background to draw from (`BACKGROUNDS`).

    Raises:
        InputError: if an argument is out of range, or that many objects of that size do not fit.
    """
    least, most = num_objects
    if not 0 <= least <= most <= len(OBJECTS):
        raise InputError(
            f"num_objects must be (least, most) with 0 <= least <= most <= {len(OBJECTS)}, got {num_objects}."
        )
    if not 0 < size_range[0] <= size_range[1] <= 1:
        raise InputError(f"size_range must be (least, most) within 0..1, got {size_range}.")
    present = np.arange(most) < rng.integers(least, most + 1, size=count)[:, None]
    objects = np.where(present, rng.random((count, len(OBJECTS))).argsort(axis=1)[:, :most], -1)
    sizes = np.where(present, rng.uniform(*size_range, size=(count, most)), 0)
    centers = _draw_centers(rng, present, sizes)
    angles = np.where(present, rng.uniform(-max_angle, max_angle, size=(count, most)), 0)
    return dress(rng, objects, centers, sizes, angles, backgrounds, 0.5)


def sample_grid(
    rng: np.random.Generator,
    objects_a: Int[np.ndarray, "N"],
    cells_a: Int[np.ndarray, "N 2"],
    objects_b: Int[np.ndarray, "N"],
    cells_b: Int[np.ndarray, "N 2"],
    *,
    scale: float | Float[np.ndarray, "N"] = 1.0,
    jitter_size: float = 0.0,
    jitter_angle: float = 0.0,
    jitter_center: float = 0.0,
    backgrounds: Sequence[str] = VARIED,
) -> Scenes:
    """Two-object scenes on a grid of cells ([ID] section 3, arXiv 2601.12626).

    Args:
        rng: source of randomness for colours, backgrounds and jitter.
        objects_a: first objects, as indices into `OBJECTS`.
        cells_a: their cells (column, row), counted from the upper left.
        objects_b: second objects.
        cells_b: their cells.
        scale: side of both objects in cells; the paper's are 224, 174, 124 and 74 of 224.
        jitter_size: sides change by up to this share either way.
        jitter_angle: objects are rotated by up to this many degrees either way.
        jitter_center: centres move by up to this many cells either way along each axis. Jitter of size and position is
            reduced where the objects would otherwise overlap, and objects stay in the picture.
        backgrounds: kinds of background to draw from; ("white",) gives the paper's transparent setting.

    Raises:
        InputError: if lengths differ, a cell is outside the grid, an object is unknown, or both share a cell.
    """
    objects = np.stack([np.asarray(objects_a), np.asarray(objects_b)], axis=-1)
    cells = np.stack([np.asarray(cells_a), np.asarray(cells_b)], axis=1)
    count = len(objects)
    if objects.shape != (count, 2) or cells.shape != (count, 2, 2):
        raise InputError(f"objects must be [N] and cells [N, 2]; got {objects.shape}, {cells.shape} stacked.")
    if count and not (objects.min() >= 0 and objects.max() < len(OBJECTS)):
        raise InputError(
            f"objects are indices 0..{len(OBJECTS) - 1} into OBJECTS; got {objects.min()}..{objects.max()}."
        )
    if count and not (cells.min() >= 0 and cells.max() < GRID):
        raise InputError(f"cells are (column, row) in 0..{GRID - 1}; got {cells.min()}..{cells.max()}.")
    if (cells[:, 0] == cells[:, 1]).all(-1).any():
        shared = int((cells[:, 0] == cells[:, 1]).all(-1).argmax())
        raise InputError(f"scene {shared} has both objects in cell {tuple(cells[shared, 0].tolist())}.")

    sides = np.broadcast_to(np.asarray(scale, float).reshape(-1, 1) / GRID, (count, 2))
    size_steps = rng.uniform(-jitter_size, jitter_size, size=(count, 2))
    steps = rng.uniform(-jitter_center, jitter_center, size=(count, 2, 2)) / GRID

    def placed(strength: Float[np.ndarray, "N 1"]) -> tuple[Float[np.ndarray, "N 2"], Float[np.ndarray, "N 2 2"]]:
        sizes = sides * (1 + strength * size_steps)
        half = np.minimum(sizes / 2, 0.5)[..., None]
        return sizes, np.clip((cells + 0.5) / GRID + strength[..., None] * steps, half, 1 - half)

    strength = np.ones((count, 1))
    for weaker in np.arange(7, -1, -1) / 8:
        sizes, centers = placed(strength)
        apart = np.abs(centers[:, 0] - centers[:, 1]).max(-1) - sizes.mean(-1)
        strength = np.where((apart < 0)[:, None], weaker, strength)
    sizes, centers = placed(strength)
    angles = rng.uniform(-jitter_angle, jitter_angle, size=(count, 2))
    return dress(rng, objects, centers, sizes, angles, backgrounds, 0.0)


def _draw_centers(
    rng: np.random.Generator, present: Bool[np.ndarray, "N K"], sizes: Float[np.ndarray, "N K"]
) -> Float[np.ndarray, "N K 2"]:
    """Draws centres uniformly from all arrangements whose squares are at least `_GAP` apart.

    The objects of a scene are drawn and redrawn together, so that every slot has the same distribution.
    """
    count, slots = present.shape
    result = np.zeros((count, slots, 2), np.float32)
    first, second = np.triu_indices(slots, 1)
    reach = (sizes[:, first] + sizes[:, second]) / 2 + _GAP
    reach = np.where(present[:, first] & present[:, second], reach, -1).astype(np.float32)
    half = (sizes / 2).astype(np.float32)
    pending, idle_rounds = np.arange(count), 0
    while idle_rounds < 50:
        if len(pending) == 0:
            return result
        # With few scenes left, each gets several proposals, so that every round does about the same work.
        tries = max(1, 2048 // len(pending))
        side = half[pending, None, :, None]
        drawn = side + rng.random((len(pending), tries, slots, 2), dtype=np.float32) * (1 - 2 * side)
        apart = np.abs(drawn[:, :, first] - drawn[:, :, second]).max(-1)
        valid = (apart >= reach[pending, None]).all(-1)
        done = valid.any(1)
        chosen = drawn[np.arange(len(pending)), valid.argmax(1)]
        result[pending[done]] = np.where(present[pending[done], :, None], chosen[done], 0)
        pending = pending[~done]
        idle_rounds = 0 if done.any() else idle_rounds + 1
    raise InputError(
        f"{slots} objects with sides up to {float(sizes.max()):.2f} and gaps of {_GAP} do not fit in a picture; "
        "ask for fewer or smaller objects."
    )


def dress(
    rng: np.random.Generator,
    objects: Int[np.ndarray, "N K"],
    centers: Float[np.ndarray, "N K 2"],
    sizes: Float[np.ndarray, "N K"],
    angles: Float[np.ndarray, "N K"],
    backgrounds: Sequence[str],
    mirror_share: float,
) -> Scenes:
    """Gives objects with positions and sizes random colours and backgrounds.

    Args:
        rng: source of randomness.
        objects: indices into `OBJECTS`, -1 for empty slots.
        centers: their places.
        sizes: sides of their bounding squares.
        angles: in degrees.
        backgrounds: kinds of background to draw from; one that is named twice is drawn twice as often.
        mirror_share: share of the scenes drawn reversed left to right.

    Raises:
        InputError: if a kind of background is unknown, or there is none.
    """
    unknown = [kind for kind in backgrounds if kind not in BACKGROUNDS]
    if unknown or not backgrounds:
        raise InputError(f"backgrounds must be some of {', '.join(BACKGROUNDS)}; got {list(backgrounds)}.")
    count, slots = objects.shape
    present = objects >= 0
    colors = np.where(present, rng.integers(len(COLORS), size=(count, slots)), -1)
    base = np.asarray(list(COLORS.values()))[colors]
    # A common factor for brightness and a small change of each channel for hue.
    fills = base * rng.uniform(0.88, 1.08, size=(count, slots, 1)) + rng.uniform(-0.05, 0.05, size=(count, slots, 3))
    fills = np.where(present[..., None], np.clip(fills, 0, 1), 0)
    kinds = np.asarray([BACKGROUNDS.index(kind) for kind in backgrounds])[rng.integers(len(backgrounds), size=count)]
    # Pale or dark, never vivid: the saturated objects and their dark outlines stand out on both.
    dark = rng.random((count, 1, 1)) < 0.3
    gray = np.where(dark, rng.uniform(0.12, 0.3, size=(count, 2, 1)), rng.uniform(0.72, 0.98, size=(count, 2, 1)))
    pair = np.clip(gray + rng.uniform(-0.08, 0.08, size=(count, 2, 3)), 0, 1)
    pair = np.where((kinds == BACKGROUNDS.index("white"))[:, None, None], 1.0, pair)
    pair = np.where((kinds == BACKGROUNDS.index("ground"))[:, None, None], _sky_and_ground(pair), pair)
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


def _sky_and_ground(pair: Float[np.ndarray, "N 2 3"]) -> Float[np.ndarray, "N 2 3"]:
    """Makes the two colours differ: the paler of pale ones, or the darker of dark ones, becomes the sky."""
    pale = pair.mean(axis=(1, 2), keepdims=True) > 0.5
    order = np.argsort(pair.mean(axis=-1), axis=1)  # the darker one first
    order = np.where(pale[:, 0], order[:, ::-1], order)
    step = np.where(pale, -0.14, 0.14) * np.array([0, 1])[:, None]
    return np.clip(np.take_along_axis(pair, order[..., None], axis=1) + step, 0, 1)


def preview(path: str | Path, *, seed: int = 0, count: int = 24, size: int = 128) -> None:
    """Writes a captioned contact sheet: every object, then free scenes, then grid scenes.

    Args:
        path: the PNG or JPEG file to write.
        seed: chooses the scenes.
        count: number of scenes, half of them free and half on the grid.
        size: side of each picture in pixels.

    Raises:
        OutputError: if the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(seed)
    everything = np.arange(len(OBJECTS))[:, None]
    middle, sides = np.full((len(OBJECTS), 1, 2), 0.5), np.full((len(OBJECTS), 1), 0.8)
    alone = dress(rng, everything, middle, sides, 0 * sides, ["white"], 0.0)
    free = sample_free(rng, (count + 1) // 2, num_objects=(2, 4))
    pairs = rng.random((count // 2, len(OBJECTS))).argsort(axis=1)[:, :2]
    cells = rng.random((count // 2, 16)).argsort(axis=1)[:, :2]
    cells = np.stack([cells % 4, cells // 4], axis=-1)
    grid = sample_grid(rng, pairs[:, 0], cells[:, 0], pairs[:, 1], cells[:, 1], scale=0.9, backgrounds=BACKGROUNDS[:5])

    columns, margin, caption = 8, 8, 36
    groups = [alone, concatenate([free, grid])]
    rows = sum(-(-len(group) // columns) for group in groups)
    sheet = Image.new("RGB", (columns * (size + margin) + margin, rows * (size + caption) + margin), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    top = margin
    for group in groups:
        for index, picture in enumerate(render(group, size)):
            if index and index % columns == 0:
                top += size + caption
            left = margin + index % columns * (size + margin)
            sheet.paste(Image.fromarray(picture), (left, top))
            draw.rectangle((left - 1, top - 1, left + size, top + size), outline=(200, 200, 200))
            names = [OBJECTS[name] for name in group.objects[index] if name >= 0]
            text = "\n".join(", ".join(names[start : start + 2]) for start in range(0, len(names), 2))
            draw.text(
                (left + size / 2, top + size + 2), text, fill=(60, 60, 60), font=font, anchor="ma", align="center"
            )
        top += size + caption
    save_picture(path, np.asarray(sheet))
