"""Mean gradients of small batches, which a device computes in turn and several devices share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from jaxid import meshes
from jaxid.train.placement import Placement

Found = tuple[PyTree, dict[str, Array]]
"""Gradients and metrics."""


def mean(function: Callable[..., Found], placement: Placement | None) -> Callable[..., Any]:
    """The means of gradients and metrics over small batches, which are computed in turn.

    If the copies of the parameters divide them, every copy takes a share, and adds it up; the sums meet once, each
    device getting the part that it updates.

    Args:
        function: maps parameters, a small batch and constants to gradients and metrics.
        placement: where they lie; on one device by default.
    """

    def together(parameters: PyTree, batch: dict[str, PyTree], constants: dict[str, PyTree]) -> Found:
        if placement is not None and placement.divides(batch):
            return _shared(function, placement)(parameters, batch, constants)
        count, total = _count(batch), _total(lambda own: function(parameters, own, constants), batch)
        return jax.tree.map(lambda leaf: leaf / count, total)

    return together


def _shared(function: Callable[..., Found], placement: Placement) -> Callable[..., Any]:
    """The means of gradients and metrics over small batches that the copies of the parameters divide."""
    specs = jax.tree.map(lambda sharding: sharding.spec, placement.parameters())
    # Axes of one device belong to it too: where all do, kernels need no division by XLA.
    manual = {name for name, size in placement.mesh.shape.items() if name == meshes.DATA or size == 1}
    if manual == set(placement.mesh.axis_names):
        axes = placement.axes()
    else:  # XLA would first gather over "model" what is to be scattered over "data"
        axes = jax.tree.map(lambda _: -1, specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))

    def share(parameters: PyTree, batch: dict[str, PyTree], constants: dict[str, PyTree]) -> Found:
        count = _count(batch) * placement.copies

        def placed(own: PyTree) -> Found:
            gradients, metrics = function(parameters, own, constants)
            return jax.lax.with_sharding_constraint(gradients, specs), metrics

        gradients, metrics = _total(placed, batch)

        def summed(leaf: Array, axis: int) -> Array:
            if axis < 0:
                return jax.lax.psum(leaf, meshes.DATA)
            return jax.lax.psum_scatter(leaf, meshes.DATA, scatter_dimension=axis, tiled=True)

        gradients, metrics = jax.tree.map(summed, gradients, axes), jax.lax.psum(metrics, meshes.DATA)
        return jax.tree.map(lambda leaf: leaf / count, (gradients, metrics))

    def over_data(axis: int) -> PartitionSpec:
        return PartitionSpec(*(None,) * axis, meshes.DATA) if axis >= 0 else PartitionSpec()

    return jax.shard_map(
        share,
        mesh=placement.mesh,
        in_specs=(PartitionSpec(), PartitionSpec(meshes.DATA), PartitionSpec()),
        out_specs=(jax.tree.map(over_data, axes), PartitionSpec()),
        axis_names=manual,
        check_vma=False,
    )


def _count(batch: dict[str, PyTree]) -> int:
    """The number of small batches."""
    return jax.tree.leaves(batch)[0].shape[0]


def _total(function: Callable[[PyTree], PyTree], batch: dict[str, PyTree]) -> PyTree:
    """The sum of a function over the first axis of a batch, one after the other."""
    first = jax.tree.map(lambda leaf: leaf[0], batch)
    if _count(batch) == 1:
        return function(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, function(part)), None), zeros, batch)
    return total
