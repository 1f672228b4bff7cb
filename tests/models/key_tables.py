"""Key tables against the tensors that a PyTorch model has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxid.checkpoints.tensors import flatten, unflatten
from jaxid.nn.keys import Key


def abstract_of(build: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Shapes of a module's parameters by their paths."""
    return flatten(nnx.to_pure_dict(nnx.state(nnx.eval_shape(build))))


def assert_table_fits(keys: Sequence[Key], abstract: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """The table names these tensors and no others, and each has the shape of the parameter that it fills."""
    table: dict[str, list[tuple[Key, tuple[int, ...]]]] = {}
    for key in keys:
        shape = abstract[key.target].shape
        for name, row in key.tensors(shape):
            table.setdefault(name, []).append((key, shape if row is None else shape[1:]))
    assert set(table) == set(tensors)
    for name, fills in table.items():
        for key, shape in fills:
            assert key.parameter_shape(tensors[name]) == shape, name


def module_of(build: Callable[[], nnx.Module], keys: Sequence[Key], tensors: Mapping[str, np.ndarray]) -> Any:
    """A module with the parameters that a table makes of a PyTorch model's tensors."""
    definition, state = nnx.split(build())
    leaves = flatten(nnx.to_pure_dict(state))
    for key in keys:
        for name, row in key.tensors(leaves[key.target].shape):
            value = jnp.asarray(key.to_parameter(tensors[name]))
            leaves[key.target] = value if row is None else leaves[key.target].at[row].set(value)
    return nnx.merge(definition, nnx.State(unflatten(leaves)))
