"""What the CLIP-like networks share: a picture tower and a text encoder that meet in one space."""

import dataclasses
from typing import NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.nn.fields import Json
from jaxid.nn.layers import Config, Linear
from jaxid.nn.text import TextConfig, TextEncoder
from jaxid.nn.vision import VisionConfig, VisionTower


class Encoded(NamedTuple):
    """Pictures or captions in the joint space, before normalisation.

    Attributes:
        tokens: every token projected: the class token, if there is one, and the patches; or the caption's tokens.
        pooled: what the model compares pictures and captions by.
    """

    tokens: Float[Array, "N S E"]
    pooled: Float[Array, "N E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualConfig(Config):
    """What every CLIP-like model's config has."""

    text_config: TextConfig  # the text encoder
    vision_config: VisionConfig  # the tower


class DualEncoder(nnx.Module):
    """Two towers; a family says what their tokens become in the joint space.

    By default all are normed and projected, and each picture and caption is pooled at its first token.
    """

    def __init__(self, config: DualConfig, width: int, *, bias: bool, rngs: nnx.Rngs):
        """Builds both towers and their projections.

        Args:
            config: the family's.
            width: of the joint space, E.
            bias: of the projections.
            rngs: for the first values.
        """
        self.config = config
        self.tower = VisionTower(config.vision_config, rngs=rngs)
        self.text_encoder = TextEncoder(config.text_config, rngs=rngs)
        self.image_projection = Linear(config.vision_config.hidden_size, width, bias=bias, rngs=rngs)
        self.text_projection = Linear(config.text_config.hidden_size, width, bias=bias, rngs=rngs)

    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space; tokens: the class token, then the patches."""
        tokens = self.image_projection(self.tower.post_norm(self.tower(pixels)[-1]))
        return Encoded(tokens, tokens[:, 0])

    def text(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Encoded:
        """Captions in the joint space; padding comes last."""
        tokens = self.text_projection(self.text_encoder.normed(self.text_encoder(token_ids, valid)[-1]))
        return Encoded(tokens, self.pooled(tokens, token_ids))

    def pooled(self, tokens: Float[Array, "N T E"], token_ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
        """The token by which a caption is compared with pictures."""
        del token_ids
        return tokens[:, 0]


def part(fields: Json, name: str) -> Json:
    """One tower's part of a config.json; `{name}_dict`, where early files have it, overrides it."""
    return {**(fields.get(name) or {}), **(fields.get(f"{name}_dict") or {})}
