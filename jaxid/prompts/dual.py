"""Pictures and captions as arrays, for CLIP-like models."""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxid.errors import CheckpointError, InputError
from jaxid.io import reporting
from jaxid.nn.dual import DualConfig
from jaxid.prompts import words
from jaxid.prompts.base import SMALL, ImageProcessor, Tokenizer, check_trial, load_image_processor, pixel_values
from jaxid.prompts.pictures import Picture, open_picture
from jaxid.prompts.words import shown


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Captions:
    """A batch of captions as arrays.

    Attributes:
        texts: the captions, length N.
        token_ids: Int[N, T].
        valid: false at padding, Bool[N, T].
        offsets: first and last + 1 character of every token in its caption, Int[N, T, 2]; equal for a token without
            characters.
        lost: the text of each caption that does not fit into the window, which may be empty.
        unknown: the words of each caption that are not in the vocabulary.
    """

    texts: tuple[str, ...]
    token_ids: Int[np.ndarray, "N T"]
    valid: Bool[np.ndarray, "N T"]
    offsets: Int[np.ndarray, "N T 2"]
    lost: tuple[str, ...]
    unknown: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, chosen: list[int]) -> "Captions":
        """The captions with the given indices."""
        return Captions(
            texts=tuple(self.texts[row] for row in chosen),
            token_ids=self.token_ids[chosen],
            valid=self.valid[chosen],
            offsets=self.offsets[chosen],
            lost=tuple(self.lost[row] for row in chosen),
            unknown=tuple(self.unknown[row] for row in chosen),
        )

    def cut(self, length: int) -> "Captions":
        """The captions without the tokens after the first `length`, all of which some encoders must read."""
        parts = {name: getattr(self, name)[:, :length] for name in ("token_ids", "valid", "offsets")}
        return dataclasses.replace(self, **parts)

    def token_at(self, caption: int, start: int, stop: int) -> int | None:
        """The first token with any of the characters `start` to `stop` of a caption; None if all of them are lost."""
        first, last = self.offsets[caption].T
        found = np.flatnonzero((first < stop) & (last > start))
        return int(found[0]) if len(found) else None


class DualProcessor:
    """Image processor and tokenizer of a CLIP-like model."""

    def __init__(
        self, tokenizer: Tokenizer, image_processor: ImageProcessor, config: DualConfig, *, padding: int | None = None
    ):
        """Takes loaded parts.

        Args:
            tokenizer: a fast tokenizer of transformers.
            image_processor: an image processor of transformers.
            config: the network's config.
            padding: id with which captions are padded; the tokenizer's own by default.
        """
        self.tokenizer, self.image_processor = tokenizer, image_processor
        self.context: int = config.text_config.context
        self.whole_window: bool = config.text_config.whole_window
        vision = config.vision_config
        self.side: int = vision.image_size
        self.grid = (int(vision.class_token), vision.patch_side)
        """Index of the first patch among a picture's tokens, and patches along a side."""
        self.padding: int = tokenizer.pad_token_id if padding is None else padding

    @classmethod
    def from_folder(cls, folder: Path, config: DualConfig) -> "DualProcessor":
        """Reads the tokenizer and the image processor of a folder in Hugging Face's layout.

        Raises:
            CheckpointError: if either is missing or unreadable.
        """
        tokenizer = words.read_tokenizer(folder)
        if tokenizer.pad_token_id is None:
            raise CheckpointError(f"the tokenizer in {folder} names no padding token in tokenizer_config.json.")
        found = cls(tokenizer, load_image_processor(folder), config)
        found.check(folder)
        return found

    def check(self, path: Path) -> None:
        """Tries the image processor, so that one that cannot work is found before the weights are loaded.

        Raises:
            CheckpointError: if it fails, or does not produce what the tower takes.
        """
        check_trial(lambda: self.pixels([SMALL]), path, (3, self.side, self.side))

    def pixels(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "N C Y X"]:
        """Pictures as the tower reads them.

        Args:
            pictures: paths, PIL images or arrays UInt8[Y, X, 3].

        Raises:
            InputError: if there are none, or one cannot be opened.
        """
        if not len(pictures):
            raise InputError("give at least one picture.")
        return pixel_values(self.image_processor, [open_picture(picture) for picture in pictures])

    def shown(self, picture: Picture) -> UInt8[np.ndarray, "Y X 3"]:
        """A picture as the tower sees it, resized and cropped."""
        pixels = self.pixels([picture])[0]
        mean, std = (
            np.asarray(value)[:, None, None]
            for value in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return np.rint(255 * np.clip(pixels * std + mean, 0, 1)).astype(np.uint8).transpose(1, 2, 0)

    def longest(self, texts: Sequence[str]) -> int:
        """Number of tokens of the longest caption, before any are cut off."""
        return max((len(self._encoded(text)["input_ids"]) for text in texts), default=0)

    def _encoded(self, text: str) -> Mapping[str, Any]:
        """Ids and offsets of a caption."""
        words.check_text(text, "the caption", self.specials, InputError)
        with reporting(f"the tokenizer cannot read the caption {shown(text)}", InputError):
            return self.tokenizer(text, return_offsets_mapping=True)

    def unknown(self, text: str, found: Mapping[str, Any] | None = None) -> tuple[str, ...]:
        """The words of a caption that are not in the vocabulary; `found`: its ids and offsets, if they are known."""
        found = self._encoded(text) if found is None else found
        offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
        return words.unknown(text, found["input_ids"], offsets, self.tokenizer.unk_token_id)

    @functools.cached_property
    def specials(self) -> tuple[str, ...]:
        """The tokenizer's special tokens, which captions must not contain."""
        return words.special_tokens(self.tokenizer)

    def captions(self, texts: Sequence[str], length: int | None = None) -> Captions:
        """Captions as arrays of one length, padded or cut; warnings name the words that are lost or unknown.

        Args:
            texts: the captions.
            length: number of tokens in every row, T; the encoder's window by default, and always for encoders
                whose output depends on the padding.

        Raises:
            InputError: if there are no captions, if one is blank or not a text, or if the encoder does not take
                captions of that length.
        """
        texts = tuple(texts)
        if not texts:
            raise InputError("the list of captions is empty; give at least one.")
        for row, text in enumerate(texts):
            words.check_text(text, f"caption {row}", (), InputError)
        blank = [row for row, text in enumerate(texts) if not text.strip()]
        if blank:
            raise InputError(f"caption {blank[0]} is blank.")
        length = self.context if length is None or self.whole_window else length
        if not 2 < length <= self.context:
            raise InputError(f"the encoder takes captions of 3 to {self.context} tokens, not of {length}.")
        rows = [self._encoded(text) for text in texts]
        token_ids = np.full((len(texts), length), self.padding, np.int32)
        offsets = np.zeros((len(texts), length, 2), np.int32)
        valid, lost = np.zeros((len(texts), length), bool), []
        for row, (text, found) in enumerate(zip(texts, rows, strict=True)):
            ids, edges = found["input_ids"], found["offset_mapping"]
            left = ""
            if len(ids) > length:
                left = text[edges[length - 2][1] :].strip()
                # Like the published tokenizers, this keeps the end token as the last one of the window.
                ids, edges = [*ids[: length - 1], ids[-1]], [*edges[: length - 1], (0, 0)]
            token_ids[row, : len(ids)], offsets[row, : len(ids)], valid[row, : len(ids)] = ids, edges, True
            lost.append(left)
        unknown = tuple(self.unknown(text, found) for text, found in zip(texts, rows, strict=True))
        words.warn_unknown(unknown, "captions", self.tokenizer.unk_token, stacklevel=2)
        if any(lost):
            named = [f"caption {row} loses {shown(left)}" for row, left in enumerate(lost) if left]
            more = f"; and {len(named) - 5} more" if len(named) > 5 else ""
            warnings.warn(f"captions longer than {length} tokens are cut: {'; '.join(named[:5])}{more}", stacklevel=2)
        return Captions(
            texts=texts, token_ids=token_ids, valid=valid, offsets=offsets, lost=tuple(lost), unknown=unknown
        )
