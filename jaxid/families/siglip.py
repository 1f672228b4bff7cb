"""SigLIP: bidirectional text encoder, attention-pooling head, no projection of pictures (HF SiglipModel)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family
from jaxid.families.clip import UNUSED
from jaxid.nn.dual import DualConfig, DualEncoder, Encoded, part
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key, fused_attention_keys, layer_norm, linear, prefixed
from jaxid.nn.layers import ACTIVATIONS, LayerNorm, Linear, filled, normal
from jaxid.nn.text import TextConfig, text_keys
from jaxid.nn.transformer import Attention, BlockConfig
from jaxid.nn.vision import vision_config, vision_keys
from jaxid.prompts.dual import DualProcessor

_TEXT = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""HF's SiglipTextConfig where it differs from CLIP's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(DualConfig):
    """Shape of a SigLIP model; names and defaults as in HF's SiglipConfig."""

    projection_size: int  # E, which must be the tower's width

    @classmethod
    def from_hf(cls, fields: Json) -> "SiglipConfig":
        """Reads a SigLIP config.json.

        Raises:
            CheckpointError: for a field that is not implemented, or towers whose outputs cannot be compared.
        """
        text, vision = part(fields, "text_config"), part(fields, "vision_config")
        if vision.get("vision_use_head") is False:
            raise CheckpointError("vision_config.vision_use_head is false: the tower has no output to compare.")
        projection = text.pop("projection_size", None)
        own = {"causal": False, "reads_padding": True}
        parts = {
            "text_config": TextConfig.from_fields({**_TEXT, **text, **own}, where="text_config"),
            "vision_config": vision_config(vision, "siglip_vision_model"),
        }
        width = projection or parts["text_config"].hidden_size
        if width != parts["vision_config"].hidden_size:
            raise CheckpointError(
                f"captions are projected to width {width}, but pictures to {parts['vision_config'].hidden_size}."
            )
        ignored = {"text_config_dict", "vision_config_dict"}
        return cls.from_fields({**fields, **parts, "projection_size": width}, where="the top level", ignored=ignored)


def siglip_keys(config: SiglipConfig) -> list[Key]:
    """The family's key table."""
    head = [
        Key("probe", "probe", "1 1 d -> d"),
        *fused_attention_keys("attention.in_proj_", "attention.out_proj"),
        *layer_norm("layernorm", "norm"),
        *linear("mlp.fc1", "up", bias=True),
        *linear("mlp.fc2", "down", bias=True),
    ]
    return [
        *prefixed(vision_keys(config.vision_config), "vision_model.", "tower."),
        *prefixed(head, "vision_model.head.", "head."),
        *prefixed(text_keys(), "text_model.", "text_encoder."),
        *linear("text_model.head", "text_projection", bias=True),
        Key("logit_scale", "logit_scale"),
        Key("logit_bias", "logit_bias"),
    ]


class PoolingHead(nnx.Module):
    """Attention of one learned query to all tokens, then an MLP (HF SiglipMultiheadAttentionPoolingHead)."""

    def __init__(self, config: BlockConfig, *, rngs: nnx.Rngs):
        """Builds the head."""
        width = config.hidden_size
        self.config = config
        self.probe = normal(rngs, (width,), 1.0)
        self.attention = Attention(config, rngs=rngs)
        self.norm = LayerNorm(width, config.layer_norm_eps)
        self.up = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "N I D"]) -> Float[Array, "N D"]:
        """Pools all tokens."""
        x = self.attention(jnp.broadcast_to(self.probe[...], (len(x), 1, x.shape[-1])), source=x)[:, 0]
        return self._with_mlp(x)

    def each(self, x: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        """Pools each token as if it were the only one."""
        _, value = self.attention.remembered(x)
        return self._with_mlp(self.attention.from_heads(value))

    def _with_mlp(self, x: Float[Array, "*N D"]) -> Float[Array, "*N D"]:
        return x + self.down(ACTIVATIONS[self.config.hidden_act](self.up(self.norm(x))))


class Siglip(DualEncoder):
    """The network."""

    def __init__(self, config: SiglipConfig, *, rngs: nnx.Rngs):
        """Builds both towers, the pooling head and the captions' projection."""
        super().__init__(config, config.projection_size, bias=True, rngs=rngs)
        del self.image_projection  # the head's output is what captions are compared with
        self.head = PoolingHead(config.vision_config, rngs=rngs)
        self.logit_scale, self.logit_bias = filled(0.0, (1,)), filled(0.0, (1,))

    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space; each patch as if the pooling head saw it alone."""
        states = self.image_states(pixels)
        return Encoded(self.head.each(states), self.head(states))

    def pooled(self, tokens: Float[Array, "N T E"], token_ids: Int[Array, "N T"]) -> Float[Array, "N E"]:
        """The last token, even if it is padding: the model was trained so."""
        del token_ids
        return tokens[:, -1]


FAMILY = Family(
    model_types=("siglip",),
    config=SiglipConfig.from_hf,
    network=Siglip,
    keys=siglip_keys,
    processor=DualProcessor,
    unused=UNUSED,
    checkpoints={"siglip-b16": Checkpoint("google/siglip-base-patch16-224")},
)
