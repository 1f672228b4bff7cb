"""Compiled programs in HLO's text form: instructions, computations, and which function of the source each one is of."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_NAME = re.compile(r"%([\w.\-]+)")
_LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Shape(NamedTuple):
    """Shape of an array.

    Attributes:
        dtype: HLO's name, such as bf16.
        dims: lengths of the axes.
        space: the memory that it lies in: 0 is the device's, others are on the chip or the host's.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Bytes."""
        if self.dtype in _BITS:
            bits = _BITS[self.dtype]
        else:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return -(-math.prod(self.dims) * bits // 8)

    @property
    def far(self) -> int:
        """Bytes in the device's memory."""
        return 0 if self.space else self.size

    @property
    def floating(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("f", "bf"))


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

    @property
    def far(self) -> int:
        """Bytes of the output in the device's memory."""
        return sum(shape.far for shape in self.shapes)

    @functools.cached_property
    def called(self) -> Mapping[str, tuple[str, ...]]:
        """Names of the computations that it calls, by attribute; of two branches, the one for true comes last."""
        found: dict[str, tuple[str, ...]] = {kind: (name,) for kind, name in _CALLED.findall(self.rest)}
        branches = _BRANCHES.search(self.rest)
        if branches:
            found["branches"] = tuple(_NAME.findall(branches[1]))
        elif "true_computation" in found:
            found["branches"] = (*found["false_computation"], *found["true_computation"])
        return found

    @property
    def branches(self) -> list[tuple[str, str]]:
        """A conditional's branches with their operands, in the order of `called`."""
        operands = self.operands[1:]
        if "true_computation" in self.called:
            operands = operands[::-1]
        return list(zip(self.called["branches"], operands, strict=True))

    @property
    def known_trips(self) -> int | None:
        """How often a loop runs, if the compiler says so."""
        found = _TRIPS.search(self.rest)
        return int(found[1]) if found else None

    @property
    def frame(self) -> int | None:
        """Index of its stack frame."""
        found = _FRAME.search(self.rest)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """The kernel that a custom call calls."""
        found = _TARGET.search(self.rest)
        return found[1] if found else ""


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

    def source(self, name: str) -> Instruction:
        """The instruction that made a value, seen through those that only hand it on."""
        instruction = self[name]
        while instruction.opcode in ("copy", "bitcast", "convert") and len(instruction.operands) == 1:
            instruction = self[instruction.operands[0]]
        return instruction


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
        computations: by name.
        entry: name of the one that runs first.
        functions: the function of the source, by stack frame.
    """

    computations: Mapping[str, Computation]
    entry: str
    functions: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def function(self, instruction: Instruction) -> str:
        """Qualified name of the function whose call an instruction is, as far as the program tells."""
        return self.functions.get(instruction.frame or 0, "")

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop runs, if the compiler says so, or if it counts up to a constant."""
        return loop.known_trips or _counted(self, computation, loop)


def parse(text: str) -> Program:
    """Reads the text of `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    current, entry = Computation(), ""
    for line in text.split("\n"):
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
    return Program(computations, entry, _functions(text))


def _functions(text: str) -> dict[int, str]:
    """The function of every stack frame, from the tables before the computations."""
    names = dict(re.findall(r'^(\d+) "([^"]*)"$', text.partition("\nFunctionNames\n")[2].partition("\n\n")[0], re.M))
    places = dict(re.findall(r"^(\d+) \{file_name_id=\d+ function_name_id=(\d+) ", text, re.M))
    frames = re.findall(r"^(\d+) \{file_location_id=(\d+) ", text, re.M)
    return {int(frame): names.get(places.get(place, ""), "") for frame, place in frames}


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
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.end()
    raise ValueError(f"a parenthesis is never closed: {text[:80]}")


def _shapes(kind: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        space = _SPACE.search(layout)
        lengths = tuple(int(length.removeprefix("<=")) for length in dims.split(",") if length)
        yield Shape(dtype, lengths, int(space[1]) if space else 0)


def _counted(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """The length of a loop that runs while a number is less than another, both of them constants before the loop.

    The loops of JAX's scans add one to the first, and leave the second alone.
    """
    condition, body = (program.computations[loop.called[kind][0]] for kind in ("condition", "body"))
    initial, test = computation.source(loop.operands[0]), condition.source(condition.root.name)
    if test.opcode != "compare" or "direction=LT" not in test.rest or initial.opcode != "tuple":
        return None
    counter, limit = (condition.source(name) for name in test.operands)
    if counter.opcode != "get-tuple-element":
        return None

    def constant(value: Instruction) -> int | None:
        if value.opcode == "get-tuple-element":
            value = computation.source(initial.operands[_index(value)])
        found = re.fullmatch(r"-?\d+", value.inside) if value.opcode == "constant" else None
        return int(found[0]) if found else None

    def kept(value: Instruction) -> bool:
        if value.opcode != "get-tuple-element":
            return True
        after = body.source(body.root.operands[_index(value)])
        return after.opcode == "get-tuple-element" and _index(after) == _index(value)

    first, last = constant(counter), constant(limit)
    return None if first is None or last is None or not kept(limit) else max(0, last - first)


def _index(element: Instruction) -> int:
    return int(re.findall(r"index=(\d+)", element.rest)[0])


def axes_of(text: str, name: str) -> list[int]:
    """The integers of an attribute such as `dims={0,2}`."""
    found = re.search(rf"\b{name}=\{{([\d,]*)\}}", text)
    return [int(one) for one in found[1].split(",") if one] if found else []
