"""Where the values inside a network lie on a mesh of devices, as far as XLA should not choose.

A program is traced with its mesh as JAX's own context (`jax.set_mesh`); without one, nothing is placed.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

_UNCONSTRAINED = PartitionSpec.UNCONSTRAINED


def axis_size(name: str) -> int:
    """The number of devices along an axis of the context's mesh; one if there is none, or it is divided already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or name not in mesh.axis_names:
        return 1
    kind = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))[name]
    return mesh.shape[name] if kind == AxisType.Auto else 1


def placed(x: Float[Array, "..."], axes: Sequence[str | None]) -> Float[Array, "..."]:
    """A value whose axes are divided over axes of the mesh, as far as their lengths allow.

    Args:
        x: the value.
        axes: for each of its last axes the mesh's axis, or None if every device has all of it. What comes before them
            is left to XLA.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    lengths = x.shape[x.ndim - len(axes) :]
    names = [
        name if name is not None and axis_size(name) > 1 and length % axis_size(name) == 0 else None
        for name, length in zip(axes, lengths, strict=True)
    ]
    leading = (_UNCONSTRAINED,) * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*leading, *names))
