"""The passes of a decoder, five drivers of one step: forward, record, resume, prefill and decode.

In a causal decoder, an edit at some layer and token changes nothing at earlier tokens or in earlier layers. A clean
pass is therefore recorded once. Every edited pass resumes at the first token that it edits, where its suffix begins,
and at the first layer that it edits, and reads the recorded keys and values of the earlier tokens, its prefix.
Generation resumes in the same way.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxid.kernels.masks import Reads
from jaxid.meshes import DATA, MODEL
from jaxid.nn import placement
from jaxid.nn.decoder import Decoder, DecoderBlock, Tap, kept
from jaxid.nn.layers import Layer, by_index, recomputed, scan_stack, take_tokens
from jaxid.nn.sites import DECODER_SITES, Capture, Site, SiteFunction, clean
from jaxid.nn.views import Cache, Keep, Memory, Own, Prefix, Stored, Swapped, View

Tree = TypeVar("Tree")
State = TypeVar("State")
Caches = tuple[Float[Array, "L R B K C E"], Float[Array, "L R B K C E"]]
Recorded = tuple[Float[Array, "L1 B S D"], Float[Array, "L B K T E"], Float[Array, "L B K T E"]]
Decoding = tuple[Array, Array, Array, Array, Array, Caches]

# --- whole prompts --------------------------------------------------------------------------------------------------


class DecoderOutput(NamedTuple):
    """What a forward pass returns."""

    hidden: Float[Array, "B T D"]  # after the final norm, at the wanted tokens
    captured: dict[str, Float[Array, "..."]]  # "embed" Float[B P D]; block sites Float[L B P D]


class Record(NamedTuple):
    """What a pass records for later ones.

    Attributes:
        hidden: normed final hidden state at the last position.
        keys: rotated keys of every layer and token, heads first.
        values: values of every layer and token, heads first.
        residuals: residual stream of the suffix, with the input of layer l at index l and the last output at index L.
        memory: the pictures' keys and values for cross-attention layers.
    """

    hidden: Float[Array, "B D"]
    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    residuals: Float[Array, "L1 B S D"]
    memory: Memory | None


def forward(
    decoder: Decoder,
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    reads: Reads,
    intervention: SiteFunction,
    capture: Capture,
    *,
    rope_positions: Int[Array, "B A T"] | None = None,
    memory: Memory | None = None,
    wanted: Int[Array, "B S"] | None = None,
    last: Int[Array, "B"] | None = None,
) -> DecoderOutput:
    """Runs whole prompts.

    Args:
        decoder: the decoder.
        embeddings: token embeddings with the pictures merged in.
        positions: position of every token in its prompt.
        reads: which tokens each token reads; later ones only within a picture.
        intervention: called as `intervention(site, value)` at every site.
        capture: what to return; values at block sites are stacked over layers.
        rope_positions: positions along several axes, for families that rotate heads by them.
        memory: what cross-attention layers read.
        wanted: index of the tokens whose final hidden states are returned; all by default. Unless blocks are trained or
            all tokens are captured, the last block then runs only for these and for the captured tokens.
        last: index of every prompt's last token, as in `Decoder.rotations`.

    Returns:
        The normed final hidden states and the captured values.
    """
    view = _whole(decoder, positions, reads, rope_positions, last, memory)
    x = intervention(Site("embed", jnp.asarray(-1), positions), embeddings)
    captured = {"embed": capture.take(x)} if "embed" in capture.sites else {}
    sites = [name for name in DECODER_SITES if name in capture.sites]
    others = capture.positions if sites else None

    def step(x: Array, layer: Layer, parameters: PyTree, keep: Keep = None) -> tuple[Array, dict[str, Array]]:
        """One layer; `keep` ends with the captured tokens."""
        found: dict[str, Array] = {}
        edit = _tap(intervention, layer, positions, keep)

        def tap(name: str, value: Array) -> Array:
            value = edit(name, value)
            if name in sites:
                if keep is None or others is None or name == "resid_pre":
                    found[name] = capture.take(value)
                else:
                    found[name] = value[:, -others.shape[1] :]
            return value

        x, _ = decoder.step(decoder.block(layer, parameters), layer, x, view, tap, keep)
        return x, found

    keep = None
    if wanted is not None and by_index(decoder.layers) and not (sites and others is None):
        keep = wanted if others is None else jnp.concatenate([wanted, others], axis=1)
    x, found = _stack(decoder, step, x, keep)
    if wanted is not None:
        x = take_tokens(x, wanted) if keep is None else x[:, : wanted.shape[1]]
    return DecoderOutput(decoder.norm(x), captured | found)


def record(
    decoder: Decoder,
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    reads: Reads,
    suffix: Int[Array, "B S"],
    last: Int[Array, "B"],
    intervention: SiteFunction,
    *,
    rope_positions: Int[Array, "B A T"] | None = None,
    memory: Memory | None = None,
) -> Record:
    """Runs and records whole prompts; the last block runs only for the suffix, which alone affects the answer.

    Args:
        decoder: the decoder.
        embeddings: as in `forward`.
        positions: as in `forward`.
        reads: as in `forward`.
        suffix: index of the tokens whose residual stream is recorded.
        last: index of every prompt's last token, which is part of the suffix.
        intervention: called as `intervention(site, value)` at every site.
        rope_positions: as in `forward`.
        memory: as in `forward`.
    """
    view = _whole(decoder, positions, reads, rope_positions, last, memory)

    def step(
        state: tuple[Array, Recorded], layer: Layer, parameters: PyTree, keep: Keep = None
    ) -> tuple[tuple[Array, Recorded], None]:
        (x, recorded), block = state, decoder.block(layer, parameters)
        entering = take_tokens(x, suffix)
        x, stored = decoder.step(block, layer, x, view, _tap(intervention, layer, positions, keep), keep)
        return (x, _written(recorded, layer, (entering, *stored))), None

    x = intervention(Site("embed", jnp.asarray(-1), positions), embeddings)
    config, (batch, tokens, width) = decoder.config, x.shape
    kept = placement.kept_heads(config.num_attention_heads, config.num_key_value_heads)
    layers, heads = config.num_hidden_layers, (kept, tokens, config.head_dim)
    # Each layer writes to where its values stay: stacking them afterwards would take their memory twice.
    shapes = ((layers + 1, batch, suffix.shape[1], width), *[(layers, batch, *heads)] * 2)
    places = ((None, DATA, None, None), *[(None, DATA, MODEL, None, None)] * 2)
    empty = tuple(placement.placed(jnp.zeros(shape, x.dtype), axes) for shape, axes in zip(shapes, places, strict=True))
    (x, (residuals, keys, values)), _ = _stack(decoder, step, (x, empty), suffix)
    end = jnp.argmax(suffix == last[:, None], axis=1)[:, None]
    return Record(
        hidden=decoder.norm(take_tokens(x, end)[:, 0]),
        keys=keys,
        values=values,
        residuals=residuals.at[layers].set(x),
        memory=memory,
    )


def _written(arrays: Recorded, layer: Layer, values: tuple[Array, Array, Array]) -> Recorded:
    """The arrays with a layer's values written to them."""
    first, second, third = (
        jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), layer, 0)
        for array, value in zip(arrays, values, strict=True)
    )
    return first, second, third


def _whole(
    decoder: Decoder,
    positions: Array,
    reads: Reads,
    rope_positions: Array | None,
    last: Array | None,
    memory: Memory | None,
) -> View:
    """What the tokens of whole prompts read."""
    tokens = decoder.tokens(positions, rope_positions, last, positions.shape[1])
    return decoder.view(Own(tokens, reads, causal=not decoder.config.bidirectional_pictures), memory)


def _tap(intervention: SiteFunction, layer: Layer, positions: Int[Array, "B T"], keep: Keep = None) -> Tap:
    """An intervention at the sites of a layer."""

    def tap(name: str, value: Array) -> Array:
        here = positions
        if keep is not None and name != "resid_pre":
            here = jnp.take_along_axis(positions, keep, axis=1)
        return intervention(Site(name, jnp.asarray(layer), here), value)

    return tap


def _stack(
    decoder: Decoder,
    step: Callable[..., tuple[State, Tree]],
    x: State,
    keep: Keep,
) -> tuple[State, Tree]:
    """Runs `step(x, layer, parameters, keep)` in all layers in turn; `keep` applies only to the last one."""
    layers, count = decoder.layers, decoder.config.num_hidden_layers
    if keep is None:
        return scan_stack(layers, step, x)
    x, found = scan_stack(layers, step, x, count - 1)
    x, last = recomputed(layers, lambda x: step(x, count - 1, None, keep))(x)
    return x, jax.tree.map(lambda before, value: jnp.concatenate([before, value[None]]), found, last)


# --- suffixes of many rows ------------------------------------------------------------------------------------------


class Suffix(NamedTuple):
    """The tokens that run again, and what they read.

    Attributes:
        residuals: recorded residual stream of these tokens, as in `Record`.
        positions: their positions in the prompt.
        rope_positions: positions along several axes, for families that rotate heads by them.
        last: index of the prompt's last token among them.
        prefix_keys: recorded keys of the tokens before them, heads first; those of later tokens are not read.
        prefix_values: recorded values that belong to these keys.
        prefix_mask: false after the end of a prompt's prefix.
        memory: what cross-attention layers read.
        other_keys: keys of another recorded pass, which rows read instead in the layers after `swapped`.
        other_values: values of that pass.
        other_memory: memory of that pass.
        swapped: the last layer in which each row reads the prefix of its own pass.
    """

    residuals: Float[Array, "L1 B S D"]
    positions: Int[Array, "B S"]
    rope_positions: Int[Array, "B A S"] | None
    last: Int[Array, "B"]
    prefix_keys: Float[Array, "L B K T E"]
    prefix_values: Float[Array, "L B K T E"]
    prefix_mask: Bool[Array, "B P"]
    memory: Memory | None = None
    other_keys: Float[Array, "L B K T E"] | None = None
    other_values: Float[Array, "L B K T E"] | None = None
    other_memory: Memory | None = None
    swapped: Int[Array, "R"] | None = None

    def views(self, decoder: Decoder) -> tuple[View, View | None]:
        """What the rows' suffixes read, and what they read instead after `swapped`."""
        tokens = decoder.tokens(self.positions, self.rope_positions, self.last, self.prefix_keys.shape[3])

        def recorded(keys: Array, values: Array, memory: Memory | None) -> View:
            memory = None if memory is None else memory.at(self.positions)
            return decoder.view(Prefix(tokens, keys, values, self.prefix_mask), memory)

        own = recorded(self.prefix_keys, self.prefix_values, self.memory)
        if self.other_keys is None or self.other_values is None:
            return own, None
        return own, recorded(self.other_keys, self.other_values, self.other_memory)


def _by_row(edits: SiteFunction) -> SiteFunction:
    """Interventions of R rows as one intervention on values of shape [R, B, S, D]."""
    return lambda site, value: jax.vmap(lambda edit, value: edit(site, value))(edits, value)


def resume(
    decoder: Decoder,
    suffix: Suffix,
    edits: SiteFunction,
    start: Int[Array, "R"],
    *,
    chunk: int,
) -> Float[Array, "R B D"]:
    """Final hidden states of R edited passes over the suffix, each starting at its own first layer.

    Rows are sorted by their first layer and pass through the layers in chunks. A chunk joins at the layer where the
    first of its rows does. First layers are data, so that one program serves all of them.

    Args:
        decoder: the decoder.
        suffix: the tokens and what they read.
        edits: a pytree of interventions with a leading axis R, or one without leaves.
        start: the first layer that each of them changes, 0 to L; L for a change of only the last layer's output.
        chunk: number of rows that pass through a block together.

    Returns:
        Normed final hidden states at the last positions.
    """
    rows, count = start.shape[0], decoder.config.num_hidden_layers
    chunks = -(-rows // chunk)
    order = jnp.argsort(start)
    # The last chunk is padded with copies that never join.
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (chunks * chunk - rows,))])

    def grouped(tree: Tree) -> Tree:
        return jax.tree.map(lambda leaf: leaf[padded].reshape(chunks, chunk, *leaf.shape[1:]), tree)

    first = jnp.where(jnp.arange(chunks * chunk) < rows, start[padded], count).reshape(chunks, chunk)
    edits, swapped = grouped(edits), grouped(suffix.swapped)

    whole, another = suffix.views(decoder)

    def at(layer: Layer) -> tuple[View, View | None]:
        """What all chunks read in a layer."""
        return whole.at(layer), None if another is None else another.at(layer)

    def enter(edit: SiteFunction, first: Array) -> Array:
        """What a row starts from: the recorded values, edited between the layer before and its first."""
        x, positions = placement.stream(suffix.residuals[first]), suffix.positions
        embedded = edit(Site("embed", jnp.asarray(-1), positions), x)
        # A traced edit may name any layer; one that does not exist must have no effect.
        return jnp.where(first > 0, edit(Site("resid_post", first - 1, positions), x), embedded)

    def advance(
        block: DecoderBlock,
        layer: Layer,
        views: tuple[View, View | None],
        chunk: tuple[Array, SiteFunction, Array, Array | None],
        keep: Keep = None,
    ) -> Array:
        """Runs the block for the rows of a chunk that have joined."""
        (own, other), (x, edits, first, swapped) = views, chunk
        waiting = kept(x, keep)

        def go(x: Array) -> Array:
            view = own if other is None or swapped is None else Swapped(own, other, swapped)
            tap = _tap(_by_row(edits), layer, suffix.positions, keep)
            after, _ = decoder.step(block, layer, x, view, tap, keep)
            return jnp.where((first <= layer)[:, None, None, None], after, waiting)

        return placement.stream(jax.lax.cond((first <= layer).any(), go, lambda x: waiting, placement.stream(x)))

    def through(x: Array, layer: Array) -> tuple[Array, None]:
        def run(x: Array) -> Array:
            block, views = decoder.block(layer), at(layer)
            return jax.lax.map(lambda chunk: advance(block, layer, views, chunk), (x, edits, first, swapped))

        return placement.stream(jax.lax.cond((first <= layer).any(), run, lambda x: x, x)), None

    x = placement.stream(jax.lax.map(lambda chunk: jax.vmap(enter)(*chunk), (edits, first)))
    x, _ = jax.lax.scan(through, x, jnp.arange(count - 1))
    final, views, last = decoder.block(count - 1), at(count - 1), suffix.last[:, None]
    x = jax.lax.map(lambda chunk: advance(final, count - 1, views, chunk, last), (x, edits, first, swapped))
    hidden = decoder.norm(x[:, :, :, 0])
    return hidden.reshape(chunks * chunk, *hidden.shape[2:])[jnp.argsort(order)]


# --- generation -----------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where decoding begins.

    Attributes:
        hidden: normed final hidden state at the prompts' last tokens.
        keys: keys of the rows' own tokens of the prompt, S of them, which may be 0; heads first.
        values: values of these tokens.
        valid: false after the last of these tokens.
    """

    hidden: Float[Array, "R B D"]
    keys: Float[Array, "L R B K S E"]
    values: Float[Array, "L R B K S E"]
    valid: Bool[Array, "B S"]


class Shared(NamedTuple):
    """What all rows of a generation share.

    Attributes:
        keys: recorded keys, heads first.
        values: recorded values, heads first.
        valid: which of them belong to the prefix.
        first: position of the rows' own first token.
        memory: what cross-attention layers read.
    """

    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    valid: Bool[Array, "B T"]
    first: Int[Array, "B"]
    memory: Memory | None


def prefill(decoder: Decoder, suffix: Suffix, edits: SiteFunction, rows: int) -> Start:
    """Runs the suffix of R rows, each with its own edit, through all layers and keeps the keys and values."""
    recorded, edit, (view, _) = suffix.residuals[0], _by_row(edits), suffix.views(decoder)

    def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
        return decoder.step(decoder.block(layer), layer, x, view, _tap(edit, layer, suffix.positions))

    x = placement.stream(jnp.broadcast_to(recorded, (rows, *recorded.shape)))
    x = edit(Site("embed", jnp.asarray(-1), suffix.positions), x)
    x, (keys, values) = jax.lax.scan(step, x, jnp.arange(decoder.config.num_hidden_layers))
    hidden = decoder.norm(take_tokens(x, suffix.last[:, None])[:, :, 0])
    valid = jnp.arange(suffix.positions.shape[1]) <= suffix.last[:, None]
    return Start(hidden, keys, values, valid)


def decode(
    decoder: Decoder,
    shared: Shared,
    start: Start,
    last: Int[Array, "B"],
    last_rope: Int[Array, "B A"] | None,
    stop_ids: Int[Array, "n"],
    edits: SiteFunction | None,
    *,
    steps: int,
) -> tuple[Int[Array, "R B N"], Int[Array, "R B"]]:
    """Greedy decoding, until every row has ended.

    Args:
        decoder: the decoder.
        shared: what all rows read.
        start: the rows' own tokens of the prompt.
        last: position of the prompts' last tokens.
        last_rope: that position along several axes, for families that rotate heads by them.
        stop_ids: tokens that end a row; ended rows are padded with the first of them.
        edits: interventions at the new tokens, one per row; None for no intervention.
        steps: maximum number of new tokens.

    Returns:
        The new tokens, including the stop token, and their number.
    """
    rows, batch, own = (*start.hidden.shape[:2], start.valid.shape[1])
    edit = _by_row(clean if edits is None else edits)
    memory = None if shared.memory is None else shared.memory.at(last[:, None])  # as the last token reads it
    filler = stop_ids[0] if stop_ids.shape[0] else jnp.asarray(0, jnp.int32)
    slots = jnp.arange(own + steps)
    filled = jnp.concatenate([start.valid, jnp.ones((batch, steps), bool)], axis=1)
    # The rows' own tokens of the prompt begin at position `first`; the new tokens follow the last of them.
    slot_positions = jnp.where(slots < own, shared.first[:, None] + slots, last[:, None] + 1 + slots - own)

    def choose(hidden: Array) -> Array:
        return jnp.argmax(decoder.logits(hidden), axis=-1).astype(jnp.int32)

    def next_token(token: Array, index: Array, caches: Caches) -> tuple[Array, Caches]:
        """The tokens that follow those with this index, and the caches with the latter added."""
        positions = last[:, None] + 1 + index
        rope_positions = None if last_rope is None else (last_rope + 1 + index)[:, :, None]
        tokens = decoder.tokens(positions, rope_positions, None, shared.keys.shape[3] + steps)
        recorded = (tokens, shared.keys, shared.values, shared.valid)
        slot = own + index

        def step(carry: tuple[Array, Stored], layer: Array) -> tuple[tuple[Array, Stored], None]:
            x, caches = carry
            cache = Cache(*recorded, caches, slot, filled & (slots <= slot), slot_positions)
            view = decoder.view(cache, memory)
            return decoder.step(decoder.block(layer), layer, x, view, _tap(edit, layer, positions)), None

        embedded = decoder.embed(token[:, :, None])
        x = edit(Site("embed", jnp.asarray(-1), positions), embedded)
        (x, caches), _ = jax.lax.scan(step, (x, caches), jnp.arange(decoder.config.num_hidden_layers))
        return choose(decoder.norm(x[:, :, 0])), caches

    def written(tokens: Array, index: Array, token: Array, lengths: Array, done: Array) -> tuple[Array, Array, Array]:
        """The tokens with those of this index, the rows' lengths, and which rows have ended."""
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, :, None], (0, 0, index))
        return tokens, lengths + (~done).astype(jnp.int32), done | (token[..., None] == stop_ids).any(axis=-1)

    def more(state: Decoding) -> Array:
        index, _, _, _, done, _ = state
        return (index + 1 < steps) & ~done.all()

    def advance(state: Decoding) -> Decoding:
        index, token, tokens, lengths, done, caches = state
        token, caches = next_token(token, index, caches)
        token = jnp.where(done, filler, token)
        return index + 1, token, *written(tokens, index + 1, token, lengths, done), caches

    room = [(0, 0)] * 4 + [(0, steps), (0, 0)]
    index, token = jnp.asarray(0, jnp.int32), choose(start.hidden)
    tokens, lengths = jnp.full((rows, batch, steps), filler, jnp.int32), jnp.zeros((rows, batch), jnp.int32)
    first = written(tokens, index, token, lengths, jnp.zeros((rows, batch), bool))
    places = (DATA, MODEL, None, None)
    keys, values = (placement.placed(jnp.pad(part, room), places) for part in (start.keys, start.values))
    _, _, tokens, lengths, *_ = jax.lax.while_loop(more, advance, (index, token, *first, (keys, values)))
    return tokens, lengths
