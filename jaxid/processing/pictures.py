"""Opening of pictures, and clips: what users hand in."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from jaxid.errors import InputError

Picture = Any
"""A path, a PIL image, or an array UInt8[Y, X, 3]."""


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


def open_picture(image: Picture) -> Any:
    """A picture as an RGB PIL image.

    Raises:
        InputError: if it cannot be opened or is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, (str, Path)):
        try:
            with Image.open(image) as file:
                return _rgb(file)
        except FileNotFoundError as error:
            raise InputError(f"there is no picture at {image}.") from error
        except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:  # PIL's, for broken PNGs
            raise InputError(f"{image} is not a readable picture ({first_line(error)}).") from error
    if isinstance(image, Image.Image):
        return _rgb(image)
    array: UInt8[np.ndarray, "Y X 3"] = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8 or array.size == 0:
        raise InputError(f"a picture must be uint8 of shape [Y, X, 3], not {array.dtype} of shape {array.shape}.")
    return Image.fromarray(array)


def _rgb(image: Any) -> Any:
    """In colour, transparent parts on white, as transformers shows them to the models."""
    from PIL import Image

    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
