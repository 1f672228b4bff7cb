"""What a program costs on a device, read from its jaxpr: operations, bytes moved, memory for temporaries.

The estimates need no compiler and no device, and assume that one is good:

- Operations are those of matrix products and convolutions; loop bodies count as often as they run.
- Bytes are those of the operands and results of products. Elementwise work is fused into them. Of a product with batch
  axes, such as those of attention, the largest array is left out: the scores of a fused kernel are never written.
- Temporaries are the arrays that products, loops and kernels read or write, each from its first to its last use; what
  is elementwise takes the place of an operand that is no longer needed.

Where a program has branches by platform, the device's own is taken.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var
from jax.interpreters import partial_eval

from jaxid.devices import Device

_PLATFORMS = {"gpu": ("cuda", "gpu"), "tpu": ("tpu",), "cpu": ("cpu",)}
"""Names of a device's platform in JAX's branches."""

_VIEWS = {
    "broadcast_in_dim",
    "dynamic_slice",
    "expand_dims",
    "reshape",
    "rev",
    "slice",
    "squeeze",
    "stop_gradient",
    "transpose",
}
"""Operations that a product reads through."""

_STORED = {
    "argsort",
    "concatenate",
    "cumsum",
    "dynamic_update_slice",
    "gather",
    "pad",
    "pallas_call",
    "random_bits",
    "scatter",
    "scatter-add",
    "sort",
}
"""Operations whose results are written to memory, as those of products and loops are."""

_IN_PLACE = {"cond", "scan", "while", "dynamic_update_slice", "scatter", "scatter-add"}
"""Operations that write over operands which are not needed any more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Costs of a program.

    Attributes:
        flops: floating-point operations.
        moved: bytes between memory and chip.
        temporary: bytes of memory besides arguments and results.
    """

    flops: float
    moved: float
    temporary: float


@dataclasses.dataclass
class _Buffer:
    """An array in memory.

    Attributes:
        size: bytes.
        last: index of the operation that reads it last; -1 if none does.
        result: whether the caller keeps it.
        over: the buffer that it can take the place of, if that is not needed any more.
    """

    size: float
    last: int = -1
    result: bool = False
    over: "_Buffer | None" = None


@dataclasses.dataclass(frozen=True)
class _Value:
    """A variable: the buffers that it is computed from, and whether it is computed rather than one of them."""

    roots: tuple[_Buffer, ...] = ()
    computed: bool = False


@dataclasses.dataclass(frozen=True)
class _Step:
    """An operation in memory: what it reads and writes, and what it needs meanwhile."""

    writes: tuple[_Buffer, ...]
    inner: float = 0.0
    in_place: bool = False


def cost_of(jaxpr: ClosedJaxpr, device: Device, *, trips: int = 1) -> Cost:
    """The costs of a traced program.

    Args:
        jaxpr: the program.
        device: the device.
        trips: how often loops run whose jaxpr does not say it.
    """
    needed, _ = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.jaxpr.outvars), instantiate=True)
    return _Walk(device, trips).run(needed)


def nbytes(array: Any) -> float:
    """Bytes of anything with a shape and a dtype; 0 of what has none, such as a key of random numbers."""
    try:
        return math.prod(array.shape) * np.dtype(array.dtype).itemsize
    except (AttributeError, TypeError):
        return 0.0


class _Walk:
    """Walks through a jaxpr, and adds up what it costs."""

    def __init__(self, device: Device, trips: int):
        self.device, self.trips = device, trips
        self.flops = self.moved = 0.0
        self.steps: list[_Step] = []

    def run(self, jaxpr: Jaxpr) -> Cost:
        """The cost of a whole jaxpr, whose arguments lie in memory already."""
        for value in self.walk(jaxpr, [_Value() for _ in jaxpr.invars]):
            for buffer in value.roots:
                buffer.result = True
        return Cost(flops=self.flops, moved=self.moved, temporary=self.peak())

    def peak(self) -> float:
        """The most bytes that are held at a time."""
        for index in range(len(self.steps) - 1, -1, -1):
            for buffer in self.steps[index].writes:
                if buffer.result and buffer.over is not None and buffer.over.last == index:
                    buffer.over.result = True
        live = peak = 0.0
        dying: dict[int, float] = {}
        for index, step in enumerate(self.steps):
            written = sum(buffer.size for buffer in step.writes if not buffer.result)
            freed = dying.pop(index, 0.0)
            peak = max(peak, live + step.inner + (max(0.0, written - freed) if step.in_place else written))
            live += written - freed
            for buffer in step.writes:
                if buffer.last <= index and not buffer.result:
                    live -= buffer.size
                elif not buffer.result:
                    dying[buffer.last] = dying.get(buffer.last, 0.0) + buffer.size
        return peak

    def walk(self, jaxpr: Jaxpr, arguments: Sequence[_Value]) -> list[_Value]:
        """Adds a jaxpr's operations, and gives the values of its results."""
        known: dict[Var, _Value] = dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> _Value:
            return _Value() if isinstance(atom, Literal) else known.get(atom, _Value())

        for equation in jaxpr.eqns:
            name, operands = equation.primitive.name, [read(atom) for atom in equation.invars]
            body = _inlined(name, equation.params)
            if body is not None:
                # What custom rules carry along comes first, and the body does not read it.
                results = self.walk(body, operands[len(operands) - len(body.invars) :])
            elif name in _VIEWS:
                results = [_Value(operands[0].roots, operands[0].computed)]
            elif name in ("dot_general", "conv_general_dilated", "scan", "while", "cond") or name in _STORED:
                operands = [
                    self.materialised(operand, atom) for operand, atom in zip(operands, equation.invars, strict=True)
                ]
                known.update(
                    (atom, operand)
                    for atom, operand in zip(equation.invars, operands, strict=True)
                    if not isinstance(atom, Literal)
                )
                inner = self.priced(name, equation)
                results = self.wrote(equation.outvars, operands, inner, name in _IN_PLACE)
            else:
                inner = sum(self.nested(one, 1).temporary for one in _jaxprs(equation.params.values()))
                roots = {id(root): root for operand in operands for root in operand.roots}
                if inner:
                    results = self.wrote(equation.outvars, operands, inner, False)
                else:
                    results = [_Value(tuple(roots.values()), computed=True)] * len(equation.outvars)
            known.update(zip(equation.outvars, results, strict=True))
        return [self.materialised(read(atom), atom) for atom in jaxpr.outvars]

    def materialised(self, value: _Value, atom: Any) -> _Value:
        """A value in memory: written, if it is still to be computed."""
        if not value.computed or isinstance(atom, Literal):
            self.touch(value.roots)
            return value
        return self.wrote([atom], [value], 0.0, in_place=True)[0]

    def wrote(self, atoms: Sequence[Any], operands: Sequence[_Value], inner: float, in_place: bool) -> list[_Value]:
        """Adds an operation that writes new buffers."""
        for operand in operands:
            self.touch(operand.roots)
        buffers = tuple(_Buffer(nbytes(atom.aval)) for atom in atoms)
        free = [root for operand in operands if not operand.computed for root in operand.roots] if in_place else []
        for buffer in buffers:
            buffer.over = next((root for root in free if root.size == buffer.size), None)
            free = [root for root in free if root is not buffer.over]
        self.steps.append(_Step(buffers, inner, in_place))
        return [_Value((buffer,)) for buffer in buffers]

    def touch(self, roots: Iterable[_Buffer]) -> None:
        """Notes that the next operation reads buffers."""
        for root in roots:
            root.last = max(root.last, len(self.steps))

    def nested(self, jaxpr: Jaxpr, times: float) -> Cost:
        """Adds the cost of a body that runs several times, and returns it."""
        cost = _Walk(self.device, self.trips).run(jaxpr)
        self.flops += times * cost.flops
        self.moved += times * cost.moved
        return cost

    def priced(self, name: str, equation: Any) -> float:
        """Adds the operations and bytes of an operation in memory; returns the bytes that it needs meanwhile."""
        sizes = [nbytes(atom.aval) for atom in (*equation.invars, *equation.outvars)]
        params = equation.params
        if name == "scan":
            return self.nested(params["jaxpr"].jaxpr, params["length"]).temporary
        if name == "while":
            self.nested(params["cond_jaxpr"].jaxpr, self.trips)
            return self.nested(params["body_jaxpr"].jaxpr, self.trips).temporary
        if name == "cond":
            # What goes through a branch is copied; those by platform are decided when the program is compiled.
            copied = 0 if params.get("branches_platforms") else sum(nbytes(atom.aval) for atom in equation.outvars)
            return self.branch(params) + copied
        if name == "dot_general":
            (left, _), (batch, _) = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            self.flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in left)
            self.moved += sum(sizes) - (max(sizes) if batch else 0)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            self.flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
            self.moved += sum(sizes)
        elif name == "pallas_call":
            self.moved += sum(sizes)
        return 0.0

    def branch(self, params: Mapping[str, Any]) -> float:
        """Adds the costliest branch; of branches by platform, that of the device."""
        costs = [_Walk(self.device, self.trips).run(branch.jaxpr) for branch in params["branches"]]
        platforms = params.get("branches_platforms")
        if platforms is not None:
            # What a kernel computes and reads cannot be seen from outside: as much as the plain form at the least.
            plain = max(costs, key=lambda cost: (cost.flops, -cost.moved))
            own = _PLATFORMS[self.device.platform]
            costs = [
                dataclasses.replace(plain, temporary=cost.temporary)
                for cost, names in zip(costs, platforms, strict=True)
                if set(names or own) & set(own)
            ][:1]
        self.flops += max(cost.flops for cost in costs)
        self.moved += max(cost.moved for cost in costs)
        return max(cost.temporary for cost in costs)


def _inlined(name: str, params: Mapping[str, Any]) -> Jaxpr | None:
    """The body of a call, whose operations are the caller's."""
    if name in ("scan", "while", "cond", "pallas_call"):
        return None
    found = next((params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call") if key in params), None)
    if isinstance(found, ClosedJaxpr):
        return found.jaxpr
    return found if isinstance(found, Jaxpr) else None


def _jaxprs(values: Iterable[Any]) -> Iterable[Jaxpr]:
    """The jaxprs among an unknown operation's settings."""
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
