"""Collectives of compiled programs: which devices take part, along which axes of their mesh, and what each one sends.

Bytes are those of the algorithm that sends least in total: a ring, or as many direct messages. Of an array of S bytes,
each of n devices sends 2 (n - 1) / n S to add it up everywhere, (n - 1) / n S to add it up in parts, to gather it from
parts, or to exchange parts, and S to hand it on.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from hlo_text import Computation, Instruction, Program

_SHARES: Mapping[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
"""Bytes that one of n devices sends, for every byte of its operands."""

_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}")
_NAMED = re.compile(r"'([^']+)'=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")

Groups = list[list[int]]


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program.

    Attributes:
        kind: the operation, without the ends of its asynchronous form.
        axes: the axes of the mesh along which devices take part.
        devices: number of devices that take part with each other.
        size: bytes of its operands on one device.
        name: of the instruction.
        function: the function of the source whose call it is.
        runs: how often it runs.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    size: int
    name: str = ""
    function: str = ""
    runs: float = 1.0

    @property
    def sent(self) -> float:
        """Bytes that one device sends in all runs."""
        return self.runs * self.size * _SHARES[self.kind](self.devices)

    def times(self, runs: float) -> "Collective":
        """The same collective, run that many times as often."""
        return dataclasses.replace(self, runs=runs * self.runs)


def collectives(
    program: Program, computation: Computation, instruction: Instruction, mesh: Mapping[str, int]
) -> Iterator[Collective]:
    """The collectives of an instruction: itself, or those in a fusion.

    Args:
        program: the program.
        computation: where the instruction is.
        instruction: the instruction; ends of asynchronous ones are none.
        mesh: sizes of the mesh's axes, in the order in which the devices are numbered.
    """
    if instruction.opcode == "fusion":
        inner = program.computations[instruction.called["calls"][0]]
        for one in inner.values():
            yield from collectives(program, inner, one, mesh)
        return
    kind = instruction.opcode.removesuffix("-start")
    if kind not in _SHARES:
        return
    groups = groups_of(instruction, math.prod(mesh.values()))
    devices = 2 if "source_target_pairs" in instruction.rest else max(map(len, groups), default=1)
    if devices < 2:
        return
    if kind == "all-reduce" and _only_parts(computation, instruction, devices):
        kind = "reduce-scatter"
    size = sum(computation[name].size for name in instruction.operands)
    function = program.function(instruction)
    yield Collective(kind, axes_of_groups(groups, mesh), devices, size, instruction.name, function)


def of_program(program: Program, mesh: Mapping[str, int]) -> list[Collective]:
    """All collectives in a program's text, each once, however often it runs; `mesh` as in `collectives`."""
    return [
        one
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode != "fusion"  # what it calls is a computation of its own
        for one in collectives(program, computation, instruction, mesh)
    ]


def channel(program: Program, instruction: Instruction) -> str | None:
    """The channel of a fusion's first collective: of the fusions into which one is cut, only the first counts."""
    if instruction.opcode != "fusion":
        return None
    for one in program.computations[instruction.called["calls"][0]].values():
        found = _CHANNEL.search(one.rest) if one.opcode.removesuffix("-start") in _SHARES else None
        deeper = found[1] if found else channel(program, one)
        if deeper is not None:
            return deeper
    return None


def _only_parts(computation: Computation, instruction: Instruction, devices: int) -> bool:
    """Whether every device keeps its own part alone, as in the fusions by which TPUs add up in parts."""
    users = computation.users[instruction.name]
    while len(users) == 1 and users[0].opcode == "bitcast":
        users = computation.users[users[0].name]
    return bool(users) and all(
        user.opcode == "dynamic-slice" and user.size * devices <= instruction.size for user in users
    )


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The groups of devices that take part with each other, by the devices' numbers in the mesh.

    Args:
        instruction: the collective.
        devices: number of all devices, which are one group where none is named.
    """
    text = instruction.rest
    pairs, lists, iota, mesh = (pattern.search(text) for pattern in (_PAIRS, _LISTS, _IOTA, _MESH))
    if pairs:
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if lists:
        return [_numbers(group) for group in re.findall(r"\{([\d,]*)\}", lists[1])] or [[*range(devices)]]
    if iota:
        return _ordered(iota[2], iota[3]).reshape(_numbers(iota[1])).tolist()
    if mesh:
        return _along(mesh)
    raise ValueError(f"{instruction.name} names no groups of devices: {text:.200}")


def _along(mesh: re.Match[str]) -> Groups:
    """Groups along some axes of a mesh that the compiler chose for a collective."""
    sizes = {name: int(size) for name, size in _NAMED.findall(mesh[1])}
    names, chosen = [*sizes], re.findall(r"'([^']+)'", mesh[4])
    if set(chosen) - set(names):
        raise ValueError(f"groups along a part of an axis are not known: {mesh[0]}")
    shape = [*sizes.values()]
    order = _ordered(mesh[2], mesh[3]) if mesh[2] else np.arange(math.prod(shape))
    numbers = order.reshape(shape)
    last = np.moveaxis(numbers, [names.index(name) for name in chosen], range(-len(chosen), 0))
    return last.reshape(-1, math.prod(sizes[name] for name in chosen)).tolist()


def _ordered(dims: str, permutation: str | None) -> np.ndarray:
    """Numbers from zero on, as an array of these lengths whose axes are then permuted."""
    numbers = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return numbers.transpose(_numbers(permutation)) if permutation else numbers


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",") if one]


def axes_of_groups(groups: Iterable[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which the devices of a group differ."""
    places = [np.unravel_index(np.array(group), tuple(mesh.values())) for group in groups if group]
    return tuple(name for axis, name in enumerate(mesh) if any(np.ptp(place[axis]) > 0 for place in places))


def in_one_step(program: Program, mesh: Mapping[str, int], *, axis: str, skipped: Iterable[str] = ()) -> int:
    """The most collectives along an axis that one step of a loop runs, without those of loops within it.

    In a stack of layers whose loop takes one at a time, these are the collectives of one layer.

    Args:
        program: the program.
        mesh: as in `collectives`.
        axis: the axis of the mesh.
        skipped: functions of the source whose loops do not count.
    """
    ignored, most = frozenset(skipped), 0

    def run(name: str) -> int:
        nonlocal most
        computation, total, seen = program.computations[name], 0, set[str]()
        for instruction in computation.values():
            if instruction.opcode == "while":
                inner = run(instruction.called["body"][0])
                most = most if program.function(instruction) in ignored else max(most, inner)
            elif instruction.opcode == "conditional":
                total += max(run(branch) for branch, _ in instruction.branches)
            elif instruction.opcode in ("call", "async-start"):
                total += run((instruction.called.get("to_apply") or instruction.called["calls"])[0])
            else:
                own = channel(program, instruction)
                if own is None or own not in seen:
                    found = collectives(program, computation, instruction, mesh)
                    total += sum(axis in one.axes for one in found)
                seen |= {own} if own is not None else set()
        return total

    run(program.entry)
    return most
