"""What the queries of a block may read: their own prompt, a recorded prefix, a growing cache, a picture's memory.

A view is called twice in every block. `store` maps the keys and values of the block's tokens to what is kept of them,
and `read` answers the queries. Only views apply rotary positions, causal masks, window masks and the masks of memories.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxid.kernels import attention, masks, rope
from jaxid.kernels.masks import Reads
from jaxid.kernels.rope import Rotation
from jaxid.kernels.stacks import LayerSlice
from jaxid.nn.layers import Layer, layer_of, take_tokens

Heads = Float[Array, "*R B T K E"]
"""Keys or values of a block's tokens; R rows of edits may share the prompts."""

Queries = Float[Array, "*R B S H E"]
"""Queries of the kept tokens, or what they read."""

Stored = tuple[Float[Array, "..."], Float[Array, "..."]]
"""Keys and values in the form in which a view keeps them."""

Keep = Int[Array, "B S"] | None
"""The tokens whose results are wanted, by their index in the block; None for all of them."""


def heads_first(array: Float[Array, "*R B S H E"]) -> Float[Array, "*R B H S E"]:
    """Exchanges the axes of tokens and heads; its own inverse."""
    return jnp.swapaxes(array, -3, -2)


class View(abc.ABC):
    """What the queries of a block may read."""

    def at(self, layer: Layer) -> "View":
        """The view for use in one layer alone, several times; what it needs of that layer is sliced out once."""
        del layer
        return self

    @abc.abstractmethod
    def store(self, layer: Layer, key: Heads, value: Heads) -> Stored:
        """What is kept of the block's keys and values."""

    @abc.abstractmethod
    def read(self, layer: Layer, query: Queries, stored: Stored, keep: Keep = None) -> Queries:
        """What the queries of the kept tokens read."""


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens that pass through a block, and their positions in the prompt.

    Attributes:
        positions: position of every token.
        rotation: rotary angles of every token; with a leading axis for full and sliding layers if these differ.
        slides: which layers have sliding-window attention.
        window: number of positions that a sliding layer reads; None if no sequence is longer.
    """

    positions: Int[Array, "B T"]
    rotation: Rotation
    slides: tuple[bool, ...]
    window: int | None

    def of(self, keep: Keep) -> Int[Array, "B S"]:
        """Positions of the kept tokens."""
        return self.positions if keep is None else jnp.take_along_axis(self.positions, keep, axis=1)

    def _sliding(self, layer: Layer) -> Bool[Array, ""]:
        return jnp.asarray(np.array(self.slides))[layer]

    def rotated(self, layer: Layer, heads: Float[Array, "*R B S H E"], keep: Keep = None) -> Float[Array, "*R B S H E"]:
        """The kept tokens' queries or keys, rotated by their positions."""
        cosine, sine = self.rotation
        if cosine.ndim == 4:
            cosine, sine = (jnp.where(self._sliding(layer), sliding, full) for full, sliding in self.rotation)
        if keep is not None:
            cosine, sine = take_tokens(cosine, keep), take_tokens(sine, keep)
        return rope.rotate(heads, cosine, sine)

    def within(self, layer: Layer, reads: Reads, keep: Keep) -> Reads:
        """What the kept tokens read, restricted to the window in a sliding layer."""
        return reads if self.window is None else reads.within(self.of(keep), self.window, self._sliding(layer))


@dataclasses.dataclass(frozen=True)
class OfTokens(View):
    """A view that keeps the keys and values of a block's own tokens.

    Attributes:
        tokens: the tokens that pass through the block.
    """

    tokens: Tokens

    def store(self, layer: Layer, key: Heads, value: Heads) -> Stored:
        """Rotated keys, and values, heads first."""
        return heads_first(self.tokens.rotated(layer, key)), heads_first(value)


@dataclasses.dataclass(frozen=True)
class Own(OfTokens):
    """Whole prompts, whose tokens read each other.

    Attributes:
        tokens: the prompts' tokens.
        reads: which tokens each token reads, without regard to windows.
        causal: promises that no token reads a later one.
    """

    reads: Reads
    causal: bool

    def read(self, layer: Layer, query: Queries, stored: Stored, keep: Keep = None) -> Queries:
        """Attention to the prompt."""
        reads = self.tokens.within(layer, self.reads if keep is None else self.reads.take(keep), keep)
        query = heads_first(self.tokens.rotated(layer, query, keep))
        return heads_first(attention.part(query, *stored, reads, causal=self.causal and keep is None).mixed)


@dataclasses.dataclass(frozen=True)
class Prefix(OfTokens):
    """Rows that share a prefix of their prompts, each continuing with tokens of its own.

    Attributes:
        tokens: the rows' own tokens, at the same positions in all rows.
        keys: recorded keys of the prefix, heads first; those of later tokens may follow, and are not read.
        values: the values that belong to these keys.
        mask: false after the end of a prompt's prefix.
        sliced: the prefix's keys and values in the only layer in which the view is used.
    """

    keys: Float[Array, "L B K T E"]
    values: Float[Array, "L B K T E"]
    mask: Bool[Array, "B P"]
    sliced: tuple[LayerSlice, LayerSlice] | None = dataclasses.field(default=None, kw_only=True)

    def at(self, layer: Layer) -> "Prefix":
        """The view with the prefix's keys and values of the layer sliced out."""
        return dataclasses.replace(self, sliced=self._recorded(layer))

    def _recorded(self, layer: Layer) -> tuple[LayerSlice, LayerSlice]:
        if self.sliced is not None:
            return self.sliced
        count = self.mask.shape[1]
        keys, values = (
            LayerSlice(leaf, layer, jax.lax.dynamic_slice_in_dim(layer_of(leaf, layer), 0, count, axis=2))
            for leaf in (self.keys, self.values)
        )
        return keys, values

    def read(self, layer: Layer, query: Queries, stored: Stored, keep: Keep = None) -> Queries:
        """Attention to the prefix, which is read once for all rows, and to the row's own tokens."""
        prefix, queries = jnp.arange(self.mask.shape[1])[None], self.tokens.of(keep)
        before = self.tokens.within(layer, masks.causal(queries, prefix, self.mask), keep)
        keys, values, own = self.own(layer, stored, keep)
        own = self.tokens.within(layer, own, keep)
        query = self.tokens.rotated(layer, query, keep)
        return attention.shared_prefix_attention(*self._recorded(layer), before, query, keys, values, own)

    def own(
        self, layer: Layer, stored: Stored, keep: Keep
    ) -> tuple[Float[Array, "R B K C E"] | LayerSlice, Float[Array, "R B K C E"] | LayerSlice, Reads]:
        """Keys and values of the rows' own tokens, and which of them each query reads."""
        del layer
        # Padding is on the right; its positions may repeat that of the last token, which must not read it.
        index = jnp.arange(self.tokens.positions.shape[1])
        positions = self.tokens.positions[:, :1] + index
        queries = positions if keep is None else jnp.take_along_axis(positions, keep, axis=1)
        return *stored, masks.causal(queries, positions)


@dataclasses.dataclass(frozen=True)
class Cache(Prefix):
    """One new token per row, which also reads the row's earlier tokens.

    Attributes:
        caches: keys and values of the rows' own tokens in every layer, heads first, with room for those to come.
        slot: index in the caches where the new token is written.
        filled: which entries of the caches hold a token, the new one included.
        positions: positions of the tokens in the caches.
    """

    caches: tuple[Float[Array, "L R B K C E"], Float[Array, "L R B K C E"]]
    slot: Int[Array, ""]
    filled: Bool[Array, "B C"]
    positions: Int[Array, "B C"]

    def store(self, layer: Layer, key: Heads, value: Heads) -> Stored:
        """The caches with the new token added."""
        new = super().store(layer, key, value)
        first, second = (
            jax.lax.dynamic_update_slice(cache, leaf[None], (layer, 0, 0, 0, self.slot, 0))
            for cache, leaf in zip(self.caches, new, strict=True)
        )
        return first, second

    def own(self, layer: Layer, stored: Stored, keep: Keep) -> tuple[LayerSlice, LayerSlice, Reads]:
        """The cached keys and values of the layer; the new token reads those that are filled."""
        keys, values = (LayerSlice(cache, layer, layer_of(cache, layer)) for cache in stored)
        return keys, values, masks.causal(self.tokens.of(keep), self.positions, self.filled)


class Memory(NamedTuple):
    """What cross-attention layers read: keys and values of the pictures, the same for every edit of the text.

    Attributes:
        keys: the pictures' keys in every cross-attention layer, heads first.
        values: the values that belong to these keys.
        reads: which of them each token reads; all of them for tokens that may read none.
        rows: false for tokens that may read none.
    """

    keys: Float[Array, "C B K I E"]
    values: Float[Array, "C B K I E"]
    reads: Reads
    rows: Bool[Array, "B T"]

    def at(self, positions: Int[Array, "B S"]) -> "Memory":
        """The memory as the tokens at some positions read it."""
        return self._replace(reads=self.reads.take(positions), rows=jnp.take_along_axis(self.rows, positions, axis=1))

    def read(self, index: Layer, query: Queries, keep: Keep = None) -> Queries:
        """What the queries of the kept tokens read in a cross-attention layer, by its index among these."""
        reads = self.reads if keep is None else self.reads.take(keep)
        keys, values = (LayerSlice(leaf, index, layer_of(leaf, index)) for leaf in (self.keys, self.values))
        rows = query.reshape(-1, *query.shape[-4:])
        return attention.prefix_part(rows, keys, values, reads).mixed.astype(values.dtype).reshape(query.shape)


@dataclasses.dataclass(frozen=True)
class Swapped(View):
    """Rows that read another view after a layer of each row's own.

    Attributes:
        own: what they read up to that layer; it stores the rows' keys and values in all layers.
        other: what they read after it.
        after: the last layer in which each row reads `own`.
    """

    own: View
    other: View
    after: Int[Array, "R"]

    def at(self, layer: Layer) -> "Swapped":
        """Both views for one layer alone."""
        return dataclasses.replace(self, own=self.own.at(layer), other=self.other.at(layer))

    def store(self, layer: Layer, key: Heads, value: Heads) -> Stored:
        """The same as the rows' own view."""
        return self.own.store(layer, key, value)

    def read(self, layer: Layer, query: Queries, stored: Stored, keep: Keep = None) -> Queries:
        """Reads both views and selects one for every row."""
        own, other = (view.read(layer, query, stored, keep) for view in (self.own, self.other))
        return jnp.where((self.after < layer)[:, None, None, None, None], other, own)
