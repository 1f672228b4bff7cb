"""InternVL3: large pictures cut into tiles, a small copy behind them (HF InternVLProcessor)."""

from collections.abc import Sequence

import numpy as np

from jaxid.prompts.base import Encoded, PictureSide, PictureTokens, bucketed, processed
from jaxid.prompts.pictures import Clip, Picture


class InternVLSide(PictureSide):
    """Tiles of a picture's own aspect ratio, as many tokens for each."""

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        tiles = self.image_processor.get_number_of_image_patches(480, 640, {"crop_to_patches": True})
        return tiles * self.config.image_tokens

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as tiles; rows of zeros bring their number to one of few.

        Raises:
            InputError: for a picture that cannot be opened.
        """
        del members
        opened = [self.open(picture) for picture in pictures]
        # Pictures are cut whatever the image processor's own setting, as the published processor does.
        found = processed(self.image_processor, opened, crop_to_patches=True)
        pixels, counts = np.asarray(found["pixel_values"], np.float32), np.asarray(found["num_patches"])
        extra = bucketed(len(pixels)) - len(pixels)
        own, ends = self.config.image_tokens, np.cumsum(counts)
        begin = getattr(self.tokenizer, "start_image_token", "<img>")
        close = getattr(self.tokenizer, "end_image_token", "</img>")
        tokens = tuple(
            PictureTokens(
                f"{begin}{self.placeholder * int(own * count)}{close}", np.arange((end - count) * own, end * own)
            )
            for count, end in zip(counts, ends, strict=True)
        )
        return Encoded(np.pad(pixels, [(0, extra), (0, 0), (0, 0), (0, 0)]), tokens)
