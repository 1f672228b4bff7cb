"""Attention whose scores never reach memory: one kernel for GPUs (Triton) and TPUs (Mosaic), forward and backward.

The functions here are not differentiable themselves; `jaxid.kernels.attention` joins `forward` and `backward`. The
kernels (`jaxid.kernels.blocks`) run on all devices that hold the arrays, and under `jax.vmap` an operand without the
mapped axis is read where it lies, once for all (`jaxid.kernels.spread`). So are one layer's keys and values in a stack.
Inside, arrays have a leading axis V of such mapped rows, and query heads are split into the K heads of the keys and the
G that share each.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from jaxid.kernels import masks
from jaxid.kernels.blocks import (
    LOG2E,
    LOWEST,
    OF_KEYS,
    OF_QUERIES,
    PROGRAMS,
    UNREAD,
    Call,
    GridRows,
    RowOf,
    Target,
    forward_kernel,
    key_kernel,
    query_kernel,
    sizes,
)
from jaxid.kernels.masks import Reads
from jaxid.kernels.parts import Part, joined
from jaxid.kernels.spread import Kernel, spread, varying

_FEW = 128
"""Queries of a head up to which those of all heads that share a key head go through its keys together."""

_MOST_VMEM = 48 * 2**20
"""Of a TPU core's fast memory, for the blocks of a program; every TPU since v5 has more."""


class Stacks(NamedTuple):
    """Where one layer's keys and values lie among those of all layers, of N tokens or more than are read."""

    keys: Float[Array, "L B K N E"]
    values: Float[Array, "L B K N E"]
    index: Int[Array, ""]


class _Operand(NamedTuple):
    """An array of a kernel.

    Attributes:
        name: by which the kernel knows it.
        shape: [V, B, heads, tokens, E], with E of 1 for one number of each token.
        dtype: of the elements.
        own: whether the program sees its own tokens or those over which it walks.
        group: how many of its heads the program sees, one after another; 0 for a single one.
        layers: how many of them lie one after another in every mapped row, [V, L, B, ...]; 0 if it is not a stack.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    own: bool
    group: int = 0
    layers: int = 0


def _block(call: Call, rows: GridRows, heads: int, operand: _Operand) -> pl.BlockSpec:
    """Which part of an operand, as `_flat` reshapes it, a program sees."""
    row = rows.of(GridRows(*operand.shape[:2]))
    share = max(1, heads // operand.shape[2])
    mine = operand.own and not call.triton
    tokens = call.own_block if mine else call.filled(operand.own)
    group = operand.group or None

    def index(i: Any, head: Any, block: Any, *_: Any) -> tuple[Any, ...]:
        place = 0 if operand.shape[2] == 1 else head if share == 1 or group else jax.lax.div(head, share)
        where = block if mine else 0
        if operand.shape[2] == call.splits * heads > heads:
            place = head * call.splits + block
        return (row(i), place, 0, where) if operand.shape[4] == 1 else (row(i), place, where, 0)

    if operand.shape[4] == 1:
        return pl.BlockSpec((None, group, 1, tokens), index)
    return pl.BlockSpec((None, group, tokens, call.padded_width), index)


def _stacked_block(call: Call, rows: GridRows, heads: int, operand: _Operand, layer_of: RowOf) -> pl.BlockSpec:
    """The same for a stack: the layer on TPU; all of them on GPU, where the kernel selects its own."""
    mapped, batch, kv_heads = operand.shape[:3]
    row, stack, share = rows.of(GridRows(mapped, batch)), rows.of(GridRows(mapped, 1)), heads // kv_heads

    def index(i: Any, head: Any, block: Any, *refs: Any) -> tuple[Any, ...]:
        del block
        layer = 0 if call.triton else refs[-1][layer_of(i)]
        prompt = jax.lax.rem(row(i), batch) if batch > 1 else 0
        return (stack(i), layer, prompt, head if share == 1 else jax.lax.div(head, share), 0, 0)

    layers = operand.layers if call.triton else None
    return pl.BlockSpec((None, layers, None, None, call.filled(False), call.padded_width), index)


def _flat(call: Call, operand: _Operand) -> jax.ShapeDtypeStruct:
    """An operand with one axis of rows; numbers of tokens lie in the last axis, which fills the blocks."""
    mapped, batch, heads, tokens, width = operand.shape
    if operand.layers:
        return jax.ShapeDtypeStruct((mapped, operand.layers, batch, heads, tokens, width), operand.dtype)
    last = (tokens, width) if width > 1 else (1, call.filled(operand.own))
    return jax.ShapeDtypeStruct((mapped * batch, heads, *last), operand.dtype)


def _vmem(call: Call, operands: Sequence[_Operand]) -> int:
    """Bytes of fast memory that a program needs on TPU: every block twice, and some tiles of scores."""
    total = 6 * 4 * call.own_block * call.other_block
    for operand in operands:
        tokens = call.own_block if operand.own else call.filled(False)
        width = max(8, pl.cdiv(operand.shape[4], 128) * 128) if operand.shape[4] > 1 else 8
        total += 2 * max(1, operand.group) * tokens * width * jnp.dtype(operand.dtype).itemsize
    return total


def _pallas(
    name: str,
    kernel: Callable[..., None],
    call: Call,
    rows: GridRows,
    heads: int,
    reads: Reads | None,
    operands: Sequence[tuple[_Operand, Array]],
    outputs: Sequence[_Operand],
    flops: int,
    *,
    by_key: bool = False,
    layers: Array | None = None,
) -> list[Array]:
    """Runs a kernel over rows, heads and blocks of own tokens, which are keys if `by_key` is true.

    Of stacked operands, every mapped row reads the layer that `layers` tells.
    """
    masked, bounds = _mask_operands(call, reads, by_key=by_key)
    operands = [*masked, *operands]
    inputs = [array.reshape(_flat(call, operand).shape) for operand, array in operands]
    names = tuple(operand.name for operand in (*(operand for operand, _ in operands), *outputs))
    prefetched: dict[str, Array] = {}
    rows_of: dict[str, RowOf] = {}
    if bounds is not None:
        prefetched["bounds"] = jnp.stack(bounds, axis=-1).reshape(-1)
        rows_of["bounds"] = rows.of(GridRows(*masked[0][0].shape[:2]))
    if layers is not None:  # comes last, where `_stacked_block` looks for it
        prefetched["layers"], rows_of["layers"] = layers, rows.of(GridRows(layers.shape[0], 1))
    grid = (rows.mapped * rows.batch, heads, call.own_blocks * call.splits)
    block = functools.partial(_block, call, rows, heads)
    in_specs = [
        _stacked_block(call, rows, heads, operand, rows_of["layers"]) if operand.layers else block(operand)
        for operand, _ in operands
    ]
    out_specs = [block(operand) for operand in outputs]
    kinds = varying(*(jax.typeof(array) for array in (*prefetched.values(), *inputs)))
    shapes = [_flat(call, operand).update(**kinds) for operand in outputs]
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in (*inputs, *shapes))
    size -= sum(array.nbytes // operand.layers * (operand.layers - 1) for operand, array in operands if operand.layers)
    common: dict[str, Any] = {
        "out_shape": shapes,
        "name": name,
        "interpret": call.target.interpret,
        "cost_estimate": pl.CostEstimate(
            flops=flops, bytes_accessed=size, transcendentals=grid[0] * heads * call.own * call.other
        ),
    }
    kernel = functools.partial(kernel, call._replace(names=(*prefetched, *names)), rows_of)
    if call.triton:
        whole = [pl.BlockSpec(array.shape, lambda *_: (0,)) for array in prefetched.values()]
        wide = call.own_block * call.padded_width > 8192
        params = plgpu.CompilerParams(num_warps=8 if wide else 4, num_stages=2)
        run = pl.pallas_call(
            kernel, grid=grid, in_specs=[*whole, *in_specs], out_specs=out_specs, compiler_params=params, **common
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
    return list(run(*prefetched.values(), *inputs))


def _call(target: Target, own: int, other: int, query: Array, *, backward: bool) -> Call:
    """A call for the heads of some queries, of which programs own blocks of `own` tokens and walk over `other`."""
    width = query.shape[-1]
    own_block, other_block = sizes(target, own, other, width, query.dtype, backward=backward)
    return Call(target, own, own_block, other, other_block, width, ())


def _mask_operands(
    call: Call, reads: Reads | None, *, by_key: bool
) -> tuple[list[tuple[_Operand, Array]], tuple[Array, Array] | None]:
    """The integers of a mask, which fill their blocks, and which blocks each of the program's own needs."""
    if reads is None:
        return [], None
    # A query without a span must not meet the keys without one.
    span = None if reads.span is None else jnp.where(reads.span < 0, -2, reads.span)
    reads = reads._replace(span=span)
    least, rows = int(jnp.iinfo(jnp.int32).min), max(leaf.shape[0] for leaf in reads.leaves())
    outside = {"high": least, "low": masks.NEVER, "span": -2, "positions": masks.NEVER, "spans": -1}
    filled: dict[str, Any] = {}
    operands = []
    for name in (*OF_QUERIES, *OF_KEYS):
        leaf = getattr(reads, name)
        if leaf is None:
            continue
        own = (name in OF_KEYS) == by_key
        missing = call.filled(own) - leaf.shape[2]
        leaf = jnp.tile(leaf, (rows // leaf.shape[0], 1, 1))
        leaf = jnp.pad(leaf, ((0, 0), (0, 0), (0, missing)), constant_values=outside[name])
        operands.append((_Operand(name, (*leaf.shape[:2], 1, leaf.shape[2], 1), jnp.int32, own), leaf))
        filled[name] = leaf.reshape(-1, leaf.shape[2])
    query_block, key_block = (call.other_block, call.own_block) if by_key else (call.own_block, call.other_block)
    return operands, masks.blocks(Reads(**filled), query_block, key_block, by_key=by_key)


def _numbers(
    call: Call, name: str, array: Array, *, own: bool, outside: float, group: int = 0
) -> tuple[_Operand, Array]:
    """An operand of one number for each token and head, which fills its blocks."""
    padding = [(0, 0)] * (array.ndim - 1) + [(0, call.filled(own) - array.shape[-1])]
    array = jnp.pad(array, padding, constant_values=outside)
    return _Operand(name, (*array.shape, 1), jnp.float32, own, group), array


def _heads(name: str, array: Array, *, own: bool, group: int = 0) -> tuple[_Operand, Array]:
    if array.ndim == 6:
        mapped, layers, *rest = array.shape
        return _Operand(name, (mapped, *rest), array.dtype, own, group, layers), array
    return _Operand(name, array.shape, array.dtype, own, group), array


def _merged(array: Array) -> Array:
    """[V, B, K, G, ...] as [V, B, H, ...]."""
    return array.reshape(*array.shape[:2], -1, *array.shape[4:])


def _rows_of(query: Array, *others: Array) -> GridRows:
    leading = [array.shape[:2] for array in (query, *others)]
    return GridRows(max(shape[0] for shape in leading), max(shape[1] for shape in leading))


def _run_forward(
    target: Target,
    dtype: Any,
    query: Array,
    key: Array,
    value: Array,
    reads: Reads | None,
    keys: int,
    layers: Array | None = None,
) -> tuple[Array, Array]:
    """`forward` on the part of the arrays that one device holds; of stacks, the first `keys` tokens of some layer."""
    sources = (key, value) if layers is None else (key[:, 0], value[:, 0], layers[:, None])
    rows = _rows_of(query, *sources, *(() if reads is None else reads.leaves()))
    shape, (length, width) = query.shape, query.shape[4:]
    if shape[3] > 1 and length <= _FEW:
        query, length = query.reshape(*shape[:3], 1, -1, width), shape[3] * length
        if reads is not None:
            tiled = {
                name: jnp.tile(leaf, shape[3]) for name in OF_QUERIES if (leaf := getattr(reads, name)) is not None
            }
            reads = reads._replace(**tiled)
    query = _merged(query)
    heads = query.shape[2]
    call = _call(target, length, keys, query, backward=False)
    splits = _splits(call, rows.mapped * rows.batch * heads)
    out, lse = _pallas(
        "attention_forward",
        forward_kernel,
        call._replace(splits=splits),
        rows,
        heads,
        reads,
        [_heads("query", query, own=True), _heads("key", key, own=False), _heads("value", value, own=False)],
        [
            _Operand("out", (*rows, heads * splits, length, width), dtype if splits == 1 else jnp.float32, True),
            _Operand("lse", (*rows, heads * splits, length, 1), jnp.float32, True),
        ],
        4 * rows.mapped * rows.batch * heads * length * keys * width,
        layers=layers,
    )
    lse = lse[..., 0, :length]
    if splits > 1:
        parts = (leaf.reshape(-1, heads, splits, *leaf.shape[2:]) for leaf in (out, lse))
        out, lse = joined(Part(*parts), axis=2)
    return out.astype(dtype).reshape(*rows, *shape[2:]), lse.reshape(*rows, *shape[2:5])


def _splits(call: Call, programs: int) -> int:
    """How many programs share the keys of the same few queries, which would else leave most of a GPU idle."""
    if not call.triton or call.own_blocks > 1:
        return 1
    return max(1, min(PROGRAMS // programs, call.other_blocks // 2))


def _run_backward(
    target: Target, query: Array, key: Array, value: Array, slope: Array, lse: Array, shift: Array, reads: Reads | None
) -> tuple[Array, Array, Array]:
    """`backward` on the part of the arrays that one device holds."""
    rows = _rows_of(query, key, value, slope, *(() if reads is None else reads.leaves()))
    shape, (length, width) = query.shape, query.shape[4:]
    query, slope, lse, shift = (_merged(array) for array in (query, slope, lse, shift))
    heads, kv_heads, keys, group = query.shape[2], key.shape[2], key.shape[3], shape[3]
    of_keys = (*rows, kv_heads, keys, width)
    flops = rows.mapped * rows.batch * heads * length * keys * width

    call = _call(target, length, keys, query, backward=True)
    (of_query,) = _pallas(
        "attention_query_gradient",
        query_kernel,
        call,
        rows,
        heads,
        reads,
        [
            *(_heads(name, array, own=True) for name, array in (("query", query), ("slope", slope))),
            *(_heads(name, array, own=False) for name, array in (("key", key), ("value", value))),
            _numbers(call, "lse", lse, own=True, outside=UNREAD),
            _numbers(call, "shift", shift, own=True, outside=0.0),
        ],
        [_Operand("query_gradient", (*rows, heads, length, width), query.dtype, True)],
        6 * flops,
    )

    call = _call(target, keys, length, query, backward=True)
    of_key, of_value = _pallas(
        "attention_key_gradient",
        key_kernel,
        call,
        rows,
        kv_heads,
        reads,
        [
            *(_heads(name, array, own=False, group=group) for name, array in (("query", query), ("slope", slope))),
            *(_heads(name, array, own=True) for name, array in (("key", key), ("value", value))),
            _numbers(call, "lse", lse, own=False, outside=UNREAD, group=group),
            _numbers(call, "shift", shift, own=False, outside=0.0, group=group),
        ],
        [
            _Operand("key_gradient", of_keys, key.dtype, True),
            _Operand("value_gradient", of_keys, value.dtype, True),
        ],
        8 * flops,
        by_key=True,
    )
    return of_query.reshape(*rows, *shape[2:]), of_key.reshape(of_keys), of_value.reshape(of_keys)


def _modern(platform: str) -> bool:
    """Whether the devices here, if there are any, run the kernel: GPUs since Ampere do, and TPUs since v5."""
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        return True
    if platform == "tpu":
        return not any(device.device_kind.startswith(("TPU v2", "TPU v3", "TPU v4")) for device in devices)
    return all(float(device.compute_capability) >= 8 for device in devices)


def takes(target: Target, query: Sequence[int], key: Sequence[int], dtype: Any) -> bool:
    """Whether the kernel is made for heads of that width and type, and for the devices that there are.

    A TPU's fast memory has to hold the keys of a head, and the queries of all heads that share it.
    """
    dtype, width = jnp.dtype(dtype), query[3]
    if dtype not in (jnp.float32, jnp.bfloat16) and (target.platform == "tpu" or dtype != jnp.float16):
        return False
    if width % 8 or not 16 <= width <= 256 or not _modern(target.platform):
        return False
    if target.platform == "cuda":
        return True
    padded, group = pl.cdiv(width, 128) * 128, query[1] // key[1]
    return 4 * padded * dtype.itemsize * max(key[2], group * query[2]) <= _MOST_VMEM


# --- whole arrays -----------------------------------------------------------------------------------------------------


@functools.cache
def _everywhere(
    kind: str, target: Target, names: tuple[str, ...], dtypes: tuple[Any, ...], keys: int = 0
) -> Callable[..., tuple[Array, ...]]:
    """The function of heads, numbers, and the arrays of a mask by their names.

    If `keys` is not 0, it is one of queries, stacks, the layer and those arrays, which reads that many keys.
    """
    heads, key, numbers, stack = "vbkgse", "vbkte", "vbkgs", "vlbkne"
    letters = (heads, key, key) if kind == "forward" else (heads, key, key, heads, numbers, numbers)
    if keys:
        letters = (heads, stack, stack, "v")
    count = len(letters)

    def run(*operands: Array) -> tuple[Array, ...]:
        reads = Reads(**dict(zip(names, operands[count:], strict=True))) if names else None
        if kind == "forward":
            query, key, value, *layers = operands[:count]
            return _run_forward(target, dtypes[0], query, key, value, reads, keys or key.shape[3], *layers)
        query, key, value, slope, lse, shift = operands[:count]
        return _run_backward(target, query, key, value, slope, lse, shift, reads)

    letters += tuple("vbs" if name in OF_QUERIES else "vbt" for name in names)
    results = (heads, numbers) if kind == "forward" else (heads, key, key)
    return spread(Kernel(run, letters, results, dtypes))


def _named(reads: Reads | None, length: int) -> tuple[tuple[str, ...], list[Array]]:
    """The arrays of a mask, of as many queries and prompts each."""
    if reads is None:
        return (), []
    batch = max(leaf.shape[0] for leaf in reads.leaves())
    sizes = dict.fromkeys(OF_QUERIES, length) | dict.fromkeys(OF_KEYS, reads.positions.shape[1])
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
    dtype: Any,
    stacks: Stacks | None = None,
) -> tuple[Float[Array, "B H S E"], Float[Array, "B H S"]]:
    """What the queries read, and the log-sum-exps of their scores in float32.

    Args:
        query: the queries, not yet scaled; H / K of them share each key head.
        key: the keys.
        value: the values.
        reads: which keys each query may read; None for all of them.
        target: where to run.
        dtype: of what is read.
        stacks: where keys and values are read; `key` and `value` are then not.

    Returns:
        What the queries read, and the log-sum-exps: 0 and `LOWEST` for a query that may read nothing.
    """
    names, leaves = _named(reads, query.shape[2])
    dtypes, query_heads = (jnp.dtype(dtype), jnp.dtype(jnp.float32)), _grouped(query, key.shape[1])
    if stacks is not None:
        run = _everywhere("forward", target, names, dtypes, key.shape[2])
        out, lse = run(query_heads, stacks.keys[None], stacks.values[None], stacks.index[None], *leaves)
    else:
        run = _everywhere("forward", target, names, dtypes)
        out, lse = run(query_heads, key[None], value[None], *leaves)
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
    base2 = jnp.where(lse < LOWEST / 2, UNREAD, lse * LOG2E)
    slope = out_slope.astype(value.dtype)
    per_query = (_grouped(array, key.shape[1]) for array in (slope, base2, shift))
    run = _everywhere("backward", target, names, (query.dtype, key.dtype, value.dtype))
    of_query, of_key, of_value = run(_grouped(query, key.shape[1]), key[None], value[None], *per_query, *leaves)
    return of_query.reshape(query.shape), of_key.reshape(key.shape), of_value.reshape(value.shape)
