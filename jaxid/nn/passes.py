"""The passes of a decoder, five thin drivers of its one step: forward, record, resume, prefill, decode.

In a causal decoder an edit at some layer and token changes nothing at earlier tokens and earlier layers. So a clean
pass is recorded once, and every edited pass resumes from the first token it edits on (the suffix) and from the first
layer it edits on, reading the earlier tokens' (the prefix's) recorded keys and values. Generation resumes likewise.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.nn.decoder import Decoder, Tap, kept
from jaxid.nn.layers import by_index, recomputed, scan_stack, take_tokens
from jaxid.nn.sites import DECODER_SITES, Capture, Site, SiteFunction, clean
from jaxid.nn.views import Cache, Keep, Memory, Own, Prefix, Swapped, View

# --- whole prompts --------------------------------------------------------------------------------------------------


class DecoderOutput(NamedTuple):
    """What a forward pass returns."""

    hidden: Float[Array, "B T D"]  # after the final norm; of the wanted tokens, if some were asked for
    captured: dict[str, Float[Array, "..."]]  # "embed" Float[B P D]; block sites Float[L B P D]


class Record(NamedTuple):
    """What one pass leaves behind for later ones.

    Attributes:
        hidden: normed final hidden state at the last position.
        keys: of every layer and token, rotated, heads first.
        values: likewise.
        residuals: of the suffix: what enters layer l at index l, what leaves the last layer at index L.
        memory: what cross-attention layers read of the pictures.
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
    mask: Bool[Array, "#B T T"],
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
        embeddings: Float[B, T, D], pictures already merged in.
        positions: of every token in its prompt, Int[B, T].
        mask: which tokens each token reads, Bool[B, T, T]; none reads a later one, but for pictures' own tokens.
        intervention: called as `intervention(site, value)` at every site.
        capture: what to return; block sites come stacked over layers.
        rope_positions: positions along several axes, for families that rotate heads by them.
        memory: what cross-attention layers read.
        wanted: the tokens whose final hidden states are returned, by index; all by default. The last block is then
            run for them, and for the captured ones, alone, unless blocks are trained or all tokens captured.
        last: index of every prompt's last token, as in `Decoder.rotations`.

    Returns:
        The normed final hidden states and the captured values.
    """
    view = _whole(decoder, positions, mask, rope_positions, last, memory)
    x = intervention(Site("embed", jnp.asarray(-1), positions), embeddings)
    captured = {"embed": capture.take(x)} if "embed" in capture.sites else {}
    sites = [name for name in DECODER_SITES if name in capture.sites]
    others = capture.positions if sites else None

    def step(x: Array, layer: Any, parameters: Any, keep: Keep = None) -> tuple[Array, dict[str, Array]]:
        """Of the kept tokens, if not all are, the captured ones come last."""
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
    mask: Bool[Array, "#B T T"],
    suffix: Int[Array, "B S"],
    last: Int[Array, "B"],
    intervention: SiteFunction,
    *,
    rope_positions: Int[Array, "B A T"] | None = None,
    memory: Memory | None = None,
) -> Record:
    """One pass, recorded. Of the last block only the suffix is computed: nothing else leads to an answer.

    Args:
        decoder: the decoder.
        embeddings: its input.
        positions: as in `forward`.
        mask: as in `forward`.
        suffix: the tokens whose residual stream is kept, by index.
        last: index of every prompt's last token, which is one of the suffix.
        intervention: called as `intervention(site, value)` at every site.
        rope_positions: as in `forward`.
        memory: as in `forward`.
    """
    view = _whole(decoder, positions, mask, rope_positions, last, memory)

    def step(x: Array, layer: Any, parameters: Any, keep: Keep = None) -> tuple[Array, tuple[Array, ...]]:
        entering, block = take_tokens(x, suffix), decoder.block(layer, parameters)
        x, stored = decoder.step(block, layer, x, view, _tap(intervention, layer, positions, keep), keep)
        return x, (entering, *(jnp.moveaxis(heads, 1, 2) for heads in stored))

    x = intervention(Site("embed", jnp.asarray(-1), positions), embeddings)
    x, (entering, keys, values) = _stack(decoder, step, x, suffix)
    end = jnp.argmax(suffix == last[:, None], axis=1)[:, None]
    return Record(
        hidden=decoder.norm(take_tokens(x, end)[:, 0]),
        keys=keys,
        values=values,
        residuals=jnp.concatenate([entering, x[None]]),
        memory=memory,
    )


def _whole(
    decoder: Decoder, positions: Array, mask: Array, rope_positions: Any, last: Any, memory: Memory | None
) -> View:
    """What the tokens of whole prompts read."""
    tokens = decoder.tokens(positions, rope_positions, last, positions.shape[1])
    return decoder.view(Own(tokens, mask, causal=not decoder.config.bidirectional_pictures), memory)


def _tap(intervention: SiteFunction, layer: Any, positions: Int[Array, "B T"], keep: Keep = None) -> Tap:
    """An intervention at the sites of a layer."""

    def tap(name: str, value: Array) -> Array:
        here = positions
        if keep is not None and name != "resid_pre":
            here = jnp.take_along_axis(positions, keep, axis=1)
        return intervention(Site(name, jnp.asarray(layer), here), value)

    return tap


def _stack(decoder: Decoder, step: Any, x: Float[Array, "B T D"], keep: Keep) -> tuple[Float[Array, "B S D"], Any]:
    """All layers in turn, `step(x, layer, parameters, keep)`; `keep` holds in the last one alone."""
    layers, count = decoder.layers, decoder.config.num_hidden_layers
    xs = (jnp.arange(count), nnx.state(layers))
    if keep is None:
        return scan_stack(layers, lambda x, layer: step(x, *layer), x, xs)
    x, found = scan_stack(layers, lambda x, layer: step(x, *layer), x, xs, count - 1)
    x, last = recomputed(layers, lambda x: step(x, count - 1, None, keep))(x)
    return x, jax.tree.map(lambda before, value: jnp.concatenate([before, value[None]]), found, last)


# --- suffixes of many rows ------------------------------------------------------------------------------------------


class Suffix(NamedTuple):
    """The tokens that are run again, and what they read.

    Attributes:
        residuals: recorded residual stream of these tokens, entering every layer (and leaving the last).
        positions: their positions in the prompt.
        rope_positions: what their heads are rotated by, if not the positions.
        last: which of them is the prompt's last token.
        prefix_keys: recorded keys, heads first, of the tokens before them (and of later ones, which are not read).
        prefix_values: likewise.
        prefix_mask: false where the prefix of a prompt has ended.
        memory: what cross-attention layers read.
        other_keys: of another recorded pass, which rows read instead in the layers after `swapped`.
        other_values: likewise.
        other_memory: likewise.
        swapped: the last layer in which each row still reads its own pass's prefix.
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


def _by_row(edits: Any) -> SiteFunction:
    """Interventions of R rows as one on values of shape [R, B, S, D]."""
    return lambda site, value: jax.vmap(lambda edit, value: edit(site, value))(edits, value)


def resume(
    decoder: Decoder,
    suffix: Suffix,
    edits: Any,
    start: Int[Array, "R"],
    *,
    chunk: int,
) -> Float[Array, "R B D"]:
    """Final hidden states of R edited passes over the suffix, each from its own first layer on.

    Rows are sorted by their first layer and go through the layers in chunks; a chunk joins at the layer where the
    first of its rows does. First layers are data: one program serves all of them.

    Args:
        decoder: the decoder.
        suffix: the tokens and what they read.
        edits: a pytree of interventions with a leading axis R, or one without leaves.
        start: the first layer that each of them changes, 0 to L (L: it only changes what leaves the last layer).
        chunk: rows that go through a block together.

    Returns:
        Normed final hidden states at the last positions.
    """
    rows, count = start.shape[0], decoder.config.num_hidden_layers
    chunks = -(-rows // chunk)
    order = jnp.argsort(start)
    # The last chunk is padded with copies that never join.
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (chunks * chunk - rows,))])

    def grouped(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf[padded].reshape(chunks, chunk, *leaf.shape[1:]), tree)

    first = jnp.where(jnp.arange(chunks * chunk) < rows, start[padded], count).reshape(chunks, chunk)
    edits, swapped = grouped(edits), grouped(suffix.swapped)

    own, other = suffix.views(decoder)

    def enter(edit: Any, first: Array) -> Array:
        """What a row starts from: the recorded values, with edits between two layers applied."""
        x, positions = suffix.residuals[first], suffix.positions
        embedded = edit(Site("embed", jnp.asarray(-1), positions), x)
        # An edit may name any layer, where it is traced: one that does not exist must not count.
        return jnp.where(first > 0, edit(Site("resid_post", first - 1, positions), x), embedded)

    def advance(block: Any, layer: Any, chunk: tuple[Array, Any, Array, Any], keep: Keep = None) -> Array:
        """Those rows of a chunk through a block that have joined by then."""
        x, edits, first, swapped = chunk
        waiting = kept(x, keep)

        def go(x: Array) -> Array:
            view = own if other is None else Swapped(own, other, swapped)
            tap = _tap(_by_row(edits), layer, suffix.positions, keep)
            after, _ = decoder.step(block, layer, x, view, tap, keep)
            return jnp.where((first <= layer)[:, None, None, None], after, waiting)

        return jax.lax.cond((first <= layer).any(), go, lambda x: waiting, x)

    def through(x: Array, layer: Array) -> tuple[Array, None]:
        def run(x: Array) -> Array:
            block = decoder.block(layer)
            return jax.lax.map(lambda chunk: advance(block, layer, chunk), (x, edits, first, swapped))

        return jax.lax.cond((first <= layer).any(), run, lambda x: x, x), None

    x = jax.lax.map(lambda chunk: jax.vmap(enter)(*chunk), (edits, first))
    x, _ = jax.lax.scan(through, x, jnp.arange(count - 1))
    final, last = decoder.block(count - 1), suffix.last[:, None]
    x = jax.lax.map(lambda chunk: advance(final, count - 1, chunk, last), (x, edits, first, swapped))
    hidden = decoder.norm(x[:, :, :, 0])
    return hidden.reshape(chunks * chunk, *hidden.shape[2:])[jnp.argsort(order)]


# --- generation -----------------------------------------------------------------------------------------------------


class Start(NamedTuple):
    """Where decoding begins.

    Attributes:
        hidden: normed final hidden state at the prompts' last tokens, Float[R, B, D].
        keys: of the tokens that are a row's own, Float[L, R, B, S, K, E]; S may be 0.
        values: likewise.
        valid: false where a prompt's own tokens have ended, Bool[B, S].
    """

    hidden: Float[Array, "R B D"]
    keys: Float[Array, "L R B S K E"]
    values: Float[Array, "L R B S K E"]
    valid: Bool[Array, "B S"]


class Shared(NamedTuple):
    """What all rows of a generation share.

    Attributes:
        keys: recorded, heads first, Float[L, B, K, T, E].
        values: likewise.
        valid: which of them belong to the prefix, Bool[B, T].
        first: position of the rows' own first token, Int[B].
        memory: what cross-attention layers read.
    """

    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    valid: Bool[Array, "B T"]
    first: Int[Array, "B"]
    memory: Memory | None


def prefill(decoder: Decoder, suffix: Suffix, edits: Any, rows: int) -> Start:
    """Runs the suffix of R rows, each under its own edit, through all layers and keeps its keys and values."""
    recorded, edit, (view, _) = suffix.residuals[0], _by_row(edits), suffix.views(decoder)

    def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array]]:
        return decoder.step(decoder.block(layer), layer, x, view, _tap(edit, layer, suffix.positions))

    x = jnp.broadcast_to(recorded, (rows, *recorded.shape))
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
    edits: Any | None,
    *,
    steps: int,
) -> tuple[Int[Array, "R B N"], Int[Array, "R B"]]:
    """The most probable token again and again, until every row has ended.

    Args:
        decoder: the decoder.
        shared: what all rows read.
        start: the rows' own tokens of the prompt.
        last: position of the prompts' last tokens.
        last_rope: what their heads are rotated by, if not that position.
        stop_ids: tokens that end a row; ended rows are padded with the first of them.
        edits: interventions, a row each, called at the new tokens too; None leaves them as they are.
        steps: the most new tokens.

    Returns:
        New tokens, stop token included, and how many they are.
    """
    rows, batch, own = (*start.hidden.shape[:2], start.valid.shape[1])
    edit = _by_row(clean if edits is None else edits)
    memory = None if shared.memory is None else shared.memory.at(last[:, None])  # what the last token sees
    unembedding = decoder.unembed_matrix()
    filler = stop_ids[0] if stop_ids.shape[0] else jnp.asarray(0, jnp.int32)
    slots = jnp.arange(own + steps)
    filled = jnp.concatenate([start.valid, jnp.ones((batch, steps), bool)], axis=1)
    # The prompt's own tokens stand from `first` on, the new ones after the last of them.
    slot_positions = jnp.where(slots < own, shared.first[:, None] + slots, last[:, None] + 1 + slots - own)

    def choose(hidden: Array) -> Array:
        logits = jnp.einsum("rbd,dv->rbv", hidden, unembedding, preferred_element_type=jnp.float32)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def next_token(token: Array, index: Array, caches: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """The tokens after those of that index, and the caches with these in them."""
        positions = last[:, None] + 1 + index
        rope_positions = None if last_rope is None else (last_rope + 1 + index)[:, :, None]
        tokens = decoder.tokens(positions, rope_positions, None, shared.keys.shape[3] + steps)
        recorded = (tokens, shared.keys, shared.values, shared.valid)
        slot = own + index

        def step(carry: tuple[Array, tuple[Array, Array]], layer: Array) -> tuple[Any, None]:
            x, caches = carry
            cache = Cache(*recorded, caches, slot, filled & (slots <= slot), slot_positions)
            view = decoder.view(cache, memory)
            return decoder.step(decoder.block(layer), layer, x, view, _tap(edit, layer, positions)), None

        embedded = decoder.embed(token.reshape(rows * batch, 1)).reshape(rows, batch, 1, -1)
        x = edit(Site("embed", jnp.asarray(-1), positions), embedded)
        (x, caches), _ = jax.lax.scan(step, (x, caches), jnp.arange(decoder.config.num_hidden_layers))
        return choose(decoder.norm(x[:, :, 0])), caches

    def more(state: tuple[Any, ...]) -> Array:
        index, _, _, _, done, _ = state
        return (index < steps) & ~done.all()

    def advance(state: tuple[Any, ...]) -> tuple[Any, ...]:
        index, token, tokens, lengths, done, caches = state
        token = jnp.where(done, filler, token)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, :, None], (0, 0, index))
        lengths = lengths + (~done).astype(jnp.int32)
        done = done | (token[..., None] == stop_ids).any(axis=-1)
        # Nothing follows the last token.
        following, caches = jax.lax.cond(
            (index + 1 < steps) & ~done.all(),
            lambda caches: next_token(token, index, caches),
            lambda caches: (token, caches),
            caches,
        )
        return index + 1, following, tokens, lengths, done, caches

    room = [(0, 0)] * 3 + [(0, steps)] + [(0, 0)] * 2
    state = (
        jnp.asarray(0, jnp.int32),
        choose(start.hidden),
        jnp.full((rows, batch, steps), filler, jnp.int32),
        jnp.zeros((rows, batch), jnp.int32),
        jnp.zeros((rows, batch), bool),
        (jnp.pad(start.keys, room), jnp.pad(start.values, room)),
    )
    _, _, tokens, lengths, *_ = jax.lax.while_loop(more, advance, state)
    return tokens, lengths
