"""BLIP's contrastive side: BERT's blocks over captions, a ViT over pictures (HF BlipForImageTextRetrieval)."""

import dataclasses

from flax import nnx

from jaxid.families.base import Checkpoint, Family
from jaxid.nn.dual import DualConfig, DualEncoder, part
from jaxid.nn.fields import Json
from jaxid.nn.keys import Key, attention_keys, encoder_block, fused_attention_keys, layer_norm, linear, prefixed
from jaxid.nn.text import TextConfig
from jaxid.nn.vision import VisionConfig, patch_key
from jaxid.prompts.dual import DualProcessor

_TEXT = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}
"""HF's BlipTextConfig where it differs from CLIP's."""

_VISION = {"image_size": 384, "patch_size": 16, "hidden_act": "gelu"}
"""HF's BlipVisionConfig where it differs from CLIP's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlipConfig(DualConfig):
    """Shape of a BLIP model; names and defaults as in HF's BlipConfig."""

    image_text_hidden_size: int = 256  # E

    @classmethod
    def from_hf(cls, fields: Json) -> "BlipConfig":
        """Reads a BLIP config.json.

        Raises:
            CheckpointError: for a field that is not implemented.
        """
        text = {**_TEXT, **part(fields, "text_config")}
        text |= {"causal": False, "first_norm": True, "final_norm": False, "norms_after": True}
        vision = {**_VISION, **part(fields, "vision_config"), "patch_bias": True, "pre_norm": False}
        # Fields that only decoding, cross-attention and training read.
        ignored = {"encoder_hidden_size", "hidden_dropout_prob", "attention_probs_dropout_prob", "label_smoothing"}
        ignored |= {"encoder_width", "fusion_layer", "text_config_dict", "vision_config_dict", "logit_scale_init_value"}
        ignored |= {"tie_word_embeddings"}
        parts = {
            "text_config": TextConfig.from_fields(text, where="text_config", ignored=ignored),
            "vision_config": VisionConfig.from_fields(vision, where="vision_config", ignored=ignored),
        }
        return cls.from_fields({**fields, **parts}, where="the top level", ignored=ignored)


def blip_keys(config: BlipConfig) -> list[Key]:
    """The key table of the contrastive side."""
    attention = fused_attention_keys("self_attn.qkv.", "self_attn.projection")
    block = encoder_block(attention, ("layer_norm1", "layer_norm2"))
    tower = [
        Key("embeddings.class_embedding", "class_token", "1 1 d -> d"),
        Key("embeddings.position_embedding", "position", "1 i d -> i d"),
        patch_key("embeddings.patch_embedding.weight", config.vision_config),
        Key("embeddings.patch_embedding.bias", "patch_bias"),
        *prefixed(block, "encoder.layers.{layer}.", "layers."),
        *layer_norm("post_layernorm", "post_norm"),
    ]
    return [
        *prefixed(tower, "vision_model.", "tower."),
        *prefixed(bert_keys(), "text_encoder.", "text_encoder."),
        *linear("vision_proj", "image_projection", bias=True),
        *linear("text_proj", "text_projection", bias=True),
    ]


def bert_keys() -> list[Key]:
    """Key table of a text encoder in BERT's names."""
    names = ("query", "key", "value")
    block = encoder_block(
        attention_keys("attention.self.{}", names, "attention.output.dense", bias=True, out_bias=True),
        ("attention.output.LayerNorm", "output.LayerNorm"),
        ("intermediate.dense", "output.dense"),
    )
    return [
        Key("embeddings.word_embeddings.weight", "embedding"),
        Key("embeddings.position_embeddings.weight", "position"),
        *layer_norm("embeddings.LayerNorm", "first_norm"),
        *prefixed(block, "encoder.layer.{layer}.", "layers."),
    ]


class Blip(DualEncoder):
    """The network."""

    def __init__(self, config: BlipConfig, *, rngs: nnx.Rngs):
        """Builds both towers and their projections."""
        super().__init__(config, config.image_text_hidden_size, bias=True, rngs=rngs)


FAMILY = Family(
    model_types=("blip",),
    config=BlipConfig.from_hf,
    network=Blip,
    keys=blip_keys,
    processor=DualProcessor,
    # Indices, cross-attention to pictures, the matching head and the captioner.
    unused=(r"\.position_ids$", r"\.crossattention\.", r"^itm_head\.", r"^text_decoder\.", r"^logit_scale$"),
    checkpoints={"blip-b16": Checkpoint("Salesforce/blip-itm-base-coco")},
)
