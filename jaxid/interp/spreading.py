"""How a pass is sharded over a mesh: prompts over "data" if their number allows it, otherwise rows of a sweep.

Every pass places its arrays here, so that all of them shard prompts alike.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int, PyTree

from jaxid import meshes
from jaxid.families.base import Model
from jaxid.interp.programs import program
from jaxid.meshes import DATA
from jaxid.nn import placement
from jaxid.nn.inputs import Inputs
from jaxid.prompts.processor import Prompts

Tree = TypeVar("Tree")


def by_prompts(mesh: Mesh | None, prompts: int) -> bool:
    """Whether the number of prompts is a multiple of axis "data"."""
    return prompts % meshes.size(mesh, DATA) == 0


def inputs_of(model: Model, prompts: Prompts) -> Inputs:
    """The arrays of prompts on the devices of a model.

    Prompts are sharded over "data", and so are their pictures where every prompt has an equal share to itself
    (`Inputs.apart`). Pictures that prompts share, or of which they have unequal numbers of tiles or squares, are whole
    on every device, which then encodes all of them. So is everything if the prompts do not divide.
    """
    mesh, inputs = model.mesh, prompts.inputs
    place = meshes.sharded if by_prompts(mesh, len(prompts)) else meshes.replicated
    pictures = place if inputs.apart else meshes.replicated
    found = place(mesh, dataclasses.replace(inputs, pixels=None, extras={}))
    return dataclasses.replace(found, pixels=pictures(mesh, inputs.pixels), extras=pictures(mesh, dict(inputs.extras)))


def of_prompts(mesh: Mesh | None, tree: PyTree, prompts: int, axis: int = 0) -> Any:
    """Arrays with an axis of prompts, which is divided as in `inputs_of`."""
    return meshes.sharded(mesh, tree, axis) if by_prompts(mesh, prompts) else meshes.replicated(mesh, tree)


def with_model(mesh: Mesh | None, tree: Tree) -> Tree:
    """Arrays of any shape, such as an intervention's, on a mesh; every device gets all of those that lie elsewhere."""

    def moved(leaf: Any) -> Any:
        if mesh is None or isinstance(leaf, Tracer) or not isinstance(leaf, jax.Array) or meshes.of(leaf) == mesh:
            return leaf
        spans = len({device.process_index for device in mesh.devices.flat}) > 1
        return meshes.replicated(mesh, np.asarray(leaf) if spans else leaf)

    return jax.tree.map(moved, tree)


def dealt(order: Int[Array, "R"], parts: int) -> Int[Array, "R"]:
    """Rows in the order in which devices take them one after another, those of a device side by side."""
    return order.reshape(-1, parts).T.reshape(-1)


def over_rows(run: Callable[[Any, Any], PyTree], shared: PyTree, rows: PyTree) -> PyTree:
    """Runs a function of shared arrays and of rows on every device along "data" for its own rows.

    Only inside of a program. What is sharded over "model" stays so.
    """
    split = jax.shard_map(
        run,
        in_specs=(PartitionSpec(), PartitionSpec(DATA)),
        out_specs=PartitionSpec(DATA),
        axis_names={DATA},
        check_vma=False,
    )
    return split(shared, rows)


@program()
def in_order(found: PyTree, order: Int[Array, "R"]) -> PyTree:
    """Results of rows, replicated and in the order of the rows; `order` is the order in which they ran."""
    back = jnp.argsort(order)
    return jax.tree.map(lambda leaf: placement.result(leaf[back], ()), found)
