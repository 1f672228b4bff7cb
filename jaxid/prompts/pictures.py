"""Opening of pictures, and clips: what users hand in."""

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from jaxid.errors import InputError, JaxidError
from jaxid.io import reading

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFile import ImageFile
else:  # Pillow is imported only where pictures are opened
    PILImage = ImageFile = Any

Picture = Any
"""A path, a PIL image, or an array UInt8[Y, X, 3] or, in grey, UInt8[Y, X]."""

MOST_PIXELS = 178_000_000
"""Pixels of the largest file that is opened; a little below what Pillow refuses."""

MOST_STRETCHED = 200
"""Longest side of a picture in units of its shortest; a longer strip would be resized to one of gigabytes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, for families that read videos.

    Attributes:
        frames: pictures of one size, in order of time; or all in one array, UInt8[F, Y, X, 3].
        times: where in the video every frame lies, in seconds; None if unknown.
        seconds: the video's length.
    """

    frames: Sequence[Picture] | np.ndarray
    times: tuple[float, ...] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuses a clip of nothing, and times of other frames."""
        if not len(self.frames):
            raise InputError("a clip needs at least one frame.")
        if self.times is not None and len(self.times) != len(self.frames):
            raise InputError(f"a clip of {len(self.frames)} frames was given {len(self.times)} times.")

    def reversed(self) -> "Clip":
        """The frames in the opposite order, shown at the same times."""
        return dataclasses.replace(self, frames=self.frames[::-1])


class Stored(NamedTuple):
    """How a picture is stored, where a file's orientation tag rotates or mirrors its pixels.

    Attributes:
        size: width and height of the stored pixels.
        orientation: the tag, 1 to 8; 1 leaves the pixels as they are.
    """

    size: tuple[int, int]
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture that `open_picture` returns."""
        width, height = self.size
        return (height, width) if _TURNS[self.orientation].swap else (width, height)

    def rotated(self, boxes: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "M 4"]:
        """Boxes (x, y, width, height) of the stored pixels, as boxes of the upright picture."""
        swap, *mirrored = _TURNS[self.orientation]
        low, extent = np.split(boxes[:, [1, 0, 3, 2]] if swap else boxes, 2, axis=1)
        return np.concatenate([np.where(mirrored, np.array(self.upright) - low - extent, low), extent], axis=1)


class _Turn(NamedTuple):
    """What makes stored pixels upright: rows and columns are swapped, then columns, then rows reversed."""

    swap: bool = False
    columns: bool = False
    rows: bool = False


_TURNS = {
    1: _Turn(),
    2: _Turn(columns=True),
    3: _Turn(columns=True, rows=True),
    4: _Turn(rows=True),
    5: _Turn(swap=True),
    6: _Turn(swap=True, columns=True),
    7: _Turn(swap=True, columns=True, rows=True),
    8: _Turn(swap=True, rows=True),
}
"""By the orientation tag of EXIF."""

_ORIENTATION, _BITS, _PHOTOMETRIC, _WIDTH, _HEIGHT = 274, 258, 262, 256, 257
"""Tags of EXIF and TIFF."""


def open_picture(image: Picture) -> PILImage:
    """A picture as an RGB PIL image of eight bits a channel.

    A file is read as viewers show it:

    - Rotated and mirrored upright, as its orientation tag says.
    - 16 bits become 8: grey values are divided by 257 and rounded, colours keep their upper byte. Floating-point values
      must lie between 0 and 1. 32-bit integers, which do not say what white is, are refused, but for those that Pillow
      makes of PGM files.
    - Transparent parts are shown on white, whether an alpha channel, a palette or a colour says what is transparent.
    - Palettes, CMYK, YCbCr, Lab and the like become RGB as Pillow has it; colour profiles are not applied.
    - Of an animation, or of several pages, the first is read.

    A PIL image is taken as it is, its orientation tag ignored, and its mode converted in the same way.

    Args:
        image: a file of at most `MOST_PIXELS` pixels, a PIL image, or an array, uint8 of shape [Y, X, 3] or [Y, X].

    Raises:
        InputError: if it cannot be opened, is not a picture, or is longer than `MOST_STRETCHED` times its other side.
    """
    from PIL import Image

    if isinstance(image, str | os.PathLike):
        with _file(image, InputError) as file:
            _scale_transparency(file)
            file.load()
            return _upright(_rgb(file), _orientation(file))
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_array(image))
    _check_sides("a picture", image.size, InputError)
    with reading("a PIL image", "a picture", InputError):
        return _rgb(image)


def stored(image: Picture, error: type[JaxidError] = InputError) -> Stored:
    """How a picture is stored; read from a file's header, as far as its format allows.

    Args:
        image: a path, a PIL image or an array.
        error: the kind of error to raise.

    Raises:
        JaxidError: of the given kind, if a file cannot be read.
    """
    if not isinstance(image, str | os.PathLike):
        return Stored(open_picture(image).size)
    with _file(image, error) as file:
        if file.format == "PNG":  # whose tag may follow the pixels
            file.load()
        tags = getattr(file, "tag_v2", {})  # Pillow gives a TIFF's upright size
        return Stored((tags.get(_WIDTH, file.width), tags.get(_HEIGHT, file.height)), _orientation(file))


@contextlib.contextmanager
def _file(path: str | os.PathLike[str], error: type[JaxidError]) -> Iterator[ImageFile]:
    """A picture file, opened but not decoded; what Pillow raises inside is raised as the given error."""
    from PIL import Image

    if not os.path.isfile(path):  # nor a pipe, which would be waited for
        raise error(f"there is no picture at {path}.")
    with reading(os.fspath(path), "a picture", error), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            if file.width * file.height > MOST_PIXELS:
                raise error(
                    f"{path} has {file.width} x {file.height} pixels, more than {MOST_PIXELS}; make it smaller."
                )
            _check_sides(path, file.size, error)
            yield file


def _orientation(file: ImageFile) -> int:
    """1 to 8; 1 where a file says nothing, or nothing readable."""
    try:
        found = file.getexif().get(_ORIENTATION)
    except Exception:  # of many kinds, for damaged tags, without which the pixels are still good
        return 1
    return found if found in _TURNS else 1


def _upright(image: PILImage, orientation: int) -> PILImage:
    from PIL.Image import Transpose

    ways = Transpose.TRANSPOSE, Transpose.FLIP_LEFT_RIGHT, Transpose.FLIP_TOP_BOTTOM
    for way, wanted in zip(ways, _TURNS[orientation], strict=True):
        image = image.transpose(way) if wanted else image
    return image


def _scale_transparency(file: ImageFile) -> None:
    """Brings a PNG's transparent value to the range to which Pillow scales its samples."""
    value = file.info.get("transparency")
    if value is None or file.format != "PNG" or not file.tile:
        return
    kind = file.tile[0][3]
    if kind in ("L;2", "L;4"):
        file.info["transparency"] = value * {"L;2": 85, "L;4": 17}[kind]
    elif kind == "RGB;16B":
        file.info["transparency"] = tuple(part >> 8 for part in value)


def _rgb(image: PILImage) -> PILImage:
    """In colour, transparent parts on white, as transformers shows them to the models."""
    from PIL import Image

    if image.mode[0] in "IF":
        image = _eight_bits(image)
    elif image.mode in ("La", "RGBa"):  # premultiplied, which Pillow converts to nothing else
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _eight_bits(image: PILImage) -> PILImage:
    """A grey image of 16 or 32 bits as one of 8, with an alpha channel if one of its values is transparent.

    Raises:
        ValueError: if its values do not say what white is.
    """
    from PIL import Image

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        top = 1
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("its floating-point values do not lie between 0 and 1; save it with 8 bits")
    elif image.mode == "I" and image.format != "PPM":
        raise ValueError("its 32-bit integers do not say what white is; save it with 8 or 16 bits")
    else:
        top = 2 ** tags.get(_BITS, (16,))[0] - 1
    shares = values.astype(np.float32) / np.float32(top)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow heeds for 8 bits alone
        shares = 1 - shares
    grey = Image.fromarray(np.rint(255 * shares).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _array(image: Picture) -> UInt8[np.ndarray, "Y X *C"]:
    """An array of a picture, checked.

    Raises:
        InputError: if it is of another type or shape.
    """
    with reading("a picture", "an array", InputError):
        array = np.asarray(image)
    grey, colour = array.ndim == 2, array.ndim == 3 and array.shape[2] == 3
    if array.dtype != np.uint8 or not (grey or colour) or not array.size:
        raise InputError(
            f"a picture must be a path, a PIL image, or a uint8 array of shape [Y, X, 3] or [Y, X], "
            f"not {array.dtype} of shape {array.shape}."
        )
    return array


def _check_sides(name: Any, size: tuple[int, int], error: type[JaxidError]) -> None:
    """Refuses pictures of no pixels, and strips."""
    width, height = size
    if not min(size):
        raise error(f"{name} has no pixels: its size is {width} x {height}.")
    if max(size) > MOST_STRETCHED * min(size):
        raise error(
            f"{name} is a strip: {width} x {height} pixels, over {MOST_STRETCHED} times as long as wide; crop it."
        )
