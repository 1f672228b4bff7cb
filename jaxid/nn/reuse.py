"""Causal reuse: one recorded pass of a decoder, and passes of a few late tokens against its keys and values.

In a causal decoder an edit at some block and token changes nothing at earlier tokens and earlier blocks. So a clean
pass is recorded once, and every edited pass runs the tokens from the first edited one on (the suffix), through the
blocks from the first edited one on, reading the earlier tokens' (the prefix's) recorded keys and values.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxid.kernels import attention
from jaxid.nn.decoder import Blocks, Decoder, Memory
from jaxid.nn.layers import layer_of, take_tokens
from jaxid.nn.sites import Intervention, Site


class Record(NamedTuple):
    """What one pass leaves behind for later ones.

    Attributes:
        hidden: normed final hidden state at the last position.
        keys: of every block and token, rotated, heads first.
        values: likewise.
        residuals: of the suffix: what enters block l at index l, what leaves the last block at index L.
        memory: what cross-attention layers read of the pictures.
    """

    hidden: Float[Array, "B D"]
    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    residuals: Float[Array, "L1 B S D"]
    memory: Memory | None


class Suffix(NamedTuple):
    """The tokens that are run again, and what they read.

    Attributes:
        residuals: recorded residual stream of these tokens, entering every block (and leaving the last).
        positions: their places in the prompt.
        rope_positions: what their heads turn by, if not the places.
        last: which of them is the prompt's last token.
        prefix_keys: recorded keys, heads first, of the tokens before them (and of later ones, which are not read).
        prefix_values: likewise.
        prefix_mask: false where the prefix of a prompt has ended.
        memory: what cross-attention layers read.
        other_keys: of another recorded pass, which rows read instead in the blocks after `swapped`.
        other_values: likewise.
        other_memory: likewise.
        swapped: the last block in which each row still reads its own pass's prefix.
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


def record(
    decoder: Decoder,
    embeddings: Float[Array, "B T D"],
    positions: Int[Array, "B T"],
    mask: Bool[Array, "B T T"],
    suffix: Int[Array, "B S"],
    last: Int[Array, "B"],
    intervention: Intervention,
    *,
    rope_positions: Int[Array, "B A T"] | None = None,
    memory: Memory | None = None,
) -> Record:
    """One pass, recorded. Of the last block only the suffix is computed: nothing else leads to an answer.

    Args:
        decoder: the decoder.
        embeddings: its input.
        positions: place of every token in its prompt.
        mask: which tokens each token reads; none reads a later one, but for pictures' own tokens.
        suffix: the tokens whose residual stream is kept, by place.
        last: place of every prompt's last token, which is one of the suffix.
        intervention: called as `intervention(site, value)` at every site.
        rope_positions: positions along several axes, for families that turn heads by them.
        memory: what cross-attention layers read.
    """
    rotation = decoder.rotations(positions if rope_positions is None else rope_positions, last)
    blocks = Blocks(decoder)
    final = decoder.config.num_hidden_layers - 1
    suffix_positions = jnp.take_along_axis(positions, suffix, axis=1)

    def keep(values: Array) -> Array:
        return jnp.take_along_axis(values, suffix[:, :, None], axis=1)

    def block(x: Array, layer: Any, *, whole: bool) -> tuple[Array, tuple[Array, Array]]:
        found: list[Array] = []
        inner = decoder.whole_read(blocks, layer, positions, mask, memory, None if whole else suffix)

        def read(query: Array, key: Array, value: Array) -> Array:
            found.extend((key, value))
            return inner(query, key, value)

        def tap(name: str, value: Array) -> Array:
            at = positions if whole or name == "resid_pre" else suffix_positions
            return intervention(Site(name, jnp.asarray(layer), at), value)

        run = blocks(layer, memory=memory, whole=True)
        x = run(x, rotation, read, tap) if whole else run(x, rotation, read, tap, keep)
        keys, values = (jnp.moveaxis(heads, 1, 2) for heads in found)
        return x, (keys, values)

    def step(x: Array, layer: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        entering = keep(x)
        x, (keys, values) = block(x, layer, whole=True)
        return x, (entering, keys, values)

    x = intervention(Site("embed", jnp.asarray(-1), positions), embeddings)
    x, (entering, keys, values) = jax.lax.scan(step, x, jnp.arange(final))
    before_last = keep(x)
    x, (last_keys, last_values) = block(x, final, whole=False)
    at_end = jnp.argmax(suffix == last[:, None], axis=1)[:, None]
    return Record(
        hidden=decoder.norm(take_tokens(x, at_end)[:, 0]),
        keys=jnp.concatenate([keys, last_keys[None]]),
        values=jnp.concatenate([values, last_values[None]]),
        residuals=jnp.concatenate([entering, before_last[None], x[None]]),
        memory=memory,
    )


def resume(
    decoder: Decoder,
    suffix: Suffix,
    edits: Any,
    start: Int[Array, "R"],
    *,
    chunk: int,
) -> Float[Array, "R B D"]:
    """Final hidden states of R edited passes over the suffix, each from its own first block on.

    Rows are sorted by their first block and go through the blocks in chunks; a chunk joins at the block where the
    first of its rows does. First blocks are data: one program serves all of them.

    Args:
        decoder: the decoder.
        suffix: the tokens and what they read.
        edits: a pytree of interventions with a leading axis R, or one without leaves.
        start: the first block that each of them changes, 0 to L (L: it only changes what leaves the last block).
        chunk: rows that go through a block together.

    Returns:
        Normed final hidden states at the last positions.
    """
    rows, layers = start.shape[0], decoder.config.num_hidden_layers
    chunks = -(-rows // chunk)
    order = jnp.argsort(start)
    # The last chunk is filled up with copies that never join.
    filled = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (chunks * chunk - rows,))])
    edits = jax.tree.map(lambda leaf: leaf[filled], edits)
    first = jnp.where(jnp.arange(chunks * chunk) < rows, start[filled], layers)
    runner = Runner(decoder, suffix)

    def grouped(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(chunks, chunk, *leaf.shape[1:]), tree)

    edits, first = grouped(edits), grouped(first)
    swapped = None if suffix.swapped is None else grouped(suffix.swapped[filled])

    def enter(arguments: tuple[Any, Array]) -> Array:
        """What the rows of a chunk start from: the recorded values, with edits between two blocks applied."""
        edits, first = arguments

        def where(entered: Array, name: str, layer: Any, x: Array) -> Array:
            # Not by a layer that does not exist: an edit may name any, where it is traced.
            return jnp.where(entered[:, None, None, None], runner.at_site(name, layer, edits, x), x)

        x = where(first == 0, "embed", -1, suffix.residuals[first])
        return where(first > 0, "resid_post", first - 1, x)

    x = jax.lax.map(enter, (edits, first))

    def layer_step(x: Array, layer: Array) -> tuple[Array, None]:
        def run(x: Array) -> Array:
            module = runner.block(layer)

            def chunk_step(_: None, arguments: tuple[Array, Any, Array, Array | None]) -> tuple[None, Array]:
                x, edits, first, swapped = arguments

                def go(x: Array) -> Array:
                    after = runner(module, layer, edits, swapped, x)
                    return jnp.where((first <= layer)[:, None, None, None], after, x)

                return None, jax.lax.cond((first <= layer).any(), go, lambda x: x, x)

            return jax.lax.scan(chunk_step, None, (x, edits, first, swapped))[1]

        return jax.lax.cond((first <= layer).any(), run, lambda x: x, x), None

    x, _ = jax.lax.scan(layer_step, x, jnp.arange(layers - 1))
    final = runner.block(layers - 1)

    def finish(arguments: tuple[Array, Any, Array, Array | None]) -> Array:
        x, edits, first, swapped = arguments
        unchanged = take_tokens(x, suffix.last[:, None])

        def go(x: Array) -> Array:
            after = runner(final, layers - 1, edits, swapped, x, last_only=True)
            return jnp.where((first < layers)[:, None, None, None], after, unchanged)

        return jax.lax.cond((first < layers).any(), go, lambda x: unchanged, x)

    hidden = decoder.norm(jax.lax.map(finish, (x, edits, first, swapped))[:, :, :, 0])
    return hidden.reshape(chunks * chunk, *hidden.shape[2:])[jnp.argsort(order)]


class Runner:
    """Runs blocks on [R, B, S, D], the suffixes of R rows that share their prompts' prefixes."""

    def __init__(self, decoder: Decoder, suffix: Suffix):
        self.blocks = Blocks(decoder)
        self.suffix = suffix
        turned = suffix.positions if suffix.rope_positions is None else suffix.rope_positions
        self.rotation = decoder.rotations(turned, suffix.last)
        length = suffix.positions.shape[1]
        # By place in the suffix: its padding stands on the right, where nothing that counts reads it.
        self.causal = jnp.tril(jnp.ones((length, length), bool))[None]
        self.last_positions = jnp.take_along_axis(suffix.positions, suffix.last[:, None], axis=1)
        self.window = decoder.window(suffix.prefix_keys.shape[3])

    def block(self, layer: Any) -> Any:
        """The block of that number, which may be traced."""
        return self.blocks(layer, memory=self.suffix.memory)

    def at_site(
        self, name: str, layer: Any, edits: Any, x: Float[Array, "R B S D"], *, last_only: bool = False
    ) -> Float[Array, "R B S D"]:
        """Every row's own edit; `layer` is one number, or one a row."""
        positions = self.last_positions if last_only else self.suffix.positions
        layers = jnp.broadcast_to(jnp.asarray(layer), x.shape[:1])
        return jax.vmap(lambda edit, layer, value: edit(Site(name, layer, positions), value))(edits, layers, x)

    def _masks(self, layer: Any, last_only: bool) -> tuple[Bool[Array, "B #S P"], Bool[Array, "#B S T"]]:
        """Which keys of the prefix, and which of the row's own, the suffix's tokens read in a layer."""
        suffix, places = self.suffix, self.suffix.positions
        before, own, queries = suffix.prefix_mask[:, None], self.causal, places
        if last_only:
            own = (jnp.arange(places.shape[1]) <= suffix.last[:, None])[:, None]
            queries = self.last_positions
        if self.window is not None:
            everywhere = ~self.blocks.slides(layer)
            prefix_places = jnp.broadcast_to(jnp.arange(before.shape[-1]), (places.shape[0], before.shape[-1]))
            before = before & (attention.near(queries, prefix_places, self.window) | everywhere)
            own = own & (attention.near(queries, places, self.window) | everywhere)
        return before, own

    def __call__(
        self,
        block: Any,
        layer: Any,
        edits: Any,
        swapped: Int[Array, "R"] | None,
        x: Float[Array, "R B S D"],
        *,
        last_only: bool = False,
        found: list[Array] | None = None,
    ) -> Float[Array, "R B _ D"]:
        """One block; of the last tokens only, [R, B, 1, D], if that is all that is asked for.

        The suffixes' own keys and values, Float[R, B, S, K, E], are appended to `found`.
        """
        rows, batch = x.shape[:2]
        suffix = self.suffix
        prefix = suffix.prefix_mask.shape[1]
        before, mask = self._masks(layer, last_only)

        def split(values: Array) -> Array:
            return values.reshape(rows, batch, *values.shape[1:])

        def join(values: Array) -> Array:
            return values.reshape(rows * batch, *values.shape[2:])

        def read(query: Array, key: Array, value: Array) -> Array:
            queries, keys, values = split(query), split(key), split(value)
            if found is not None:
                found.extend((keys, values))

            def against(recorded: tuple[Array, Array], memory: Memory | None) -> Array:
                def own() -> Array:
                    cut = (layer_of(leaf, layer) for leaf in recorded)
                    cut = (jax.lax.dynamic_slice_in_dim(leaf, 0, prefix, axis=2) for leaf in cut)
                    return attention.shared_prefix_attention(*cut, before, queries, keys, values, mask[None])

                def cross(memory_keys: Array, memory_values: Array) -> Array:
                    assert memory is not None
                    at = self.last_positions if last_only else suffix.positions
                    allowed = jnp.take_along_axis(memory.mask, at[:, :, None], axis=1)
                    part = attention.prefix_part(queries, memory_keys, memory_values, allowed)
                    return attention.merge(part).astype(values.dtype)

                return self.blocks.choose(layer, memory, own, cross)

            mixed = against((suffix.prefix_keys, suffix.prefix_values), suffix.memory)
            if swapped is None or suffix.other_keys is None or suffix.other_values is None:
                return join(mixed)
            other = against((suffix.other_keys, suffix.other_values), suffix.other_memory)
            return join(jnp.where((swapped < layer)[:, None, None, None, None], other, mixed))

        def tap(name: str, value: Array) -> Array:
            short = last_only and name != "resid_pre"
            return join(self.at_site(name, layer, edits, split(value), last_only=short))

        def keep(values: Array) -> Array:
            return join(take_tokens(split(values), suffix.last[:, None]))

        rotation = tuple(jnp.tile(part, (rows, 1, 1)) for part in self.rotation)
        kept = {"keep": keep} if last_only else {}
        return split(block(join(x), rotation, read, tap, **kept))
