"""Kernels over the devices of a mesh and under `jax.vmap`: what XLA and Pallas do not do by themselves.

XLA cannot divide a kernel among devices, and on TPU refuses to compile one that runs on several. Which devices a
program has is only known when it is lowered, so a kernel is an operation of its own that becomes a `jax.shard_map`
there. (JAX's `custom_partitioning` does this on GPU, but not on TPU.)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch  # has no public counterpart
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

HEADS_AXIS = "model"
"""The axis of a mesh that divides heads; the others divide prompts."""


class Kernel(NamedTuple):
    """A function of the arrays that one device holds, with the meaning of their axes.

    Letters stand for axes: v for rows that `jax.vmap` made, b for prompts and k for heads, which may be divided among
    devices, and any other letter for an axis that every device has whole. An array may have one row or prompt for all.

    Attributes:
        run: the function.
        operands: a letter for each axis of each operand; the first is v.
        results: the same for each result.
        dtypes: the type of each result.
    """

    run: Callable[..., tuple[Array, ...]]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    dtypes: tuple[Any, ...]

    def sizes(self, operands: Sequence[Any]) -> dict[str, int]:
        """The size of every axis."""
        found: dict[str, int] = {}
        for letters, operand in zip(self.operands, operands, strict=True):
            for letter, size in zip(letters, operand.shape, strict=True):
                found[letter] = max(size, found.get(letter, 1))
        return found


kernel_p = Primitive("attention_kernel")
kernel_p.multiple_results = True
# Without this a lowering learns the number of its devices but not which mesh they form.
dispatch.prim_requires_devices_during_lowering.add(kernel_p)


@functools.cache
def _compiled(kernel: Kernel) -> Callable[..., list[Array]]:
    return jax.jit(functools.partial(kernel_p.bind, kernel=kernel))


@kernel_p.def_impl
def _run(*operands: Array, kernel: Kernel) -> list[Array]:
    return _compiled(kernel)(*operands)


def varying(*operands: Any) -> dict[str, Any]:
    """What makes a shape vary, inside `jax.shard_map`, over every axis of the mesh over which an operand does.

    Args:
        operands: their abstract values.

    Returns:
        An argument of the shape's `update`, whose name depends on the version of JAX.
    """
    if hasattr(operands[0], "manual_axis_type"):
        axes = frozenset().union(*(operand.manual_axis_type.varying for operand in operands))
        return {"manual_axis_type": jax.sharding.ManualAxisType(varying=axes)}
    return {"vma": frozenset().union(*(operand.vma for operand in operands))}


@kernel_p.def_abstract_eval
def _shapes(*operands: Any, kernel: Kernel) -> list[Any]:
    sizes, kinds = kernel.sizes(operands), varying(*operands)
    return [
        operands[0].update(shape=tuple(sizes[letter] for letter in letters), dtype=jnp.dtype(dtype), **kinds)
        for letters, dtype in zip(kernel.results, kernel.dtypes, strict=True)
    ]


def _placed(kernel: Kernel, mesh: Mesh, free: Sequence[str], operands: Sequence[Any]) -> Callable[..., Any]:
    """The kernel on the devices of a mesh, over those of its axes that no `jax.shard_map` has divided already."""
    sizes = kernel.sizes(operands)
    owners: dict[str, tuple[str, ...]] = dict.fromkeys("vbk", ())
    for axis in free:
        for letter in ("k",) if axis == HEADS_AXIS else ("b", "v"):
            if sizes.get(letter, 1) % (math.prod(mesh.shape[name] for name in owners[letter]) * mesh.shape[axis]) == 0:
                owners[letter] += (axis,)
                break

    def spec(letters: str, shape: Sequence[int]) -> PartitionSpec:
        return PartitionSpec(
            *(
                owners.get(letter) or None if size == sizes[letter] else None
                for letter, size in zip(letters, shape, strict=True)
            )
        )

    results = [tuple(sizes[letter] for letter in letters) for letters in kernel.results]
    return jax.shard_map(
        kernel.run,
        # Inside another `jax.shard_map`, the mesh of the context says which axes that has divided.
        mesh=mesh if jax.sharding.get_abstract_mesh().empty else None,
        in_specs=tuple(
            spec(letters, operand.shape) for letters, operand in zip(kernel.operands, operands, strict=True)
        ),
        out_specs=tuple(spec(letters, shape) for letters, shape in zip(kernel.results, results, strict=True)),
        axis_names=frozenset(free),
        check_vma=False,
    )


def _lowered(context: Any, *values: Any, kernel: Kernel) -> Any:
    """The kernel where the program has one device or is divided already, else its `jax.shard_map`."""
    axes = context.module_context.axis_context
    run: Callable[..., Any] = kernel.run
    if hasattr(axes, "manual_axes"):
        free = [name for name in axes.mesh.axis_names if name not in axes.manual_axes]
        if free:
            run = _placed(kernel, axes.mesh, free, context.avals_in)
    elif getattr(axes, "num_devices", 1) > 1:
        shape, names = (axes.num_devices,), ("devices",)
        if axes.abstract_mesh is not None and axes.abstract_mesh.axis_names:
            shape, names = axes.abstract_mesh.axis_sizes, axes.abstract_mesh.axis_names
        mesh = Mesh(np.array(axes.device_assignment).reshape(shape), names)
        run = _placed(kernel, mesh, names, context.avals_in)
    return mlir.lower_fun(lambda *operands: list(run(*operands)), multiple_results=True)(context, *values)


mlir.register_lowering(kernel_p, _lowered)


def spread(kernel: Kernel) -> Callable[..., tuple[Array, ...]]:
    """The function of whole arrays that runs a kernel on every device of its program, and under `jax.vmap` too.

    A mapped axis is folded into axis v of the operands that have it; the others keep theirs, and the kernel reads them
    once for all rows.
    """

    @custom_vmap
    def mapped(*operands: Array) -> tuple[Array, ...]:
        return tuple(kernel_p.bind(*operands, kernel=kernel))

    @mapped.def_vmap
    def fold(size: int, batched: Sequence[bool], *operands: Array) -> tuple[Any, Any]:
        pairs = list(zip(operands, batched, strict=True))
        rows = max(operand.shape[1] if has else operand.shape[0] for operand, has in pairs)

        def folded(operand: Array, has: bool) -> Array:
            if not has:
                return operand
            operand = jnp.broadcast_to(operand, (size, rows, *operand.shape[2:]))
            return operand.reshape(size * rows, *operand.shape[2:])

        results = mapped(*(folded(operand, has) for operand, has in pairs))
        unfolded = tuple(result.reshape(size, rows, *result.shape[1:]) for result in results)
        return unfolded, tuple(True for _ in unfolded)

    return mapped
