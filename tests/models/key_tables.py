"""Key tables against the tensors that a PyTorch model has."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from jaxid.checkpoints.tensors import flatten
from jaxid.models.keys import Key


def abstract_of(build: Callable[[], nnx.Module]) -> dict[str, Any]:
    """Shapes of a module's parameters by their paths."""
    return flatten(nnx.to_pure_dict(nnx.state(nnx.eval_shape(build))))


def assert_table_fits(keys: Sequence[Key], abstract: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> None:
    """The table names these tensors and no others, and each has the shape of the parameter that it fills."""
    table: dict[str, list[tuple[Key, tuple[int, ...]]]] = {}
    for key in keys:
        shape = abstract[key.target].shape
        if "{layer}" in key.source:
            for layer, _ in key.places(shape[0]):
                table.setdefault(key.source.format(layer=layer), []).append((key, shape[1:]))
        else:
            table.setdefault(key.source, []).append((key, shape))
    assert set(table) == set(tensors)
    for name, fills in table.items():
        for key, shape in fills:
            assert key.parameter_shape(tensors[name]) == shape, name
