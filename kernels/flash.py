"""Attention whose scores never reach memory: one kernel for GPUs (Triton) and TPUs (Mosaic), forward and backward.

A program of the grid owns one block of the queries of a head and walks over the blocks of keys that its queries may
read, keeping a running maximum and sum. The backward pass computes the scores again: once for blocks of queries, for
the gradient of the queries, and once for blocks of keys, for that of keys and values.

The functions here are not differentiable themselves; `jaxid.kernels.attention` joins `forward` and `backward`. They
follow the sharding of their operands over batch and heads, and under `jax.vmap` an operand without the mapped axis is
read where it lies, once for all. Inside, arrays have a leading axis V of such mapped rows, and query heads are split
into the K heads of the keys and the G that share each.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxid.kernels import masks
from jaxid.kernels.masks import Reads

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The log-sum-exp of a query that reads nothing: finite, so that differences of two of them are."""

_UNREAD = 1e30
"""Stands for that log-sum-exp in the backward pass, where exp(score - log-sum-exp) has to be 0."""

_LOG2E = math.log2(math.e)

_FEW = 128
"""Queries of a head up to which those of all heads that share a key head go through its keys together."""

_MOST_VMEM = 48 * 2**20
"""Of a TPU core's fast memory, for the blocks of a program; every TPU since v4 has more."""


class Target(NamedTuple):
    """Where a kernel runs.

    Attributes:
        platform: the compiler.
        interpret: runs the kernel as a JAX program, on any platform and slowly, which shows that its numbers are right.
    """

    platform: Literal["cuda", "tpu"]
    interpret: bool = False


class _Call(NamedTuple):
    """What a kernel has to know when it is traced.

    Attributes:
        target: where it runs.
        own: number of tokens of which every program owns a block.
        own_block: tokens in such a block.
        other: number of tokens over which it walks.
        other_block: tokens that it reads in one step.
        width: of a head.
        names: of the arrays, in their order.
    """

    target: Target
    own: int
    own_block: int
    other: int
    other_block: int
    width: int
    names: tuple[str, ...]

    @property
    def triton(self) -> bool:
        return self.target.platform == "cuda"

    @property
    def padded_width(self) -> int:
        """Triton's blocks are powers of two."""
        return pl.next_power_of_2(self.width) if self.triton else self.width

    @property
    def own_blocks(self) -> int:
        return pl.cdiv(self.own, self.own_block)

    @property
    def other_blocks(self) -> int:
        return pl.cdiv(self.other, self.other_block)

    @property
    def start(self) -> Any:
        """The first of the program's own tokens within the arrays that it sees: blocks on TPU, whole heads on GPU."""
        return pl.program_id(2) * self.own_block if self.triton else 0


# --- the kernels ------------------------------------------------------------------------------------------------------


def _tile(call: _Call, ref: Any, start: Any, first: Any, size: int, length: int, lead: tuple[Any, ...] = ()) -> Array:
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


def _own(call: _Call, ref: Any) -> Array:
    """The program's own rows."""
    return _tile(call, ref, call.start, pl.program_id(2) * call.own_block, call.own_block, call.own)


def _put(call: _Call, ref: Any, tile: Array) -> None:
    """Writes the program's own rows."""
    if not call.triton:
        ref[...] = tile.astype(ref.dtype)
        return
    rows, columns = call.start + jnp.arange(call.own_block), jnp.arange(call.padded_width)
    where = ref.at[pl.ds(call.start, call.own_block), pl.ds(0, call.padded_width)]
    mask = (rows < call.own)[:, None] & (columns < call.width)[None, :]
    plgpu.store(where, tile.astype(ref.dtype), mask=mask)


def _column(call: _Call, ref: Any) -> Array:
    """One number for each of the program's own tokens, as [size, 1]."""
    if call.triton:
        return ref[0, pl.ds(call.start, call.own_block)][:, None]
    return ref[...].reshape(call.own_block, 1)


def _row(call: _Call, ref: Any, start: Any, lead: tuple[Any, ...] = ()) -> Array:
    """One number for each of the tokens of a step, as [1, size]."""
    where = pl.ds(start, call.other_block)
    return ref[(*lead, 0, where)][None, :] if call.triton else ref[(*lead, slice(None), where)]


def _dot(call: _Call, a: Array, b: Array, *, transposed: bool = False) -> Array:
    """A @ b, or a @ b.T, in float32."""
    precision: Any = None
    if a.dtype == jnp.float32:
        # Three products on tensor cores come as near to float32 as Triton's exact form, which is many times slower.
        three = call.triton and not call.target.interpret
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if three else jax.lax.Precision.HIGHEST
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _needed(call: _Call, at: dict[str, Any], row: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The range of blocks of other tokens that the program's own tokens need."""
    if "bounds" not in at:
        return 0, call.other_blocks
    index = 2 * (row(pl.program_id(0)) * call.own_blocks + pl.program_id(2))
    return at["bounds"][index], at["bounds"][index + 1]


def _walk(call: _Call, needed: tuple[Any, Any], step: Callable[[Any, Any], Any], carry: Any) -> Any:
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


_OF_QUERIES, _OF_KEYS = ("high", "low", "span"), ("positions", "spans")


def _scores_of_queries(call: _Call, at: dict[str, Any], query: Array) -> Callable[[Array, Any], Array]:
    """A function from some keys and where they start to the scores of the program's own queries, in base 2."""
    queries = {name: _column(call, at[name]) for name in _OF_QUERIES if name in at}

    def scores(key: Array, start: Any) -> Array:
        found = _dot(call, query, key, transposed=True) * (call.width**-0.5 * _LOG2E)
        if not queries and call.other % call.other_block:
            index = start + jax.lax.broadcasted_iota(jnp.int32, (1, call.other_block), 1)
            return found + jnp.where(index < call.other, 0.0, LOWEST)
        return _hidden(found, queries, {name: _row(call, at[name], start) for name in _OF_KEYS if name in at})

    return scores


def _forward_kernel(call: _Call, row: Callable[[Any], Any], *refs: Any) -> None:
    """What a block of queries reads, and the log-sum-exp of their scores."""
    at = dict(zip(call.names, refs, strict=True))
    scores_of = _scores_of_queries(call, at, _own(call, at["query"]))

    def step(start: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        mixed, largest, total = carry
        key, value = (_tile(call, at[name], start, start, call.other_block, call.other) for name in ("key", "value"))
        scores = scores_of(key, start)
        higher = jnp.maximum(largest, scores.max(axis=1, keepdims=True))
        weights, shrink = jnp.exp2(scores - higher), jnp.exp2(largest - higher)
        mixed = mixed * shrink + _dot(call, weights.astype(value.dtype), value)
        return mixed, higher, total * shrink + weights.sum(axis=1, keepdims=True)

    size = call.own_block
    carry = jnp.zeros((size, call.padded_width)), jnp.full((size, 1), LOWEST), jnp.zeros((size, 1))
    carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), carry)
    mixed, largest, total = _walk(call, _needed(call, at, row), step, carry)
    reads = largest > LOWEST / 2
    _put(call, at["out"], jnp.where(reads, mixed / total, 0.0))
    lse = jnp.where(reads, (largest + jnp.log2(total)) / _LOG2E, LOWEST)
    if call.triton:
        at["lse"][0, pl.ds(call.start, size)] = lse.reshape(size)
    else:
        at["lse"][...] = lse.reshape(1, size)


def _query_kernel(call: _Call, row: Callable[[Any], Any], *refs: Any) -> None:
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
    gradient = _walk(call, _needed(call, at, row), step, gradient)
    _put(call, at["query_gradient"], gradient * call.width**-0.5)


def _key_kernel(call: _Call, row: Callable[[Any], Any], *refs: Any) -> None:
    """The gradients of a block of keys and of their values, from all query heads that share them."""
    at = dict(zip(call.names, refs, strict=True))
    key, value = _own(call, at["key"]), _own(call, at["value"])
    keys = {name: _column(call, at[name]) for name in _OF_KEYS if name in at}
    needed = _needed(call, at, row)

    def head(index: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        def step(start: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            query, slope = (
                _tile(call, at[name], start, start, call.other_block, call.other, (index,))
                for name in ("query", "slope")
            )
            lse, shift = (_row(call, at[name], start, (index,)) for name in ("lse", "shift"))
            queries = {name: _row(call, at[name], start) for name in _OF_QUERIES if name in at}
            scores = _dot(call, key, query, transposed=True) * (call.width**-0.5 * _LOG2E)
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


# --- their calls ------------------------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """The V mapped rows and B prompts of a call, which one axis of its grid counts."""

    mapped: int
    batch: int

    def of(self, operand: "_Rows") -> Callable[[Any], Any]:
        """From that count to the row of an operand that has fewer of either."""
        if operand == self:
            return lambda index: index
        if operand.mapped * operand.batch == 1:
            return lambda index: 0

        def row(index: Any) -> Any:
            mapped = jax.lax.rem(jax.lax.div(index, self.batch), operand.mapped)
            return mapped * operand.batch + jax.lax.rem(jax.lax.rem(index, self.batch), operand.batch)

        return row


class _Operand(NamedTuple):
    """An array of a kernel.

    Attributes:
        name: by which the kernel knows it.
        shape: [V, B, heads, tokens, E], with E of 1 for one number of each token.
        dtype: of the elements.
        own: whether the program sees its own tokens or those over which it walks.
        group: how many of its heads the program sees, one after another; 0 for a single one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    own: bool
    group: int = 0


def _block(call: _Call, rows: _Rows, heads: int, operand: _Operand) -> pl.BlockSpec:
    """Which part of an operand, as `_flat` reshapes it, a program sees."""
    row = rows.of(_Rows(*operand.shape[:2]))
    share = max(1, heads // operand.shape[2])
    mine = operand.own and not call.triton
    size, count = (call.own_block, call.own_blocks) if operand.own else (call.other_block, call.other_blocks)
    tokens = size if mine else size * count
    group = operand.group or None

    def index(i: Any, head: Any, block: Any, *_: Any) -> tuple[Any, ...]:
        place = 0 if operand.shape[2] == 1 else head if share == 1 or group else jax.lax.div(head, share)
        where = block if mine else 0
        return (row(i), place, 0, where) if operand.shape[4] == 1 else (row(i), place, where, 0)

    if operand.shape[4] == 1:
        return pl.BlockSpec((None, group, 1, tokens), index)
    return pl.BlockSpec((None, group, tokens, call.padded_width), index)


def _flat(call: _Call, operand: _Operand, array: Array | None = None) -> Any:
    """An operand with one axis of rows; numbers of tokens lie in the last axis, which fills the blocks."""
    mapped, batch, heads, tokens, width = operand.shape
    if width > 1:
        shape = (mapped * batch, heads, tokens, width)
        return jax.ShapeDtypeStruct(shape, operand.dtype) if array is None else array.reshape(shape)
    size, count = (call.own_block, call.own_blocks) if operand.own else (call.other_block, call.other_blocks)
    if array is None:
        return jax.ShapeDtypeStruct((mapped * batch, heads, 1, size * count), operand.dtype)
    return array.reshape(mapped * batch, heads, 1, size * count)


def _vmem(call: _Call, operands: Sequence[_Operand]) -> int:
    """Bytes of fast memory that a program needs on TPU: every block twice, and some tiles of scores."""
    total = 6 * 4 * call.own_block * call.other_block
    for operand in operands:
        tokens = call.own_block if operand.own else call.other_block * call.other_blocks
        width = max(8, pl.cdiv(operand.shape[4], 128) * 128) if operand.shape[4] > 1 else 8
        total += 2 * max(1, operand.group) * tokens * width * jnp.dtype(operand.dtype).itemsize
    return total


def _pallas(
    name: str,
    kernel: Callable[..., None],
    call: _Call,
    rows: _Rows,
    heads: int,
    operands: Sequence[tuple[_Operand, Array]],
    outputs: Sequence[_Operand],
    bounds: tuple[Array, Array] | None,
    flops: int,
) -> list[Array]:
    """Runs a kernel over rows, heads and blocks of own tokens."""
    inputs = [_flat(call, operand, array) for operand, array in operands]
    names = tuple(operand.name for operand in (*(operand for operand, _ in operands), *outputs))
    row: Callable[[Any], Any] = lambda index: index  # noqa: E731
    prefetched: list[Array] = []
    if bounds is not None:
        mask = next(operand for operand, _ in operands if operand.name == "positions")
        row, names = rows.of(_Rows(*mask.shape[:2])), ("bounds", *names)
        prefetched = [jnp.stack(bounds, axis=-1).reshape(-1)]
    grid = (rows.mapped * rows.batch, heads, call.own_blocks)
    in_specs = [_block(call, rows, heads, operand) for operand, _ in operands]
    out_specs = [_block(call, rows, heads, operand) for operand in outputs]
    shapes = [_flat(call, operand) for operand in outputs]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*inputs, *shapes))
    common: dict[str, Any] = {
        "out_shape": shapes,
        "name": name,
        "interpret": call.target.interpret,
        "cost_estimate": pl.CostEstimate(
            flops=flops, bytes_accessed=size, transcendentals=grid[0] * heads * call.own * call.other
        ),
    }
    kernel = functools.partial(kernel, call._replace(names=names), row)
    if call.triton:
        if prefetched:
            in_specs = [pl.BlockSpec(prefetched[0].shape, lambda *_: (0,)), *in_specs]
        wide = call.own_block * call.padded_width > 8192
        params = plgpu.CompilerParams(num_warps=8 if wide else 4, num_stages=2)
        run = pl.pallas_call(
            kernel, grid=grid, in_specs=in_specs, out_specs=out_specs, compiler_params=params, **common
        )
    else:
        needed = _vmem(call, [*(operand for operand, _ in operands), *outputs])
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=max(32 * 2**20, 3 * needed // 2)
        )
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched), grid=grid, in_specs=in_specs, out_specs=out_specs
        )
        run = pl.pallas_call(kernel, grid_spec=spec, compiler_params=params, **common)
    return list(run(*prefetched, *inputs))


def _even(length: int, most: int) -> int:
    """A multiple of 128 that leaves little of the last block empty; small blocks cost something each."""
    return min(range(128, most + 1, 128), key=lambda size: -(-length // size) * (size + 64))


def _sizes(target: Target, own: int, other: int, width: int, dtype: Any, *, backward: bool) -> tuple[int, int]:
    """Tokens in a program's own block, and in one step."""
    if target.platform == "tpu":
        return _even(own, 512), _even(other, 512)
    size = jnp.dtype(dtype).itemsize * max(64, pl.next_power_of_2(width))
    most, walk = (128, 64) if size <= 256 and not backward else (64, 32) if size <= 512 else (32, 32)
    return max(16, min(most, pl.next_power_of_2(own))), max(16, min(walk, pl.next_power_of_2(other)))


def _mask_operands(
    call: _Call, reads: Reads | None, *, by_key: bool
) -> tuple[list[tuple[_Operand, Array]], tuple[Array, Array] | None]:
    """The integers of a mask, which fill their blocks, and which blocks each of the program's own needs."""
    if reads is None:
        return [], None
    sizes = {True: call.own_block * call.own_blocks, False: call.other_block * call.other_blocks}
    # A query without a span must not meet the keys without one.
    span = None if reads.span is None else jnp.where(reads.span < 0, -2, reads.span)
    reads = reads._replace(span=span)
    least = int(jnp.iinfo(jnp.int32).min)
    outside = {"high": least, "low": masks.NEVER, "span": -2, "positions": masks.NEVER, "spans": -1}
    filled: dict[str, Any] = {}
    operands = []
    for name in (*_OF_QUERIES, *_OF_KEYS):
        leaf = getattr(reads, name)
        if leaf is None:
            continue
        own = (name in _OF_KEYS) == by_key
        missing = sizes[own] - leaf.shape[2]
        leaf = jnp.pad(leaf, ((0, 0), (0, 0), (0, missing)), constant_values=outside[name])
        operands.append((_Operand(name, (*leaf.shape[:2], 1, leaf.shape[2], 1), jnp.int32, own), leaf))
        filled[name] = leaf.reshape(-1, leaf.shape[2])
    own_block, other_block = (call.other_block, call.own_block) if by_key else (call.own_block, call.other_block)
    return operands, masks.blocks(Reads(**filled), own_block, other_block, by_key=by_key)


def _numbers(call: _Call, name: str, array: Array, *, own: bool, outside: float, group: int = 0) -> Any:
    """An operand of one number for each token and head, which fills its blocks."""
    tokens = call.own_block * call.own_blocks if own else call.other_block * call.other_blocks
    padding = [(0, 0)] * (array.ndim - 1) + [(0, tokens - array.shape[-1])]
    array = jnp.pad(array, padding, constant_values=outside)
    return _Operand(name, (*array.shape, 1), jnp.float32, own, group), array


def _heads(name: str, array: Array, *, own: bool, group: int = 0) -> tuple[_Operand, Array]:
    return _Operand(name, array.shape, array.dtype, own, group), array


def _merged(array: Array) -> Array:
    """[V, B, K, G, ...] as [V, B, H, ...]."""
    return array.reshape(*array.shape[:2], -1, *array.shape[4:])


def _rows_of(query: Array, *others: Array) -> _Rows:
    leading = [array.shape[:2] for array in (query, *others)]
    return _Rows(max(shape[0] for shape in leading), max(shape[1] for shape in leading))


def _run_forward(
    target: Target, dtype: Any, query: Array, key: Array, value: Array, reads: Reads | None
) -> tuple[Array, Array]:
    """`forward` on the part of the arrays that one device holds."""
    rows = _rows_of(query, key, value, *(() if reads is None else reads.leaves()))
    shape, (length, width) = query.shape, query.shape[4:]
    if shape[3] > 1 and length <= _FEW:
        query, length = query.reshape(*shape[:3], 1, -1, width), shape[3] * length
        if reads is not None:
            tiled = {
                name: jnp.tile(leaf, shape[3]) for name in _OF_QUERIES if (leaf := getattr(reads, name)) is not None
            }
            reads = reads._replace(**tiled)
    query = _merged(query)
    heads, keys = query.shape[2], key.shape[3]
    own, other = _sizes(target, length, keys, width, query.dtype, backward=False)
    call = _Call(target, length, own, keys, other, width, ())
    masked, bounds = _mask_operands(call, reads, by_key=False)
    out, lse = _pallas(
        "attention_forward",
        _forward_kernel,
        call,
        rows,
        heads,
        [*masked, _heads("query", query, own=True), _heads("key", key, own=False), _heads("value", value, own=False)],
        [
            _Operand("out", (*rows, heads, length, width), dtype, True),
            _Operand("lse", (*rows, heads, length, 1), jnp.float32, True),
        ],
        bounds,
        4 * rows.mapped * rows.batch * heads * length * keys * width,
    )
    return out.reshape(*rows, *shape[2:]), lse[..., 0, :length].reshape(*rows, *shape[2:5])


def _run_backward(
    target: Target, query: Array, key: Array, value: Array, slope: Array, lse: Array, shift: Array, reads: Reads | None
) -> tuple[Array, Array, Array]:
    """`backward` on the part of the arrays that one device holds."""
    rows = _rows_of(query, key, value, slope, *(() if reads is None else reads.leaves()))
    shape, (length, width) = query.shape, query.shape[4:]
    query, slope, lse, shift = (_merged(array) for array in (query, slope, lse, shift))
    heads, kv_heads, keys, group = query.shape[2], key.shape[2], key.shape[3], shape[3]
    flops = rows.mapped * rows.batch * heads * length * keys * width

    own, other = _sizes(target, length, keys, width, query.dtype, backward=True)
    call = _Call(target, length, own, keys, other, width, ())
    masked, bounds = _mask_operands(call, reads, by_key=False)
    (of_query,) = _pallas(
        "attention_query_gradient",
        _query_kernel,
        call,
        rows,
        heads,
        [
            *masked,
            *(_heads(name, array, own=True) for name, array in (("query", query), ("slope", slope))),
            *(_heads(name, array, own=False) for name, array in (("key", key), ("value", value))),
            _numbers(call, "lse", lse, own=True, outside=_UNREAD),
            _numbers(call, "shift", shift, own=True, outside=0.0),
        ],
        [_Operand("query_gradient", (*rows, heads, length, width), query.dtype, True)],
        bounds,
        6 * flops,
    )

    own, other = _sizes(target, keys, length, width, query.dtype, backward=True)
    call = _Call(target, keys, own, length, other, width, ())
    masked, bounds = _mask_operands(call, reads, by_key=True)
    of_key, of_value = _pallas(
        "attention_key_gradient",
        _key_kernel,
        call,
        rows,
        kv_heads,
        [
            *masked,
            *(_heads(name, array, own=False, group=group) for name, array in (("query", query), ("slope", slope))),
            *(_heads(name, array, own=True) for name, array in (("key", key), ("value", value))),
            _numbers(call, "lse", lse, own=False, outside=_UNREAD, group=group),
            _numbers(call, "shift", shift, own=False, outside=0.0, group=group),
        ],
        [
            _Operand("key_gradient", (*rows, kv_heads, keys, width), key.dtype, True),
            _Operand("value_gradient", (*rows, kv_heads, keys, width), value.dtype, True),
        ],
        bounds,
        8 * flops,
    )
    of_keys = (leaf.reshape(*rows, kv_heads, keys, width) for leaf in (of_key, of_value))
    return of_query.reshape(*rows, *shape[2:]), *of_keys


def takes(target: Target, query: Sequence[int], key: Sequence[int], dtype: Any) -> bool:
    """Whether the kernel is made for heads of that width and type, and a TPU's fast memory holds the keys of a head."""
    dtype, width = jnp.dtype(dtype), query[3]
    if dtype not in (jnp.float32, jnp.bfloat16) and (target.platform == "tpu" or dtype != jnp.float16):
        return False
    if width % 8 or not 16 <= width <= 256:
        return False
    if target.platform == "cuda":
        return True
    padded, group = pl.cdiv(width, 128) * 128, query[1] // key[1]
    return 4 * padded * dtype.itemsize * max(key[2], group * query[2]) <= _MOST_VMEM


# --- over devices and mapped axes -------------------------------------------------------------------------------------


def _partitioned(run: Callable[..., Any], letters: Sequence[str], results: Sequence[str]) -> Callable[..., Any]:
    """Lets every device run its share of the rows and heads.

    Args:
        run: the function of one device's arrays.
        letters: a letter for each axis of each operand: v, b, k and g may be divided among devices.
        results: the same for the outputs.
    """

    def sizes(shapes: Sequence[Any]) -> dict[str, int]:
        """The size of every axis; operands with fewer rows do not take part in dividing them."""
        found: dict[str, int] = {}
        for names, shape in zip(letters, shapes, strict=True):
            for letter, size in zip(names, shape, strict=True):
                found[letter] = max(size, found.get(letter, 1))
        return found

    def named(shapes: Sequence[Any], operands: Sequence[str]) -> list[str]:
        whole, said = sizes(shapes[: len(letters)]), []
        for number, (names, shape) in enumerate(zip(operands, shapes[-len(operands) :], strict=True)):
            said.append(
                " ".join(
                    letter if size == whole[letter] else f"{letter}{number}x"
                    for letter, size in zip(names, shape, strict=True)
                )
            )
        return said

    def rule(mesh: Any, operands: Sequence[Any], outputs: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        shapes = [tuple(operand.shape) for operand in operands]
        inputs = named(shapes, letters)
        text = ", ".join(inputs) + " -> " + ", ".join(" ".join(names) for names in results)
        factors = dict.fromkeys(" ".join(inputs).replace(",", " ").split())
        fixed = tuple(name for name in factors if name not in ("v", "b", "k", "g"))
        return text, {"need_replication_factors": fixed}

    def partition(mesh: Any, operands: Sequence[Any], outputs: Sequence[Any]) -> Any:
        whole = sizes([operand.shape for operand in operands])
        spec = (*operands[0].sharding.spec, *(None,) * len(letters[0]))
        axes = dict(zip("vbkg" if "g" in results[-1] else "vbk", spec, strict=False))

        def divides(letter: str) -> bool:
            entry = axes.get(letter)
            names = () if entry is None else (entry,) if isinstance(entry, str) else entry
            return whole[letter] % math.prod(mesh.shape[name] for name in names) == 0

        def placed(names: str, shape: Sequence[int]) -> NamedSharding:
            entries = [
                axes.get(letter) if size == whole[letter] and divides(letter) else None
                for letter, size in zip(names, shape, strict=True)
            ]
            return NamedSharding(mesh, PartitionSpec(*entries))

        inputs = tuple(placed(names, operand.shape) for names, operand in zip(letters, operands, strict=True))
        out = tuple(placed(names, output.shape) for names, output in zip(results, outputs, strict=True))
        return mesh, run, out, inputs

    divided = custom_partitioning(run)
    divided.def_partition(partition=partition, sharding_rule=rule)
    return divided


def _mapped(run: Callable[..., Any]) -> Callable[..., Any]:
    """Folds an axis mapped by `jax.vmap` into the first axis of every operand that has it."""
    mapped = custom_vmap(run)

    @mapped.def_vmap
    def fold(size: int, batched: Sequence[bool], *operands: Array) -> tuple[Any, Any]:
        rows = max(
            operand.shape[1] if here else operand.shape[0] for operand, here in zip(operands, batched, strict=True)
        )

        def folded(operand: Array, here: bool) -> Array:
            if not here:
                return operand
            operand = jnp.broadcast_to(operand, (size, rows, *operand.shape[2:]))
            return operand.reshape(size * rows, *operand.shape[2:])

        outputs = mapped(*(folded(operand, here) for operand, here in zip(operands, batched, strict=True)))
        unfolded = tuple(output.reshape(size, rows, *output.shape[1:]) for output in outputs)
        return unfolded, tuple(True for _ in outputs)

    return mapped


@functools.cache
def _everywhere(kind: str, target: Target, names: tuple[str, ...], dtype: Any) -> Callable[..., Any]:
    """The function of flat operands: heads, numbers, and the arrays of a mask by their names."""
    heads, key, numbers = "vbkgse", "vbkte", "vbkgs"
    letters = [heads, key, key, *(() if kind == "forward" else (heads, numbers, numbers))]
    count = len(letters)
    letters += ["vbs" if name in _OF_QUERIES else "vbt" for name in names]

    def run(*operands: Array) -> tuple[Array, ...]:
        reads = Reads(**dict(zip(names, operands[count:], strict=True))) if names else None
        if kind == "forward":
            query, key, value = operands[:count]
            return _run_forward(target, dtype, query, key, value, reads)
        query, key, value, slope, lse, shift = operands[:count]
        return _run_backward(target, query, key, value, slope, lse, shift, reads)

    return _mapped(_partitioned(run, letters, [heads, numbers] if kind == "forward" else [heads, key, key]))


def _named(reads: Reads | None, length: int) -> tuple[tuple[str, ...], list[Array]]:
    """The arrays of a mask, of as many queries and prompts each."""
    if reads is None:
        return (), []
    batch = max(leaf.shape[0] for leaf in reads.leaves())
    sizes = dict.fromkeys(_OF_QUERIES, length) | dict.fromkeys(_OF_KEYS, reads.positions.shape[1])
    present = {
        name: jnp.broadcast_to(leaf, (1, batch, sizes[name]))
        for name, leaf in reads._asdict().items()
        if leaf is not None
    }
    return tuple(present), list(present.values())


def _grouped(array: Float[Array, "B H *rest"], kv_heads: int) -> Float[Array, "1 B K G *rest"]:
    return array.reshape(1, array.shape[0], kv_heads, -1, *array.shape[2:])


def forward(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B K T E"],
    value: Float[Array, "B K T E"],
    reads: Reads | None,
    target: Target,
    dtype: Any = None,
) -> tuple[Float[Array, "B H S E"], Float[Array, "B H S"]]:
    """What the queries read, and the log-sum-exps of their scores in float32.

    Args:
        query: the queries, not yet scaled; H / K of them share each key head.
        key: the keys.
        value: the values.
        reads: which keys each query may read; None for all of them.
        target: where to run.
        dtype: of what is read; that of the values if None.

    Returns:
        What the queries read, and the log-sum-exps: 0 and `LOWEST` for a query that may read nothing.
    """
    names, leaves = _named(reads, query.shape[2])
    run = _everywhere("forward", target, names, jnp.dtype(value.dtype if dtype is None else dtype))
    out, lse = run(_grouped(query, key.shape[1]), key[None], value[None], *leaves)
    return out.reshape(query.shape), lse.reshape(query.shape[:3])


def backward(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B K T E"],
    value: Float[Array, "B K T E"],
    reads: Reads | None,
    target: Target,
    out: Float[Array, "B H S E"],
    lse: Float[Array, "B H S"],
    out_slope: Float[Array, "B H S E"],
    lse_slope: Float[Array, "B H S"],
) -> tuple[Float[Array, "B H S E"], Float[Array, "B K T E"], Float[Array, "B K T E"]]:
    """The gradients of query, key and value, from those of both results of `forward`."""
    names, leaves = _named(reads, query.shape[2])
    shift = (out.astype(jnp.float32) * out_slope.astype(jnp.float32)).sum(axis=-1) - lse_slope
    base2 = jnp.where(lse < LOWEST / 2, _UNREAD, lse * _LOG2E)
    slope = out_slope.astype(value.dtype)
    per_query = (_grouped(array, key.shape[1]) for array in (slope, base2, shift))
    run = _everywhere("backward", target, names, None)
    of_query, of_key, of_value = run(_grouped(query, key.shape[1]), key[None], value[None], *per_query, *leaves)
    return of_query.reshape(query.shape), of_key.reshape(key.shape), of_value.reshape(value.shape)
