"""Which keys a query may read, told by the tokens themselves: a few integers each instead of a [B, S, T] array."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

NEVER = int(np.iinfo(np.int32).max)
"""The position of a key that is padding: after every query."""


class Reads(NamedTuple):
    """Which keys each query may read: those in a range of positions, and those of its own span.

    Query i may read key j if `positions[j] > low[i]` and either `positions[j] <= high[i]` or the two belong to the
    same span. B may be 1, which serves a batch of any size, and so may S in an array that is the same for all queries.

    Attributes:
        high: the last position that every query may read.
        positions: the position of every key, `NEVER` where a key is padding.
        low: the position before the first one that every query may read; None where that is the first one of all.
        span: the span of every query, -1 for none; None if no query has one.
        spans: the span of every key, -1 for none; None if no key has one.
    """

    high: Int[Array, "B S"]
    positions: Int[Array, "B T"]
    low: Int[Array, "B S"] | None = None
    span: Int[Array, "B S"] | None = None
    spans: Int[Array, "B T"] | None = None

    def leaves(self) -> list[Int[Array, "..."]]:
        """The arrays that there are."""
        return [leaf for leaf in self if leaf is not None]

    def mask(self) -> Bool[Array, "B S T"]:
        """True where a query may read a key."""
        positions = self.positions[:, None, :]
        allowed = positions <= self.high[:, :, None]
        if self.span is not None and self.spans is not None:
            same = (self.span[:, :, None] == self.spans[:, None, :]) & (self.span >= 0)[:, :, None]
            allowed = allowed | same
        if self.low is not None:
            allowed = allowed & (positions > self.low[:, :, None])
        return allowed

    def take(self, keep: Int[Array, "B C"]) -> "Reads":
        """What the queries at some indices may read."""

        def some(leaf: Int[Array, "#B S"]) -> Int[Array, "..."]:
            if leaf.shape[1] == 1:  # the same for all
                return leaf
            return jnp.take_along_axis(jnp.broadcast_to(leaf, (keep.shape[0], leaf.shape[1])), keep, axis=1)

        return self._of_queries(some)

    def tile(self, times: int) -> "Reads":
        """What the queries may read if all of them are repeated, one copy after another."""
        return self._of_queries(lambda leaf: jnp.tile(leaf, (1, times)) if leaf.shape[1] > 1 else leaf)

    def _of_queries(self, change: Callable[[Array], Array]) -> "Reads":
        low = None if self.low is None else change(self.low)
        return self._replace(high=change(self.high), low=low, span=None if self.span is None else change(self.span))

    def by_row(self, rows: int) -> "Reads":
        """What the queries of `rows` rows may read of their own row's keys, all of them one row after another.

        Spans are not told by row. The first key is a token, and none is at an earlier position.
        """
        if self.span is not None:
            raise ValueError("spans cannot be told by row")
        first, stride = self.positions[:, :1], (NEVER - 1) // rows
        starts = jnp.arange(rows, dtype=jnp.int32)[:, None] * stride

        def joined(leaf: Int[Array, "#B S"]) -> Int[Array, "..."]:
            # Clipped before the difference, which would overflow for a `low` without a bound.
            own = jnp.minimum(jnp.maximum(leaf, first - 1) - first, stride - 1)
            return (own[:, None] + starts).reshape(own.shape[0], -1)

        high, low = jnp.broadcast_arrays(self.high, first - 1 if self.low is None else self.low)
        real = jnp.tile(self.positions < NEVER, (1, rows))
        return Reads(joined(high), jnp.where(real, joined(self.positions), NEVER), joined(low))

    def within(self, query_positions: Int[Array, "B S"], window: int, sliding: Bool[Array, ""] | bool) -> "Reads":
        """Restricted to the last `window` positions up to each query's own if `sliding` is true.

        The flag may be traced, so that layers with and without a window share a program.
        """
        low = jnp.where(sliding, query_positions - window, jnp.iinfo(jnp.int32).min)
        return self._replace(low=low if self.low is None else jnp.maximum(self.low, low))


def causal(
    query_positions: Int[Array, "#B S"], key_positions: Int[Array, "#B T"], valid: Bool[Array, "#B T"] | None = None
) -> Reads:
    """Every query reads the keys at or before its own position.

    For example, with three tokens and one of padding (positions 0 1 2 3, valid 1 1 1 0)::

        query 0 reads 1 0 0 0
        query 1 reads 1 1 0 0
        query 2 reads 1 1 1 0

    Args:
        query_positions: position of every query in the prompt.
        key_positions: position of every key in the prompt.
        valid: false where a key is padding, which nothing reads.
    """
    return Reads(query_positions, key_positions if valid is None else jnp.where(valid, key_positions, NEVER))


def everything(length: int, valid: Bool[Array, "B T"]) -> Reads:
    """Each of `length` queries reads every key that is not padding."""
    return Reads(
        jnp.zeros((valid.shape[0], length), jnp.int32),
        jnp.where(valid, jnp.zeros((), jnp.int32), NEVER),
    )


def within_spans(span: Int[Array, "B S"], spans: Int[Array, "B T"] | None = None) -> Reads:
    """Every query reads the keys of its own span alone, such as one picture or one window of it; -1 belongs to none.

    For example, with spans -1 0 0 1::

        token 0 reads 0 0 0 0
        token 1 reads 0 1 1 0
        token 2 reads 0 1 1 0
        token 3 reads 0 0 0 1
    """
    spans = span if spans is None else spans
    return Reads(jnp.full_like(span, -1), jnp.zeros_like(spans), span=span, spans=spans)


def with_spans(reads: Reads, span: Int[Array, "B S"], spans: Int[Array, "B T"]) -> Reads:
    """Every query also reads the keys of its own span, later ones included (within its window if it has one)."""
    return reads._replace(span=span, spans=spans)


def blocks(
    reads: Reads, query_block: int, key_block: int, *, by_key: bool = False
) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    """The range of key blocks that the queries of every query block may read; wider than need be, never too narrow.

    Args:
        reads: what the queries may read; S and T are multiples of the blocks.
        query_block: queries in a block.
        key_block: keys in a block.
        by_key: asks instead for the range of query blocks that may read every key block.

    Returns:
        The first block of every range and the one after its last; both 0 if there is none.
    """

    def edge(leaf: Int[Array, "B S"], size: int, largest: bool) -> Int[Array, "B N"]:
        cut = leaf.reshape(leaf.shape[0], -1, size)
        return cut.max(axis=2) if largest else cut.min(axis=2)

    real = reads.positions < NEVER
    first = edge(reads.positions, key_block, False)
    last = edge(jnp.where(real, reads.positions, -1), key_block, True)
    active = first[:, None, :] <= edge(reads.high, query_block, True)[:, :, None]
    if reads.span is not None and reads.spans is not None:
        sides = ((reads.span, query_block), (reads.spans, key_block))
        query_first, key_first = (edge(jnp.where(leaf >= 0, leaf, NEVER), size, False) for leaf, size in sides)
        query_last, key_last = (edge(leaf, size, True) for leaf, size in sides)
        active = active | (
            (query_first[:, :, None] <= key_last[:, None, :]) & (key_first[:, None, :] <= query_last[:, :, None])
        )
    if reads.low is not None:
        active = active & (last[:, None, :] > edge(reads.low, query_block, False)[:, :, None])
    if by_key:
        active = jnp.swapaxes(active, 1, 2)
    index = jnp.arange(active.shape[2], dtype=jnp.int32)
    start = jnp.where(active, index, active.shape[2]).min(axis=2)
    stop = jnp.where(active, index + 1, 0).max(axis=2)
    return jnp.where(stop > 0, start, 0), stop
