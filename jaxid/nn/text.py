"""The text encoder: the caption side of the CLIP-like models."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import InputError
from jaxid.kernels import attention, masks
from jaxid.kernels.masks import Reads
from jaxid.nn.keys import Key, layer_norm, prefixed
from jaxid.nn.layers import LayerNorm, normal, stacked
from jaxid.nn.transformer import BLOCK_KEYS, Block, BlockConfig, run_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(BlockConfig):
    """Shape of a text encoder; names and defaults as in HF's CLIPTextConfig."""

    hidden_size: int = 512  # D of the encoder
    intermediate_size: int = 2048  # width of the MLP
    num_attention_heads: int = 8  # H
    vocab_size: int = 49408  # V
    max_position_embeddings: int = 77  # the longest caption, tokens, and the class token if there is one
    eos_token_id: int = 49407  # ends a caption
    causal: bool = True  # tokens read only those before them
    reads_padding: bool = False  # padding is read like any other token
    first_norm: bool = False  # a norm before the first block
    final_norm: bool = True  # a norm after the last block
    class_token: bool = False  # a class token follows the window

    @property
    def context(self) -> int:
        """Tokens of the longest caption."""
        return self.max_position_embeddings - self.class_token

    @property
    def whole_window(self) -> bool:
        """Whether a caption's embedding depends on its padding, so that it must be padded to the whole window."""
        return self.class_token or (self.reads_padding and not self.causal)


def text_keys() -> list[Key]:
    """Key table of CLIP's and SigLIP's encoder, below HF's `text_model.`."""
    return [
        Key("embeddings.token_embedding.weight", "embedding"),
        Key("embeddings.position_embedding.weight", "position"),
        *prefixed(BLOCK_KEYS, "encoder.layers.{layer}.", "layers."),
        *layer_norm("final_layer_norm", "final_norm"),
    ]


class TextEncoder(nnx.Module):
    """Token and position embeddings, blocks, norms (HF CLIPTextModel and similar classes)."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        """Builds the encoder; every block parameter carries a leading layer axis."""
        width = config.hidden_size
        self.config = config
        self.embedding = normal(rngs, (config.vocab_size, width), 0.02)
        self.position = normal(rngs, (config.max_position_embeddings, width), 0.01)
        if config.first_norm:
            self.first_norm = LayerNorm(width, config.layer_norm_eps)
        if config.class_token:
            self.class_token = normal(rngs, (width,), 0.01)
        self.layers = stacked(lambda rngs: Block(config, rngs=rngs), config.num_hidden_layers, rngs)
        if config.final_norm:
            self.final_norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(
        self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"], states: Sequence[int] | None = None
    ) -> Float[Array, "L1 N S D"]:
        """Hidden states: index 0 is the blocks' input, index k + 1 the output of block k; before the final norm.

        S is T, or T + 1 if a class token follows the window.

        Args:
            token_ids: ids of the tokens.
            valid: false at padding, which is at the end.
            states: the hidden states to return, as in `run_blocks`; all by default.
        """
        length, context = token_ids.shape[1], self.config.context
        if length > context or (self.config.class_token and length < context):
            raise InputError(f"the captions have {length} tokens, the encoder takes {context}.")
        x = self.embed(token_ids)
        if self.config.first_norm:
            x = self.first_norm(x)
        reads = self.reads(valid)

        def read(query: Array, key: Array, value: Array) -> Array:
            return attention.attend(query, key, value, reads)

        return run_blocks(self.layers, x, states, read=lambda layer: read)

    def embed(self, token_ids: Int[Array, "N T"]) -> Float[Array, "N S D"]:
        """Token and position embeddings."""
        x = jnp.take(self.embedding[...], token_ids, axis=0)
        if self.config.class_token:
            last = jnp.broadcast_to(self.class_token[...], (len(x), 1, x.shape[2]))
            x = jnp.concatenate([x, last], axis=1)
        return x + self.position[: x.shape[1]]

    def reads(self, valid: Bool[Array, "N T"]) -> Reads:
        """Which tokens each token reads."""
        if self.config.class_token:
            # Published weights were trained with the padding mask shifted right by one: the first token is always read,
            # every other if the one before it is not padding.
            valid = jnp.pad(valid, ((0, 0), (1, 0)), constant_values=True)
        read = jnp.ones_like(valid) if self.config.reads_padding else valid
        if not self.config.causal:
            return masks.everything(valid.shape[1], read)
        positions = jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)
        return masks.causal(positions, positions, read)

    def normed(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        """After the final norm, if there is one."""
        return self.final_norm(x) if self.config.final_norm else x


def at_end(x: Float[Array, "N T D"], token_ids: Int[Array, "N T"], eos_token_id: int) -> Float[Array, "N D"]:
    """The row at every caption's end token.

    Args:
        x: hidden states.
        token_ids: ids of the tokens.
        eos_token_id: the end token, whose first position counts; 2 means the highest id of each caption, as in the
            configs of early CLIP checkpoints.
    """
    position = jnp.argmax(token_ids if eos_token_id == 2 else token_ids == eos_token_id, axis=1)
    return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]
