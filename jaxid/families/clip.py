"""CLIP: causal text encoder, class token, two projections (HF CLIPModel)."""

import dataclasses
from typing import Any

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.families.base import Family
from jaxid.nn.dual import DualEncoder, Encoded, part
from jaxid.nn.keys import Key, linear, prefixed
from jaxid.nn.layers import Config, Linear, filled
from jaxid.nn.text import TextConfig, TextEncoder, at_end, text_keys
from jaxid.nn.vision import VisionConfig, VisionTower, vision_config, vision_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(Config):
    """Shape of a CLIP model; names and defaults as in HF's CLIPConfig."""

    text_config: TextConfig  # the text encoder
    vision_config: VisionConfig  # the tower
    projection_dim: int = 512  # E

    @classmethod
    def from_hf(cls, fields: dict[str, Any]) -> "CLIPConfig":
        """Reads a CLIP config.json.

        Raises:
            CheckpointError: for a field that is not implemented.
        """
        parts = {
            "text_config": TextConfig.from_fields(part(fields, "text_config"), where="text_config"),
            "vision_config": vision_config(part(fields, "vision_config"), "clip_vision_model"),
        }
        # The scale's first value serves training.
        ignored = {"logit_scale_init_value", "text_config_dict", "vision_config_dict"}
        return cls.from_fields({**fields, **parts}, where="the top level", ignored=ignored)


def clip_keys(config: CLIPConfig) -> list[Key]:
    """The family's key table."""
    return [
        *prefixed(vision_keys(config.vision_config), "vision_model.", "tower."),
        *prefixed(text_keys(config.text_config), "text_model.", "text_encoder."),
        *linear("visual_projection", "image_projection", bias=False),
        *linear("text_projection", "text_projection", bias=False),
        Key("logit_scale", "logit_scale"),
    ]


UNUSED = (r"\.position_ids$",)
"""Tensors that hold nothing learned."""


class CLIP(DualEncoder):
    """The network."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        """Builds both towers and their projections."""
        self.config = config
        width = config.projection_dim
        self.tower = VisionTower(config.vision_config, rngs=rngs)
        self.text_encoder = TextEncoder(config.text_config, rngs=rngs)
        self.image_projection = Linear(config.vision_config.hidden_size, width, bias=False, rngs=rngs)
        self.text_projection = Linear(config.text_config.hidden_size, width, bias=False, rngs=rngs)
        self.logit_scale = filled(2.6592, ())

    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space; tokens: class token, then patches, all behind norm and projection."""
        tokens = self.image_projection(self.tower.post_norm(self.tower(pixels)[-1]))
        return Encoded(tokens, tokens[:, 0])

    def text(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Encoded:
        """Captions in the joint space; pooled at the end token."""
        tokens = self.text_projection(self.text_encoder.normed(self.text_encoder(token_ids, valid)[-1]))
        return Encoded(tokens, at_end(tokens, token_ids, self.config.text_config.eos_token_id))


FAMILY = Family(
    model_types=("clip",),
    config=CLIPConfig.from_hf,
    network=CLIP,
    keys=clip_keys,
    unused=UNUSED,
    aliases={
        "clip-b32": "openai/clip-vit-base-patch32",
        "clip-b16": "openai/clip-vit-base-patch16",
        "clip-l14": "openai/clip-vit-large-patch14",
        "clip-l14-336": "openai/clip-vit-large-patch14-336",
    },
)
