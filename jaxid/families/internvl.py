"""InternVL3: InternViT on tiles of a picture, pixel shuffle, projector, Qwen2 (HF InternVLForConditionalGeneration)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import CheckpointError
from jaxid.families.base import Checkpoint, Family, hidden_states, sections
from jaxid.nn.decoder import Decoder
from jaxid.nn.decoder_config import ModelConfig, decoder_config, decoder_keys, unembedding_key
from jaxid.nn.fields import Json
from jaxid.nn.inputs import Inputs
from jaxid.nn.keys import LANGUAGE_MODEL, ROTARY, Key, attention_keys, encoder_block, layer_norm, linear, prefixed
from jaxid.nn.layers import ACTIVATIONS, LayerNorm, Linear
from jaxid.nn.network import Network
from jaxid.nn.vision import VisionConfig, VisionTower, patch_key, state_indices
from jaxid.prompts.base import Encoded, PictureTokens, apart, bucketed, processed
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Processor

_TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "attention_bias": False,
}
"""Defaults of HF's InternVLVisionConfig."""


def _vision_config(fields: Json) -> VisionConfig:
    """Reads the `vision_config`, whose sizes may be pairs."""
    fields = _TOWER | {name: value for name, value in fields.items() if value is not None}
    for name in ("image_size", "patch_size"):
        size = fields[name]
        if isinstance(size, list | tuple):
            if len(set(size)) > 1:
                raise CheckpointError(f"vision_config.{name} {size} is not square, which is not implemented.")
            fields[name] = size[0]
    kind = fields.pop("norm_type", "layer_norm")
    if kind not in ("layer_norm", "rms_norm"):
        raise CheckpointError(f"vision_config.norm_type {kind!r} is neither 'layer_norm' nor 'rms_norm'.")
    if not fields.pop("use_absolute_position_embeddings", True) or fields.pop("use_mask_token", False):
        raise CheckpointError(
            "vision_config: a tower without position embeddings or with a mask token is not implemented."
        )
    own = {
        "rms_norm": kind == "rms_norm",
        "query_key_norm": bool(fields.pop("use_qk_norm", False)),
        "post_norm": not fields.pop("use_mean_pooling", True),
        "patch_bias": True,
        "pre_norm": False,
        "layer_scale": True,
    }
    # Dropout and initial values matter only for training.
    ignored = {"hidden_dropout_prob", "projection_dropout", "layer_scale_init_value"}
    return VisionConfig.from_fields(fields | own, where="vision_config", ignored=ignored)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InternVLConfig(ModelConfig):
    """Shape of an InternVL3 model; names and defaults as in HF's InternVLConfig."""

    vision_config: VisionConfig  # the tower
    image_token_index: int = 151667  # id of the token that pictures replace
    downsample_ratio: float = 0.5  # tokens along a side of a tile, per patch
    projector_hidden_act: str = "gelu"  # between the projector's two layers
    vision_feature_layer: int = -1  # which of the tower's hidden states is projected

    @classmethod
    def from_hf(cls, fields: Json) -> "InternVLConfig":
        """Reads a config.json in Hugging Face's layout.

        Raises:
            CheckpointError: for a section of another kind, or an unknown field.
        """
        # Hugging Face's class ties embeddings by default. Published files say nothing and hold both tensors.
        fields, text, vision = sections(fields, "image", vision_kind="internvl_vision", tied=True)
        layer = fields.get("vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise CheckpointError(f"vision_feature_layer {layer} is a list, which is not implemented here.")
        strategy = fields.pop("vision_feature_select_strategy", "default")
        if strategy != "default":  # "full" fails in Hugging Face's class, too
            raise CheckpointError(
                f"vision_feature_select_strategy {strategy!r} is not 'default', without which the tower's class token "
                "stays among the patches."
            )
        parts = {"text_config": decoder_config(text, "qwen2"), "vision_config": _vision_config(vision)}
        # `image_seq_length` follows from the tower and the ratio.
        config = cls.from_fields(fields | parts, where="the top level", ignored={"image_seq_length"})
        side = config.vision_config.patch_side
        state_indices([config.vision_feature_layer], config.vision_config.num_hidden_layers)
        if config.downsample_ratio not in [1 / square for square in range(1, side + 1) if side % square == 0]:
            raise CheckpointError(
                f"downsample_ratio {config.downsample_ratio} does not divide a tile's {side} x {side} patches evenly."
            )
        return config

    @property
    def square(self) -> int:
        """Side of the square of patches that becomes a decoder token."""
        return round(1 / self.downsample_ratio)

    @property
    def image_tokens(self) -> int:
        """Decoder tokens of one tile."""
        return (self.vision_config.patch_side // self.square) ** 2


def internvl_keys(config: InternVLConfig) -> list[Key]:
    """The family's key table, in the names that published checkpoints use."""
    vision = config.vision_config
    bias = vision.attention_bias
    attention = attention_keys("attention.{}_proj", "qkv", "attention.projection_layer", bias=bias, out_bias=True)
    block = [
        *encoder_block(attention, ("layernorm_before", "layernorm_after"), norm_bias=not vision.rms_norm),
        Key("lambda_1", "attention_scale"),
        Key("lambda_2", "mlp_scale"),
    ]
    if vision.query_key_norm:
        block += [Key("attention.q_norm.weight", "attention.query_norm.scale")]
        block += [Key("attention.k_norm.weight", "attention.key_norm.scale")]
    tower = [
        Key("embeddings.cls_token", "class_token", "o i d -> (o i d)", {"o": 1, "i": 1}),
        Key("embeddings.position_embeddings", "position", "o p d -> (o p) d", {"o": 1}),
        patch_key("embeddings.patch_embeddings.projection.weight", vision),
        Key("embeddings.patch_embeddings.projection.bias", "patch_bias"),
        *prefixed(block, "encoder.layer.{layer}.", "layers."),
        *(layer_norm("layernorm", "post_norm") if vision.post_norm else []),
    ]
    return [
        *prefixed(tower, "vision_tower.", "tower."),
        *layer_norm("multi_modal_projector.layer_norm", "projector_norm"),
        *linear("multi_modal_projector.linear_1", "projector_in", bias=True),
        *linear("multi_modal_projector.linear_2", "projector_out", bias=True),
        *prefixed(decoder_keys(config.text_config), "language_model.model.", "decoder."),
        unembedding_key(config.text_config, "language_model.lm_head.weight"),
    ]


class InternVL(Network):
    """The network; every tile of a picture is a row of the pixels."""

    def __init__(self, config: InternVLConfig, *, rngs: nnx.Rngs):
        """Builds tower, projector and decoder."""
        self.config = config
        width, inputs = config.text_config.hidden_size, config.vision_config.hidden_size * config.square**2
        self.tower = VisionTower(config.vision_config, rngs=rngs)
        self.projector_norm = LayerNorm(inputs, 1e-5)
        self.projector_in = Linear(inputs, width, bias=True, rngs=rngs)
        self.projector_out = Linear(width, width, bias=True, rngs=rngs)
        self.decoder = Decoder(config.text_config, rngs=rngs)

    def features(self, inputs: Inputs) -> Float[Array, "N I D"]:
        """The tiles' decoder tokens."""
        config, layer = self.config, self.config.vision_feature_layer
        (chosen,) = self.tower(self.pixels(inputs), state_indices([layer], config.vision_config.num_hidden_layers))
        if layer == -1 and config.vision_config.post_norm:
            chosen = self.tower.post_norm(chosen)
        side, square = config.vision_config.patch_side, config.square
        grid = chosen[:, 1:].reshape(chosen.shape[0], side, side, -1)  # without the class token
        shuffled = rearrange(grid, "n (y p) (x q) d -> n (y x) (p q d)", p=square, q=square)
        activation = ACTIVATIONS[config.projector_hidden_act]
        return self.projector_out(activation(self.projector_in(self.projector_norm(shuffled))))


class InternVLProcessor(Processor):
    """Pictures are cut into tiles of about their own aspect ratio; every tile takes the same number of tokens."""

    config: InternVLConfig

    @property
    def usual_tokens(self) -> int:
        """Decoder tokens of a photograph of 640 x 480 pixels."""
        tiles = self.image_processor.get_number_of_image_patches(480, 640, {"crop_to_patches": True})
        return tiles * self.config.image_tokens

    def encode(self, pictures: Sequence[Picture | Clip], members: Sequence[Sequence[int]]) -> Encoded:
        """Pictures as tiles, padded with tiles of zeros so that few programs are compiled.

        Where prompts have pictures of their own, and those of each one fit into its share of the tiles, the padding
        follows every prompt's; otherwise it follows all of them, and devices cannot divide the pictures.
        """
        opened = [self.open(picture) for picture in pictures]
        # Like the published processor, this cuts pictures whatever the image processor's own setting is.
        found = processed(self.image_processor, opened, crop_to_patches=True)
        pixels, counts = np.asarray(found["pixel_values"], np.float32), np.asarray(found["num_patches"])
        total, own = bucketed(len(pixels)), self.config.image_tokens
        places, share = np.arange(len(pixels)), total // len(members)
        tiles = np.array([counts[list(some)].sum() for some in members])
        alone = apart(members) and int(tiles.max()) <= share
        if alone:
            total = share * len(members)
            places = np.concatenate([row * share + np.arange(count) for row, count in enumerate(tiles)])
        padded = np.zeros((total, *pixels.shape[1:]), np.float32)
        padded[places] = pixels
        ends = np.cumsum(counts)
        begin = getattr(self.tokenizer, "start_image_token", "<img>")
        close = getattr(self.tokenizer, "end_image_token", "</img>")
        tokens = tuple(
            PictureTokens(
                f"{begin}{self.placeholder * int(own * count)}{close}",
                (places[end - count : end, None] * own + np.arange(own)).ravel(),
            )
            for count, end in zip(counts, ends, strict=True)
        )
        return Encoded(padded, tokens, apart=alone)


FAMILY = Family(
    model_types=("internvl",),
    config=InternVLConfig.from_hf,
    network=InternVL,
    keys=internvl_keys,
    processor=InternVLProcessor,
    renames=(*LANGUAGE_MODEL, (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.")),
    unused=ROTARY,
    checkpoints={
        "internvl-1b": Checkpoint("OpenGVLab/InternVL3-1B-hf", belief_swap=hidden_states(6, 16)),
        "internvl-2b": Checkpoint("OpenGVLab/InternVL3-2B-hf", belief_swap=hidden_states(6, 16)),
        "internvl-8b": Checkpoint("OpenGVLab/InternVL3-8B-hf", belief_swap=hidden_states(6, 16)),
        "internvl-14b": Checkpoint("OpenGVLab/InternVL3-14B-hf", belief_swap=hidden_states(12, 24)),
    },
)
