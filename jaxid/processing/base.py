"""What every family's pictures become on the host: arrays for the tower, and tokens in the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxid.errors import CheckpointError, InputError, PromptError
from jaxid.processing.pictures import Clip, Picture, first_line, open_picture


class PictureTokens(NamedTuple):
    """One picture in a prompt.

    Attributes:
        text: what stands in the prompt where the chat template places the picture.
        rows: which row of all pictures' flattened tokens each of its image tokens takes, in order, Int[I]; empty in
            families whose pictures do not enter as tokens.
        grid: rows and columns of its tokens, for families that turn heads by them.
    """

    text: str
    rows: Int[np.ndarray, "I"]
    grid: tuple[int, int] | None = None


Shown = Sequence[Sequence[PictureTokens]]
"""The pictures of every prompt, in order."""


class Encoded(NamedTuple):
    """Pictures ready for a network.

    Attributes:
        pixels: in the family's layout.
        tokens: every picture in a prompt.
        extras: further arrays that the network reads, by name.
    """

    pixels: Float[np.ndarray, "N ..."]
    tokens: tuple[PictureTokens, ...]
    extras: Mapping[str, np.ndarray] = {}


def bucketed(count: int) -> int:
    """The next number whose binary form has three leading digits at most, so that few programs are compiled."""
    step = 1 << max(0, count.bit_length() - 3)
    return -(-count // step) * step


class PictureSide:
    """How a family reads pictures on the host: one token after the other for every patch, by default.

    Attributes:
        image_token_id: the token that pictures replace.
        placeholder: what the chat template writes for a picture.
        template: chat template for checkpoints that bring none that places pictures.
        case: how the family writes answers ("lower", "capital", or "both").
        tokenizer_of: `model_type` of the language model that lends its tokenizer, where transformers does not know
            the checkpoint's own.
    """

    template: str | None = None
    tokenizer_of: str | None = None
    case: str = "lower"

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any):
        """Takes loaded parts and the network's config."""
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.config = config
        self.image_token_id: int = self.token_id(tokenizer, config)
        self.placeholder: str = tokenizer.convert_ids_to_tokens(self.image_token_id)

    @staticmethod
    def token_id(tokenizer: Any, config: Any) -> int:
        """Id of the token that pictures replace; may add it to the tokenizer."""
        del tokenizer
        return config.image_token_index

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels, by which batches are sized."""
        return self.config.image_tokens

    @classmethod
    def load_image_processor(cls, folder: Path, config: Any) -> Any:
        """The checkpoint's image processor.

        Raises:
            CheckpointError: if it is missing or unreadable.
        """
        from transformers import AutoImageProcessor

        del config
        try:
            return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
            raise CheckpointError(f"the image processor in {folder} cannot be read: {first_line(error)}") from error

    def open(self, picture: Picture | Clip) -> Any:
        """A picture as an RGB PIL image.

        Raises:
            InputError: if it cannot be opened, or is a clip.
        """
        if isinstance(picture, Clip):
            raise InputError("this model reads pictures, not clips; give it the frames one by one.")
        return open_picture(picture)

    def pixels(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "N C Y X"]:
        """Pictures through the image processor."""
        opened = [self.open(picture) for picture in pictures]
        return np.asarray(self.image_processor(opened, return_tensors="np")["pixel_values"], np.float32)

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as arrays and tokens.

        Args:
            pictures: all different pictures of a batch.
            members: for every prompt, which of them it shows, in order.

        Raises:
            InputError: for a picture that cannot be opened, or that the family cannot read.
        """
        del members
        count, text = self.config.image_tokens, self.placeholder * self.config.image_tokens
        rows = np.arange(len(pictures) * count).reshape(len(pictures), count)
        return Encoded(self.pixels(pictures), tuple(PictureTokens(text, own) for own in rows))

    def rope_positions(
        self,
        token_ids: Int[np.ndarray, "B T"],
        valid: Bool[np.ndarray, "B T"],
        shown: Sequence[Sequence[PictureTokens]],
    ) -> Int[np.ndarray, "B A T"] | None:
        """What rotary embedding turns by, in families where it is not the place in the prompt.

        Args:
            token_ids: the prompts.
            valid: false at padding.
            shown: every prompt's pictures.
        """
        del token_ids, valid, shown
        return None

    def slots(
        self,
        token_ids: Int[np.ndarray, "B T"],
        valid: Bool[np.ndarray, "B T"],
        shown: Sequence[Sequence[PictureTokens]],
    ) -> Int[np.ndarray, "B T"]:
        """Which row of the pictures' flattened tokens stands at each position, or -1.

        Raises:
            PromptError: if a prompt holds another number of image tokens than its pictures need.
        """
        slots = np.full(token_ids.shape, -1, np.int32)
        for row, pictures in enumerate(shown):
            rows = np.concatenate([np.zeros(0, np.int32), *(picture.rows.astype(np.int32) for picture in pictures)])
            here = (token_ids[row] == self.image_token_id) & valid[row]
            if not len(rows):
                continue
            if here.sum() != len(rows):
                raise PromptError(
                    f"prompt {row} holds {here.sum()} picture tokens instead of {len(rows)}: "
                    f"the chat template must place every picture once, as {self.placeholder!r}."
                )
            slots[row, here] = rows
        return slots
