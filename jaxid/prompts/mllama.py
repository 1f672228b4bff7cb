"""Llama 3.2 Vision: pictures cut into tiles, shown at a token of their own (HF MllamaProcessor)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int

from jaxid.errors import PromptError
from jaxid.prompts.base import Encoded, PictureSide, PictureTokens, Shown, processed
from jaxid.prompts.pictures import Clip, Picture


class MllamaSide(PictureSide):
    """A picture is one token of the prompt; its tiles are read by cross-attention."""

    case = "both"

    @property
    def usual_tokens(self) -> int:
        """As many decoder tokens as a picture's memory, which only some layers hold, takes room."""
        text = self.config.text_config
        return self.config.image_tokens * len(text.cross_attention_layers) // text.num_hidden_layers

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as tiles, and which of them every prompt shows.

        Raises:
            InputError: for a picture that cannot be opened.
        """
        found = processed(self.image_processor, [[self.open(picture)] for picture in pictures])
        shown = np.full((len(members), max(map(len, members))), -1, np.int32)
        for row, own in enumerate(members):
            shown[row, : len(own)] = own
        extras = {
            "aspect_ratio": np.asarray(found["aspect_ratio_ids"], np.int32)[:, 0],
            "tile_count": np.array([own[0] for own in found["num_tiles"]], np.int32),
            "shown": shown,
        }
        tokens = tuple(PictureTokens(self.placeholder, np.zeros(1, np.int32)) for _ in pictures)
        return Encoded(np.asarray(found["pixel_values"], np.float32)[:, 0], tokens, extras)

    def slots(
        self, token_ids: Int[np.ndarray, "B T"], valid: Bool[np.ndarray, "B T"], shown: Shown
    ) -> Int[np.ndarray, "B T"]:
        """0 where a picture is shown, which marks where the text behind it begins; else -1.

        Raises:
            PromptError: if a prompt shows another number of pictures than it was given.
        """
        here = (token_ids == self.image_token_id) & valid
        for row, pictures in enumerate(shown):
            if here[row].sum() != len(pictures):
                raise PromptError(f"prompt {row} shows {here[row].sum()} pictures instead of {len(pictures)}.")
        return np.where(here, 0, -1).astype(np.int32)
