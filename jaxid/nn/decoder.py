"""The decoder, the text side of every model family, from leaf to root: attention, MLP, block, stack."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxid.kernels import rope
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.layers import (
    ACTIVATIONS,
    Linear,
    RMSNorm,
    Stackable,
    filled,
    flat_product,
    join_heads,
    layer_of,
    normal,
    stacked,
    take_tokens,
)
from jaxid.nn.views import Keep, Memory, Rotation, Stored, Tokens, View

Tap = Callable[[str, Float[Array, "*R B T D"]], Float[Array, "*R B T D"]]
"""What stands at every site of a block: `(name, value) -> value`."""


class Attention(nnx.Module):
    """Grouped-query attention; heads are real axes of the weights."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        head_width, scale = config.head_dim, config.hidden_size**-0.5
        self.config = config
        self.query = normal(rngs, (width, heads, head_width), scale)
        self.key = normal(rngs, (width, kv_heads, head_width), scale)
        self.value = normal(rngs, (width, kv_heads, head_width), scale)
        self.out = normal(rngs, (heads, head_width, width), scale * (2 * config.num_hidden_layers) ** -0.5)
        if config.attention_bias:
            self.query_bias = filled(0.0, (heads, head_width))
            self.key_bias = filled(0.0, (kv_heads, head_width))
            self.value_bias = filled(0.0, (kv_heads, head_width))
        if config.attention_out_bias:
            self.out_bias = filled(0.0, (width,))
        if config.query_key_norm:
            self.query_norm = RMSNorm(head_width, config.rms_norm_eps, config.norm_offset)
            self.key_norm = RMSNorm(head_width, config.rms_norm_eps, config.norm_offset)

    def __call__(
        self, layer: Any, x: Float[Array, "*R B T D"], view: View, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """Mixes tokens: what the kept tokens read in the view, and what the view keeps of all of them."""
        config = self.config
        query = flat_product(kept(x, keep), self.query[...])
        key, value = flat_product(x, self.key[...]), flat_product(x, self.value[...])
        if config.attention_bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        if config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if config.query_pre_attn_scalar:
            # A view divides by the root of the head width.
            query = query * (config.head_dim / config.query_pre_attn_scalar) ** 0.5
        stored = view.store(layer, key, value)
        mixed = view.read(layer, query, stored, keep)
        out = flat_product(join_heads(mixed), join_heads(self.out[...], 0))
        return (out + self.out_bias[...] if config.attention_out_bias else out), stored


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the network to every token."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class DecoderBlock(Stackable):
    """Pre-norm attention and MLP around the residual stream (HF LlamaDecoderLayer, Gemma3DecoderLayer)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the block's parts."""
        norm = (config.hidden_size, config.rms_norm_eps, config.norm_offset)
        self.config = config
        self.attention_norm = RMSNorm(*norm)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = GatedMLP(config, rngs=rngs)
        if config.post_norms:
            self.attention_post_norm, self.mlp_post_norm = RMSNorm(*norm), RMSNorm(*norm)

    def __call__(
        self, layer: Any, x: Float[Array, "*R B T D"], view: View, tap: Tap, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """One step of the residual stream; see `Decoder.step`."""
        x = tap("resid_pre", x)
        with jax.named_scope("attention"):
            added, stored = self.attention(layer, self.attention_norm(x), view, keep)
            if self.config.post_norms:
                added = self.attention_post_norm(added)
            x = kept(x, keep) + tap("attn_out", added)
        x = tap("resid_mid", x)
        with jax.named_scope("mlp"):
            added = self.mlp(self.mlp_norm(x))
            if self.config.post_norms:
                added = self.mlp_post_norm(added)
            x = x + tap("mlp_out", added)
        return tap("resid_post", x), stored


def kept(x: Float[Array, "*R B T D"], keep: Keep) -> Float[Array, "*R B S D"]:
    """The values of the kept tokens."""
    return x if keep is None else take_tokens(x, keep)


class Decoder(nnx.Module):
    """Embedding, stacked blocks, final norm and unembedding (HF LlamaModel); `jaxid.nn.passes` runs them."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the stack; every block parameter carries a leading layer axis."""
        self.config = config
        self.embedding = normal(rngs, (config.vocab_size + config.extra_embeddings, config.hidden_size), 0.02)
        self.layers = stacked(lambda rngs: DecoderBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        if not config.tie_word_embeddings:
            self.unembedding = normal(rngs, (config.hidden_size, config.vocab_size), config.hidden_size**-0.5)

    def embed(self, token_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Embeddings of the tokens."""
        found = jnp.take(self.embedding[...], token_ids, axis=0)
        scale = self.config.embedding_scale
        # Rounded first, as the published embedding is.
        return found if scale == 1.0 else found * jnp.asarray(scale, found.dtype)

    def unembed_matrix(self) -> Float[Array, "D V"]:
        """The map from the normed residual stream to logits."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.unembedding[...]

    def rotations(
        self, positions: Int[Array, "B T"] | Int[Array, "B A T"], last: Int[Array, "B"] | None = None
    ) -> Rotation:
        """Rotary angles of tokens by their positions, or their positions along several axes.

        Args:
            positions: of the tokens.
            last: which of them is its prompt's last, for frequencies that depend on the length of the longest prompt;
                by default the highest position counts, padding or not.
        """
        config, length = self.config, None
        if config.reads_length:
            counted = positions
            if last is not None:
                counted = jnp.take_along_axis(positions, last.reshape(-1, *[1] * (positions.ndim - 1)), axis=-1)
            length = counted.max() + 1

        def rotated(settings: RopeConfig) -> Rotation:
            frequencies = settings.frequencies(config.head_dim, length)
            if positions.ndim == 3:
                sections = settings.mrope_section
                return rope.multimodal_rotations(positions, frequencies, sections, settings.attention_factor)
            return rope.rotations(positions, frequencies, settings.attention_factor)

        full = rotated(config.rope)
        if config.sliding_rope is None or positions.ndim == 3:
            return full
        cosine, sine = (jnp.stack(pair) for pair in zip(full, rotated(config.sliding_rope), strict=True))
        return cosine, sine

    def window(self, tokens: int) -> int | None:
        """The sliding window, if sequences of that length reach beyond it in some layer."""
        return self.config.sliding_window if any(self.config.slides) and tokens > self.config.sliding_window else None

    def tokens(
        self,
        positions: Int[Array, "B T"],
        rope_positions: Int[Array, "B A T"] | None,
        last: Int[Array, "B"] | None,
        length: int,
    ) -> Tokens:
        """Tokens as views take them.

        Args:
            positions: of every token in its prompt.
            rope_positions: positions along several axes, for families that rotate heads by them.
            last: which of them is its prompt's last, as in `rotations`.
            length: tokens of the whole sequences, for windows.
        """
        rotation = self.rotations(positions if rope_positions is None else rope_positions, last)
        return Tokens(positions, rotation, self.config.slides, self.window(length))

    def view(self, own: View, memory: Memory | None) -> View:
        """What blocks read: `own`; families with cross-attention put the memory beside it."""
        del memory
        return own

    def block(self, layer: Any, parameters: Any = None) -> DecoderBlock:
        """The block of a layer, which may be traced; its parameters may be at hand."""
        definition, stack = nnx.split(self.layers)
        return nnx.merge(definition, layer_of(stack, layer) if parameters is None else parameters)

    def step(
        self, block: DecoderBlock, layer: Any, x: Float[Array, "*R B T D"], view: View, tap: Tap, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """The one step that every pass is made of.

        Args:
            block: the layer's.
            layer: its index, which may be traced.
            x: what enters; with a leading axis R where rows of edits share their prompts.
            view: what the tokens' queries may read.
            tap: called as `tap(name, value)` at every site; all but "resid_pre" hold the kept tokens only.
            keep: tokens that leave the block; the others serve as keys and values.

        Returns:
            The kept tokens, and what the view keeps of the keys and values of all of them.
        """
        return block(layer, x, view, tap, keep)
