"""CLIP: causal text encoder, class token, two projections (HF CLIPModel)."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.families.base import Checkpoint, Family
from jaxid.nn.dual import DualConfig, DualEncoder, part
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key, linear, prefixed
from jaxid.nn.layers import filled
from jaxid.nn.text import TextConfig, at_end, text_keys
from jaxid.nn.vision import vision_config, vision_keys
from jaxid.prompts.dual import DualProcessor


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(DualConfig):
    """Shape of a CLIP model; names and defaults as in HF's CLIPConfig."""

    projection_dim: int = 512  # E

    @classmethod
    def from_hf(cls, fields: Json) -> "CLIPConfig":
        """Reads a CLIP config.json.

        Raises:
            CheckpointError: for a field that is not implemented.
        """
        parts = {
            "text_config": TextConfig.from_fields(part(fields, "text_config"), where="text_config"),
            "vision_config": vision_config(part(fields, "vision_config"), "clip_vision_model"),
        }
        # The initial logit scale matters only for training.
        ignored = {"logit_scale_init_value", "text_config_dict", "vision_config_dict"}
        return cls.from_fields({**fields, **parts}, where="the top level", ignored=ignored)


def clip_keys(config: CLIPConfig) -> list[Key]:
    """The family's key table."""
    return [
        *prefixed(vision_keys(config.vision_config), "vision_model.", "tower."),
        *prefixed(text_keys(), "text_model.", "text_encoder."),
        *linear("visual_projection", "image_projection", bias=False),
        *linear("text_projection", "text_projection", bias=False),
        Key("logit_scale", "logit_scale"),
    ]


UNUSED = (r"\.position_ids$",)
"""Tensors that are not learned."""


class CLIP(DualEncoder):
    """The network."""

    def __init__(self, config: CLIPConfig, *, rngs: nnx.Rngs):
        """Builds both towers and their projections."""
        super().__init__(config, config.projection_dim, bias=False, rngs=rngs)
        self.logit_scale = filled(2.6592, ())

    def pooled(self, tokens: Float[Array, "N T E"], token_ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
        """The end token of each caption."""
        return at_end(tokens, token_ids, self.config.text_config.eos_token_id)


FAMILY = Family(
    model_types=("clip",),
    config=CLIPConfig.from_hf,
    network=CLIP,
    keys=clip_keys,
    processor=DualProcessor,
    unused=UNUSED,
    checkpoints={
        "clip-b32": Checkpoint("openai/clip-vit-base-patch32"),
        "clip-b16": Checkpoint("openai/clip-vit-base-patch16"),
        "clip-l14": Checkpoint("openai/clip-vit-large-patch14"),
        "clip-l14-336": Checkpoint("openai/clip-vit-large-patch14-336"),
    },
)
