"""Products with one layer's matrix of a stack [L, K, N], which GPUs read where it lies.

XLA's loops over layers slice a layer's matrix out of the stack. On TPU a slice becomes part of its product. On GPU it
does not: cuBLAS takes whole arrays, so every matrix would be copied before it is read. There, 16-bit matrices go
through a kernel that adds the layer's offset itself, and so does the gradient with respect to the input. The gradient
with respect to the matrix belongs to the slice, of which a scan makes the gradient of the stack.

The two products that a gated MLP begins with are one kernel there, so that what they make is never in memory apart.

Inputs may have several axes before the last. Where devices divide one of them, they must not be joined outside.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.layout import Layout, with_layout_constraint
from jax.experimental.pallas import triton as plgpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from jaxid.kernels.blocks import PROGRAMS
from jaxid.kernels.spread import HEADS_AXIS
from jaxid.kernels.stacks import LayerSlice

PRODUCT = "product"
"""Name by which `jax.checkpoint` knows the results of products."""

Activation = Callable[[Array], Array]
"""A function of every number, on its own."""

_SMALLEST = 256
"""Shortest side of a matrix for which the kernel runs; copying smaller ones costs next to nothing."""


def prompts_divided() -> bool:
    """Whether the mesh of the context divides prompts among devices, by any of its axes but that of heads.

    Rows of several prompts then cannot be joined to one axis: their shares do not lie side by side in it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and name != HEADS_AXIS and kind == AxisType.Auto for name, size, kind in axes)


def partly_divided() -> bool:
    """Whether a `jax.shard_map` divides this code over some axes of the mesh, and leaves others to XLA.

    JAX's `custom_partitioning` cannot express such shardings, so kernels do not run there.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return False
    kinds = {kind for size, kind in zip(mesh.axis_sizes, mesh.axis_types, strict=True) if size > 1}
    return {AxisType.Auto, AxisType.Manual} <= kinds


def runs(dtype: Any, inputs: int, outputs: int) -> bool:
    """Whether GPUs read a matrix of this type and shape out of its stack."""
    return jnp.dtype(dtype).itemsize == 2 and min(inputs, outputs) >= _SMALLEST


def product(
    x: Float[Array, "*M K"], matrix: LayerSlice, *, by_rows: bool | PartitionSpec = False
) -> Float[Array, "*M N"]:
    """The matrix product x @ matrix, in the dtype of x.

    Args:
        x: the inputs.
        matrix: the matrix.
        by_rows: whether TPUs write the result row by row. Where heads come first afterwards, XLA would rather transpose
            the matrix of every layer than the result. Elsewhere it is to choose: it reads matrices column by column if
            their rows do not fill its tiles. On a mesh, how devices divide the result: XLA does not find that out where
            a layout is set.
    """
    if x.dtype != matrix.dtype or not runs(x.dtype, *matrix.shape):
        return x @ matrix.value
    stack, index = jax.lax.stop_gradient(matrix.stack), jnp.asarray(matrix.index, jnp.int32)
    return _product(by_rows, x, stack, index, matrix.value)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(by_rows: bool | PartitionSpec, x: Array, stack: Array, index: Array, value: Array) -> Array:
    return _by_platform(x, stack, index, value, transposed=False, by_rows=by_rows)


def _forward(
    by_rows: bool | PartitionSpec, x: Array, stack: Array, index: Array, value: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _product(by_rows, x, stack, index, value), (x, stack, index, value)


def _backward(by_rows: bool | PartitionSpec, kept: tuple[Any, ...], slope: Array) -> tuple[Array | None, ...]:
    del by_rows
    x, stack, index, value = kept  # a known index is NumPy's
    of_x = _by_platform(slope, stack, jnp.asarray(index), value, transposed=True)
    return of_x, None, None, x.reshape(-1, x.shape[-1]).T @ slope.reshape(-1, slope.shape[-1])


_product.defvjp(_forward, _backward)


def _by_platform(
    x: Array, stack: Array, index: Array, value: Array, *, transposed: bool, by_rows: bool | PartitionSpec = False
) -> Array:
    def sliced(x: Array, stack: Array, index: Array, value: Array) -> Array:
        del stack, index
        return x @ (value.T if transposed else value)

    def stacked(x: Array, stack: Array, index: Array, value: Array) -> Array:
        if partly_divided():
            return sliced(x, stack, index, value)
        return everywhere(transposed, axes=x.ndim - 1)(x, stack, index)

    def in_place(x: Array, stack: Array, index: Array, value: Array) -> Array:
        # A slice made here becomes part of the product, one made outside a loop over products is a copy.
        result = sliced(x, stack, index, jax.lax.dynamic_index_in_dim(stack, index, keepdims=False))
        return _in_rows(result, by_rows) if by_rows is not False else result

    return jax.lax.platform_dependent(x, stack, index, value, cuda=stacked, tpu=in_place, default=sliced)


def _in_rows(x: Array, divided: bool | PartitionSpec) -> Array:
    """An array that is written row by row, on every device for itself."""

    def here(x: Array) -> Array:
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    if not isinstance(divided, PartitionSpec):
        return here(x)
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    free = {name for name, kind in kinds if kind == AxisType.Auto}
    if not free:
        return here(x)
    return jax.shard_map(here, in_specs=divided, out_specs=divided, axis_names=free, check_vma=False)(x)


def logits(
    x: Float[Array, "*M D"], matrix: Float[Array, "..."], *, transposed: bool = False, implementation: str | None = None
) -> Float[Array, "*M V"]:
    """The product x @ matrix in float32, which has no gradient.

    For products with 16-bit matrices whose rows are not multiples of 16 bytes, XLA pads the matrix on GPUs: in every
    call, a copy of the whole vocabulary. The kernel reads it as it is.

    Args:
        x: the inputs.
        matrix: the map to the vocabulary, [D, V].
        transposed: whether it is [V, D].
        implementation: "kernel" runs the kernel as a JAX program; that of the platform if None.
    """

    def plain(x: Array, matrix: Array) -> Array:
        return jnp.einsum(
            "...d,vd->...v" if transposed else "...d,dv->...v", x, matrix, preferred_element_type=jnp.float32
        )

    def kernel(x: Array, matrix: Array) -> Array:
        run = everywhere(transposed, implementation is not None, dtype=jnp.dtype(jnp.float32), axes=x.ndim - 1)
        return run(x, matrix[None], jnp.zeros((), jnp.int32))

    if implementation is not None:
        return kernel(x, matrix)
    if x.dtype != matrix.dtype or not runs(x.dtype, *matrix.shape) or not any(side % 8 for side in matrix.shape):
        return plain(x, matrix)
    return jax.lax.platform_dependent(x, matrix, cuda=plain if partly_divided() else kernel, default=plain)


def gated_product(
    x: Float[Array, "*B K"], gate: LayerSlice, up: LayerSlice, activation: Activation
) -> Float[Array, "*B N"]:
    """activation(x @ gate) * (x @ up), of two matrices of one layer.

    The kernel for GPUs rounds only the result to 16 bits. Where there is a gradient, both products are kept for it, and
    are made apart. On TPU both results get the shape of x before they are multiplied: multiplied as matrices, they
    made XLA copy whole stacks (LLaVA-7B over four v5e, where a stack's rows do not fill tiles).
    """
    if x.dtype != gate.dtype or gate.dtype != up.dtype or not runs(x.dtype, *gate.shape):
        return _apart(activation, x, gate, up)
    stacks = jax.lax.stop_gradient((gate.stack, up.stack))
    return _gated(activation, x, *stacks, jnp.asarray(gate.index, jnp.int32), gate.value, up.value)


def _apart(activation: Activation, x: Array, gate: LayerSlice, up: LayerSlice) -> Array:
    flat = x if prompts_divided() else x.reshape(-1, x.shape[-1])
    products = (checkpoint_name(product(flat, matrix), PRODUCT) for matrix in (gate, up))
    first, second = (found.reshape(*x.shape[:-1], found.shape[-1]) for found in products)
    return activation(first) * second


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated(activation: Activation, x: Array, gates: Array, ups: Array, index: Array, gate: Array, up: Array) -> Array:
    return _gated_by_platform(activation, x, gates, ups, index, gate, up)


def _gated_forward(
    activation: Activation, x: Array, gates: Array, ups: Array, index: Array, gate: Array, up: Array
) -> tuple[Array, Any]:
    def apart(x: Array, gate: Array, up: Array) -> Array:
        return _apart(activation, x, LayerSlice(gates, index, gate), LayerSlice(ups, index, up))

    return jax.vjp(apart, x, gate, up)


def _gated_backward(activation: Activation, pull: Any, slope: Array) -> tuple[Array | None, ...]:
    del activation
    of_x, of_gate, of_up = pull(slope)
    return of_x, None, None, None, of_gate, of_up


_gated.defvjp(_gated_forward, _gated_backward)


def _gated_by_platform(activation: Activation, *operands: Array) -> Array:
    def together(x: Array, gates: Array, ups: Array, index: Array, gate: Array, up: Array) -> Array:
        if partly_divided():
            return apart(x, gates, ups, index, gate, up)
        return everywhere(False, combine=_gating(activation), axes=x.ndim - 1)(x, gates, ups, index)

    def apart(x: Array, gates: Array, ups: Array, index: Array, gate: Array, up: Array) -> Array:
        return _apart(activation, x, LayerSlice(gates, index, gate), LayerSlice(ups, index, up))

    return jax.lax.platform_dependent(*operands, cuda=together, default=apart)


@functools.cache
def _gating(activation: Activation) -> Callable[..., Array]:
    return lambda gate, up: activation(gate) * up


# --- the kernel -------------------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """How a product is cut: a program computes [rows, columns] of the output from a share of the inner axis.

    With several matrices it computes as many columns, a part of them from each.
    """

    rows: int
    columns: int
    inner: int
    splits: int


def _tiles(tokens: int, inputs: int, outputs: int, matrices: int = 1) -> _Tiles:
    rows = min(128, max(16, pl.next_power_of_2(tokens)))
    columns = (64 if rows <= 64 else 128) // matrices
    blocks = pl.cdiv(tokens, rows) * pl.cdiv(outputs, columns)
    splits = 1
    while matrices == 1 and blocks * splits < PROGRAMS and rows <= 64 and splits < 8 and inputs // (2 * splits) >= 512:
        splits *= 2
    return _Tiles(rows, columns, 64, splits)


def _kernel(
    index: Any,
    x: Any,
    *arrays: Any,
    tiles: _Tiles,
    shape: tuple[int, int, int],
    transposed: bool,
    combine: Callable[..., Array] | None,
):
    (*stacks, out), (tokens, inputs, outputs) = arrays, shape
    first_row, first_column = pl.program_id(0) * tiles.rows, pl.program_id(1) * tiles.columns
    layer = index[...]
    rows, columns = first_row + jnp.arange(tiles.rows), first_column + jnp.arange(tiles.columns)
    steps = pl.cdiv(pl.cdiv(inputs, tiles.inner), tiles.splits)
    share = pl.program_id(2) * steps * tiles.inner

    def load(
        where: Any, first: Array, first_size: int, second: Array, second_size: int, ragged: tuple[bool, bool]
    ) -> Array:
        mask = None
        if any(ragged):  # the ends of axes that blocks do not divide
            mask = (first < first_size)[:, None] & (second < second_size)[None, :]
        return plgpu.load(where, mask=mask, other=None if mask is None else 0.0)

    ragged = (
        tokens % tiles.rows > 0,
        inputs % (tiles.inner * tiles.splits) > 0,
        outputs % tiles.columns > 0,
    )

    def step(number: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        start = share + number * tiles.inner
        inner = start + jnp.arange(tiles.inner)
        here, inside = pl.ds(start, tiles.inner), pl.ds(first_column, tiles.columns)
        left = load(x.at[pl.ds(first_row, tiles.rows), here], rows, tokens, inner, inputs, (ragged[0], ragged[1]))

        def matrix(stack: Any) -> Array:
            if transposed:
                ends = (ragged[2], ragged[1])
                return load(stack.at[layer, inside, here], columns, outputs, inner, inputs, ends).T
            return load(stack.at[layer, here, inside], inner, inputs, columns, outputs, (ragged[1], ragged[2]))

        # Products of 16-bit numbers are exact in float32, whatever precision is set.
        dot = partial(jnp.dot, precision=jax.lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
        return tuple(total + dot(left, matrix(stack)) for total, stack in zip(totals, stacks, strict=True))

    zeros = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    totals = jax.lax.fori_loop(0, steps, step, (zeros,) * len(stacks))
    total = totals[0] if combine is None else combine(*totals)
    place = out.at[pl.program_id(2), pl.ds(first_row, tiles.rows), pl.ds(first_column, tiles.columns)]
    plgpu.store(place, total.astype(out.dtype), mask=(rows < tokens)[:, None] & (columns < outputs)[None, :])


def stacked_product(
    x: Float[Array, "M K"],
    *arrays: Array,
    transposed: bool = False,
    combine: Callable[..., Array] | None = None,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "M N"]:
    """The kernel: x @ stack[index], or x @ stack[index].T, of 16-bit arrays on one GPU.

    Args:
        x: the inputs.
        *arrays: the matrices, [L, K, N], and which of them; for `combine` several such stacks of one shape before.
        transposed: whether to multiply by its transpose.
        combine: makes the result of the products with a matrix of every stack, number by number.
        dtype: of the result; that of x if None.
        interpret: runs the kernel as a JAX program, on any platform and slowly.
    """
    *stacks, index = arrays
    tokens, inputs = x.shape
    outputs = stacks[0].shape[1 if transposed else 2]
    tiles = _tiles(tokens, inputs, outputs, len(stacks))
    wanted = jnp.dtype(x.dtype if dtype is None else dtype)
    written = wanted if tiles.splits == 1 else jnp.dtype(jnp.float32)
    moved = x.size * x.dtype.itemsize + sum(inputs * outputs * stack.dtype.itemsize for stack in stacks)
    parts = pl.pallas_call(
        partial(_kernel, tiles=tiles, shape=(tokens, inputs, outputs), transposed=transposed, combine=combine),
        grid=(pl.cdiv(tokens, tiles.rows), pl.cdiv(outputs, tiles.columns), tiles.splits),
        out_shape=jax.ShapeDtypeStruct((tiles.splits, tokens, outputs), written),
        compiler_params=plgpu.CompilerParams(num_warps=4 if tiles.rows <= 64 else 8, num_stages=3),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * inputs * outputs * len(stacks),
            transcendentals=0,
            bytes_accessed=moved + tiles.splits * tokens * outputs * written.itemsize,
        ),
        interpret=interpret,
        name="layer_product_transposed" if transposed else "layer_product" if combine is None else "gated_product",
    )(index, x, *stacks)
    return parts[0] if tiles.splits == 1 else parts.sum(axis=0).astype(wanted)


# --- over devices and mapped axes -------------------------------------------------------------------------------------


@functools.cache
def everywhere(
    transposed: bool,
    interpret: bool = False,
    combine: Callable[..., Array] | None = None,
    dtype: Any = None,
    axes: int = 1,
) -> Callable[..., Array]:
    """The kernel over the devices that hold parts of its operands, and under `jax.vmap`.

    Args:
        transposed: as in `stacked_product`.
        interpret: the same.
        combine: the same, of the products with matrices of two stacks.
        dtype: the same.
        axes: number of axes of the input before the last, which every device joins for itself.
    """
    several = combine is not None

    def run_here(x: Array, *arrays: Array, dtype: Any) -> Array:
        flat = x.reshape(-1, x.shape[-1])
        options: dict[str, Any] = {"transposed": transposed, "combine": combine, "interpret": interpret}
        return stacked_product(flat, *arrays, dtype=dtype, **options).reshape(*x.shape[:-1], -1)

    def single(x: Array, stack: Array, index: Array) -> Array:
        return run_here(x, stack, index, dtype=dtype)

    def pair(x: Array, first: Array, second: Array, index: Array) -> Array:
        return run_here(x, first, second, index, dtype=dtype)

    divided = custom_partitioning(pair if several else single)

    def partition(mesh: Any, operands: Sequence[Any], outputs: Any) -> Any:
        """The matrix stays where it is, and the tokens come to it."""
        del outputs
        tokens, (rows, columns) = list(_axes(operands[0])[:-1]), _axes(operands[1])[1:]
        inner, outer = (columns, rows) if transposed else (rows, columns)
        if several:  # sums over devices would have to come before
            inner, rows = None, None
        summed = tuple(_names(inner))
        tokens = [None if _names(axis) & (_names(inner) | _names(outer)) else axis for axis in tokens]

        def run(x: Array, *arrays: Array) -> Array:
            part = run_here(x, *arrays, dtype=dtype)
            # In the dtype of the result, as XLA's own products: float32 would send twice the bytes.
            return jax.lax.psum(part, summed) if summed else part

        stacks = (PartitionSpec(None, rows, columns),) * (len(operands) - 2)
        inputs = (PartitionSpec(*tokens, inner), *stacks, PartitionSpec())
        result = NamedSharding(mesh, PartitionSpec(*tokens, outer))
        return mesh, run, result, tuple(NamedSharding(mesh, spec) for spec in inputs)

    matrices = ", ".join(["l n k" if transposed else "l k n"] * (2 if several else 1))
    whole, summed = (("k", "l"), ()) if several else (("l",), ("k",))
    tokens = " ".join(f"m{axis}" for axis in range(axes))
    divided.def_partition(
        partition=partition,
        sharding_rule=f"{tokens} k, {matrices}, -> {tokens} n",
        need_replication_factors=whole,
        reduction_factors=summed,
    )
    mapped = custom_vmap(divided)

    @mapped.def_vmap
    def fold(_: int, batched: Sequence[bool], x: Array, *arrays: Array) -> tuple[Array, bool]:
        if any(batched[1:]):  # other matrices for every row
            mapped_axes = tuple(0 if here else None for here in batched)

            def plain(x: Array, *arrays: Array) -> Array:
                *stacks, index = arrays
                found = [jax.lax.dynamic_index_in_dim(stack, index, keepdims=False) for stack in stacks]
                parts = [
                    jnp.matmul(x, matrix.T if transposed else matrix, preferred_element_type=dtype) for matrix in found
                ]
                return parts[0] if combine is None else combine(*parts)

            return jax.vmap(plain, mapped_axes)(x, *arrays), True
        return everywhere(transposed, interpret, combine, dtype, axes + 1)(x, *arrays), True

    return mapped


def _axes(operand: Any) -> tuple[Any, ...]:
    """How every axis of an operand is divided."""
    spec = operand.sharding.spec
    return (*spec, *(None,) * (len(operand.shape) - len(spec)))


def _names(entry: Any) -> set[str]:
    """The mesh axes over which an array's axis is divided."""
    return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)
