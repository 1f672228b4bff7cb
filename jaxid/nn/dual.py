"""The base of the CLIP-like networks: a picture tower and a text encoder with a joint space."""

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
        tokens: all tokens: the class token, if there is one, and the patches; or the caption's tokens.
        pooled: the vector by which the model compares pictures and captions.
    """

    tokens: Float[Array, "N S E"]
    pooled: Float[Array, "N E"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DualConfig(Config):
    """What every CLIP-like model's config has."""

    text_config: TextConfig  # the text encoder
    vision_config: VisionConfig  # the tower


class DualEncoder(nnx.Module):
    """Two towers; families define how their tokens are mapped to the joint space.

    By default all tokens are normed and projected, and each picture and caption is pooled at its first token.
    """

    def __init__(self, config: DualConfig, width: int, *, bias: bool, rngs: nnx.Rngs):
        """Builds both towers and their projections.

        Args:
            config: the family's config.
            width: width of the joint space, E.
            bias: whether the projections have biases.
            rngs: source of the first values.
        """
        self.config = config
        self.tower = VisionTower(config.vision_config, rngs=rngs)
        self.text_encoder = TextEncoder(config.text_config, rngs=rngs)
        self.image_projection = Linear(config.vision_config.hidden_size, width, bias=bias, rngs=rngs)
        self.text_projection = Linear(config.text_config.hidden_size, width, bias=bias, rngs=rngs)

    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space."""
        tokens = self.image_projection(self.image_states(pixels))
        return Encoded(tokens, tokens[:, 0])

    def image_states(self, pixels: Float[Array, "N C Y X"]) -> Float[Array, "N I D"]:
        """Tokens of pictures after the tower's last norm, before any projection."""
        return self.tower.post_norm(self.tower(pixels, [-1])[0])

    def text(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Encoded:
        """Captions in the joint space; padding comes last."""
        tokens = self.text_projection(self.text_states(token_ids, valid))
        return Encoded(tokens, self.pooled(tokens, token_ids))

    def text_states(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Float[Array, "N T D"]:
        """Tokens of captions after the encoder's last norm, before any projection."""
        return self.text_encoder.normed(self.text_encoder(token_ids, valid, [-1])[0])

    def pooled(self, tokens: Float[Array, "N T E"], token_ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
        """The vector by which captions are compared with pictures."""
        del token_ids
        return tokens[:, 0]


def part(fields: Json, name: str) -> Json:
    """One tower's section of a config.json, updated by `{name}_dict`, which early files have."""
    return {**(fields.get(name) or {}), **(fields.get(f"{name}_dict") or {})}
