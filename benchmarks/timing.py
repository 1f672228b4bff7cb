"""Fair timing: the same CPUs for every system, calls in turn, medians, first calls reported separately."""

import dataclasses
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

Result = TypeVar("Result")

THREADS = 2
"""Number of CPUs, and so of threads, of every system."""

MIN_ROUNDS = 3
"""Smallest number of timed calls for a median."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed(Generic[Result]):
    """Times of one system's calls, in seconds, and the result of its last call."""

    first: float
    rounds: tuple[float, ...]
    result: Result

    @property
    def median(self) -> float:
        """Time of a call once everything is warm."""
        return statistics.median(self.rounds)

    @property
    def warm_up(self) -> float:
        """Time of the first call beyond that of a warm one: compilation, for a system that compiles."""
        return self.first - self.median


def use_cpus(count: int = THREADS) -> list[int]:
    """Confines this process, and with it PyTorch's and JAX's thread pools, to its first few CPUs.

    Has to be called before JAX and PyTorch are imported. JAX has no setting for its threads and starts one for each CPU
    that it finds. This also keeps JAX from using an accelerator, or programs that an earlier run compiled.

    Args:
        count: number of CPUs.

    Returns:
        Indices of the CPUs: fewer than `count` on a smaller machine, none where a process cannot be confined.
    """
    os.environ["OMP_NUM_THREADS"] = str(count)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if not hasattr(os, "sched_setaffinity"):
        return []
    chosen = sorted(os.sched_getaffinity(0))[:count]
    os.sched_setaffinity(0, chosen)
    return chosen


def side_by_side(
    systems: Mapping[str, Callable[[], Result]],
    rounds: int = MIN_ROUNDS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed[Result]]:
    """Times systems in turn, so that a disturbance of the machine affects all of them.

    Every system is called once before the first round; that call is only reported as `first`.

    Args:
        systems: call of each system, which must not return before its result is ready.
        rounds: number of timed calls of each system.
        clock: returns the time in seconds.

    Returns:
        Times by system.

    Raises:
        ValueError: for fewer than three rounds.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(f"a median needs {MIN_ROUNDS} or more rounds, not {rounds}.")
    times: dict[str, list[float]] = {name: [] for name in systems}
    results: dict[str, Result] = {}
    for _ in range(rounds + 1):
        for name, call in systems.items():
            started = clock()
            results[name] = call()
            times[name].append(clock() - started)
    return {name: Timed(first=taken[0], rounds=tuple(taken[1:]), result=results[name]) for name, taken in times.items()}


@dataclasses.dataclass
class Disturbance:
    """Share of the time of some CPUs that other processes took while this context was open.

    Threads that wait for one another, as PyTorch's do, lose far more to another process than its share of the machine.
    On a busy machine the systems' ratio is therefore as wrong as their times.
    """

    cpus: list[int]
    share: float | None = None  # None where the operating system does not report it

    def __enter__(self) -> "Disturbance":
        self._start = (time.perf_counter(), self._others())
        return self

    def __exit__(self, *_: object) -> None:
        before, now = self._start[1], self._others()
        if before is not None and now is not None:
            self.share = max(0.0, now - before) / ((time.perf_counter() - self._start[0]) * len(self.cpus))

    def _others(self) -> float | None:
        """CPU seconds on these CPUs that this process, which is confined to them, did not use."""
        statistics_file = Path("/proc/stat")
        if not self.cpus or not statistics_file.exists():
            return None
        names = {f"cpu{index}" for index in self.cpus}
        lines = [line.split() for line in statistics_file.read_text().splitlines()]
        # Per CPU: user, nice, system, idle, iowait, irq, softirq, steal, ...; guests are part of user and nice.
        ticks = sum(sum(map(int, line[1:4] + line[6:9])) for line in lines if line and line[0] in names)
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4])


def peak_memory_mb() -> float:
    """Peak memory of this process in MB; NaN where the operating system does not report it.

    Not by `getrusage`, which includes the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = [int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else float("nan")


def describe_machine(cpus: list[int]) -> list[str]:
    """Lines that describe the machine, its load, and versions of packages."""
    packages = ("jaxid-vlm", "jax", "jaxlib", "flax", "torch", "transformers", "numpy")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    confined = f"confined to CPUs {', '.join(map(str, cpus))}" if cpus else "not confined to certain CPUs"
    load = f", load average {os.getloadavg()[0]:.2f} at the start" if hasattr(os, "getloadavg") else ""
    return [
        f"machine   {_cpu_name()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}{load}",
        f"threads   {THREADS} each, {confined}",
        f"versions  Python {platform.python_version()}, {versions}",
    ]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown CPU"
