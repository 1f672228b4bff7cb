"""Pictures and clips as users pass them, and how picture files are opened."""

import contextlib
import dataclasses
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float, UInt8

from jaxid.errors import InputError, JaxidError
from jaxid.io import reading

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage
    from PIL.ImageFile import ImageFile

    Picture: TypeAlias = str | os.PathLike[str] | PILImage | np.ndarray
    Pictures: TypeAlias = "Picture | Clip | Sequence[Picture | Clip | Sequence[Picture | Clip]] | None"
else:  # Pillow is imported only where pictures are opened, and other values are refused there
    PILImage = ImageFile = Picture = Pictures = object

MOST_PIXELS = 178_000_000
"""The most pixels of a file that is opened; a little below Pillow's own limit."""

MOST_STRETCHED = 200
"""The largest ratio of a picture's sides; a longer strip would be resized to gigabytes."""


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, for families that read videos.

    Attributes:
        frames: pictures of one size, in temporal order; or all in one array, UInt8[F, Y, X, 3].
        times: time of each frame in the video, in seconds; None if unknown.
        seconds: length of the video.
    """

    frames: Sequence[Picture] | np.ndarray
    times: tuple[float, ...] | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Refuses a clip without frames, and times that do not match the frames."""
        if not len(self.frames):
            raise InputError("a clip needs at least one frame.")
        if self.times is not None and len(self.times) != len(self.frames):
            raise InputError(f"a clip of {len(self.frames)} frames was given {len(self.times)} times.")

    def reversed(self) -> "Clip":
        """The same clip with its frames in reverse order, at the same times."""
        return dataclasses.replace(self, frames=self.frames[::-1])


class Stored(NamedTuple):
    """How the pixels of a picture are stored: a file's orientation tag may rotate or mirror them.

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
        """Boxes (x, y, width, height) in the stored pixels, as boxes in the upright picture."""
        swap, *mirrored = _TURNS[self.orientation]
        low, extent = np.split(boxes[:, [1, 0, 3, 2]] if swap else boxes, 2, axis=1)
        return np.concatenate([np.where(mirrored, np.array(self.upright) - low - extent, low), extent], axis=1)


class _Turn(NamedTuple):
    """How stored pixels become upright: axes are swapped, then columns are reversed, then rows."""

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
"""Turns by EXIF's orientation tag."""

_FILTERS = threading.Lock()
"""Held by the thread that changes the filters of warnings."""

_ORIENTATION, _BITS, _PHOTOMETRIC, _WIDTH, _HEIGHT = 274, 258, 262, 256, 257
"""Tags of EXIF and TIFF."""


@dataclasses.dataclass(frozen=True)
class WithoutAlpha(os.PathLike[str]):
    """A picture file whose alpha channel is dropped: transparent pixels show their stored colours, not white.

    Attributes:
        path: the file.
    """

    path: str | os.PathLike[str]

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return os.fspath(self.path)


def without_alpha(picture: Picture) -> Picture:
    """A picture that is shown without its alpha channel if it is a file; any other as it is."""
    return WithoutAlpha(picture) if isinstance(picture, str | os.PathLike) else picture


def open_with_alpha(path: str | os.PathLike[str]) -> PILImage:
    """A picture file as an RGBA image with eight bits per channel, read and rotated like `open_picture` does.

    Raises:
        InputError: as from `open_picture`.
    """
    with _file(path, InputError) as file:
        _scale_transparency(file)
        file.load()
        return _upright(_rgba(file), _orientation(file))


def open_picture(image: Picture) -> PILImage:
    """A picture as an RGB PIL image with eight bits per channel.

    A file is read as viewers show it:

    - It is rotated and mirrored as its orientation tag says.
    - 16 bits become 8: grey values are divided by 257 and rounded, colours keep their upper byte. Floating-point values
      must be between 0 and 1. 32-bit integers are refused, since their range is unknown, unless Pillow read them from a
      PGM file.
    - Transparent parts are shown on white, whether given by an alpha channel, a palette or a transparent colour; of a
      file given as `WithoutAlpha`, in their stored colours.
    - Palettes, CMYK, YCbCr, Lab and other modes are converted to RGB by Pillow; colour profiles are not applied.
    - The first frame of an animation, or the first of several pages, is read.

    The mode of a PIL image is converted in the same way; its orientation tag is ignored.

    Args:
        image: a file of at most `MOST_PIXELS` pixels, a PIL image, or an array, uint8 of shape [Y, X, 3] or [Y, X].

    Raises:
        InputError: if it cannot be opened or is not a picture, or if one side is more than `MOST_STRETCHED` times as
            long as the other.
    """
    from PIL import Image

    if isinstance(image, WithoutAlpha):
        return open_with_alpha(image.path).convert("RGB")
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
    """How a picture is stored; only the header of a file is read, if its format allows it.

    Args:
        image: a path, a PIL image or an array.
        error: the class of error to raise.

    Raises:
        JaxidError: of the given class, if a file cannot be read.
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
    """A picture file, opened but not decoded; exceptions of Pillow become the given error."""
    from PIL import Image

    if not os.path.isfile(path):  # a pipe exists, but reading it could wait forever
        raise error(f"picture {path} does not exist, or is not a file.")
    with reading(os.fspath(path), "a picture", error):
        # Python's filters belong to all threads, of which several open pictures.
        with _FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as file:
            if file.width * file.height > MOST_PIXELS:
                raise error(
                    f"{path} has {file.width} x {file.height} pixels, more than {MOST_PIXELS}; make it smaller."
                )
            _check_sides(path, file.size, error)
            yield file


def _orientation(file: ImageFile) -> int:
    """The orientation tag, 1 to 8; 1 if it is missing or unreadable."""
    try:
        found = file.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises many kinds for damaged tags, and the pixels are good without them
        return 1
    return found if found in _TURNS else 1


def _upright(image: PILImage, orientation: int) -> PILImage:
    from PIL.Image import Transpose

    ways = Transpose.TRANSPOSE, Transpose.FLIP_LEFT_RIGHT, Transpose.FLIP_TOP_BOTTOM
    for way, wanted in zip(ways, _TURNS[orientation], strict=True):
        image = image.transpose(way) if wanted else image
    return image


def _scale_transparency(file: ImageFile) -> None:
    """Scales a PNG's transparent value as Pillow scales its samples."""
    value = file.info.get("transparency")
    if value is None or file.format != "PNG" or not file.tile:
        return
    kind = file.tile[0][3]
    if kind in ("L;2", "L;4"):
        file.info["transparency"] = value * {"L;2": 85, "L;4": 17}[kind]
    elif kind == "RGB;16B":
        file.info["transparency"] = tuple(part >> 8 for part in value)


def _rgb(image: PILImage) -> PILImage:
    """The image in RGB with transparent parts on white, as in transformers."""
    from PIL import Image

    image = _eight_bits_each(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _rgba(image: PILImage) -> PILImage:
    return _eight_bits_each(image).convert("RGBA")


def _eight_bits_each(image: PILImage) -> PILImage:
    """The image in a mode with eight bits per channel, whose colours are not multiplied by its alpha channel."""
    if image.mode[0] in "IF":
        return _eight_bits(image)
    if image.mode in ("La", "RGBa"):  # Pillow converts these to LA and RGBA only
        return image.convert(image.mode.upper())
    return image


def _eight_bits(image: PILImage) -> PILImage:
    """A grey image of 16 or 32 bits converted to 8, with an alpha channel if one of its values is transparent.

    Raises:
        ValueError: if the range of its values is unknown.
    """
    from PIL import Image

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        top = 1
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError("its floating-point values are not between 0 and 1; save it with 8 bits")
    elif image.mode == "I" and image.format != "PPM":
        raise ValueError("the range of its 32-bit integers is unknown; save it with 8 or 16 bits")
    else:
        top = 2 ** tags.get(_BITS, (16,))[0] - 1
    shares = values.astype(np.float32) / np.float32(top)
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0, which Pillow respects for 8 bits only
        shares = 1 - shares
    grey = Image.fromarray(np.rint(255 * shares).astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def _array(image: Picture) -> UInt8[np.ndarray, "Y X *C"]:
    """A picture as an array.

    Raises:
        InputError: if its type or shape is not a picture's.
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


def _check_sides(name: object, size: tuple[int, int], error: type[JaxidError]) -> None:
    """Refuses empty pictures and very long ones."""
    width, height = size
    if not min(size):
        raise error(f"{name} has no pixels: its size is {width} x {height}.")
    if max(size) > MOST_STRETCHED * min(size):
        raise error(
            f"{name} is a strip: {width} x {height} pixels, over {MOST_STRETCHED} times as long as wide; crop it."
        )
