"""The drawn objects by other means than the training scenes': Pillow's own shapes and glyphs of fonts, in other styles.

The proportions are drawn anew rather than copied from `jaxid.data.objects`.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, UInt8

from jaxid.data.scenes import OBJECTS, Scenes
from jaxid.prompts.pictures import PILImage

Silhouette = Callable[[str], PILImage]
"""Gives the silhouette of an object by its name, white on black ("L"), upright and cut to its bounding box."""

Style = Literal["flat", "outline", "hatched", "thick"]
"""Filled without an outline; a thin outline alone; hatched within a thin outline; filled, with a thick dark outline."""

FONTS: dict[str, dict[str, str]] = {
    "DejaVuSans-Bold.ttf": {
        "circle": "●",
        "triangle": "▲",
        "square": "■",
        "star": "★",
        "heart": "♥",
        "cross": "✚",
        "moon": "☾",
        "ring": "◯",
        "house": "⌂",
        "cup": "☕",
        "bolt": "⚡",
    },
    "STIXGeneral.ttf": {
        "circle": "●",
        "triangle": "▲",
        "square": "■",
        "star": "★",
        "heart": "♥",
        "moon": "☾",
        "ring": "◯",
        "hourglass": "⧗",
    },
}
"""Fonts that Matplotlib ships, and their glyphs of objects."""

STRANGERS = "➔R8&⬢♣"
"""Glyphs of DejaVu Sans that show none of the objects."""

_CANVAS = 512  # side of the canvas on which a silhouette is drawn
_LONGEST = 128  # longer side of a silhouette
_FINER = 4  # pictures are drawn that many times larger and then reduced
_INK = 0.22  # what remains of a colour in a dark outline


def redraw(
    scenes: Scenes,
    ground: UInt8[np.ndarray, "N Y X 3"],
    silhouette: Silhouette,
    style: Style = "flat",
    strangers: Mapping[int, str] | None = None,
) -> UInt8[np.ndarray, "N Y X 3"]:
    """Draws the objects of scenes, in their colours and at their places, sizes and angles, over pictures.

    Args:
        scenes: the scenes, whose own backgrounds are not drawn.
        ground: the pictures behind them.
        silhouette: draws an object.
        style: how silhouettes become pictures.
        strangers: glyph of `STRANGERS` that replaces the first object of a scene, by the scene's index.
    """
    from PIL import Image

    side = ground.shape[1]
    pictures = np.empty_like(ground)
    for row in range(len(scenes)):
        canvas = Image.fromarray(ground[row]).resize((_FINER * side, _FINER * side), Image.Resampling.NEAREST)
        for slot in np.flatnonzero(scenes.objects[row] >= 0).tolist():
            if slot == 0 and strangers and row in strangers:
                mask = glyph("DejaVuSans-Bold.ttf", strangers[row])
            else:
                mask = silhouette(OBJECTS[scenes.objects[row, slot]])
            # Pillow's angles count counterclockwise.
            mask = mask.rotate(-float(scenes.angles[row, slot]), Image.Resampling.BICUBIC, expand=True)
            if scenes.mirrored[row]:
                mask = mask.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            _paste(canvas, mask, scenes.fills[row, slot], scenes.centers[row, slot], scenes.sizes[row, slot], style)
        pictures[row] = np.asarray(canvas.resize((side, side), Image.Resampling.BOX))
    return pictures


def _paste(canvas: PILImage, mask: PILImage, fill: Any, center: Any, size: Any, style: Style) -> None:
    """Draws an object on the canvas; the longer side of its bounding box is `size` of the canvas'."""
    from PIL import Image, ImageOps

    mask = mask.crop(mask.getbbox())
    longest = float(size) * canvas.width / max(mask.size)
    mask = mask.resize((max(1, round(longest * mask.width)), max(1, round(longest * mask.height))))
    mask = ImageOps.expand(mask, 1)  # so that the silhouette's edge has something outside of it
    corner = [round(float(center[axis]) * canvas.width - mask.size[axis] / 2) for axis in range(2)]
    for part, color in _layers(mask, np.asarray(fill, float), style):
        tone = tuple(np.clip(np.rint(255 * color), 0, 255).astype(int).tolist())
        canvas.paste(Image.new("RGB", part.size, tone), (corner[0], corner[1]), part)


def _layers(
    mask: PILImage, color: Float[np.ndarray, "3"], style: Style
) -> list[tuple[PILImage, Float[np.ndarray, "3"]]]:
    """What is painted, one over the other: the places and the colour."""
    from PIL import ImageChops, ImageFilter

    def inner(width: int) -> PILImage:  # what an outline leaves that is so many pixels of the reduced picture wide
        return mask.filter(ImageFilter.MinFilter(2 * width * _FINER - 1))

    if style == "flat":
        return [(mask, color)]
    if style == "thick":
        return [(mask, _INK * color), (inner(2), color)]
    rim = ImageChops.subtract(mask, inner(1))
    if style == "outline":
        return [(rim, color)]
    return [(rim, color), (ImageChops.multiply(mask, _hatching(mask.size)), color)]


def _hatching(size: tuple[int, int]) -> PILImage:
    """Diagonal stripes, three pixels of the reduced picture apart."""
    from PIL import Image

    x, y = np.arange(size[0])[None], np.arange(size[1])[:, None]
    return Image.fromarray(np.where((x + y) % (4 * _FINER) < 1.5 * _FINER, 255, 0).astype(np.uint8))


# --- silhouettes ---------------------------------------------------------------------------------------------------


def glyphs(font: str) -> Silhouette:
    """The silhouettes that a font of `FONTS` has."""
    return lambda name: glyph(font, FONTS[font][name])


@lru_cache(maxsize=256)
def glyph(font: str, character: str) -> PILImage:
    """A character of a font that Matplotlib ships."""
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    path = Path(get_data_path()) / "fonts" / "ttf" / font
    canvas = Image.new("L", (2 * _CANVAS, 2 * _CANVAS))
    ImageDraw.Draw(canvas).text((_CANVAS, _CANVAS), character, 255, ImageFont.truetype(path, _CANVAS), anchor="mm")
    return _reduced(canvas)


@lru_cache(maxsize=256)
def shape(name: str) -> PILImage:
    """An object made of Pillow's polygons, ellipses, arcs and rounded rectangles."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (_CANVAS, _CANVAS))
    _PARTS[name](ImageDraw.Draw(canvas))
    return _reduced(canvas)


def _reduced(canvas: PILImage) -> PILImage:
    """What is drawn on a canvas, with smooth edges."""
    drawn = canvas.crop(canvas.getbbox())
    scale = _LONGEST / max(drawn.size)
    return drawn.resize((max(1, round(scale * drawn.width)), max(1, round(scale * drawn.height))))


def _at(*numbers: float) -> list[float]:
    """Coordinates -1..1 as pixels of the canvas."""
    return [(number + 1) * (_CANVAS - 1) / 2 for number in numbers]


def _turned(count: int, radii: tuple[float, ...]) -> list[float]:
    """The corners of a star or a regular polygon, the first one on top."""
    corners: list[float] = []
    for index in range(count):
        angle, radius = 2 * math.pi * index / count, radii[index % len(radii)]
        corners += [radius * math.sin(angle), -radius * math.cos(angle)]
    return corners


def _heart(draw: Any) -> None:
    turns = np.linspace(0, 2 * np.pi, 100)
    x = 16 * np.sin(turns) ** 3
    y = -(13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns))
    draw.polygon(_at(*np.stack([x, y], axis=-1).ravel() / 18), fill=255)


def _cross(draw: Any) -> None:
    draw.rounded_rectangle(_at(-0.25, -1, 0.25, 1), 20, fill=255)
    draw.rounded_rectangle(_at(-1, -0.25, 1, 0.25), 20, fill=255)


def _moon(draw: Any) -> None:
    draw.ellipse(_at(-1, -1, 1, 1), fill=255)
    draw.ellipse(_at(-0.35, -0.9, 1.25, 0.7), fill=0)


def _house(draw: Any) -> None:
    draw.polygon(_at(0, -0.95, 1, 0, -1, 0), fill=255)
    draw.rectangle(_at(-0.75, -0.02, 0.75, 0.95), fill=255)
    draw.rectangle(_at(0.35, -0.9, 0.6, -0.3), fill=255)
    draw.rectangle(_at(-0.2, 0.35, 0.2, 1), fill=0)


def _tree(draw: Any) -> None:
    for top, bottom, half in ((-1, -0.3, 0.5), (-0.6, 0.15, 0.65), (-0.2, 0.65, 0.8)):
        draw.polygon(_at(0, top, half, bottom, -half, bottom), fill=255)
    draw.rectangle(_at(-0.12, 0.6, 0.12, 1), fill=255)


def _fish(draw: Any) -> None:
    draw.ellipse(_at(-1, -0.5, 0.55, 0.5), fill=255)
    draw.polygon(_at(0.35, 0, 1, -0.6, 1, 0.6), fill=255)
    draw.ellipse(_at(-0.7, -0.2, -0.5, 0), fill=0)


def _cup(draw: Any) -> None:
    draw.polygon(_at(-0.95, -0.75, 0.5, -0.75, 0.35, 0.8, -0.8, 0.8), fill=255)
    draw.arc(_at(0.1, -0.5, 1, 0.4), -90, 100, fill=255, width=50)


def _key(draw: Any) -> None:
    draw.ellipse(_at(-1, -0.5, 0, 0.5), outline=255, width=75)
    draw.rectangle(_at(-0.1, -0.13, 1, 0.13), fill=255)
    draw.rectangle(_at(0.4, 0, 0.58, 0.5), fill=255)
    draw.rectangle(_at(0.8, 0, 1, 0.5), fill=255)


def _mushroom(draw: Any) -> None:
    draw.pieslice(_at(-1, -0.95, 1, 0.95), 180, 360, fill=255)
    draw.rounded_rectangle(_at(-0.28, -0.1, 0.28, 0.85), 30, fill=255)


def _polygon(*corners: float) -> Callable[[Any], None]:
    return lambda draw: draw.polygon(_at(*corners), fill=255)


_PARTS: dict[str, Callable[[Any], None]] = {
    "circle": lambda draw: draw.ellipse(_at(-1, -1, 1, 1), fill=255),
    "triangle": _polygon(0, -0.95, 1, 0.8, -1, 0.8),
    "square": lambda draw: draw.rectangle(_at(-1, -1, 1, 1), fill=255),
    "star": _polygon(*_turned(10, (1, 0.45))),
    "heart": _heart,
    "cross": _cross,
    "moon": _moon,
    "ring": lambda draw: draw.ellipse(_at(-1, -1, 1, 1), outline=255, width=110),
    "house": _house,
    "tree": _tree,
    "fish": _fish,
    "cup": _cup,
    "key": _key,
    "bolt": _polygon(0.1, -1, -0.7, 0.15, -0.1, 0.15, -0.35, 1, 0.7, -0.3, 0.1, -0.3, 0.5, -1),
    "hourglass": _polygon(-0.8, -1, 0.8, -1, 0.12, 0, 0.8, 1, -0.8, 1, -0.12, 0),
    "mushroom": _mushroom,
}

STYLES: tuple[Style, ...] = get_args(Style)
