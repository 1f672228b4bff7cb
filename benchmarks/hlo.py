"""Counts what a compiled program does: what it computes, which bytes it moves, which weights it copies.

XLA's own cost analysis counts the body of a loop once, and returns nothing for a GPU that is not there. Here the body
counts as often as the loop runs, and a branch as often as it is expected to be taken. The text does not show what
kernels of libraries and of Pallas do inside: their operands and outputs count, and the operations of those whose name
and shapes tell them. Other kernels are listed.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

from hlo_collectives import Collective, channel, collectives
from hlo_kernels import convolution, kernel_name, library, read_shares
from hlo_text import Computation, Instruction, Program, axes_of
from hlo_text import Shape as Shape
from hlo_text import parse as parse

_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id domain
    send-done recv-done
    """.split()
)
"""Operations that move nothing; so do the ends of asynchronous ones, which count where they start."""

_MOVING = frozenset(
    "copy slice dynamic-slice transpose convert reshape concatenate bitcast-convert pad reverse".split()
)
"""Operations that only write what they read in another place, order or type. Looking up rows is none of them."""

_SELECTING = frozenset(["slice", "dynamic-slice", "gather"])

_IDLE = frozenset(
    """AllocateBuffer ConcatBitcast Sharding AssumeGatherIndicesInBound GatherScatterIndicesBitpacked
    AsyncCollectiveStart AsyncCollectiveDone annotate_device_placement
    """.split()
)
"""Custom calls that compute nothing."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does in one run.

    Attributes:
        flop: floating-point operations of matrix products, convolutions and attention.
        moved: bytes of operands and outputs of all top-level instructions in the device's memory.
        in_products: those of instructions with products, and of kernels.
        in_moves: those of instructions that only write what they read in another place, order or type.
        copied: bytes of weights that are written in another place, order or type.
        weight_copies: instructions that do so.
        score_tensors: buffers in the device's memory with an axis of queries and an axis of keys.
        unknown_loops: loops of which neither the compiler nor the caller knows how often they run; they count once.
        unknown_branches: conditionals of which the caller does not know how often they take which branch; the branch
            that moves most counts.
        unknown_kernels: names of custom calls whose operations do not count.
        faults: what is copied or holds scores: its kind, shape, name and function.
        functions: functions of the source whose loops and conditionals counted as the caller said.
        collectives: those that run, each with the number of its runs.
    """

    flop: float = 0.0
    moved: float = 0.0
    in_products: float = 0.0
    in_moves: float = 0.0
    copied: float = 0.0
    weight_copies: int = 0
    score_tensors: int = 0
    unknown_loops: int = 0
    unknown_branches: int = 0
    unknown_kernels: frozenset[str] = frozenset()
    faults: frozenset[str] = frozenset()
    functions: frozenset[str] = frozenset()
    collectives: tuple[Collective, ...] = ()

    def __add__(self, other: "Counts") -> "Counts":
        """Both programs in turn."""
        names = ("unknown_kernels", "faults", "functions")
        sets = {name: getattr(self, name) | getattr(other, name) for name in names}
        fields = [field.name for field in dataclasses.fields(self) if field.name not in names]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in fields}, **sets)

    def times(self, runs: float) -> "Counts":
        """A loop's body in all runs; instructions and buffers count once."""
        names = ("flop", "moved", "in_products", "in_moves", "copied")
        own = tuple(one.times(runs) for one in self.collectives)
        return dataclasses.replace(self, collectives=own, **{name: runs * getattr(self, name) for name in names})

    def sent(self, axis: str) -> float:
        """Bytes that one device sends in collectives along an axis of the mesh."""
        return sum(one.sent for one in self.collectives if axis in one.axes)


Flags = tuple[bool, ...]
"""Which of an instruction's outputs are weights."""


def count(
    program: Program,
    *,
    weights: Iterable[int] = (),
    large: int = 1_000_000,
    keys: Iterable[int] = (),
    widths: Iterable[int] = (),
    least: int = 512,
    shares: Mapping[str, float] | None = None,
    trips: Mapping[str, float] | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Counts:
    """Counts what a program does.

    Args:
        program: the program.
        weights: indices of the entry's parameters that are weights.
        large: bytes from which a copied weight counts.
        keys: lengths of key axes. A floating-point buffer with such an axis, and with another of `least` or more that
            is not a width of the model, holds scores.
        widths: widths of the model, and other lengths of axes that are not of queries.
        least: length from which an axis of queries or keys counts.
        shares: how often a conditional takes its second branch (in JAX, that of a true predicate), by the qualified
            name of the function that calls `jax.lax.cond`.
        trips: how often a loop runs of which the compiler does not know it, by the function that starts it.
        mesh: sizes of the axes of the mesh whose devices share the program.
    """
    chosen = set(weights)
    reader = _Reader(
        program,
        large,
        frozenset(key for key in keys if key >= least),
        frozenset(widths),
        least,
        shares or {},
        trips or {},
        mesh or {},
    )
    parameters = program.computations[program.entry].parameters
    return reader.run(program.entry, [(index in chosen,) * len(one.shapes) for index, one in enumerate(parameters)])[0]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Follows a program through its loops and branches; the fields are arguments of `count`."""

    program: Program
    large: int
    keys: frozenset[int]
    widths: frozenset[int]
    least: int
    shares: Mapping[str, float]
    trips: Mapping[str, float]
    mesh: Mapping[str, int]

    def run(self, name: str, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        """What a computation does in one run, and which of its outputs are weights, from those of its parameters."""
        computation, counts = self.program.computations[name], Counts()
        flags: dict[str, Flags] = {}
        channels: set[str] = set()
        for instruction in computation.values():
            none = (False,) * max(1, len(instruction.shapes))
            if instruction.opcode == "parameter":
                flags[instruction.name] = given[int(instruction.inside)]
                continue
            more, found = self._step(computation, instruction, [flags[one] for one in instruction.operands])
            own = channel(self.program, instruction)
            if own is not None and own in channels:
                more = dataclasses.replace(more, collectives=())
            channels |= {own} if own is not None else set()
            counts += more
            flags[instruction.name] = found if len(found) == len(none) else none
        return counts, flags[computation.root.name]

    def _step(self, computation: Computation, instruction: Instruction, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "tuple":
            return Counts(), tuple(flag for flags in given for flag in flags)
        if opcode == "get-tuple-element":
            return Counts(), _element(computation, instruction, given[0])
        if opcode in _FREE or opcode.endswith(("-done", "-update")) or instruction.target in _IDLE:
            return Counts(), _ended(instruction, given[0]) if given else ()
        if opcode == "while":
            return self._loop(computation, instruction, given)
        if opcode == "conditional":
            return self._branch(computation, instruction, given)
        if opcode in ("call", "async-start"):
            return self.run((called.get("to_apply") or called["calls"])[0], given)
        results = _results(instruction)
        moved, flop = _moved(self.program, computation, instruction), self._flop(computation, instruction)
        moves, scores = _only_moves(self.program, instruction), [one for one in results if self._scores(one)]
        counts = Counts(
            flop=flop,
            moved=moved,
            in_products=moved if flop or opcode.startswith("custom-call") else 0.0,
            in_moves=moved if moves else 0.0,
            score_tensors=len(scores),
            unknown_kernels=frozenset(self._unknown(computation, instruction)),
            faults=frozenset(self._fault("scores", instruction, one) for one in scores),
            collectives=tuple(collectives(self.program, computation, instruction, self.mesh)),
        )
        if not (moves and any(any(flags) for flags in given)):
            return counts, ()
        written = sum(shape.far for shape in results)  # a copy to memory on the chip is how weights are read
        if written >= self.large:
            fault = self._fault("a copy of weights", instruction, results[0])
            counts += Counts(weight_copies=1, copied=written, faults=frozenset([fault]))
        return counts, (True,) * len(instruction.shapes)

    def _fault(self, kind: str, instruction: Instruction, shape: Shape) -> str:
        dims, function = ",".join(map(str, shape.dims)), self.program.function(instruction)
        return f"{kind}: {shape.dtype}[{dims}] {instruction.name}" + (f" in {function}" if function else "")

    def _loop(self, computation: Computation, loop: Instruction, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        counts, returned = self.run(loop.called["body"][0], given)
        known, function = self.program.trips(computation, loop), self.program.function(loop)
        if known is not None:
            counts = counts.times(known)
        elif function in self.trips:
            counts = counts.times(self.trips[function]) + Counts(functions=frozenset([function]))
        else:
            counts += Counts(unknown_loops=1)
        # What the body changes is no longer the weight that entered.
        return counts, tuple(before and after for before, after in zip(given[0], returned, strict=True))

    def _branch(self, computation: Computation, branch: Instruction, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        flags = dict(zip(branch.operands, given, strict=True))
        found = [self.run(name, [flags[operand]]) for name, operand in branch.branches]
        function = self.program.function(branch)
        if function not in self.shares or len(found) != 2:
            counts, returned = max(found, key=lambda one: one[0].moved)
            return counts + Counts(unknown_branches=1), returned
        share = self.shares[function]
        counts = found[0][0].times(1 - share) + found[1][0].times(share) + Counts(functions=frozenset([function]))
        return counts, found[1][1]

    def _scores(self, shape: Shape) -> bool:
        long = [length for length in shape.dims if length >= self.least and length not in self.widths]
        written = shape.floating and not shape.space  # scores on the chip are what fused attention has
        return written and len(long) > 1 and any(length in self.keys for length in long)

    def _inner(self, instruction: Instruction) -> Computation:
        return self.program.computations[instruction.called["calls"][0]]

    def _flop(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "fusion":
            inner = self._inner(instruction)
            return sum(self._flop(inner, one) for one in inner.values())
        operands = [computation[name].shapes[0] for name in instruction.operands if computation[name].shapes]
        opcode = instruction.opcode.removesuffix("-start")
        if opcode == "dot":
            axes = axes_of(instruction.rest, "lhs_contracting_dims")
            contracted = math.prod(operands[0].dims[axis] for axis in axes)
            return 2.0 * math.prod(instruction.shapes[0].dims) * contracted
        if opcode == "convolution":
            return convolution(instruction, operands)
        if opcode == "custom-call":
            return library(instruction, operands) or 0.0
        return 0.0

    def _unknown(self, computation: Computation, instruction: Instruction) -> Iterable[str]:
        if instruction.opcode == "fusion":
            inner = self._inner(instruction)
            for one in inner.values():
                yield from self._unknown(inner, one)
        elif instruction.opcode.startswith("custom-call") and instruction.target not in _IDLE:
            operands = [computation[name].shapes[0] for name in instruction.operands if computation[name].shapes]
            if library(instruction, operands) is None:
                yield kernel_name(instruction)


def _element(computation: Computation, instruction: Instruction, flags: Flags) -> Flags:
    """The flags of one output. A tuple in a tuple is flattened, which only a tuple of plain arrays allows to index."""
    index = int(re.findall(r"index=(\d+)", instruction.rest)[0])
    plain = len(computation[instruction.operands[0]].shapes) == len(flags) and len(instruction.shapes) == 1
    return (flags[index],) if plain and index < len(flags) else ()


def _ended(instruction: Instruction, flags: Flags) -> Flags:
    """The flags of what is handed on; the end of an asynchronous operation returns a part of its start."""
    count = max(1, len(instruction.shapes))
    return (all(flags),) * count if instruction.opcode.endswith("-done") and flags else flags


def _results(instruction: Instruction) -> tuple[Shape, ...]:
    """What an instruction writes: without the scratch of a library, or the operands that an asynchronous start returns.

    A copy's start returns its result first, that of a sum over devices nothing else, others their operands before it.
    """
    shapes = instruction.shapes
    if instruction.opcode == "copy-start":
        return shapes[:1]
    if instruction.opcode == "all-reduce-start":
        return shapes
    if instruction.opcode.endswith("-start"):
        count = len(instruction.operands)
        return shapes[count : count + 1]
    if "__cu" in instruction.target:
        return tuple(shape for shape in shapes if shape.dtype not in ("s8", "u8")) or shapes[:1]
    return shapes


def _only_moves(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction writes nothing but a rearranged operand."""
    if instruction.opcode != "fusion":
        return instruction.opcode.removesuffix("-start") in _MOVING
    inner = program.computations[instruction.called["calls"][0]].values()
    # Indices are computed beside it.
    arrays = [one for one in inner if any(shape.dims for shape in one.shapes)]
    return all(one.opcode in _FREE or _only_moves(program, one) for one in arrays)


def _moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes; of what it selects or updates in place, the touched ones."""
    operands = [computation[name] for name in instruction.operands]
    opcode, results = instruction.opcode.removesuffix("-start"), _results(instruction)
    written = sum(shape.far for shape in results)
    if opcode in _SELECTING:
        read = sum(shape.size for shape in results) if operands[0].far else 0
        return float(written + read + sum(one.far for one in operands[1:]))
    if opcode == "dynamic-update-slice":
        return float(operands[1].far + (operands[1].size if written else 0))
    if opcode == "scatter":
        return 2.0 * operands[-1].far + operands[1].far
    if opcode == "custom-call":
        shares = read_shares(instruction, [one.shapes[0].dims for one in operands])
        return float(written + sum(share * one.far for share, one in zip(shares, operands, strict=True)))
    if opcode != "fusion":
        return float(written + sum(one.far for one in operands))
    inner = program.computations[instruction.called["calls"][0]]
    read = sum(
        _read(program, inner, parameter)
        for parameter, operand in zip(inner.parameters, operands, strict=True)
        if operand.far
    )
    root = inner.root
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(outputs) != len(results):
        return float(read + written)
    return float(read + sum(_written(inner, one) for one, shape in zip(outputs, results, strict=True) if shape.far))


def _read(program: Program, inner: Computation, value: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads."""
    total = 0
    for user in inner.users[value.name]:
        if user.opcode == "bitcast":
            total += _read(program, inner, user)
        elif user.opcode in _SELECTING and user.operands[0] == value.name:
            total += user.size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated in place
        elif user.opcode == "fusion":
            nested = program.computations[user.called["calls"][0]]
            places = [place for place, operand in enumerate(user.operands) if operand == value.name]
            total += sum(_read(program, nested, nested.parameters[place]) for place in places)
        else:
            return value.size
    return min(total, value.size)


def _written(inner: Computation, output: Instruction) -> int:
    """Bytes that a fusion writes of one output."""
    while output.opcode == "bitcast":
        output = inner[output.operands[0]]
    return inner[output.operands[1]].size if output.opcode == "dynamic-update-slice" else output.size
