"""The picture side of every family's processor: pictures to arrays for the tower, and to tokens in the prompt."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxid.errors import InputError, PromptError
from jaxid.io import read_json, reading, reporting
from jaxid.nn.decoder_config import ModelConfig
from jaxid.prompts.pictures import Clip, Picture, PILImage, open_picture
from jaxid.prompts.words import Tokenizer as Tokenizer

ImageProcessor = Any
"""An image processor of transformers, or an object that works like one."""


class PictureTokens(NamedTuple):
    """One picture in a prompt.

    Attributes:
        text: what replaces the picture's placeholder in the prompt.
        rows: for each of its tokens, the row among the flattened tokens of all pictures, Int[I].
        grid: rows and columns of its tokens, for families whose rotary positions depend on them.
    """

    text: str
    rows: Int[np.ndarray, "I"]
    grid: tuple[int, int] | None = None


Shown = Sequence[Sequence[PictureTokens]]
"""The pictures of each prompt, in order."""


class Encoded(NamedTuple):
    """Pictures ready for a network.

    Attributes:
        pixels: the pictures in the family's layout.
        tokens: what each picture becomes in a prompt.
        extras: further arrays that the network reads, by name.
        apart: as in `Inputs`.
    """

    pixels: Float[np.ndarray, "N ..."]
    tokens: tuple[PictureTokens, ...]
    extras: Mapping[str, np.ndarray] = {}
    apart: bool = False


def apart(members: Sequence[Sequence[int]]) -> bool:
    """Whether all prompts show equally many pictures, each its own, in the prompts' order."""
    each = len(members[0])
    return each > 0 and all(list(own) == list(range(row * each, (row + 1) * each)) for row, own in enumerate(members))


SMALL = np.full((24, 25, 3), 200, np.uint8)
"""The picture on which image processors are tried."""

_SIZES = ("size", "crop_size", "pad_size", "image_grid_pinpoints", "min_pixels", "max_pixels")
_COUNTS = ("min_patches", "max_patches", "max_image_tiles", "patch_size", "temporal_patch_size", "merge_size")
_MOST_COUNTED = 100


def check_settings(settings: Mapping[str, object], path: str | Path, most: int = 4096) -> None:
    """Refuses settings of an image processor with which no picture can be read, or pictures would take gigabytes.

    Args:
        settings: settings by their names in transformers.
        path: where they were read.
        most: the largest size allowed, in the image processor's own unit.

    Raises:
        CheckpointError: naming the setting.
    """

    def numbers(value: object) -> Iterator[object]:
        """All values in a setting except None."""
        if isinstance(value, dict | list | tuple):
            for part in value.values() if isinstance(value, dict) else value:
                yield from numbers(part)
        elif value is not None:
            yield value

    def real(value: object) -> TypeGuard[int | float]:
        return (type(value) is int or type(value) is float) and -math.inf < value < math.inf

    with reading(path, "an image processor"):
        for name, value in settings.items():
            if name.startswith("do_"):
                fits, needed = type(value) is bool, "true or false"
            elif name == "resample":
                fits, needed = isinstance(value, int) and value in range(6), "an integer from 0 to 5"
            elif name == "rescale_factor":
                fits, needed = real(value) and 0 < value <= 1, "a number above 0, at most 1"
            elif name in ("image_mean", "image_std"):
                fits = (
                    isinstance(value, list | tuple)
                    and len(value) == 3
                    and all(map(real, value))
                    and (name == "image_mean" or min(value) > 0)
                )
                needed = "three numbers, deviations above 0"
            elif name in _SIZES or name in _COUNTS:
                last = most if name in _SIZES else _MOST_COUNTED
                fits = all(type(one) is int and 0 < one <= last for one in numbers(value))
                needed = f"integers from 1 to {last}"
            else:
                continue
            if not fits and value is not None:
                raise ValueError(f"its {name} is {value!r:.100} instead of {needed}")


def check_trial(read: Callable[[], np.ndarray], path: str | Path, shape: tuple[int, ...]) -> None:
    """Refuses an image processor that fails on a small picture, or does not produce what the tower takes.

    Args:
        read: returns the pixels of the picture.
        path: where the image processor was read.
        shape: the last axes that the pixels must have.

    Raises:
        CheckpointError: saying why.
    """
    with reading(path, "an image processor"):
        try:
            pixels = read()
        except InputError as error:  # the picture is good, so the settings are at fault
            raise ValueError(str(error)) from error
        if pixels.shape[-len(shape) :] != shape:
            raise ValueError(f"it makes pictures of shape {pixels.shape}, whose last axes must be {shape}")
        if not np.isfinite(pixels).all():
            raise ValueError("it makes values that are not finite")


def load_image_processor(folder: Path, most_size: int = 4096) -> ImageProcessor:
    """A checkpoint's image processor.

    Args:
        folder: the checkpoint's folder.
        most_size: the largest size that its settings may ask for, see `check_settings`.

    Raises:
        CheckpointError: if it is missing or unreadable, or has settings with which no picture can be read.
    """
    from transformers import AutoImageProcessor

    for name in ("preprocessor_config.json", "processor_config.json"):
        read_json(folder / name, missing={})
    with reading(folder, "an image processor"):
        found = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        settings = found.to_dict()
    check_settings(settings, folder, most_size)
    return found


def processed(
    processor: ImageProcessor, pictures: Sequence[PILImage] | Sequence[Sequence[PILImage]], **options: bool
) -> Mapping[str, Any]:
    """The output of an image processor for PIL images, or for lists of those that a prompt shows together.

    Raises:
        InputError: if it refuses one.
    """
    with reporting("the image processor cannot read a picture", InputError):
        return processor(pictures, return_tensors="np", **options)


def pixel_values(processor: ImageProcessor, pictures: Sequence[PILImage]) -> Float[np.ndarray, "N ..."]:
    """The pixels that an image processor makes of PIL images."""
    return np.asarray(processed(processor, pictures)["pixel_values"], np.float32)


def bucketed(count: int) -> int:
    """The count rounded up to three significant binary digits, so that few programs are compiled."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class PictureReader:
    """How a family reads pictures on the host; by default, all pictures have one size and the same number of tokens.

    Attributes:
        image_token_id: id of the token that pictures replace.
        placeholder: what the chat template writes for a picture.
        template: chat template for checkpoints without one that places pictures.
        frame: what stands before and after a picture's tokens in a prompt without the chat template.
        case: the form of answer words that the published code reads; of both, it takes the more probable one.
        tokenizer_of: `model_type` of the language model whose tokenizer is used, where transformers does not know the
            checkpoint's own `model_type`.
        most_size: the largest side, in pixels, that settings may ask for.
        trial: pictures on which the image processor is tried.
    """

    template: str | None = None
    tokenizer_of: str | None = None
    frame: tuple[str, str] = ("", "")
    case: Literal["lower", "capital", "both"] = "lower"
    most_size: int = 4096
    trial: tuple[Picture | Clip, ...] = (SMALL,)

    def __init__(self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: ModelConfig):
        """Takes loaded parts and the network's config."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.image_token_id: int = self.token_id(tokenizer, config)
        self.placeholder: str = tokenizer.convert_ids_to_tokens(self.image_token_id)

    @staticmethod
    def token_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
        """Id of the token that pictures replace; may add it to the tokenizer."""
        del tokenizer
        return config.image_token_index

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels, by which batches are sized."""
        return self.config.image_tokens

    @classmethod
    def load_image_processor(cls, folder: Path, config: ModelConfig) -> ImageProcessor:
        """The checkpoint's image processor.

        Raises:
            CheckpointError: if it is missing or unreadable, or does not fit the config.
        """
        del config
        return load_image_processor(folder, cls.most_size)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Last axes of the pixels that the tower takes."""
        side = self.config.vision_config.image_size
        return 3, side, side

    def check(self, path: str | Path) -> None:
        """Tries the image processor, so that one that cannot work is found before the weights are loaded.

        Raises:
            CheckpointError: if it fails, or does not produce what the tower takes.
        """
        members = [[index] for index in range(len(self.trial))]
        check_trial(lambda: self.encode(self.trial, members).pixels, path, self.pixel_shape)

    def open(self, picture: Picture | Clip) -> PILImage:
        """A picture as an RGB PIL image.

        Raises:
            InputError: if it cannot be opened, or is a clip.
        """
        if isinstance(picture, Clip):
            raise InputError("this model reads pictures, not clips; pass the frames as separate pictures.")
        return open_picture(picture)

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as arrays and tokens.

        Args:
            pictures: the distinct pictures of a batch.
            members: indices of the pictures that each prompt shows, in order.

        Raises:
            InputError: for a picture that cannot be opened, or that the family cannot read.
        """
        count, text = self.config.image_tokens, self.placeholder * self.config.image_tokens
        rows = np.arange(len(pictures) * count).reshape(len(pictures), count)
        pixels = pixel_values(self.image_processor, [self.open(picture) for picture in pictures])
        return Encoded(pixels, tuple(PictureTokens(text, own) for own in rows), apart=apart(members))

    def rope_positions(
        self,
        token_ids: Int[np.ndarray, "B T"],
        valid: Bool[np.ndarray, "B T"],
        shown: Shown,
    ) -> Int[np.ndarray, "B A T"] | None:
        """Positions for rotary embedding, in families where they are not the positions in the prompt.

        Args:
            token_ids: the prompts.
            valid: false at padding.
            shown: the pictures of each prompt.
        """
        del token_ids, valid, shown
        return None

    def image_rows(
        self,
        token_ids: Int[np.ndarray, "B T"],
        valid: Bool[np.ndarray, "B T"],
        shown: Shown,
    ) -> Int[np.ndarray, "B T"]:
        """Which row of the pictures' flattened tokens is at each position, or -1.

        Raises:
            PromptError: if the number of image tokens in a prompt is not what its pictures need.
        """
        found = np.full(token_ids.shape, -1, np.int32)
        for row, pictures in enumerate(shown):
            rows = np.concatenate([np.zeros(0, np.int32), *(picture.rows.astype(np.int32) for picture in pictures)])
            here = (token_ids[row] == self.image_token_id) & valid[row]
            if not len(rows):
                continue
            if here.sum() != len(rows):
                raise PromptError(
                    f"prompt {row} holds {here.sum()} picture tokens instead of {len(rows)}: "
                    f"the chat template must place every picture exactly once, as {self.placeholder!r}."
                )
            found[row, here] = rows
        return found
