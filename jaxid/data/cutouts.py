"""Users' own pictures of objects, pasted on the cells of a grid.

Source: [ID] section 3, arXiv 2601.12626: two objects with an alpha channel, resized and pasted at the centres of two
cells, on a transparent or photographic ground, with optional jitter.
"""

import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from jaxid.data.scenes import GRID
from jaxid.errors import DataError, InputError, JaxidWarning
from jaxid.io import digest
from jaxid.prompts.pictures import PILImage, open_picture, open_with_alpha

Cell = tuple[int, int]
Bad = list[tuple[str, DataError]]
"""Files that were skipped, each with its error."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
"""Endings of files that count as pictures."""

TRANSPARENT = "transparent"

_KEPT_GROUNDS = 64  # photographs of a picture's size that are kept in memory


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Cutout:
    """A picture of an object.

    Attributes:
        name: what questions call it.
        picture: in RGBA.
        outline: points around everything that is not transparent, (x, y) from the centre in shares of the picture's
            width and height.
        digest: of the file.
    """

    name: str
    picture: PILImage
    outline: Float[np.ndarray, "P 2"]
    digest: str

    @property
    def opaque(self) -> bool:
        """Whether no part of the picture is transparent."""
        return self.picture.getchannel("A").getextrema()[0] == 255


def object_name(path: str | Path) -> str:
    """The name of an object by its file: "fire_truck.png" shows a fire truck.

    Raises:
        DataError: if no name is left.
    """
    name = " ".join(Path(path).stem.replace("_", " ").split())
    if not name:
        raise DataError(f"{path} names no object; call the file by what it shows, such as fire_truck.png.")
    return name


def read_cutouts(folder: str | Path, *, bad: Bad | None = None) -> dict[str, Cutout]:
    """Reads a folder of pictures of objects, each named by its file; warns of those without an alpha channel.

    Args:
        folder: the folder; hidden files and files without a picture's extension are ignored.
        bad: if given, files that cannot be used are skipped and noted here.

    Returns:
        The objects by name, in alphabetical order.

    Raises:
        DataError: if the folder is missing or holds fewer than two objects, or, without `bad`, for a file that is no
            picture, shows nothing, or has the name of another.
    """
    found: dict[str, Cutout] = {}
    files: dict[str, Path] = {}

    def read(path: Path) -> None:
        cutout = _cutout(path)
        other = files.setdefault(cutout.name, path)
        if other != path:
            raise DataError(f"{path} and {other.name} both show the {cutout.name}; rename or remove one.")
        found[cutout.name] = cutout

    _each(_pictures_of(folder, "pictures of objects, such as fire_truck.png"), read, bad)
    if len(found) < 2:
        raise DataError(f"{folder} holds {len(found)} usable pictures of objects; a grid needs at least two.")
    opaque = [name for name, cutout in found.items() if cutout.opaque]
    if opaque:
        warnings.warn(
            f"no part of the pictures of {', '.join(opaque[:5])}{', ...' if len(opaque) > 5 else ''} is transparent: "
            "they are pasted with their backgrounds. Save them as PNG files with an alpha channel to show the objects "
            "alone.",
            JaxidWarning,
            stacklevel=2,
        )
    return found


def _cutout(path: Path) -> Cutout:
    try:
        picture = open_with_alpha(path)
    except InputError as error:
        raise DataError(str(error)) from error
    seen = np.asarray(picture)[..., 3] > 0
    rows = np.flatnonzero(seen.any(axis=1))
    if not len(rows):
        raise DataError(f"{path} is transparent everywhere; it shows no object.")
    height, width = seen.shape
    left, right = seen[rows].argmax(axis=1), width - seen[rows, ::-1].argmax(axis=1)
    edges = [(x, y) for x in (left, right) for y in (rows, rows + 1)]
    outline = np.concatenate([np.stack([x / width, y / height], axis=-1) for x, y in edges]) - 0.5
    return Cutout(name=object_name(path), picture=picture, outline=outline, digest=digest(path))


def read_grounds(folder: str | Path, *, bad: Bad | None = None) -> list[Path]:
    """The photographs of a folder, sorted by name; each is opened once.

    Args:
        folder: the folder; hidden files and files without a picture's extension are ignored.
        bad: if given, files that cannot be opened are skipped and noted here.

    Raises:
        DataError: if the folder is missing or holds none, or, without `bad`, for a file that is not a picture.
    """
    found = []

    def read(path: Path) -> None:
        try:
            open_picture(path)
        except InputError as error:
            raise DataError(str(error)) from error
        found.append(path)

    _each(_pictures_of(folder, "photographs"), read, bad)
    if not found:
        raise DataError(f"{folder} holds no usable photographs.")
    return found


def _pictures_of(folder: str | Path, what: str) -> list[Path]:
    if not Path(folder).is_dir():
        raise DataError(f"{folder} is not a directory; pass a directory of {what}.")
    found = [path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES and path.name[0] != "."]
    if not found:
        raise DataError(f"{folder} holds no files that end in {', '.join(PICTURES)}; give a folder of {what}.")
    return sorted(found)


def _each(paths: Sequence[Path], read: Callable[[Path], None], bad: Bad | None) -> None:
    for path in paths:
        try:
            read(path)
        except DataError as error:
            if bad is None:
                raise
            bad.append((path.name, error))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pasting:
    """How objects are pasted on a grid.

    Every picture is drawn by a seed of its own, made of `seed`, the two names, cells and the size. It does not depend
    on what else is drawn, or in which order.

    Attributes:
        seed: chooses photographs and jitter.
        picture_size: side of the square pictures, in pixels.
        grounds: photographs behind the objects; cut to squares around their centres.
        ground: without photographs, "transparent" (RGBA pictures, black where nothing is drawn), or a colour.
        jitter_size: sides change by up to this share either way.
        jitter_angle: objects are rotated by up to this many degrees either way. Both kinds of jitter are reduced where
            the two objects would otherwise overlap, and objects stay in the picture.
        stretched: resize pictures of objects to squares, as published; by default their proportions are kept.
    """

    seed: int = 0
    picture_size: int
    grounds: tuple[Path, ...] = ()
    ground: str = TRANSPARENT
    jitter_size: float = 0.0
    jitter_angle: float = 0.0
    stretched: bool = False

    def __post_init__(self) -> None:
        """Checks the colour and the jitter.

        Raises:
            InputError: for a colour that Pillow does not know, or jitter out of its range.
        """
        from PIL import ImageColor

        if not 0 <= self.jitter_size < 1 or not 0 <= self.jitter_angle <= 180:
            raise InputError(
                "jitter of size is a share from 0 to less than 1, and of rotation at most 180 degrees; got "
                f"{self.jitter_size} and {self.jitter_angle}."
            )
        if self.ground != TRANSPARENT:
            try:
                ImageColor.getrgb(self.ground)
            except ValueError as error:
                raise InputError(
                    f"the ground is transparent or a colour such as white or #808080, not {self.ground!r}."
                ) from error

    def settings(self, first: Cutout, second: Cutout) -> dict[str, object]:
        """All that the pictures of a pair depend on besides cells and size, as JSON types."""
        return {
            "seed": self.seed,
            "picture_size": self.picture_size,
            "jitter_size": self.jitter_size,
            "jitter_rotation": self.jitter_angle,
            "stretched": self.stretched,
            "ground": self._photographs or self.ground,
            "files": [first.digest, second.digest],
        }

    @functools.cached_property
    def _photographs(self) -> str:
        """A digest of the photographs; empty without any."""
        found = hashlib.sha256("\n".join(digest(path) for path in self.grounds).encode()).hexdigest()[:16]
        return f"{len(self.grounds)} photographs {found}" if self.grounds else ""

    def draw(
        self, first: Cutout, cell_a: Cell, second: Cutout, cell_b: Cell, side: float
    ) -> UInt8[np.ndarray, "Y X C"]:
        """A picture of two objects.

        Args:
            first: one object.
            cell_a: its (column, row).
            second: the other object, drawn over the first.
            cell_b: its (column, row).
            side: longer side of both, in pixels of the picture.

        Returns:
            RGBA on a transparent ground, else RGB.
        """
        key = repr((self.seed, first.name, cell_a, second.name, cell_b, round(side, 6)))
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:16]))
        canvas = self._canvas(rng)
        both, cells = (first, second), (cell_a, cell_b)
        steps = rng.uniform(-1, 1, (2, 2)) * (self.jitter_size, self.jitter_angle)
        for strength in np.arange(8, -1, -1) / 8:
            sides, angles = side * (1 + strength * steps[:, 0]), strength * steps[:, 1]
            boxes = [self._box(*one) for one in zip(both, cells, sides, angles, strict=True)]
            moves = [self._inward(box) for box in boxes]
            (low, high), (other_low, other_high) = (box + move for box, move in zip(boxes, moves, strict=True))
            if (np.maximum(low, other_low) >= np.minimum(high, other_high)).any():  # they do not overlap
                break
        for cutout, cell, own, angle, move in zip(both, cells, sides, angles, moves, strict=True):
            self._paste(canvas, self._sprite(cutout, own, angle), cell, move)
        return np.asarray(canvas if self._transparent else canvas.convert("RGB"))

    @property
    def _transparent(self) -> bool:
        return not self.grounds and self.ground == TRANSPARENT

    def _canvas(self, rng: np.random.Generator) -> PILImage:
        from PIL import Image

        size = (self.picture_size, self.picture_size)
        if self.grounds:
            return _ground(self.grounds[int(rng.integers(len(self.grounds)))], self.picture_size).copy()
        return Image.new("RGBA", size, (0, 0, 0, 0) if self._transparent else self.ground)

    def _sides(self, cutout: Cutout, side: float) -> tuple[int, int]:
        """Width and height of a resized object."""
        width, height = cutout.picture.size
        longest = max(width, height)
        shares = (1.0, 1.0) if self.stretched else (width / longest, height / longest)
        return max(1, round(side * shares[0])), max(1, round(side * shares[1]))

    def _centre(self, cell: Cell) -> Float[np.ndarray, "2"]:
        return (np.array(cell) + 0.5) * self.picture_size / GRID

    def _box(self, cutout: Cutout, cell: Cell, side: float, angle: float) -> Float[np.ndarray, "2 2"]:
        """Upper left and lower right corner of what is seen of an object."""
        points, turn = cutout.outline * self._sides(cutout, side), np.deg2rad(angle)
        # Counterclockwise as seen, like Pillow's; y is counted downwards.
        points = points @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        return self._centre(cell) + np.stack([points.min(axis=0), points.max(axis=0)])

    def _inward(self, box: Float[np.ndarray, "2 2"]) -> Float[np.ndarray, "2"]:
        """The shift that moves a box into the picture."""
        return np.maximum(-box[0], 0) - np.maximum(box[1] - self.picture_size, 0)

    def _sprite(self, cutout: Cutout, side: float, angle: float) -> PILImage:
        """An object, resized and rotated."""
        from PIL.Image import Resampling

        if not self.jitter_size:
            sprite = _resized(cutout, self._sides(cutout, side))
        else:  # reduced before it is resized, which is much faster for a large file and looks the same
            sprite = cutout.picture.resize(self._sides(cutout, side), Resampling.LANCZOS, reducing_gap=3.0)
        return sprite.rotate(angle, Resampling.BICUBIC, expand=True) if angle else sprite

    def _paste(self, canvas: PILImage, sprite: PILImage, cell: Cell, move: Float[np.ndarray, "2"]) -> None:
        """Pastes an object at the centre of a cell, moved by some pixels; what lies outside is cut off."""
        left, top = (np.floor(self._centre(cell) - np.array(sprite.size) / 2) + np.round(move)).astype(int).tolist()
        sprite = sprite.crop((max(0, -left), max(0, -top), *sprite.size))
        canvas.alpha_composite(sprite, (max(left, 0), max(top, 0)))


@functools.lru_cache(maxsize=256)
def _resized(cutout: Cutout, size: tuple[int, int]) -> PILImage:
    from PIL.Image import Resampling

    return cutout.picture.resize(size, Resampling.LANCZOS)


@functools.lru_cache(maxsize=_KEPT_GROUNDS)
def _ground(path: Path, side: int) -> PILImage:
    """A photograph as a square picture with an alpha channel."""
    from PIL import ImageOps
    from PIL.Image import Resampling

    return ImageOps.fit(open_picture(path), (side, side), Resampling.LANCZOS).convert("RGBA")
