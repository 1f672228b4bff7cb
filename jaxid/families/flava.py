"""FLAVA's contrastive side: two pre-norm towers with class tokens (HF FlavaModel)."""

import dataclasses

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family
from jaxid.nn.dual import DualConfig, DualEncoder
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key, attention_keys, encoder_block, layer_norm, linear, prefixed
from jaxid.nn.layers import filled, normal
from jaxid.nn.text import TextConfig, TextEncoder
from jaxid.nn.vision import VisionConfig, patch_key
from jaxid.prompts.dual import DualProcessor

_SHARED = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
_SHARED |= {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
_TEXT = {**_SHARED, "vocab_size": 30522, "max_position_embeddings": 512}
_VISION = {**_SHARED, "patch_size": 16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlavaConfig(DualConfig):
    """Shape of a FLAVA model; names and defaults as in HF's FlavaConfig."""

    projection_dim: int = 768  # E
    type_vocab_size: int = 2  # number of segment types; captions are of type 0

    @classmethod
    def from_hf(cls, fields: Json) -> "FlavaConfig":
        """Reads a FLAVA config.json.

        Raises:
            CheckpointError: for a field that is not implemented.
        """
        fields = dict(fields)
        text, vision = ({**(fields.pop(f"{name}_config", None) or {})} for name in ("text", "image"))
        kinds = text.pop("type_vocab_size", 2)
        if text.pop("position_embedding_type", "absolute") != "absolute":
            raise CheckpointError("text_config.position_embedding_type is not 'absolute', which is not implemented.")
        own = {"attention_bias": bool(text.pop("qkv_bias", True)), "causal": False, "first_norm": True}
        tower = {"attention_bias": bool(vision.pop("qkv_bias", True)), "patch_bias": True, "pre_norm": False}
        # Fields that only training, the multimodal encoder and the masked-picture codebook read.
        ignored = {"hidden_dropout_prob", "attention_probs_dropout_prob", "mask_token", "init_codebook"}
        ignored |= {"hidden_size", "logit_scale_init_value", "image_codebook_config", "multimodal_config"}
        ignored |= {name for name in fields if name.endswith(("_weight", "_loss", "_dict")) or name.startswith("skip_")}
        ignored |= {
            "ce_ignore_index",
            "vocab_size",
            "global_backprop_contrastive",
            "layer_norm_eps",
            "tie_word_embeddings",
        }
        parts = {
            "text_config": TextConfig.from_fields({**_TEXT, **text, **own}, where="text_config", ignored=ignored),
            "vision_config": VisionConfig.from_fields(
                {**_VISION, **vision, **tower}, where="image_config", ignored=ignored
            ),
            "type_vocab_size": kinds,
        }
        return cls.from_fields({**fields, **parts}, where="the top level", ignored=ignored)


def _block_keys(config: TextConfig | VisionConfig) -> list[Key]:
    bias, names = config.attention_bias, ("query", "key", "value")
    return encoder_block(
        attention_keys("attention.attention.{}", names, "attention.output.dense", bias=bias, out_bias=True),
        ("layernorm_before", "layernorm_after"),
        ("intermediate.dense", "output.dense"),
    )


def flava_keys(config: FlavaConfig) -> list[Key]:
    """The key table of the contrastive side."""
    tower = [
        Key("embeddings.cls_token", "class_token", "1 1 d -> d"),
        Key("embeddings.position_embeddings", "position", "1 i d -> i d"),
        patch_key("embeddings.patch_embeddings.projection.weight", config.vision_config),
        Key("embeddings.patch_embeddings.projection.bias", "patch_bias"),
        *prefixed(_block_keys(config.vision_config), "encoder.layer.{layer}.", "layers."),
        *layer_norm("layernorm", "post_norm"),
    ]
    text = [
        Key("embeddings.word_embeddings.weight", "embedding"),
        Key("embeddings.position_embeddings.weight", "position"),
        *layer_norm("embeddings.LayerNorm", "first_norm"),
        *prefixed(_block_keys(config.text_config), "encoder.layer.{layer}.", "layers."),
        *layer_norm("layernorm", "final_norm"),
    ]
    return [
        *prefixed(tower, "image_model.", "tower."),
        *prefixed(text, "text_model.", "text_encoder."),
        Key("text_model.embeddings.token_type_embeddings.weight", "text_encoder.segment"),
        *linear("image_projection", "image_projection", bias=True),
        *linear("text_projection", "text_projection", bias=True),
        Key("logit_scale", "logit_scale"),
    ]


class FlavaTextEncoder(TextEncoder):
    """A text encoder that also embeds segment types."""

    def __init__(self, config: TextConfig, kinds: int, *, rngs: nnx.Rngs):
        """Builds the encoder."""
        super().__init__(config, rngs=rngs)
        self.segment = normal(rngs, (kinds, config.hidden_size), 0.02)

    def embed(self, token_ids: Int[Array, "N T"]) -> Float[Array, "N S D"]:
        """Embeddings of captions, which are segments of type 0."""
        return super().embed(token_ids) + self.segment[0]


class Flava(DualEncoder):
    """The network."""

    def __init__(self, config: FlavaConfig, *, rngs: nnx.Rngs):
        """Builds both towers and their projections."""
        super().__init__(config, config.projection_dim, bias=True, rngs=rngs)
        self.text_encoder = FlavaTextEncoder(config.text_config, config.type_vocab_size, rngs=rngs)
        self.logit_scale = filled(2.6592, ())


FAMILY = Family(
    model_types=("flava",),
    config=FlavaConfig.from_hf,
    network=Flava,
    keys=flava_keys,
    processor=DualProcessor,
    renames=((r"^flava\.", ""),),  # where pre-training checkpoints keep the model
    unused=(  # indices, the multimodal encoder and the heads for pre-training
        r"\.position_ids$",
        r"\.(pooler|mask_token)",
        r"\.token_type_ids$",
        r"(^|\.)(multimodal_model|image_to_mm_projection|text_to_mm_projection|image_codebook)\.",
        r"^(mim|mlm|itm|mmm_image|mmm_text|global_contrastive)_head\.",
    ),
    checkpoints={"flava": Checkpoint("facebook/flava-full")},
)
