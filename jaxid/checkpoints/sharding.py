"""Sharding rules for parameters: one table for the networks of all families."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxid import meshes
from jaxid.errors import InputError
from jaxid.nn.layers import Projections


@dataclasses.dataclass(frozen=True)
class Rule:
    """An axis of parameters that is sharded over the mesh's axis "model".

    Attributes:
        pattern: of the parameter's dotted path.
        axis: the axis that is divided, counted from the end.
        parts: what it is made of, for messages.
    """

    pattern: str
    axis: int
    parts: str


RULES = (
    Rule(r"(attention|pooler)\.(query|key|value)(_bias)?$", -1, "heads"),
    Rule(r"(attention|pooler)\.out$", -2, "heads"),
    Rule(r"(^|\.)(gate|up|\w+_in)\.(kernel|bias)$", -1, "columns"),
    Rule(r"(^|\.)(down|\w+_out)\.kernel$", -2, "rows"),
    Rule(r"(^|\.)(decoder|text_encoder)\.embedding$", -2, "tokens"),
    Rule(r"(^|\.)unembedding$", -1, "tokens"),
)
"""The first rule that fits a path counts; parameters that none fits are replicated on every device.

The maps into heads and into MLPs are divided by their outputs, those back by their inputs: a block then adds up over
the devices twice, after its attention and after its MLP.
"""

_STACKS = {
    "the decoder's": re.compile(r"^decoder\.layers\.(attention\.out|mlp\.down\.kernel)$"),
    "the encoder's": re.compile(r"^(tower|text_encoder)\.layers\.(attention\.out|down\.kernel)$"),
}
"""Parameters of which some must be divided, or the mesh would save nothing; those of the first stack that there is."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of a network's parameters.

    Attributes:
        shardings: by dotted path.
        whole: what a rule would shard but is replicated, with the reason, by dotted path.
    """

    shardings: Mapping[str, NamedSharding]
    whole: Mapping[str, str]


def layout(definition: Any, abstract: Mapping[str, Any], mesh: Mesh | AbstractMesh) -> Layout:
    """The shardings of a network's parameters.

    Args:
        definition: the network's structure.
        abstract: the shape of every parameter by dotted path.
        mesh: the devices, with axes "data" and "model".

    Raises:
        InputError: if the axis "model" divides neither the heads nor the MLPs of the decoder, or of a CLIP-like model.
    """
    count = meshes.size(mesh, meshes.MODEL)
    widths = dict(_head_widths(definition, abstract))
    shardings: dict[str, NamedSharding] = {}
    whole: dict[str, str] = {}
    for path, leaf in abstract.items():
        spec = PartitionSpec()
        rule = next((rule for rule in RULES if re.search(rule.pattern, path)), None)
        if rule is not None and count > 1:
            axis = len(leaf.shape) + rule.axis
            parts = leaf.shape[axis] // (widths[path.rpartition(".")[0]] if rule.parts == "heads" else 1)
            if parts % count == 0:
                spec = PartitionSpec(*(None,) * axis, meshes.MODEL, *(None,) * (-rule.axis - 1))
            else:
                whole[path] = f"{parts} {rule.parts}"
        shardings[path] = NamedSharding(mesh, spec)
    found = ((owner, [path for path in abstract if stack.match(path)]) for owner, stack in _STACKS.items())
    owner, stack = next(((owner, paths) for owner, paths in found if paths), ("", []))
    if stack and all(path in whole for path in stack):
        reasons = ", ".join(dict.fromkeys(whole[path] for path in stack))
        raise InputError(f"model={count} divides none of {owner} {reasons}; choose a divisor of them.")
    return Layout(shardings, whole)


def _head_widths(definition: Any, abstract: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The head width of every attention layer, by its path."""
    from flax import traverse_util

    state = traverse_util.unflatten_dict(dict(abstract), sep=".")
    network = nnx.merge(definition, nnx.State(state))
    for path, module in nnx.iter_modules(network):
        if isinstance(module, Projections):
            yield ".".join(map(str, path)), module.head_width


def note(layout: Layout, abstract: Mapping[str, Any], mesh: Mesh | AbstractMesh, width: int) -> str | None:
    """One line about what is replicated although a rule would shard it; None if nothing is.

    Args:
        layout: where the parameters lie.
        abstract: their shapes by dotted path.
        mesh: the devices.
        width: bytes of a number.
    """
    if not layout.whole:
        return None
    kinds: dict[str, list[str]] = {}
    for path, reason in layout.whole.items():
        room, _, name = path.rpartition(".kernel")[0].rpartition(".") if ".kernel" in path else path.rpartition(".")
        if not path.endswith("bias"):
            kinds.setdefault(f"{room} ({reason})", []).append(name)
    texts = [f"{'/'.join(names)} of {room}" for room, names in kinds.items()]
    size = sum(math.prod(abstract[path].shape) for path in layout.whole) * width
    count = meshes.size(mesh, meshes.MODEL)
    return f"model={count} does not divide {', '.join(texts)}; they are replicated ({size / 1e9:.2f} GB each)."


def abstract_arrays(layout: Layout, abstract: Mapping[str, Any], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters' shapes with their shardings, for compilers."""
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=layout.shardings[path])
        for path, leaf in abstract.items()
    }
