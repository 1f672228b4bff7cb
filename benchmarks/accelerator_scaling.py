"""How a sweep scales over devices, by its programs as compiled for them: `accelerator.py --scaling`.

A sweep is a trace and its rerun. Of each program, the time that its operations or its bytes in memory bound on one
device (the roofline), and after it the time in which the device sends its part of all collectives.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import accelerator_targets as targets

from jaxid.io import write_json, write_text

HEADER = """A sweep (a trace and its rerun) on more and more devices, by its programs as compiled; nothing was run.

Figures are for each device. The bound is the roofline of its programs, and after it the time in which it sends its part
of all collectives at the peak of its links. A ring of n devices sends 2 (n - 1) / n bytes for every byte that it adds
up. On H100 it has all links of NVLink 4 (450 GB/s in one direction), on v5e two of four (100 GB/s).

Along data, every copy of the model has as many prompts of its own, and the ideal is the bound of one copy. Along model,
devices share one copy and the same prompts, and the ideal is the bound of one device divided by their number; where one
device has no room for the model, its bound is taken as the roofline of the fewest with room, times their number.

Not counted: the latency of collectives (their number is given), what of them is hidden behind operations, and what the
host does."""

WORKS = ("trace", "rerun")


class Case(NamedTuple):
    """Meshes on which a model's sweep is compared.

    Attributes:
        name: the accelerator.
        alias: the model.
        axis: the axis that grows.
        sizes: its sizes.
        other: the size of the other axis.
    """

    name: str
    alias: str
    axis: str
    sizes: tuple[int, ...]
    other: int = 1

    def target(self, size: int) -> targets.Target:
        """The devices of one size."""
        device = targets.DEVICES[self.name]
        data, model = (size, self.other) if self.axis == "data" else (self.other, size)
        return targets.Target(device, model, data)


CASES = (
    Case("h100", "llava-7b", "data", (1, 2, 4, 8, 64)),
    Case("v5e", "llava-7b", "data", (1, 2, 16), other=4),
    Case("v5e", "gemma-4b", "data", (1, 2, 4, 8, 64)),
    Case("h100", "llava-7b", "model", (1, 2, 4)),
    Case("h100", "llava-13b", "model", (1, 2, 4)),
    Case("v5e", "llava-7b", "model", (2, 4)),
    Case("v5e", "llava-13b", "model", (4, 8)),
)
SHOWN = {
    "devices": "d",
    "fits": "d",
    "tflop": ".1f",
    "hbm_gb": ".1f",
    "collective_gb_model": ".2f",
    "collective_gb_data": ".2f",
    "collectives": "d",
    "roofline_ms": ".1f",
    "collective_ms": ".1f",
    "bound_ms": ".1f",
    "ideal_ms": ".1f",
    "efficiency": ".0%",
}
"""The table's columns and their format."""

ADDED = (
    "tflop",
    "hbm_gb",
    "collective_gb_model",
    "collective_gb_data",
    "collectives",
    "roofline_ms",
    "collective_ms",
)
"""Figures that are those of a sweep's programs, added up."""

LEAST = {"data": 0.9, "model": 0.7}
"""The efficiency that is aimed at, by the axis that grows; along model, of up to four devices."""

Measure = Callable[[targets.Target, str, str], Mapping[str, Mapping[str, float]]]
Figures = dict[str, float]


def sweep(target: targets.Target, alias: str, measure: Measure) -> Figures:
    """What a device does in a sweep, without a comparison."""
    found = [measure(target, alias, work)[work] for work in WORKS]
    total = {name: sum(one[name] for one in found) for name in ADDED}
    return {
        **total,
        "devices": target.chips,
        "fits": min(one["fits"] for one in found),
        "bound_ms": total["roofline_ms"] + total["collective_ms"],
    }


def compared(found: Mapping[int, Figures], axis: str) -> dict[int, Figures]:
    """Figures with the ideal and the efficiency, by the size of the axis that grows."""
    first = min(found)
    alone = found[first]
    whole = alone["bound_ms"] if first == 1 or axis == "data" else first * alone["roofline_ms"]
    results = {}
    for size, one in found.items():
        ideal = whole if axis == "data" else whole / size
        own = {**one, "ideal_ms": ideal, "efficiency": ideal / one["bound_ms"]}
        results[size] = {name: float(f"{own[name]:.6g}") for name in SHOWN}
    return results


def key(case: Case, size: int) -> str:
    """The row of a mesh: accelerator, model, the axis that grows, and the mesh."""
    target = case.target(size)
    return f"{case.name}/{case.alias}/{case.axis}/data={target.data},model={target.model}"


def scaled(
    cases: Iterable[Case], measure: Measure, failed: Callable[[str, Exception], None]
) -> Iterator[dict[str, Figures]]:
    """Rows of the cases, as they become known."""
    known: dict[tuple[targets.Target, str], Figures] = {}
    for case in cases:
        own: dict[int, Figures] = {}
        for size in case.sizes:
            target = case.target(size)
            try:
                own[size] = known[target, case.alias] = known.get((target, case.alias)) or sweep(
                    target, case.alias, measure
                )
            except Exception as error:  # compilers raise many kinds; the other meshes still count
                failed(key(case, size), error)
                continue
            yield {key(case, size): one for size, one in compared(own, case.axis).items()}


def bounds(found: Mapping[str, Figures]) -> list[tuple[str, float, float]]:
    """Keys, values and least values of all efficiencies that have one."""
    checked = []
    for row, own in found.items():
        _, _, axis, mesh = row.split("/")
        if axis == "data" or int(mesh.rpartition("=")[2]) <= 4:
            checked.append((f"{row}/efficiency", own["efficiency"], LEAST[axis]))
    return checked


def table(found: Mapping[str, Figures]) -> str:
    """All figures as a Markdown table."""
    lines = ["| target | model | axis | mesh | " + " | ".join(SHOWN) + " |", "| --- " * (4 + len(SHOWN)) + "|"]
    for row, own in found.items():
        shown = [format(int(own[name]) if form == "d" else own[name], form) for name, form in SHOWN.items()]
        lines.append("| " + " | ".join([*row.split("/"), *shown]) + " |")
    return "\n".join(lines)


def write(folder: Path, found: Mapping[str, Figures]) -> None:
    """Writes both files."""
    flat = {f"{row}/{name}": value for row, own in found.items() for name, value in own.items()}
    write_json(folder / "scaling.json", flat)
    write_text(folder / "scaling.md", f"{HEADER}\n\n{table(found)}\n")
