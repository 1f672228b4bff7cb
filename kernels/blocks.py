"""The bodies of the attention kernels, for Triton and for Mosaic.

A program of the grid owns one block of the queries of a head and walks over the blocks of keys that its queries may
read, keeping a running maximum and sum. The backward pass computes the scores again: once for blocks of queries, for
the gradient of the queries, and once for blocks of keys, for that of keys and values.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The log-sum-exp of a query that reads nothing: finite, so that differences of two of them are."""

UNREAD = 1e30
"""Stands for that log-sum-exp in the backward pass, where exp(score - log-sum-exp) has to be 0."""

LOG2E = math.log2(math.e)

PROGRAMS = 264
"""Programs that keep a large GPU busy, two for each of an H100's processors."""

OF_QUERIES, OF_KEYS = ("high", "low", "span"), ("positions", "spans")
"""The arrays of a mask, `jaxid.kernels.masks.Reads`."""


class Target(NamedTuple):
    """Where a kernel runs.

    Attributes:
        platform: the compiler.
        interpret: runs the kernel as a JAX program, on any platform and slowly, which shows that its numbers are right.
    """

    platform: Literal["cuda", "tpu"]
    interpret: bool = False


RowOf = Callable[[Any], Any]
"""From the row of a grid to that of an operand."""


class GridRows(NamedTuple):
    """The V mapped rows and B prompts of a call, which one axis of its grid counts."""

    mapped: int
    batch: int

    def of(self, operand: "GridRows") -> RowOf:
        """From that count to the row of an operand that has fewer of either."""
        if operand == self:
            return lambda index: index
        if operand.mapped * operand.batch == 1:
            return lambda index: 0

        def row(index: Any) -> Any:
            mapped = jax.lax.rem(jax.lax.div(index, self.batch), operand.mapped)
            return mapped * operand.batch + jax.lax.rem(jax.lax.rem(index, self.batch), operand.batch)

        return row


class Call(NamedTuple):
    """What a kernel has to know when it is traced.

    Attributes:
        target: where it runs.
        own: number of tokens of which every program owns a block.
        own_block: tokens in such a block.
        other: number of tokens over which it walks.
        other_block: tokens that it reads in one step.
        width: of a head.
        names: of the arrays, in their order.
        splits: number of programs that share the other tokens, where one block holds all own ones.
    """

    target: Target
    own: int
    own_block: int
    other: int
    other_block: int
    width: int
    names: tuple[str, ...]
    splits: int = 1

    @property
    def triton(self) -> bool:
        """Whether the kernel is Triton's; else it is Mosaic's."""
        return self.target.platform == "cuda"

    @property
    def padded_width(self) -> int:
        """Triton's blocks are powers of two."""
        return pl.next_power_of_2(self.width) if self.triton else self.width

    @property
    def own_blocks(self) -> int:
        """The number of blocks that programs own."""
        return pl.cdiv(self.own, self.own_block)

    @property
    def other_blocks(self) -> int:
        """The number of steps over all other tokens."""
        return pl.cdiv(self.other, self.other_block)

    def filled(self, own: bool) -> int:
        """The tokens of all blocks: of those that programs own, or of those over which they walk."""
        return self.own_block * self.own_blocks if own else self.other_block * self.other_blocks

    @property
    def block(self) -> Any:
        """The index of the program's own block."""
        return pl.program_id(2) if self.splits == 1 else 0

    @property
    def start(self) -> Any:
        """The first of the program's own tokens within the arrays that it sees: blocks on TPU, whole heads on GPU."""
        return self.block * self.own_block if self.triton else 0


def _even(length: int, most: int) -> int:
    """A multiple of 128 that leaves little of the last block empty; small blocks cost something each."""
    return min(range(128, most + 1, 128), key=lambda size: -(-length // size) * (size + 64))


def sizes(target: Target, own: int, other: int, width: int, dtype: Any, *, backward: bool) -> tuple[int, int]:
    """Tokens in a program's own block, and in one step."""
    if target.platform == "tpu":
        return _even(own, 512), _even(other, 512)
    size = jnp.dtype(dtype).itemsize * max(64, pl.next_power_of_2(width))
    most, walk = (128, 64) if size <= 256 and not backward else (64, 32) if size <= 512 else (32, 32)
    return max(16, min(most, pl.next_power_of_2(own))), max(16, min(walk, pl.next_power_of_2(other)))


def _tile(call: Call, ref: Any, start: Any, first: Any, size: int, length: int, lead: tuple[Any, ...] = ()) -> Array:
    """Rows of an array from `start`, where row `first` of [length, E] lies; zeros after the end of that."""
    ragged = length % size > 0
    if not call.triton:
        tile = ref[(*lead, pl.ds(start, size), slice(None))]
        if not ragged:
            return tile
        index = first + jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0)
        return jnp.where(index < length, tile, jnp.zeros_like(tile))
    where = ref.at[(*lead, pl.ds(start, size), pl.ds(0, call.padded_width))]
    if not ragged and call.padded_width == call.width:
        return plgpu.load(where)
    inside = (first + jnp.arange(size) < length)[:, None] & (jnp.arange(call.padded_width) < call.width)[None, :]
    return plgpu.load(where, mask=inside, other=0.0)


def _own(call: Call, ref: Any) -> Array:
    """The program's own rows."""
    return _tile(call, ref, call.start, call.block * call.own_block, call.own_block, call.own)


def _put(call: Call, ref: Any, tile: Array) -> None:
    """Writes the program's own rows."""
    if not call.triton:
        ref[...] = tile.astype(ref.dtype)
        return
    rows, columns = call.start + jnp.arange(call.own_block), jnp.arange(call.padded_width)
    where = ref.at[pl.ds(call.start, call.own_block), pl.ds(0, call.padded_width)]
    mask = (rows < call.own)[:, None] & (columns < call.width)[None, :]
    plgpu.store(where, tile.astype(ref.dtype), mask=mask)


def _column(call: Call, ref: Any) -> Array:
    """One number for each of the program's own tokens, as [size, 1]."""
    if call.triton:
        return ref[0, pl.ds(call.start, call.own_block)][:, None]
    return ref[...].reshape(call.own_block, 1)


def _row(call: Call, ref: Any, start: Any, lead: tuple[Any, ...] = ()) -> Array:
    """One number for each of the tokens of a step, as [1, size]."""
    where = pl.ds(start, call.other_block)
    return ref[(*lead, 0, where)][None, :] if call.triton else ref[(*lead, slice(None), where)]


def _dot(call: Call, a: Array, b: Array, *, transposed: bool = False) -> Array:
    """A @ b, or a @ b.T, in float32."""
    precision: Any = jax.lax.Precision.DEFAULT  # what is set for all products may be more than Mosaic takes
    if a.dtype == jnp.float32:
        # Three products on tensor cores, which Triton's exact form does not use.
        three = call.triton and not call.target.interpret
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if three else jax.lax.Precision.HIGHEST
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


Rows = Mapping[str, RowOf]
"""By the names of the small arrays that every program sees whole."""


def _needed(call: Call, at: dict[str, Any], rows: Rows) -> tuple[Any, Any]:
    """The range of blocks of other tokens that the program's own tokens need, or the program's share of it."""
    first, end = 0, call.other_blocks
    if "bounds" in at:
        index = 2 * (rows["bounds"](pl.program_id(0)) * call.own_blocks + call.block)
        first, end = at["bounds"][index], at["bounds"][index + 1]
    if call.splits == 1:
        return first, end
    share = jax.lax.div(end - first + call.splits - 1, call.splits)
    first += pl.program_id(2) * share
    return first, jnp.minimum(end, first + share)


def _layer(call: Call, at: dict[str, Any], rows: Rows) -> tuple[Any, ...]:
    """The index of the first axis of keys and values, if programs see those of all layers, as on GPU."""
    if "layers" not in at or not call.triton:
        return ()
    return (at["layers"][rows["layers"](pl.program_id(0))],)


def _walk(call: Call, needed: tuple[Any, Any], step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Calls `step(start, carry)` for a range of blocks of other tokens."""

    def visit(block: Any, carry: Any) -> Any:
        start = block * call.other_block
        return step(start if call.triton else pl.multiple_of(start, call.other_block), carry)

    return jax.lax.fori_loop(*needed, visit, carry)


def _hidden(scores: Array, queries: dict[str, Array], keys: dict[str, Array]) -> Array:
    """The scores, lowest where the query may not read the key; queries and keys are rows and columns or the reverse."""
    if not keys:
        return scores
    allowed = keys["positions"] <= queries["high"]
    if "spans" in keys:
        allowed = allowed | (keys["spans"] == queries["span"])
    if "low" in queries:
        allowed = allowed & (keys["positions"] > queries["low"])
    return jnp.where(allowed, scores, LOWEST)


def _scores_of_queries(call: Call, at: dict[str, Any], query: Array) -> Callable[[Array, Any], Array]:
    """A function from some keys and where they start to the scores of the program's own queries, in base 2."""
    queries = {name: _column(call, at[name]) for name in OF_QUERIES if name in at}

    def scores(key: Array, start: Any) -> Array:
        found = _dot(call, query, key, transposed=True) * (call.width**-0.5 * LOG2E)
        if not queries and call.other % call.other_block:
            index = start + jax.lax.broadcasted_iota(jnp.int32, (1, call.other_block), 1)
            return found + jnp.where(index < call.other, 0.0, LOWEST)
        return _hidden(found, queries, {name: _row(call, at[name], start) for name in OF_KEYS if name in at})

    return scores


def forward_kernel(call: Call, rows: Rows, *refs: Any) -> None:
    """What a block of queries reads, and the log-sum-exp of their scores."""
    at = dict(zip(call.names, refs, strict=True))
    scores_of, layer = _scores_of_queries(call, at, _own(call, at["query"])), _layer(call, at, rows)

    def step(start: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, largest, total = carry
        key, value = (
            _tile(call, at[name], start, start, call.other_block, call.other, layer) for name in ("key", "value")
        )
        scores = scores_of(key, start)
        higher = jnp.maximum(largest, scores.max(axis=1, keepdims=True))
        weights, shrink = jnp.exp2(scores - higher), jnp.exp2(largest - higher)
        mixed = mixed * shrink + _dot(call, weights.astype(value.dtype), value)
        return mixed, higher, total * shrink + weights.sum(axis=1, keepdims=True)

    size = call.own_block
    carry = jnp.zeros((size, call.padded_width)), jnp.full((size, 1), LOWEST), jnp.zeros((size, 1))
    carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), carry)
    mixed, largest, total = _walk(call, _needed(call, at, rows), step, carry)
    reads = largest > LOWEST / 2
    _put(call, at["out"], jnp.where(reads, mixed / total, 0.0))
    lse = jnp.where(reads, (largest + jnp.log2(total)) / LOG2E, LOWEST)
    if call.triton:
        at["lse"][0, pl.ds(call.start, size)] = lse.reshape(size)
    else:
        at["lse"][...] = lse.reshape(1, size)


def query_kernel(call: Call, rows: Rows, *refs: Any) -> None:
    """The gradient of a block of queries."""
    at = dict(zip(call.names, refs, strict=True))
    scores_of = _scores_of_queries(call, at, _own(call, at["query"]))
    slope, lse, shift = _own(call, at["slope"]), _column(call, at["lse"]), _column(call, at["shift"])

    def step(start: Any, gradient: Array) -> Array:
        key, value = (_tile(call, at[name], start, start, call.other_block, call.other) for name in ("key", "value"))
        weights = jnp.exp2(scores_of(key, start) - lse)
        slopes = weights * (_dot(call, slope, value, transposed=True) - shift)
        return gradient + _dot(call, slopes.astype(key.dtype), key)

    gradient = jnp.zeros((call.own_block, call.padded_width), jnp.float32)
    gradient = _walk(call, _needed(call, at, rows), step, gradient)
    _put(call, at["query_gradient"], gradient * call.width**-0.5)


def key_kernel(call: Call, rows: Rows, *refs: Any) -> None:
    """The gradients of a block of keys and of their values, from all query heads that share them."""
    at = dict(zip(call.names, refs, strict=True))
    key, value = _own(call, at["key"]), _own(call, at["value"])
    keys = {name: _column(call, at[name]) for name in OF_KEYS if name in at}
    needed = _needed(call, at, rows)

    def head(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(start: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            query, slope = (
                _tile(call, at[name], start, start, call.other_block, call.other, (index,))
                for name in ("query", "slope")
            )
            lse, shift = (_row(call, at[name], start, (index,)) for name in ("lse", "shift"))
            queries = {name: _row(call, at[name], start) for name in OF_QUERIES if name in at}
            scores = _dot(call, key, query, transposed=True) * (call.width**-0.5 * LOG2E)
            weights = jnp.exp2(_hidden(scores, queries, keys) - lse)
            slopes = weights * (_dot(call, value, slope, transposed=True) - shift)
            return (
                carry[0] + _dot(call, slopes.astype(query.dtype), query),
                carry[1] + _dot(call, weights.astype(slope.dtype), slope),
            )

        return _walk(call, needed, step, carry)

    nothing = jnp.zeros((call.own_block, call.padded_width), jnp.float32)
    of_key, of_value = jax.lax.fori_loop(0, at["query"].shape[0], head, (nothing, nothing))
    _put(call, at["key_gradient"], of_key * call.width**-0.5)
    _put(call, at["value_gradient"], of_value)
