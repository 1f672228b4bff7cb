"""The decoder, the text side of every model family: attention, MLP, block and stack."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from jaxid.kernels import rope
from jaxid.kernels.product import logits, prompts_divided
from jaxid.kernels.rope import Rotation
from jaxid.nn import placement
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.layers import (
    Layer,
    Linear,
    Projections,
    RMSNorm,
    Stackable,
    gated,
    normal,
    parameters_of,
    stacked,
    take_tokens,
)
from jaxid.nn.views import Keep, Memory, Stored, Tokens, View

Tap = Callable[[str, Float[Array, "*R B T D"]], Float[Array, "*R B T D"]]
"""Called at every site of a block: `(name, value) -> value`."""


class Attention(Projections):
    """Grouped-query attention."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the projections and norms."""
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.head_dim,
            config.num_hidden_layers,
            kv_heads=config.num_key_value_heads,
            bias=config.attention_bias,
            out_bias=config.attention_out_bias,
            rngs=rngs,
        )
        self.config = config
        if config.query_key_norm:
            norm = (config.head_dim, config.rms_norm_eps, config.norm_offset)
            self.query_norm, self.key_norm = RMSNorm(*norm), RMSNorm(*norm)

    def __call__(
        self, layer: Layer, x: Float[Array, "*R B T D"], view: View, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """What the kept tokens read in the view, and what the view keeps of all tokens."""
        config = self.config
        query, key, value = self.into_heads(kept(x, keep), x)
        if config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if config.query_pre_attn_scalar:
            # A view divides by the root of the head width.
            query = query * (config.head_dim / config.query_pre_attn_scalar) ** 0.5
        stored = view.store(layer, key, value)
        return self.from_heads(view.read(layer, query, stored, keep)), stored


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the three projections."""
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Applies the network to every token."""
        hidden = placement.placed(gated(x, self.gate, self.up, self.activation), (None, placement.MODEL))
        return self.down(hidden)


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
        self, layer: Layer, x: Float[Array, "*R B T D"], view: View, tap: Tap, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """Runs the block; see `Decoder.step`."""
        x = tap("resid_pre", x)
        with jax.named_scope("attention"):
            added, stored = self.attention(layer, self.attention_norm(x), view, keep)
            added = placement.stream(added)
            if self.config.post_norms:
                added = self.attention_post_norm(added)
            x = kept(x, keep) + tap("attn_out", added)
        x = tap("resid_mid", x)
        with jax.named_scope("mlp"):
            added = placement.stream(self.mlp(self.mlp_norm(x)))
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

    def embed(self, token_ids: Int[Array, "*R B T"]) -> Float[Array, "*R B T D"]:
        """Embeddings of the tokens."""
        found = placement.stream(jnp.take(self.embedding[...], token_ids, axis=0))
        scale = self.config.embedding_scale
        # The scale is rounded first, as in the published models.
        return found if scale == 1.0 else found * jnp.asarray(scale, found.dtype)

    def unembed_matrix(self) -> Float[Array, "D V"]:
        """The map from the normed residual stream to logits."""
        return self.embedding[...].T if self.config.tie_word_embeddings else self.unembedding[...]

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Logits of normed final hidden states, in float32 and without a gradient."""
        tied = self.config.tie_word_embeddings
        matrix = self.embedding[...] if tied else self.unembedding[...]
        flat = hidden if prompts_divided() else hidden.reshape(-1, hidden.shape[-1])
        return logits(flat, matrix, transposed=tied).reshape(*hidden.shape[:-1], -1)

    def rotations(
        self, positions: Int[Array, "B T"] | Int[Array, "B A T"], last: Int[Array, "B"] | None = None
    ) -> Rotation:
        """Rotary angles of tokens.

        Args:
            positions: positions of the tokens, along one axis or several.
            last: index of every prompt's last token, for frequencies that depend on the length of the longest prompt;
                by default the highest position determines it, padding or not.
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
        """The sliding window, if some layer has one and sequences of this length exceed it."""
        return self.config.sliding_window if any(self.config.slides) and tokens > self.config.sliding_window else None

    def tokens(
        self,
        positions: Int[Array, "B T"],
        rope_positions: Int[Array, "B A T"] | None,
        last: Int[Array, "B"] | None,
        length: int,
    ) -> Tokens:
        """The tokens of a pass, in the form that views take.

        Args:
            positions: position of every token in its prompt.
            rope_positions: positions along several axes, for families that rotate heads by them.
            last: index of every prompt's last token, as in `rotations`.
            length: length of the whole sequences, for windows.
        """
        rotation = self.rotations(positions if rope_positions is None else rope_positions, last)
        return Tokens(positions, rotation, self.config.slides, self.window(length))

    def view(self, own: View, memory: Memory | None) -> View:
        """What blocks read: `own`, to which families with cross-attention add the memory."""
        del memory
        return own

    def block(self, layer: Layer, parameters: PyTree = None) -> DecoderBlock:
        """The block of a layer; its parameters are taken from the stack unless they are given."""
        definition, stack = nnx.split(self.layers)
        return nnx.merge(definition, parameters_of(stack, layer) if parameters is None else parameters)

    def step(
        self, block: DecoderBlock, layer: Layer, x: Float[Array, "*R B T D"], view: View, tap: Tap, keep: Keep = None
    ) -> tuple[Float[Array, "*R B S D"], Stored]:
        """The step that every pass repeats.

        Args:
            block: the block of the layer.
            layer: its index.
            x: residual stream that enters it, with a leading axis R if rows of edits share their prompts.
            view: what the tokens' queries may read.
            tap: called as `tap(name, value)` at every site; all values but "resid_pre" hold only the kept tokens.
            keep: index of the tokens that leave the block; the others serve only as keys and values.

        Returns:
            The kept tokens, and what the view keeps of the keys and values of all of them.
        """
        return block(layer, x, view, tap, keep)
