"""One Vision Transformer block and its scanned tower: the picture side of the model families."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from jaxid.errors import InputError
from jaxid.kernels import attention
from jaxid.models.common import (
    ACTIVATIONS,
    Config,
    LayerNorm,
    Linear,
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
    """Shape of a CLIP-like tower; names and defaults as in HF's CLIPVisionConfig."""

    hidden_size: int = 768  # D of the tower
    intermediate_size: int = 3072  # width of the MLP
    num_hidden_layers: int = 12  # number of blocks
    num_attention_heads: int = 12  # H
    num_channels: int = 3  # colour channels
    image_size: int = 224  # side of the square picture, pixels
    patch_size: int = 32  # side of a patch, pixels
    hidden_act: str = "quick_gelu"  # activation of the MLP
    layer_norm_eps: float = 1e-5  # added to the variance

    @property
    def num_patches(self) -> int:
        """Patches of one picture."""
        return (self.image_size // self.patch_size) ** 2


def clip_vision_keys(config: VisionConfig) -> list[Key]:
    """Key table of CLIP's tower, below HF's `vision_model.`."""
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
    return [
        Key("embeddings.class_embedding", "class_token"),
        Key("embeddings.patch_embedding.weight", "patch_kernel", "d c p q -> p q c d"),
        Key("embeddings.position_embedding.weight", "position"),
        *layer_norm("pre_layrnorm", "pre_norm"),
        *prefixed(block, "encoder.layers.{layer}.", "layers."),
        *layer_norm("post_layernorm", "post_norm"),
    ]


class VisionAttention(nnx.Module):
    """Bidirectional multi-head attention with biases; heads are real axes of the weights."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, heads = config.hidden_size, config.num_attention_heads
        head_width, scale = width // heads, width**-0.5
        self.query = normal(rngs, (width, heads, head_width), scale)
        self.key = normal(rngs, (width, heads, head_width), scale)
        self.value = normal(rngs, (width, heads, head_width), scale)
        self.out = normal(rngs, (heads, head_width, width), scale * (2 * config.num_hidden_layers) ** -0.5)
        self.query_bias = filled(0.0, (heads, head_width))
        self.key_bias = filled(0.0, (heads, head_width))
        self.value_bias = filled(0.0, (heads, head_width))
        self.out_bias = filled(0.0, (width,))

    def __call__(self, x: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        """Mixes all tokens of a picture."""
        query = flat_product(x, self.query[...]) + self.query_bias[...]
        key = flat_product(x, self.key[...]) + self.key_bias[...]
        value = flat_product(x, self.value[...]) + self.value_bias[...]
        mixed = attention.attend(query, key, value)
        return flat_product(join_heads(mixed), join_heads(self.out[...], 0)) + self.out_bias[...]


class VisionBlock(nnx.Module):
    """Pre-norm attention and MLP (HF CLIPEncoderLayer)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Builds the block's parts."""
        width = config.hidden_size
        self.attention_norm = LayerNorm(width, config.layer_norm_eps)
        self.attention = VisionAttention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(width, config.layer_norm_eps)
        self.up = Linear(width, config.intermediate_size, bias=True, rngs=rngs)
        self.down = Linear(config.intermediate_size, width, bias=True, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "N I D"]) -> Float[Array, "N I D"]:
        """One block."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(ACTIVATIONS[self.activation](self.up(self.mlp_norm(x))))


class ClipVision(nnx.Module):
    """CLIP's tower: patches, class token, learned positions, pre-norm, blocks (HF CLIPVisionModel)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        """Builds the tower; every block parameter carries a leading layer axis."""
        width, patch = config.hidden_size, config.patch_size
        self.config = config
        self.patch_kernel = normal(rngs, (patch, patch, config.num_channels, width), 0.02)
        self.class_token = normal(rngs, (width,), 0.02)
        self.position = normal(rngs, (config.num_patches + 1, width), 0.02)
        self.pre_norm = LayerNorm(width, config.layer_norm_eps)
        self.layers = stacked(lambda rngs: VisionBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.post_norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, pixels: Float[Array, "N C Y X"], depth: int | None = None) -> Float[Array, "L1 N I D"]:
        """Hidden states: index 0 is the blocks' input, index k + 1 the output of block k.

        Args:
            pixels: Float[N, C, Y, X].
            depth: how many blocks to run; all by default.
        """
        patch, side = self.config.patch_size, self.config.image_size
        if pixels.shape[-2:] != (side, side):
            given = " x ".join(map(str, pixels.shape[-2:]))
            raise InputError(f"the pictures have {given} pixels, the tower takes {side} x {side}.")
        # As a convolution does, pixels beyond the last whole patch are left out.
        whole = side // patch * patch
        pixels = pixels[:, :, :whole, :whole]
        patches = rearrange(pixels, "n c (y p) (x q) -> n (y x) (p q c)", p=patch, q=patch)
        tokens = patches @ self.patch_kernel[...].reshape(-1, self.config.hidden_size)
        first = jnp.broadcast_to(self.class_token[...], (tokens.shape[0], 1, tokens.shape[2]))
        x = self.pre_norm(jnp.concatenate([first, tokens], axis=1) + self.position[...])
        block_definition, block_parameters = nnx.split(self.layers)

        def step(x: Array, parameters: Any) -> tuple[Array, Array]:
            x = nnx.merge(block_definition, parameters)(x)
            return x, x

        if depth is None or depth == self.config.num_hidden_layers:
            _, outputs = jax.lax.scan(step, x, block_parameters)
        else:  # scanning over a slice of the parameters would copy it first
            _, outputs = jax.lax.scan(lambda x, k: step(x, layer_of(block_parameters, k)), x, jnp.arange(depth))
        return jnp.concatenate([x[None], outputs])
