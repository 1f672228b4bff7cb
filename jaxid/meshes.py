"""Meshes of devices: prompts and edits are sharded over "data", heads, MLPs and vocabularies over "model"."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxid.errors import InputError

DATA, MODEL = "data", "model"
AXES = (DATA, MODEL)

_SIZE = re.compile(r"\s*(data|model)\s*=\s*([0-9]{1,6})\s*")


class Axes(NamedTuple):
    """The sizes of a mesh's axes.

    Attributes:
        data: replicas of the model, among which prompts and edits are sharded.
        model: devices that share a replica.
    """

    data: int = 1
    model: int = 1

    def __str__(self) -> str:
        """As in a command."""
        return f"data={self.data},model={self.model}"


ONE = Axes()
"""A single device."""


def sizes(text: str) -> Axes:
    """The axes in a text such as "data=4,model=2"; one that is not named has size 1.

    Raises:
        InputError: for any other text.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        match = _SIZE.fullmatch(part)
        if match is None or match[1] in found or int(match[2]) < 1:
            raise InputError(f"a mesh is given as data=4,model=2, or as auto; not as {text!r}.")
        found[match[1]] = int(match[2])
    return Axes(found.get(DATA, 1), found.get(MODEL, 1))


def mesh(data: int, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of the first devices, those of one replica of the model adjacent.

    Args:
        data: number of replicas of the model, among which prompts and edits are sharded.
        model: number of devices that share a replica.
        devices: by default all that JAX has.

    Raises:
        InputError: if there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = data * model
    if wanted > len(devices):
        raise InputError(
            f"the mesh data={data},model={model} has {wanted} devices, but JAX sees {len(devices)}; "
            "choose smaller axes, or start more processes."
        )
    return Mesh(np.array(devices[:wanted]).reshape(data, model), AXES, axis_types=(AxisType.Auto,) * 2)


def checked(given: Mesh) -> Mesh:
    """The user's own mesh, if its axes are known.

    Raises:
        InputError: for axes other than "data" and "model", or axes that are not of type Auto.
    """
    unknown = [name for name in given.axis_names if name not in AXES]
    if unknown:
        raise InputError(f"the mesh has an axis {unknown[0]!r}; jaxid shards over {' and '.join(AXES)}.")
    if any(kind != AxisType.Auto for kind in given.axis_types):
        raise InputError("the mesh's axes are to be of type Auto: jax.make_mesh(..., axis_types=(AxisType.Auto, ...)).")
    return given


def size(given: Mesh | AbstractMesh | None, axis: str) -> int:
    """The number of devices along an axis of a mesh; one without the axis, or without a mesh."""
    return 1 if given is None else given.shape.get(axis, 1)


def of(tree: Any) -> Mesh | None:
    """The mesh over which the first concrete array of a tree is placed; None if it is on a single device."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, Tracer):
            return None
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh) and sharding.mesh.size > 1:
            return sharding.mesh
        if sharding is not None:
            return None
    return None


def sharded(given: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """Arrays on the devices of a mesh, with one of their axes sharded over "data".

    Arrays without that axis, and those whose axis is not a multiple of "data", are replicated. Without a mesh, arrays
    go to the default device.
    """
    parts = size(given, DATA)

    def placed(leaf: Any) -> Any:
        shape = np.shape(leaf)
        splits = len(shape) > axis and parts > 1 and shape[axis] % parts == 0
        return put(given, leaf, PartitionSpec(*(None,) * axis, DATA) if splits else PartitionSpec())

    return jax.tree.map(placed, tree)


def replicated(given: Mesh | None, tree: Any) -> Any:
    """Arrays replicated over a mesh; without a mesh, arrays on the default device."""
    return jax.tree.map(lambda leaf: put(given, leaf, PartitionSpec()), tree)


def put(given: Mesh | None, leaf: Any, spec: PartitionSpec) -> Any:
    """One array on the devices of a mesh; traced and abstract ones are left to the compiler."""
    if given is None or isinstance(leaf, Tracer | jax.ShapeDtypeStruct):
        return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.numpy.asarray(leaf)
    sharding = NamedSharding(given, spec)
    if isinstance(leaf, jax.Array) or sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def fewest(needed: float, room: float, heads: int, devices: int) -> int:
    """The fewest devices that hold a model of some bytes, each with room for some of them.

    Args:
        needed: bytes of the parameters.
        room: bytes of them for which one device has room.
        heads: number of attention heads, which the devices divide.
        devices: number of devices.

    Raises:
        InputError: if all of them together have no room.
    """
    counts = [count for count in range(1, devices + 1) if devices % count == 0 and heads % count == 0]
    for count in counts:
        if needed <= count * room:
            return count
    raise InputError(
        f"the parameters take {needed / 1e9:.1f} GB, more than {counts[-1]} devices with {room / 1e9:.1f} GB for them "
        "hold; use more or larger devices, or --dtype bfloat16."
    )


def local(data: int, model: int, processes: int) -> tuple[int, int]:
    """How a mesh is divided among processes: the copies of the model that one has, and the processes that share one.

    Raises:
        InputError: if neither of them divides the other.
    """
    devices = data * model
    own = devices // processes
    if devices % processes or (own % model and model % own):
        raise InputError(
            f"the mesh data={data},model={model} cannot be divided among {processes} processes: each needs whole "
            "copies of the model, or an equal part of one."
        )
    return max(1, own // model), max(1, math.ceil(model / own))
