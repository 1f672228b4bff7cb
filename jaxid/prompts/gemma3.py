"""Gemma 3: pictures of one size between marks (HF Gemma3Processor)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxid.errors import CheckpointError
from jaxid.prompts.base import Encoded, PictureSide, PictureTokens
from jaxid.prompts.pictures import Clip, Picture


class Gemma3Side(PictureSide):
    """As many tokens for every picture; pan and scan is off, as published."""

    def __init__(self, tokenizer: Any, image_processor: Any, config: Any):
        """Takes loaded parts and the network's config.

        Raises:
            CheckpointError: if pictures are to be cropped by pan and scan, or the tokenizer lacks the marks.
        """
        super().__init__(tokenizer, image_processor, config)
        if getattr(image_processor, "do_pan_and_scan", None):
            raise CheckpointError("the image processor asks for pan and scan, which is not implemented; turn it off.")
        self.image_token: str = self.placeholder
        marks = {"boi_token_index": config.boi_token_index, "eoi_token_index": config.eoi_token_index}
        for name, index in marks.items():
            if tokenizer.convert_ids_to_tokens(index) in (None, tokenizer.unk_token):
                raise CheckpointError(f"the tokenizer has no token for config.json's {name} {index}.")
        self.placeholder, self.end = (tokenizer.convert_ids_to_tokens(index) for index in marks.values())

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as arrays, and their tokens between marks and blank lines.

        Raises:
            InputError: for a picture that cannot be opened.
        """
        del members
        count = self.config.image_tokens
        text = f"\n\n{self.placeholder}{self.image_token * count}{self.end}\n\n"
        rows = np.arange(len(pictures) * count).reshape(len(pictures), count)
        return Encoded(self.pixels(pictures), tuple(PictureTokens(text, own) for own in rows))
