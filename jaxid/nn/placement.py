"""Sharding constraints on values inside a network, where XLA should not choose.

A program is traced with its mesh as JAX's own context (`jax.set_mesh`); without one, nothing is constrained.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Shaped

from jaxid.kernels.product import prompts_divided
from jaxid.meshes import DATA, MODEL

_UNCONSTRAINED = PartitionSpec.UNCONSTRAINED

_WHOLE: contextvars.ContextVar[bool] = contextvars.ContextVar("whole", default=False)


def axis_size(name: str) -> int:
    """The number of devices along an axis of the context's mesh; one if there is none, or it is divided already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or name not in mesh.axis_names:
        return 1
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[name]
    return mesh.shape[name] if kind == AxisType.Auto else 1


def placed(x: Shaped[Array, "..."], axes: Sequence[str | None]) -> Shaped[Array, "..."]:
    """A value with its axes sharded over axes of the mesh, if their lengths are multiples.

    Args:
        x: the value.
        axes: the mesh's axis for each of its last axes, or None for a replicated one. XLA chooses for the axes before
            them.
    """
    if AxisType.Auto not in jax.sharding.get_abstract_mesh().axis_types:  # no mesh, or `jax.shard_map` over all of it
        return x
    lengths = x.shape[x.ndim - len(axes) :]
    names = [
        name if name is not None and axis_size(name) > 1 and length % axis_size(name) == 0 else None
        for name, length in zip(axes, lengths, strict=True)
    ]
    leading = (_UNCONSTRAINED,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*leading, *names))


def result(x: Shaped[Array, "..."], axes: Sequence[str | None]) -> Shaped[Array, "..."]:
    """Like `placed`, with all axes before them replicated."""
    return placed(x, (*(None,) * (x.ndim - len(axes)), *axes))


@contextlib.contextmanager
def undivided(whole: bool) -> Iterator[None]:
    """Within it, every device has all pictures, if `whole` says so; otherwise those of its own prompts."""
    token = _WHOLE.set(whole)
    try:
        yield
    finally:
        _WHOLE.reset(token)


def rows_of_heads(x: Shaped[Array, "*B T D"], heads: int) -> bool | PartitionSpec:
    """How devices divide the product that maps tokens into heads, as `jaxid.kernels.product.product` takes it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return True
    model = MODEL if axis_size(MODEL) > 1 and heads % axis_size(MODEL) == 0 else None
    if not prompts_divided():  # all axes but the last are one
        return PartitionSpec(None, model)
    data = None if _WHOLE.get() or x.shape[-3] % axis_size(DATA) else DATA
    return PartitionSpec(*(None,) * (x.ndim - 3), data, None, model)


def stream(x: Float[Array, "*R B T D"]) -> Float[Array, "*R B T D"]:
    """The residual stream, or what is added to it: prompts divided, every number of a token on its devices.

    What a block's attention and MLP add is summed over the devices that share the model here, and nowhere else.
    """
    return placed(x, (DATA, None, None))


def heads(x: Float[Array, "*R T H E"]) -> Float[Array, "*R T H E"]:
    """Queries, keys or values, or what queries read, divided by heads."""
    return placed(x, (None, MODEL, None))


def kept_heads(heads: int, kv_heads: int) -> int:
    """How many heads of keys and values are kept where devices share the query heads.

    Every device has those that its own queries read. Where there are fewer than devices, or they do not divide,
    several devices have the same one, and it is kept as often.

    Args:
        heads: number of query heads, H.
        kv_heads: number of heads of keys and values, K.
    """
    parts = axis_size(MODEL)
    return math.lcm(kv_heads, parts) if heads % parts == 0 else kv_heads
