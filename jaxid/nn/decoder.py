"""One decoder block and its scanned stack: the text side of every model family."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.kernels import attention, rope
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.layers import (
    ACTIVATIONS,
    Linear,
    RMSNorm,
    Stackable,
    by_number,
    filled,
    flat_product,
    join_heads,
    layer_of,
    normal,
    recomputed,
    rms_norm,
    scan_stack,
    stacked,
    take_tokens,
)
from jaxid.nn.sites import DECODER_SITES, Capture, Intervention, Site

Rotation = tuple[Float[Array, "*G B T F"], Float[Array, "*G B T F"]]
"""Cosine and sine of every token's rotary angles; with a leading axis for full and for sliding layers."""

Read = Callable[[Float[Array, "B S H E"], Float[Array, "B T K E"], Float[Array, "B T K E"]], Float[Array, "B S H E"]]
"""Attention: from queries, keys and values to what the queries read."""

Keep = Callable[[Float[Array, "B T ..."]], Float[Array, "B S ..."]]
"""Picks, of every prompt's tokens, those whose results are wanted."""


def _all(x: Float[Array, "B T ..."]) -> Float[Array, "B T ..."]:
    """Keeps every token."""
    return x


class Memory(NamedTuple):
    """What cross-attention layers read: keys and values of the pictures, the same for every edit of the text.

    Attributes:
        keys: of every cross-attention layer, heads first, Float[C, B, K, I, E].
        values: likewise.
        mask: which of them each token reads, Bool[B, T, I]; tokens that may read none read all.
        rows: false for tokens that may read none, Bool[B, T].
    """

    keys: Float[Array, "C B K I E"]
    values: Float[Array, "C B K I E"]
    mask: Bool[Array, "B T I"]
    rows: Bool[Array, "B T"]


class Crossing(NamedTuple):
    """What turns a block into a cross-attention block where `on` is true.

    Attributes:
        on: whether the layer is one, Bool[].
        query_scale: of the norm of every head's queries, Float[E].
        attention_gate: what attention adds is multiplied by it, Float[].
        mlp_gate: what the MLP adds is multiplied by it, by token, Float[B, T] or Float[].
    """

    on: Bool[Array, ""]
    query_scale: Float[Array, "E"]
    attention_gate: Float[Array, ""]
    mlp_gate: Float[Array, "..."]


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions; heads are real axes of the weights."""

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
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        read: Read,
        keep: Keep = _all,
        crossing: Crossing | None = None,
    ) -> Float[Array, "B S D"]:
        """Mixes tokens: `read(query, key, value)` says who reads whom, `keep` whose results are wanted."""
        config = self.config
        query = flat_product(keep(x), self.query[...])
        key, value = flat_product(x, self.key[...]), flat_product(x, self.value[...])
        if config.attention_bias:
            query, key = query + self.query_bias[...], key + self.key_bias[...]
            value = value + self.value_bias[...]
        if config.query_key_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        turned = rope.rotate(query, *map(keep, rotation))
        if crossing is not None:
            turned = jnp.where(crossing.on, rms_norm(query, crossing.query_scale, config.rms_norm_eps), turned)
        if config.query_pre_attn_scalar:
            # `read` divides by the root of the head width.
            turned = turned * (config.head_dim / config.query_pre_attn_scalar) ** 0.5
        mixed = read(turned, rope.rotate(key, *rotation), value)
        out = flat_product(join_heads(mixed), join_heads(self.out[...], 0))
        return out + self.out_bias[...] if config.attention_out_bias else out


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Draws projections of variance 1 / inputs."""
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear(width, hidden, bias=bias, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, rngs=rngs)
        self.activation = config.hidden_act

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the network to every token."""
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


Tap = Callable[[str, Float[Array, "B T D"]], Float[Array, "B T D"]]
"""What stands at every site of a block: `(name, value) -> value`."""


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
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation,
        read: Read,
        tap: Tap,
        keep: Keep = _all,
        crossing: Crossing | None = None,
    ) -> Float[Array, "B S D"]:
        """One step of the residual stream.

        Args:
            x: Float[B, T, D].
            rotation: of every token.
            read: attention over the keys and values that this block makes.
            tap: called as `tap(name, value)` at every site; all but "resid_pre" hold the kept tokens only.
            keep: tokens that leave the block; the others serve as keys and values.
            crossing: gates of a block that may be one of cross-attention.

        Returns:
            Float[B, S, D], the kept tokens.
        """
        x = tap("resid_pre", x)
        with jax.named_scope("attention"):
            added = self.attention(self.attention_norm(x), rotation, read, keep, crossing)
            if self.config.post_norms:
                added = self.attention_post_norm(added)
            if crossing is not None:
                added = added * crossing.attention_gate
            x = keep(x) + tap("attn_out", added)
        x = tap("resid_mid", x)
        with jax.named_scope("mlp"):
            added = self.mlp(self.mlp_norm(x))
            if self.config.post_norms:
                added = self.mlp_post_norm(added)
            if crossing is not None:
                gate = crossing.mlp_gate
                added = added * (gate if gate.ndim == 0 else keep(gate[..., None]))
            x = x + tap("mlp_out", added)
        return tap("resid_post", x)


class CrossParts(nnx.Module):
    """What a cross-attention block has besides the parts of every block (HF MllamaCrossAttentionDecoderLayer)."""

    def __init__(self, config: DecoderConfig):
        """Starts with open gates, so that pictures matter before any training."""
        self.query_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.key_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.attention_gate = filled(1.0, (1,))
        self.mlp_gate = filled(1.0, (1,))


class Blocks:
    """A decoder's blocks by number, which may be traced, and what differs between them."""

    def __init__(self, decoder: "Decoder"):
        config = self.config = decoder.config
        self.definition, self.parameters = nnx.split(decoder.layers)
        self.crossing = nnx.split(decoder.crossing) if config.cross_attention_layers else None
        numbers = np.full(config.num_hidden_layers, -1)
        numbers[list(config.cross_attention_layers)] = np.arange(len(config.cross_attention_layers))
        self._cross_numbers = numbers

    def slides(self, layer: Any) -> Bool[Array, ""]:
        """Whether a layer has sliding-window attention."""
        return jnp.asarray(np.array(self.config.slides))[layer]

    def choose(
        self, layer: Any, memory: Memory | None, own: Callable[[], Array], cross: Callable[[Array, Array], Array]
    ) -> Array:
        """What a layer's queries read: `own()` by self-attention, or `cross(keys, values)` of the memory."""
        if memory is None or self.crossing is None:
            return own()
        number = jnp.asarray(self._cross_numbers)[layer]

        def remembered() -> Array:
            return cross(*layer_of((memory.keys, memory.values), jnp.maximum(number, 0)))

        return jax.lax.cond(number >= 0, remembered, own)

    def __call__(self, layer: Any, parameters: Any = None, *, memory: Memory | None, whole: bool = False) -> Any:
        """A block as a function `(x, rotation, read, tap, keep) -> x`.

        Args:
            layer: its number.
            parameters: its parameters, if they are at hand.
            memory: what cross-attention blocks read; without one they change nothing, as without a picture.
            whole: the block is given whole prompts, not only tokens after the pictures.
        """
        module = nnx.merge(self.definition, layer_of(self.parameters, layer) if parameters is None else parameters)
        crossing = None
        if self.crossing is not None:
            definition, stack = self.crossing
            number = jnp.asarray(self._cross_numbers)[layer]
            parts = nnx.merge(definition, layer_of(stack, jnp.maximum(number, 0)))
            on, gates = number >= 0, [parts.attention_gate[...][0], parts.mlp_gate[...][0]]
            gates = [jnp.tanh(gate) if memory is not None else jnp.zeros_like(gate) for gate in gates]
            attention_gate, mlp_gate = (jnp.where(on, gate, jnp.ones_like(gate)) for gate in gates)
            if whole and memory is not None:
                mlp_gate = jnp.where(on & ~memory.rows, jnp.zeros_like(mlp_gate), mlp_gate)
            crossing = Crossing(on, parts.query_norm.scale[...], attention_gate, mlp_gate)

        def run(x: Array, rotation: Rotation, read: Read, tap: Tap, keep: Keep = _all) -> Array:
            if self.config.sliding_rope is not None:
                cosine, sine = (jnp.where(self.slides(layer), sliding, full) for full, sliding in rotation)
                rotation = cosine, sine
            return module(x, rotation, read, tap, keep, crossing)

        return run


class DecoderOutput(NamedTuple):
    """What the stack returns."""

    hidden: Float[Array, "B T D"]  # after the final norm; of the wanted tokens, if some were asked for
    captured: dict[str, Float[Array, "..."]]  # "embed" Float[B P D]; block sites Float[L B P D]


class Decoder(nnx.Module):
    """Embedding, a stack of blocks run as one `lax.scan`, final norm and unembedding (HF LlamaModel)."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        """Builds the stack; every block parameter carries a leading layer axis."""
        self.config = config
        self.embedding = normal(rngs, (config.vocab_size + config.extra_embeddings, config.hidden_size), 0.02)
        self.layers = stacked(lambda rngs: DecoderBlock(config, rngs=rngs), config.num_hidden_layers, rngs)
        if config.cross_attention_layers:
            self.crossing = stacked(lambda rngs: CrossParts(config), len(config.cross_attention_layers), rngs)
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

    def remember(self, states: Float[Array, "B I D"], mask: Bool[Array, "B T I"], rows: Bool[Array, "B T"]) -> Memory:
        """Keys and values of the pictures' states for every cross-attention layer; `mask`, `rows` as in `Memory`."""
        blocks = Blocks(self)
        assert blocks.crossing is not None
        definition, stack = blocks.crossing

        def step(_: None, number: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
            layer, row = number
            attention_parameters = layer_of(blocks.parameters, layer)
            block = nnx.merge(blocks.definition, attention_parameters)
            parts = nnx.merge(definition, layer_of(stack, row))
            key = parts.key_norm(flat_product(states, block.attention.key[...]))
            value = flat_product(states, block.attention.value[...])
            return None, (jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2))

        layers = np.array(self.config.cross_attention_layers)
        _, (keys, values) = jax.lax.scan(step, None, (jnp.asarray(layers), jnp.arange(len(layers))))
        return Memory(keys, values, mask, rows)

    def whole_read(
        self,
        blocks: Blocks,
        layer: Any,
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        memory: Memory | None,
        suffix: Int[Array, "B S"] | None = None,
    ) -> Read:
        """Attention of whole prompts in a layer, or of some of their tokens to all.

        Args:
            blocks: this decoder's blocks.
            layer: the block's number.
            positions: place of every token in its prompt.
            mask: which tokens each token reads.
            memory: what cross-attention layers read.
            suffix: the tokens whose results are wanted; all by default.
        """
        memory_mask = None if memory is None else memory.mask
        if suffix is not None:
            mask = jnp.take_along_axis(mask, suffix[:, :, None], axis=1)
            if memory_mask is not None:
                memory_mask = jnp.take_along_axis(memory_mask, suffix[:, :, None], axis=1)
        window = self.window(positions.shape[1])
        if window is not None:
            queries = positions if suffix is None else jnp.take_along_axis(positions, suffix, axis=1)
            mask = mask & (attention.near(queries, positions, window) | ~blocks.slides(layer))
        causal = suffix is None and not self.config.bidirectional_pictures

        def read(query: Array, key: Array, value: Array) -> Array:
            def cross(keys: Array, values: Array) -> Array:
                return attention.attend(query, jnp.moveaxis(keys, 1, 2), jnp.moveaxis(values, 1, 2), memory_mask)

            return blocks.choose(layer, memory, lambda: attention.attend(query, key, value, mask, causal=causal), cross)

        return read

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        mask: Bool[Array, "B T T"],
        intervention: Intervention,
        capture: Capture,
        *,
        rope_positions: Int[Array, "B A T"] | None = None,
        memory: Memory | None = None,
        wanted: Int[Array, "B S"] | None = None,
        last: Int[Array, "B"] | None = None,
    ) -> DecoderOutput:
        """Runs the stack.

        Args:
            embeddings: Float[B, T, D], pictures already merged in.
            positions: place of every token in its prompt, Int[B, T].
            mask: which tokens each token reads, Bool[B, T, T]; none reads a later one, but for pictures' own tokens.
            intervention: called as `intervention(site, value)` at every site.
            capture: what to return; block sites come stacked over layers.
            rope_positions: positions along several axes, for families that turn heads by them.
            memory: what cross-attention layers read.
            wanted: the tokens whose final hidden states are returned, by place; all by default. The last block is then
                run for them, and for the captured ones, alone, unless blocks are trained or all tokens captured.
            last: place of every prompt's last token, as in `rotations`.

        Returns:
            The normed final hidden states and the captured values.
        """
        rotation = self.rotations(positions if rope_positions is None else rope_positions, last)
        before = Site("embed", jnp.asarray(-1), positions)
        x = intervention(before, embeddings)
        captured = {"embed": capture.take(x)} if "embed" in capture.sites else {}
        sites = [name for name in DECODER_SITES if name in capture.sites]
        blocks, places = Blocks(self), capture.positions

        def run(x: Array, number: Any, parameters: Any = None, at: Array | None = None) -> tuple[Array, dict]:
            """A block, of whose results only those of the tokens `at` are computed, the captured ones last."""
            found: dict[str, Array] = {}
            kept = positions if at is None else jnp.take_along_axis(positions, at, axis=1)

            def tap(name: str, value: Array) -> Array:
                every = at is None or name == "resid_pre"
                value = intervention(Site(name, jnp.asarray(number), positions if every else kept), value)
                if name in sites:
                    found[name] = capture.take(value) if every or places is None else value[:, -places.shape[1] :]
                return value

            keep = {} if at is None else {"keep": partial(take_tokens, at=at)}
            read = self.whole_read(blocks, number, positions, mask, memory, at)
            return blocks(number, parameters, memory=memory, whole=True)(x, rotation, read, tap, **keep), found

        count = self.config.num_hidden_layers
        alone = None
        if wanted is not None and by_number(self.layers) and not (sites and places is None):
            alone = wanted if places is None or not sites else jnp.concatenate([wanted, places], axis=1)
        xs = (jnp.arange(count), blocks.parameters)
        x, found = scan_stack(
            self.layers, lambda x, layer: run(x, *layer), x, xs, count if alone is None else count - 1
        )
        if alone is not None:
            x, last = recomputed(self.layers, lambda x: run(x, count - 1, at=alone))(x)
            found = jax.tree.map(lambda before, value: jnp.concatenate([before, value[None]]), found, last)
        if wanted is not None:
            x = take_tokens(x, wanted) if alone is None else x[:, : wanted.shape[1]]
        return DecoderOutput(self.norm(x), captured | found)
