"""Where the state, the gradients and the batches of training lie on a mesh of devices.

Axis "model" divides parameters as the network's layout says, and with them their gradients and the optimizer's copies
of them. Axis "data" divides batches, and the optimizer's copies and the summed gradients once more (as in ZeRO, arXiv
1910.02054, stages 1 and 2), along the longest axis of a parameter that it divides.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jaxid import meshes
from jaxid.checkpoints.tensors import flatten, unflatten
from jaxid.errors import InputError

Layout = Mapping[str, NamedSharding]
"""Where parameters lie, by dotted path; those without an entry are replicated on every device."""


def every_device() -> Mesh:
    """The mesh on which every device of every process has a copy of the parameters."""
    return meshes.mesh(jax.device_count())


def shared(axes: meshes.Axes) -> Mesh:
    """A mesh of as many devices of every process.

    Raises:
        InputError: if the processes do not divide it, or one of them has fewer devices.
    """
    count, wanted = jax.process_count(), axes.data * axes.model
    own: dict[int, list[Any]] = {}
    for device in jax.devices():
        own.setdefault(device.process_index, []).append(device)
    fewest = min(len(devices) for devices in own.values())
    if count > 1 and (wanted % count or wanted > count * fewest):
        raise InputError(
            f"the mesh {axes} has {wanted} devices, which are to be an equal number of each of the {count} processes, "
            f"at most {fewest}; choose other axes."
        )
    chosen = [device for process in sorted(own) for device in own[process][: max(wanted // count, 1)]]
    return meshes.mesh(*axes, chosen if count > 1 else None)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a run's arrays lie.

    Attributes:
        mesh: the devices; an abstract mesh serves plans.
        shapes: the shape of every trained parameter.
        layout: where they lie.
    """

    mesh: Mesh | AbstractMesh
    shapes: PyTree
    layout: Layout

    @property
    def devices(self) -> Mesh:
        """The mesh, of real devices."""
        return cast(Mesh, self.mesh)

    @property
    def copies(self) -> int:
        """The number of copies of the parameters, among which batches are divided."""
        return meshes.size(self.mesh, meshes.DATA)

    @property
    def whole(self) -> NamedSharding:
        """On every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def parameters(self) -> PyTree:
        """The sharding of every parameter."""

        def of(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
            own = self.layout.get(jax.tree_util.keystr(path, simple=True, separator="."))
            return self.whole if own is None else NamedSharding(self.mesh, own.spec)

        return jax.tree_util.tree_map_with_path(of, self.shapes)

    def axes(self) -> PyTree:
        """For every parameter the axis along which its optimizer's copies are sharded over "data"; -1 for none."""
        return jax.tree.map(partial(_longest, copies=self.copies), self.shapes, self.parameters())

    def divided(self) -> PyTree:
        """The sharding of every parameter's gradient and of the optimizer's copies of it."""
        return jax.tree.map(self._along, self.parameters(), self.axes())

    def _along(self, sharding: NamedSharding, axis: int) -> NamedSharding:
        if axis < 0:
            return sharding
        names = [*sharding.spec, *[None] * (axis + 1 - len(sharding.spec))]
        names[axis] = meshes.DATA
        return NamedSharding(self.mesh, PartitionSpec(*names))

    def state(self, optimizer: optax.GradientTransformation) -> dict[str, PyTree]:
        """The shardings of "parameters" and "optimizer", its state: what mirrors a parameter is divided, else whole."""
        optimizer = skip_not_finite(optimizer)
        state = jax.eval_shape(optimizer.init, self.shapes)

        def of(leaf: Any, sharding: NamedSharding, shape: Any) -> NamedSharding:
            return sharding if leaf.shape == shape.shape else self.whole  # some optimizers summarise parameters

        found = optax.tree.map_params(
            optimizer, of, state, self.divided(), self.shapes, transform_non_params=lambda _: self.whole
        )
        return {"parameters": self.parameters(), "optimizer": found}

    def batch(self, batch: Mapping[str, PyTree], whole: tuple[str, ...]) -> dict[str, PyTree]:
        """A batch on the devices, divided along the first axis where it divides.

        Args:
            batch: arrays that all processes have alike.
            whole: names of the arrays that every device has whole.
        """
        return {
            name: meshes.replicated(self.devices, value) if name in whole else meshes.sharded(self.devices, value)
            for name, value in batch.items()
        }

    def divides(self, batch: Mapping[str, PyTree]) -> bool:
        """Whether the copies share the first axis of a batch among them."""
        return self.copies > 1 and jax.tree.leaves(dict(batch))[0].shape[0] % self.copies == 0

    def constants(self, tree: PyTree) -> PyTree:
        """Arrays that no step changes: those on the mesh stay where they are, others are replicated on every device."""

        def of(leaf: Any) -> Any:
            sharding = getattr(leaf, "sharding", None)
            there = isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh
            return leaf if there else meshes.put(self.devices, leaf, PartitionSpec())

        return jax.tree.map(of, tree)


def skip_not_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that skips, and counts, steps whose gradient is not finite."""
    # After this many skipped steps in a row, optax would apply updates that are not finite.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=int(jnp.iinfo(jnp.int32).max))


def _longest(shape: Any, sharding: NamedSharding, copies: int) -> int:
    """The longest axis of an array that is not divided yet and that a number divides; -1 if there is none."""
    names = [*sharding.spec, *[None] * (len(shape.shape) - len(sharding.spec))]
    found = [
        axis
        for axis, (length, name) in enumerate(zip(shape.shape, names, strict=True))
        if name is None and length and length % copies == 0
    ]
    return max(found, key=lambda axis: shape.shape[axis]) if found and copies > 1 else -1


def placement(mesh: Mesh | AbstractMesh | None, layout: Layout | None, parameters: PyTree) -> Placement:
    """Where a run's arrays lie.

    Args:
        mesh: the devices; by default all of them, each with a copy of the parameters.
        layout: where the parameters lie on the mesh; replicated on every device by default.
        parameters: the parameters, or their shapes.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), parameters)
    return Placement(mesh or every_device(), shapes, layout or {})


def shardings(parameters: PyTree) -> Layout:
    """Where the parameters of a network lie on a mesh, by dotted path; empty if they are on one device."""
    found = {path: getattr(leaf, "sharding", None) for path, leaf in flatten(parameters).items()}
    return {path: sharding for path, sharding in found.items() if isinstance(sharding, NamedSharding)}


def placed_as(parameters: PyTree, layout: Layout) -> PyTree:
    """The parameters of a network, placed as a layout says."""

    def of(path: str, leaf: Any) -> Any:
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and path in layout
        return jax.device_put(leaf, layout[path]) if placed else leaf

    return unflatten({path: of(path, leaf) for path, leaf in flatten(parameters).items()})


def complete(tree: PyTree) -> PyTree:
    """A tree with whole arrays in host memory, of which other processes may hold parts; all processes call it."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(of, tree)
