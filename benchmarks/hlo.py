"""Reads a compiled program in HLO's text form: what it computes, which bytes it moves, which weights it copies.

XLA's own cost analysis counts the body of a loop once, and returns nothing for a GPU that is not there. Here the body
counts as often as the loop runs. The text does not show what kernels of libraries and of Pallas do inside: their
operands and outputs count, and the operations of products whose shapes are known.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

_FREE = frozenset(
    """parameter constant tuple get-tuple-element bitcast after-all opt-barrier partition-id replica-id copy-done
    async-done async-update all-reduce-done all-gather-done collective-permute-done send-done recv-done domain
    """.split()
)
"""Operations that move nothing; an asynchronous one counts where it starts."""

_MOVING = frozenset(
    """copy copy-start slice dynamic-slice transpose convert reshape concatenate bitcast-convert pad reverse gather
    """.split()
)
"""Operations that only write what they read in another place, order or type."""

_SELECTING = frozenset(["slice", "dynamic-slice", "gather"])


class Shape(NamedTuple):
    """Shape of an array.

    Attributes:
        dtype: HLO's name, such as bf16.
        dims: lengths of the axes.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return -(-math.prod(self.dims) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: its name, unique in its computation.
        opcode: the operation.
        shapes: of the output; several if it is a tuple, nested ones flattened.
        operands: names of the operands.
        inside: the text between the parentheses, such as a parameter's index.
        rest: the attributes.
        root: whether it is what the computation returns.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    inside: str
    rest: str
    root: bool

    @property
    def size(self) -> int:
        """Bytes of the output."""
        return sum(shape.size for shape in self.shapes)

    @functools.cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the computations that it calls, by attribute."""
        found: dict[str, tuple[str, ...]] = {kind: (name,) for kind, name in _CALLED.findall(self.rest)}
        branches = _BRANCHES.search(self.rest)
        if branches:
            found["branches"] = tuple(_NAME.findall(branches[1]))
        elif "true_computation" in found:
            found["branches"] = (*found["true_computation"], *found["false_computation"])
        return found

    @property
    def trips(self) -> int:
        """How often a loop runs; 1 if the compiler does not know it."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else 1


class Computation(dict[str, Instruction]):
    """Instructions by name, in order of execution."""

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(instruction for instruction in self.values() if instruction.root)

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """The parameters, in order."""
        found = [instruction for instruction in self.values() if instruction.opcode == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.inside))

    @functools.cached_property
    def users(self) -> Mapping[str, list[Instruction]]:
        """The instructions that read each one."""
        found: dict[str, list[Instruction]] = {name: [] for name in self}
        for instruction in self.values():
            for operand in dict.fromkeys(instruction.operands):
                found[operand].append(instruction)
        return found


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that runs first.
    """

    computations: Mapping[str, Computation]
    entry: str


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a program does in one run.

    Attributes:
        flop: floating-point operations of matrix products and convolutions.
        moved: bytes of operands and outputs of all top-level instructions.
        copied: bytes of weights that are written in another place, order or type.
        weight_copies: instructions that do so.
        score_tensors: buffers with an axis of queries and an axis of keys.
        unknown_loops: loops of which the compiler does not know how often they run; they count once.
    """

    flop: float = 0.0
    moved: float = 0.0
    copied: float = 0.0
    weight_copies: int = 0
    score_tensors: int = 0
    unknown_loops: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Both programs in turn."""
        return Counts(
            flop=self.flop + other.flop,
            moved=self.moved + other.moved,
            copied=self.copied + other.copied,
            weight_copies=self.weight_copies + other.weight_copies,
            score_tensors=self.score_tensors + other.score_tensors,
            unknown_loops=self.unknown_loops + other.unknown_loops,
        )

    def times(self, trips: int) -> "Counts":
        """A loop's body in all runs; instructions and buffers count once."""
        return dataclasses.replace(self, flop=trips * self.flop, moved=trips * self.moved, copied=trips * self.copied)


def parse(text: str) -> Program:
    """Reads the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    current, entry = Computation(), ""
    for line in text.splitlines():
        head = _HEAD.match(line)
        if head:
            current = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
            continue
        found = _LINE.match(line)
        if found:
            instruction = _instruction(found[2], found[3], root=bool(found[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text holds no entry computation")
    return Program(computations, entry)


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    kind, text = text[:end], text[end:].lstrip()
    opening = text.index("(")
    closing = _closing(text, opening)
    inside = text[opening + 1 : closing - 1]
    return Instruction(
        name=name,
        opcode=text[:opening],
        shapes=tuple(_shapes(kind)),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        rest=text[closing:],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """The index after the parenthesis that closes the one at `start`."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def _shapes(kind: str) -> Iterator[Shape]:
    for dtype, dims in _SHAPE.findall(kind):
        yield Shape(dtype, tuple(int(length.removeprefix("<=")) for length in dims.split(",") if length))


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
) -> Counts:
    """Counts what a program does.

    Args:
        program: the program.
        weights: indices of the entry's parameters that are weights.
        large: bytes from which a copied weight counts.
        keys: lengths of key axes. A floating-point buffer with such an axis, and with another of `least` or more that
            is not a width of the model, holds scores.
        widths: widths of the model.
        least: length from which an axis of queries or keys counts.
    """
    chosen = set(weights)
    reader = _Reader(program, large, frozenset(key for key in keys if key >= least), frozenset(widths), least)
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

    def run(self, name: str, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        """What a computation does in one run, and which of its outputs are weights, from those of its parameters."""
        computation, counts = self.program.computations[name], Counts()
        flags: dict[str, Flags] = {}
        for instruction in computation.values():
            none = (False,) * max(1, len(instruction.shapes))
            if instruction.opcode == "parameter":
                flags[instruction.name] = given[int(instruction.inside)]
                continue
            more, found = self._step(computation, instruction, [flags[one] for one in instruction.operands])
            counts += more
            flags[instruction.name] = found if len(found) == len(none) else none
        return counts, flags[computation.root.name]

    def _step(self, computation: Computation, instruction: Instruction, given: Sequence[Flags]) -> tuple[Counts, Flags]:
        opcode, called = instruction.opcode, instruction.called
        if opcode == "tuple":
            return Counts(), tuple(flag for flags in given for flag in flags)
        if opcode == "get-tuple-element":
            return Counts(), _element(computation, instruction, given[0])
        if opcode in _FREE:
            return Counts(), given[0] if given else ()
        if opcode == "while":
            counts, returned = self.run(called["body"][0], given)
            counts = counts.times(instruction.trips)
            if not _TRIPS.search(instruction.rest):
                counts += Counts(unknown_loops=1)
            # What the body changes is no longer the weight that entered.
            return counts, tuple(before and after for before, after in zip(given[0], returned, strict=True))
        if opcode == "conditional":  # the branch that moves most
            taken = zip(called["branches"], given[1:], strict=True)
            return max((self.run(name, [flags]) for name, flags in taken), key=lambda found: found[0].moved)
        if opcode in ("call", "async-start"):
            return self.run((called.get("to_apply") or called["calls"])[0], given)
        counts = Counts(
            flop=self._flop(computation, instruction),
            moved=_moved(self.program, computation, instruction),
            score_tensors=sum(map(self._scores, instruction.shapes)),
        )
        if not (any(any(flags) for flags in given) and _only_moves(self.program, instruction)):
            return counts, ()
        if instruction.size >= self.large:
            counts += Counts(weight_copies=1, copied=instruction.size)
        return counts, (True,) * len(instruction.shapes)

    def _scores(self, shape: Shape) -> bool:
        long = [length for length in shape.dims if length >= self.least and length not in self.widths]
        floating = shape.dtype.startswith(("f", "bf"))
        return floating and len(long) > 1 and any(length in self.keys for length in long)

    def _flop(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode == "fusion":
            inner = self.program.computations[instruction.called["calls"][0]]
            return sum(self._flop(inner, one) for one in inner.values())
        operands = [computation[name].shapes[0].dims for name in instruction.operands if computation[name].shapes]
        if instruction.opcode == "dot":
            axes = _list(instruction.rest, "lhs_contracting_dims")
            return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(operands[0][axis] for axis in axes)
        if instruction.opcode == "convolution":
            return _convolution(instruction, operands[1])
        if instruction.opcode == "custom-call":
            return _library(instruction, operands)
        return 0.0


def _element(computation: Computation, instruction: Instruction, flags: Flags) -> Flags:
    """The flags of one output. A tuple in a tuple is flattened, which only a tuple of plain arrays allows to index."""
    index = int(re.findall(r"index=(\d+)", instruction.rest)[0])
    plain = len(computation[instruction.operands[0]].shapes) == len(flags) and len(instruction.shapes) == 1
    return (flags[index],) if plain and index < len(flags) else ()


def _only_moves(program: Program, instruction: Instruction) -> bool:
    """Whether an instruction writes nothing but a rearranged operand."""
    if instruction.opcode != "fusion":
        return instruction.opcode in _MOVING
    inner = program.computations[instruction.called["calls"][0]].values()
    # Indices are computed beside it.
    arrays = [one for one in inner if any(shape.dims for shape in one.shapes)]
    return all(one.opcode in _MOVING | _FREE for one in arrays)


def _moved(program: Program, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads and writes; of what it selects or updates in place, the touched ones."""
    operands = [computation[name] for name in instruction.operands]
    if instruction.opcode in _SELECTING:
        return 2.0 * instruction.size + sum(one.size for one in operands[1:])
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * operands[1].size
    if instruction.opcode == "scatter":
        return 2.0 * operands[-1].size + operands[1].size
    if instruction.opcode != "fusion":
        return float(instruction.size + sum(one.size for one in operands))
    inner = program.computations[instruction.called["calls"][0]]
    read = sum(_read(inner, parameter) for parameter in inner.parameters)
    root = inner.root
    outputs = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return float(read + sum(_written(inner, one) for one in outputs))


def _read(inner: Computation, value: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads."""
    total = 0
    for user in inner.users[value.name]:
        if user.opcode == "bitcast":
            total += _read(inner, user)
        elif user.opcode in _SELECTING and user.operands[0] == value.name:
            total += user.size
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == value.name:
            continue  # updated in place
        else:
            return value.size
    return min(total, value.size)


def _written(inner: Computation, output: Instruction) -> int:
    """Bytes that a fusion writes of one output."""
    while output.opcode == "bitcast":
        output = inner[output.operands[0]]
    return inner[output.operands[1]].size if output.opcode == "dynamic-update-slice" else output.size


def _list(text: str, name: str) -> list[int]:
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
    return [int(one) for one in found[1].split(",") if one] if found else []


def _convolution(instruction: Instruction, kernel: tuple[int, ...]) -> float:
    """Operations of a convolution, as which TPUs also compute products of matrices."""
    labels = re.search(r"dim_labels=\w+_(\w+)->\w+", instruction.rest)
    if not labels:
        raise ValueError(f"{instruction.name} has no dim_labels")
    features = kernel[labels[1].index("i")]
    # Of a batch of products, spatial axes in disguise, each output reads one entry of the kernel.
    window = re.search(r"window=\{([^}]*)\}", instruction.rest)
    sizes = re.findall(r"(\w+)=([\dx_]+)", window[1]) if window else []
    fields = {name: [int(one) for one in value.replace("_", "x").split("x")] for name, value in sizes}
    size = fields.get("size", [])
    taps = [-(-one // spread) for one, spread in zip(size, fields.get("lhs_dilate", [1] * len(size)), strict=True)]
    return 2.0 * math.prod(instruction.shapes[0].dims) * features * math.prod(taps)


def _library(instruction: Instruction, operands: Sequence[tuple[int, ...]]) -> float:
    """Operations of a library's kernel; of an unknown one, 0."""
    found = re.search(r'custom_call_target="([^"]*)"', instruction.rest)
    target = found[1] if found else ""
    output = math.prod(instruction.shapes[0].dims)
    if "cublas" in target:
        axes = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.rest)
        return 2.0 * output * math.prod(operands[0][int(axis)] for axis in json.loads(axes[1])) if axes else 0.0
    if "cudnn$conv" in target:
        return _convolution(instruction, operands[1])
    return 0.0
