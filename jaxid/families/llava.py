"""LLaVA-1.5 and its variants: CLIP or SigLIP tower, two-layer projector, decoder (HF LlavaForConditionalGeneration)."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family, hidden_states, sections
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import ModelConfig, decoder_config, decoder_keys, unembedding_key
from jaxid.nn.fields import Json
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import LANGUAGE_MODEL, ROTARY, Key, linear, prefixed
from jaxid.nn.layers import ACTIVATIONS, Linear
from jaxid.nn.network import Network
from jaxid.nn.vision import VisionConfig, VisionTower, state_indices, vision_config, vision_keys
from jaxid.prompts.processor import Processor

LARGE_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
}
"""The `vision_config` of files that have none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlavaConfig(ModelConfig):
    """Shape of a LLaVA-1.5 model; names and defaults as in HF's LlavaConfig."""

    vision_config: VisionConfig  # the tower
    image_token_index: int = 32000  # id of the token that pictures replace
    projector_hidden_act: str = "gelu"  # between the projector's two layers
    vision_feature_select_strategy: str = "default"  # "default" drops the tower's first token, "full" keeps it
    vision_feature_layer: tuple[int, ...] = (-2,)  # tower hidden states to project, concatenated
    multimodal_projector_bias: bool = True  # biases in the projector

    @classmethod
    def from_hf(cls, fields: Json) -> "LlavaConfig":
        """Reads a LLaVA config.json.

        Raises:
            CheckpointError: for a tower or decoder of another kind, or an unknown field.
        """
        fields, text, vision = sections(fields, "image", tower=LARGE_TOWER)
        fields["vision_feature_layer"] = feature_layers(fields, -2)
        parts = {
            "text_config": decoder_config(text, "llama"),
            "vision_config": vision_config(vision, "clip_vision_model"),
        }
        # `image_seq_length` follows from the tower and the strategy; `ignore_index` matters only for training.
        ignored = {"image_seq_length", "vocab_size", "ignore_index"}
        config = cls.from_fields(fields | parts, where="the top level", ignored=ignored)
        state_indices(config.vision_feature_layer, config.vision_config.num_hidden_layers)
        if config.vision_feature_select_strategy not in ("default", "full"):
            raise CheckpointError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} is neither "
                "'default' nor 'full'."
            )
        return config

    @property
    def image_tokens(self) -> int:
        """Decoder tokens per picture, I."""
        tower = self.vision_config
        return tower.num_patches + tower.class_token - (self.vision_feature_select_strategy == "default")


def feature_layers(fields: Json, default: int) -> tuple[int, ...]:
    """The `vision_feature_layer` of a config.json, which may be an integer or a list."""
    layers = fields.get("vision_feature_layer", default)
    return (layers,) if isinstance(layers, int) else tuple(layers)


def llava_keys(config: LlavaConfig) -> list[Key]:
    """The family's key table, in the names that published checkpoints use."""
    bias = config.multimodal_projector_bias
    return [
        *prefixed(vision_keys(config.vision_config), "vision_tower.vision_model.", "tower."),
        *linear("multi_modal_projector.linear_1", "projector_in", bias=bias),
        *linear("multi_modal_projector.linear_2", "projector_out", bias=bias),
        *prefixed(decoder_keys(config.text_config), "language_model.model.", "decoder."),
        unembedding_key(config.text_config, "language_model.lm_head.weight"),
    ]


RENAMES = (
    *LANGUAGE_MODEL,
    (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)
"""Spellings of transformers >= 4.52, in memory and on disk, and their published form."""

UNUSED = (*ROTARY, r"\.position_ids$", r"^(model\.vision_tower\.)?vision_tower\.(vision_model\.)?head\.")
"""Indices of positions, and SigLIP's pooling head, which is for retrieval."""


class Llava(Network):
    """The network."""

    def __init__(self, config: LlavaConfig, *, rngs: nnx.Rngs):
        """Builds tower, projector and decoder."""
        self.config = config
        width, bias = config.text_config.hidden_size, config.multimodal_projector_bias
        inputs = config.vision_config.hidden_size * len(config.vision_feature_layer)
        self.tower = VisionTower(config.vision_config, rngs=rngs)
        self.projector_in = Linear(inputs, width, bias=bias, rngs=rngs)
        self.projector_out = Linear(width, width, bias=bias, rngs=rngs)
        self.decoder = Decoder(config.text_config, rngs=rngs)

    def features(self, inputs: Inputs) -> Float[Array, "N I D"]:
        """The pictures' decoder tokens."""
        return self.image_features(self.pixels(inputs))

    def image_features(self, pixels: Float[Array, "N C Y X"]) -> Float[Array, "N I D"]:
        """Pictures as decoder tokens."""
        indices = state_indices(self.config.vision_feature_layer, self.config.vision_config.num_hidden_layers)
        first = 1 if self.config.vision_feature_select_strategy == "default" else 0
        chosen = jnp.concatenate([state[:, first:] for state in self.tower(pixels, indices)], axis=-1)
        return self.projector_out(ACTIVATIONS[self.config.projector_hidden_act](self.projector_in(chosen)))


class LlavaProcessor(Processor):
    """Pictures of one size; answers begin with a capital."""

    config: LlavaConfig

    case = "capital"


FAMILY = Family(
    model_types=("llava",),
    config=LlavaConfig.from_hf,
    network=Llava,
    keys=llava_keys,
    processor=LlavaProcessor,
    renames=RENAMES,
    unused=UNUSED,
    checkpoints={
        "llava-7b": Checkpoint("llava-hf/llava-1.5-7b-hf", belief_swap=hidden_states(8, 20), deviation=11),
        "llava-13b": Checkpoint("llava-hf/llava-1.5-13b-hf", belief_swap=hidden_states(10, 20)),
    },
)
