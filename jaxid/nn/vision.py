"""The Vision Transformer tower, the picture side of the model families."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import CheckpointError, InputError
from jaxid.kernels.stacks import LayerSlice
from jaxid.nn.fields import check_patches
from jaxid.nn.keys import Key, layer_norm, prefixed
from jaxid.nn.layers import LayerNorm, filled, flat_product, normal, stacked
from jaxid.nn.transformer import BLOCK_KEYS, Block, BlockConfig, run_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(BlockConfig):
    """Shape of a vision tower; names and defaults as in HF's CLIPVisionConfig."""

    num_channels: int = 3  # colour channels
    image_size: int = 224  # side of the square picture, pixels
    patch_size: int = 32  # side of a patch, pixels
    class_token: bool = True  # a class token precedes the patches
    patch_bias: bool = False  # bias of the patch embedding
    pre_norm: bool = True  # a norm before the first block
    post_norm: bool = True  # a norm for the output of the last block

    def __post_init__(self) -> None:
        """Refuses what does not fit together."""
        super().__post_init__()
        check_patches(self.image_size, self.patch_size)

    @property
    def patch_side(self) -> int:
        """Patches along a side of the picture."""
        return self.image_size // self.patch_size

    @property
    def patch_numbers(self) -> int:
        """Numbers in a patch."""
        return self.num_channels * self.patch_size**2

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return self.patch_side**2


KINDS: Mapping[str, Mapping[str, object]] = {
    "clip_vision_model": {},
    "siglip_vision_model": {
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
        "class_token": False,
        "patch_bias": True,
        "pre_norm": False,
    },
}
"""Towers that families share: defaults by the `model_type` of their `vision_config`."""


def vision_config(fields: Mapping[str, object], kind: str) -> VisionConfig:
    """Reads Hugging Face's `vision_config` of a CLIP or SigLIP tower.

    Args:
        fields: the parsed JSON object.
        kind: its `model_type`, if it does not contain one.

    Raises:
        CheckpointError: for a kind or field that is not implemented.
    """
    kind = str(fields.get("model_type") or kind)
    if kind not in KINDS:
        raise CheckpointError(f"vision_config.model_type {kind!r} is not one of {', '.join(KINDS)}.")
    # No network here contains SigLIP's pooling head as part of the tower.
    ignored = {"vocab_size", "vision_use_head", "tie_word_embeddings"}
    given = {name: value for name, value in fields.items() if value is not None}
    return VisionConfig.from_fields({**KINDS[kind], **given}, where="vision_config", ignored=ignored)


def patch_key(source: str, config: VisionConfig) -> Key:
    """Row of the map from patches to tokens, a convolution in PyTorch."""
    side = config.patch_size
    return Key(source, "patch_kernel", "d c p q -> (p q c) d", {"c": config.num_channels, "p": side, "q": side})


def vision_keys(config: VisionConfig) -> list[Key]:
    """Key table of CLIP's and SigLIP's tower, below HF's `vision_model.`."""
    keys = [
        patch_key("embeddings.patch_embedding.weight", config),
        Key("embeddings.position_embedding.weight", "position"),
        *prefixed(BLOCK_KEYS, "encoder.layers.{layer}.", "layers."),
    ]
    if config.class_token:
        keys.append(Key("embeddings.class_embedding", "class_token"))
    if config.patch_bias:
        keys.append(Key("embeddings.patch_embedding.bias", "patch_bias"))
    if config.pre_norm:
        keys += layer_norm("pre_layrnorm", "pre_norm")
    if config.post_norm:
        keys += layer_norm("post_layernorm", "post_norm")
    return keys


def state_indices(layers: Sequence[int], blocks: int) -> list[int]:
    """Indices of a tower's hidden states that a config names: 0 for the blocks' input, k + 1 for the output of block k.

    Raises:
        CheckpointError: for a hidden state that a tower with this number of blocks does not have.
    """
    if not all(-blocks - 1 <= layer <= blocks for layer in layers):
        raise CheckpointError(
            f"vision_feature_layer {list(layers)} names hidden states that a tower of {blocks} blocks does not have."
        )
    return [layer if layer >= 0 else blocks + 1 + layer for layer in layers]


def patches(pixels: Float[Array, "N C Y X"], side: int) -> Float[Array, "N I F"]:
    """Square patches row by row, each as (row, column, channel); pixels outside whole patches are dropped."""
    height, width = (length // side * side for length in pixels.shape[-2:])
    return rearrange(pixels[:, :, :height, :width], "n c (y p) (x q) -> n (y x) (p q c)", p=side, q=side)


def embedded(patches: Float[Array, "*N I F"], kernel: Float[Array, "F D"]) -> Float[Array, "*N I D"]:
    """Patches as tokens."""
    # Such a product reads inputs of any length; cuBLAS would take a copy of the matrix, padded to a multiple of 8.
    return flat_product(patches, LayerSlice(kernel[None], 0, kernel))


class VisionTower(nnx.Module):
    """Patches, class token, learned positions, blocks (HF CLIPVisionModel, SiglipVisionModel)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Builds the tower; every block parameter carries a leading layer axis."""
        width = config.hidden_size
        self.config = config
        self.patch_kernel = normal(rngs, (config.patch_numbers, width), 0.02)
        if config.patch_bias:
            self.patch_bias = filled(0.0, (width,))
        if config.class_token:
            self.class_token = normal(rngs, (width,), 0.02)
        self.position = normal(rngs, (config.num_patches + config.class_token, width), 0.02)
        if config.pre_norm:
            self.pre_norm = LayerNorm(width, config.layer_norm_eps)
        self.layers = stacked(lambda rngs: Block(config, rngs=rngs), config.num_hidden_layers, rngs)
        if config.post_norm:
            self.post_norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, pixels: Float[Array, "N C Y X"], states: Sequence[int] | None = None) -> Float[Array, "S N I D"]:
        """Hidden states: index 0 is the blocks' input, index k + 1 the output of block k.

        Args:
            pixels: the pictures.
            states: the hidden states to return, as in `run_blocks`; all by default.
        """
        config, side = self.config, self.config.image_size
        if pixels.shape[-2:] != (side, side):
            given = " x ".join(map(str, pixels.shape[-2:]))
            raise InputError(f"the pictures have {given} pixels, the tower takes {side} x {side}.")
        x = embedded(patches(pixels, config.patch_size), self.patch_kernel[...])
        if config.patch_bias:
            x = x + self.patch_bias[...]
        if config.class_token:
            first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position[...]
        if config.pre_norm:
            x = self.pre_norm(x)
        return run_blocks(self.layers, x, states)
