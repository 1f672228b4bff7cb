"""One Vision Transformer block and its scanned tower: the picture side of the model families."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import CheckpointError, InputError
from jaxid.kernels import attention, rope
from jaxid.models.common import (
    ACTIVATIONS,
    Config,
    LayerNorm,
    Linear,
    RMSNorm,
    filled,
    flat_product,
    join_heads,
    layer_of,
    normal,
    stacked,
)
from jaxid.models.keys import Key, heads_in, heads_out, layer_norm, linear, prefixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """Shape of a vision tower; names and defaults as in HF's CLIPVisionConfig."""

    hidden_size: int = 768  # D of the tower
    intermediate_size: int = 3072  # width of the MLP
    num_hidden_layers: int = 12  # number of blocks
    num_attention_heads: int = 12  # H
    num_channels: int = 3  # colour channels
    image_size: int = 224  # side of the square picture, pixels
    patch_size: int = 32  # side of a patch, pixels
    hidden_act: str = "quick_gelu"  # activation of the MLP
    layer_norm_eps: float = 1e-5  # added to the variance
    class_token: bool = True  # a token of its own stands before the patches
    patch_bias: bool = False  # bias of the patch embedding
    pre_norm: bool = True  # a norm before the first block
    post_norm: bool = True  # a norm behind the last block, for what reads the tower's end
    attention_bias: bool = True  # biases of queries, keys and values
    attention_out_bias: bool = True  # bias of what attention adds
    rms_norm: bool = False  # the blocks' norms are root-mean-square norms
    query_key_norm: bool = False  # norms of queries and keys, over all heads together
    layer_scale: bool = False  # what attention and MLP add is multiplied by learned vectors
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) in place of down(act(up(x)))
    tanh_gates: bool = False  # what attention and MLP add is multiplied by the tanh of learned numbers

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2


KINDS: Mapping[str, Mapping[str, Any]] = {
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
"""Towers that the families share, by the `model_type` of their `vision_config`, and what it implies."""


def vision_config(fields: Mapping[str, Any], kind: str) -> VisionConfig:
    """Reads Hugging Face's `vision_config` of a CLIP or SigLIP tower.

    Args:
        fields: the parsed JSON object.
        kind: its `model_type`, if it does not say so itself.

    Raises:
        CheckpointError: for a kind or field that is not implemented.
    """
    kind = fields.get("model_type") or kind
    if kind not in KINDS:
        raise CheckpointError(f"vision_config.model_type {kind!r} is not one of {', '.join(KINDS)}.")
    # The pooling head of SigLIP serves retrieval; no family here reads it.
    ignored = {"vocab_size", "vision_use_head", "tie_word_embeddings"}
    given = {name: value for name, value in fields.items() if value is not None}
    return VisionConfig.from_fields({**KINDS[kind], **given}, where="vision_config", ignored=ignored)


def vision_keys(config: VisionConfig) -> list[Key]:
    """Key table of CLIP's and SigLIP's tower, below HF's `vision_model.`."""
    heads = config.num_attention_heads
    block = [
        *layer_norm("layer_norm1", "attention_norm"),
        *heads_in("self_attn.q_proj", "attention.query", heads, bias=True),
        *heads_in("self_attn.k_proj", "attention.key", heads, bias=True),
        *heads_in("self_attn.v_proj", "attention.value", heads, bias=True),
        *heads_out("self_attn.out_proj", "attention.out", heads, bias=True),
        *layer_norm("layer_norm2", "mlp_norm"),
        *linear("mlp.fc1", "up", bias=True),
        *linear("mlp.fc2", "down", bias=True),
    ]
    keys = [
        Key("embeddings.patch_embedding.weight", "patch_kernel", "d c p q -> p q c d"),
        Key("embeddings.position_embedding.weight", "position"),
        *prefixed(block, "encoder.layers.{layer}.", "layers."),
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


VisionRead = Callable[
    [Float[Array, "N I H E"], Float[Array, "N I H E"], Float[Array, "N I H E"]], Float[Array, "N I H E"]
]
"""Attention: from queries, keys and values to what the queries read."""


def read_all(
    query: Float[Array, "N I H E"], key: Float[Array, "N I H E"], value: Float[Array, "N I H E"]
) -> Float[Array, "N I H E"]:
    """Every token of a picture reads all of them."""
    return attention.attend(query, key, value)


class VisionAttention(nnx.Module):
    """Multi-head attention of a picture's tokens; heads are real axes of the weights."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, heads = config.hidden_size, config.num_attention_heads
        head_width, scale = width // heads, width**-0.5
        self.config = config
        self.query = normal(rngs, (width, heads, head_width), scale)
        self.key = normal(rngs, (width, heads, head_width), scale)
        self.value = normal(rngs, (width, heads, head_width), scale)
        self.out = normal(rngs, (heads, head_width, width), scale * (2 * config.num_hidden_layers) ** -0.5)
        if config.attention_bias:
            self.query_bias = filled(0.0, (heads, head_width))
            self.key_bias = filled(0.0, (heads, head_width))
            self.value_bias = filled(0.0, (heads, head_width))
        if config.attention_out_bias:
            self.out_bias = filled(0.0, (width,))
        if config.query_key_norm:
            self.query_norm, self.key_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)

    def __call__(
        self,
        x: Float[Array, "N I D"],
        read: VisionRead = read_all,
        rotation: tuple[Float[Array, "N I F"], Float[Array, "N I F"]] | None = None,
    ) -> Float[Array, "N I D"]:
        """Mixes a picture's tokens."""
        query, key, value = (flat_product(x, kernel[...]) for kernel in (self.query, self.key, self.value))
        if self.config.attention_bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        if self.config.query_key_norm:
            query = self.query_norm(join_heads(query)).reshape(query.shape)
            key = self.key_norm(join_heads(key)).reshape(key.shape)
        if rotation is not None:
            query, key = rope.rotate(query, *rotation), rope.rotate(key, *rotation)
        out = flat_product(join_heads(read(query, key, value)), join_heads(self.out[...], 0))
        return out + self.out_bias[...] if self.config.attention_out_bias else out


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP (HF CLIPEncoderLayer and its kin)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Builds the block's parts."""
        width, norm = config.hidden_size, RMSNorm if config.rms_norm else LayerNorm
        self.config = config
        self.attention_norm = norm(width, config.layer_norm_eps)
        self.attention = VisionAttention(config, rngs=rngs)
        self.mlp_norm = norm(width, config.layer_norm_eps)
        self.up = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, bias=True, rngs=rngs)
        if config.gated_mlp:
            self.gate = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        shape = (width,) if config.layer_scale else (1,)
        if config.layer_scale or config.tanh_gates:
            self.attention_scale, self.mlp_scale = filled(1.0, shape), filled(1.0, shape)

    def __call__(
        self,
        x: Float[Array, "N I D"],
        read: VisionRead = read_all,
        rotation: tuple[Float[Array, "N I F"], Float[Array, "N I F"]] | None = None,
    ) -> Float[Array, "N I D"]:
        """One block: `read(query, key, value)` says who reads whom."""
        x = x + self._scaled("attention", self.attention(self.attention_norm(x), read, rotation))
        normed, activation = self.mlp_norm(x), ACTIVATIONS[self.config.hidden_act]
        gated = self.config.gated_mlp
        hidden = activation(self.gate(normed)) * self.up(normed) if gated else activation(self.up(normed))
        return x + self._scaled("mlp", self.down(hidden))

    def _scaled(self, name: str, added: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        if self.config.layer_scale:
            return added * getattr(self, f"{name}_scale")[...]
        if self.config.tanh_gates:
            return added * jnp.tanh(getattr(self, f"{name}_scale")[...])
        return added


def state_indices(layers: Sequence[int], blocks: int) -> list[int]:
    """Which of a tower's hidden states a config names: 0 the blocks' input, k + 1 the output of block k.

    Raises:
        CheckpointError: for one that a tower of so many blocks does not have.
    """
    if not all(-blocks - 1 <= layer <= blocks for layer in layers):
        raise CheckpointError(
            f"vision_feature_layer {list(layers)} names hidden states that a tower of {blocks} blocks does not have."
        )
    return [layer if layer >= 0 else blocks + 1 + layer for layer in layers]


def patches(pixels: Float[Array, "N C Y X"], side: int) -> Float[Array, "N I F"]:
    """Square patches row by row, each as (row, column, channel); what no whole patch covers is left out."""
    height, width = (length // side * side for length in pixels.shape[-2:])
    return rearrange(pixels[:, :, :height, :width], "n c (y p) (x q) -> n (y x) (p q c)", p=side, q=side)


class VisionTower(nnx.Module):
    """Patches, class token, learned positions, blocks (HF CLIPVisionModel, SiglipVisionModel)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Builds the tower; every block parameter carries a leading layer axis."""
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_kernel = normal(rngs, (patch, patch, config.num_channels, width), 0.02)
        if config.patch_bias:
            self.patch_bias = filled(0.0, (width,))
        if config.class_token:
            self.class_token = normal(rngs, (width,), 0.02)
        self.position = normal(rngs, (config.num_patches + config.class_token, width), 0.02)
        if config.pre_norm:
            self.pre_norm = LayerNorm(width, config.layer_norm_eps)
        self.layers = stacked(lambda rngs: VisionBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        if config.post_norm:
            self.post_norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, pixels: Float[Array, "N C Y X"], depth: int | None = None) -> Float[Array, "L1 N I D"]:
        """Hidden states: index 0 is the blocks' input, index k + 1 the output of block k.

        Args:
            pixels: Float[N, C, Y, X].
            depth: how many blocks to run; all by default.
        """
        config, side = self.config, self.config.image_size
        if pixels.shape[-2:] != (side, side):
            given = " x ".join(map(str, pixels.shape[-2:]))
            raise InputError(f"the pictures have {given} pixels, the tower takes {side} x {side}.")
        x = patches(pixels, config.patch_size) @ self.patch_kernel[...].reshape(-1, config.hidden_size)
        if config.patch_bias:
            x = x + self.patch_bias[...]
        if config.class_token:
            first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, x.shape[2]))
            x = jnp.concatenate([first, x], axis=1)
        x = x + self.position[...]
        if config.pre_norm:
            x = self.pre_norm(x)
        return run_blocks(self.layers, x, config.num_hidden_layers, depth)


def run_blocks(
    layers: Any, x: Float[Array, "N I D"], blocks: int, depth: int | None = None, *, read: VisionRead = read_all
) -> Float[Array, "L1 N I D"]:
    """What enters the first of stacked blocks, and what leaves every one of the first `depth`; `read` as in a block."""
    block_definition, block_parameters = nnx.split(layers)

    def step(x: Array, parameters: Any) -> tuple[Array, Array]:
        x = nnx.merge(block_definition, parameters)(x, read)
        return x, x

    if depth is None or depth == blocks:
        _, outputs = jax.lax.scan(step, x, block_parameters)
    else:  # scanning over a slice of the parameters would copy it first
        _, outputs = jax.lax.scan(lambda x, k: step(x, layer_of(block_parameters, k)), x, jnp.arange(depth))
    return jnp.concatenate([x[None], outputs])
