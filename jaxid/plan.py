"""Plans: what a job needs on a device, and how many prompts go together, before any weights are read.

A job is planned by its own code: a batch of every kind runs as it will, up to the compiled programs (`jaxid.dry_run`).
On a mesh, figures are for each device. Operations and moved bytes are taken to divide evenly. Memory for parameters is
that of a device's own parts. All other memory divides over copies of the model only; in fact, keys, values and what is
inside MLPs also divide over the devices of a copy.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from jaxid.devices import GIB, Device, free_memory
from jaxid.dry_run import PAIRS, RERUNS, TRACES, Call, dry_run
from jaxid.errors import OutOfMemoryError
from jaxid.families.base import Model
from jaxid.interp.sweep import bucket
from jaxid.meshes import ONE, Axes

USABLE = 0.92
"""The share of a device's memory that a plan fills; the rest is for the runtime, fragments and wrong estimates."""

MOST = 256
"""The most prompts that go together: their pictures wait on the host, and a killed run loses a batch."""

LARGEST_BATCH = 32
"""The most prompts that are traced together, however much memory there is."""

_BETWEEN = 0.02
"""Seconds that a batch takes besides its programs: an estimate for reading arguments, dispatching and fetching."""

_WORTH = 1.05
"""A smaller batch is preferred if the whole job takes at most so many times as long: a killed run loses less."""


@runtime_checkable
class Job(Protocol):
    """A job that can be planned.

    Attributes:
        weights: bytes of the model's parameters on a device.
        axes: of the mesh that the job runs on.
        items: number of items.
        per_item: prompts of an item.
        most: the most items that can go together, as so many are of one kind.
    """

    weights: float
    axes: Axes
    items: int
    per_item: int
    most: int

    def batches(self, together: int) -> Iterable[tuple[int, Callable[[], object]]]:
        """Kinds of batches with so many prompts: how many of a kind there are, and a function that runs one."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job needs on a device; memory in bytes.

    Attributes:
        device: the device, or one of those of a mesh.
        axes: the mesh's axes.
        weights: the model's parameters.
        items: number of items.
        together: prompts that go together.
        batches: number of batches.
        fits: whether that many fit.
        peak: the most memory that is used at a time.
        trace_per_prompt: what recording a prompt takes, results and temporaries.
        rerun_per_row: what a prompt under one more intervention takes.
        flops: operations of the whole job.
        moved: bytes that the whole job moves between memory and chip.
        seconds: the least time for the whole job: each program's operations at the peak or its bytes at the full
            bandwidth, whichever takes longer.
        programs: the calls of a batch; of batches of several kinds, those of the one that needs most memory.
        measured: whether XLA's compiler told the programs' memory; else it is estimated.
        unit: what goes together.
        pairs: number of pairs whose dense maps are scored, if any are.
        pairs_per_second: how many are scored in a second, at the most.
    """

    device: Device
    axes: Axes
    weights: float
    items: int
    together: int
    batches: int
    fits: bool
    peak: float
    trace_per_prompt: float
    rerun_per_row: float
    flops: float
    moved: float
    seconds: float
    programs: Sequence[Call]
    measured: bool
    unit: str = "prompt"
    pairs: int = 0
    pairs_per_second: float = 0.0

    def report(self) -> Iterator[str]:
        """A readable table."""
        device = self.device
        yield _peaks(device)
        if self.axes != ONE:
            yield f"{'mesh':22s}{self.axes!s:>12s}  figures are for each device"
        yield f"{'weights':22s}{_size(self.weights):>12s}"
        if self.trace_per_prompt:
            yield f"{'trace of a prompt':22s}{_size(self.trace_per_prompt):>12s}"
        if self.rerun_per_row:
            yield f"{'rerun of a row':22s}{_size(self.rerun_per_row):>12s}  a prompt under one intervention"
        yield f"{'peak':22s}{_size(self.peak):>12s}  {'measured by XLA' if self.measured else 'estimated'}"
        fits = "fits" if self.fits else "does not fit"
        yield f"{'batch':22s}{self.together:>12d}  {self.unit}s together: {fits}"
        yield from _table(self.programs, device)
        yield (
            f"{self.items} {'item' if self.unit == 'prompt' else self.unit}s in {self.batches} batches: "
            f"{self.flops / 1e12:.4g} TFLOP, {_size(self.moved)} moved, at least {_time(self.seconds)} at these peaks"
        )
        if self.pairs:
            yield f"{self.pairs} pairs of picture and caption are scored, at most {self.pairs_per_second:.3g} a second"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training run needs on a device; memory in bytes.

    Attributes:
        device: the device.
        weights: the model's parameters.
        trained: the float32 copies of trained tensors.
        optimizer: the optimizer's states.
        steps: number of steps.
        small_batches: small batches of a step, which are computed in turn.
        batch_size: pictures of a small batch.
        fits: whether they fit.
        peak: the most memory that is used at a time.
        sparing_peak: the same if everything is recomputed, where the plan does not fit as it is.
        evaluations: number of evaluations.
        evaluation_seconds: the least time for one.
        flops: operations of the whole run.
        moved: bytes that the whole run moves between memory and chip.
        seconds: the least time for the whole run.
        programs: the calls of a step, and of a batch of an evaluation.
        measured: whether XLA's compiler told the programs' memory; else it is estimated.
        axes: of the mesh that the run takes; figures are for each of its devices.
    """

    device: Device
    weights: float
    trained: float
    optimizer: float
    steps: int
    small_batches: int
    batch_size: int
    fits: bool
    peak: float
    sparing_peak: float | None
    evaluations: int
    evaluation_seconds: float
    flops: float
    moved: float
    seconds: float
    programs: Sequence[Call]
    measured: bool
    axes: Axes = ONE

    def report(self) -> Iterator[str]:
        """A readable table."""
        device = self.device
        yield _peaks(device)
        if self.axes != ONE:
            yield f"{'mesh':22s}{self.axes!s:>12s}  figures are for each device"
        yield f"{'weights':22s}{_size(self.weights):>12s}"
        yield f"{'trained tensors':22s}{_size(self.trained):>12s}  float32 copies"
        yield f"{'optimizer':22s}{_size(self.optimizer):>12s}"
        yield f"{'peak':22s}{_size(self.peak):>12s}  {'measured by XLA' if self.measured else 'estimated'}"
        batch = f"{self.small_batches} x {self.batch_size}"
        yield f"{'step':22s}{batch:>12s}  pictures: {_fits(self.peak, device)}"
        if self.sparing_peak is not None:
            fits = _fits(self.sparing_peak, device)
            yield f"{'with --recompute all':22s}{_size(self.sparing_peak):>12s}  peak: {fits}"
        yield from _table(self.programs, device)
        evaluations = self.evaluations * self.evaluation_seconds
        each = (self.seconds - evaluations) / self.steps
        yield (
            f"{self.steps} steps of at least {_time(each)}, {self.evaluations} evaluations of "
            f"{_time(self.evaluation_seconds)}: {self.flops / 1e12:.4g} TFLOP, {_size(self.moved)} moved, at least "
            f"{_time(self.seconds)} at these peaks"
        )


def _peaks(device: Device) -> str:
    """The first line of a plan."""
    peaks = "estimated peaks" if device.estimated else "peaks"
    return (
        f"{device.name}: {_size(device.memory)} of memory; {peaks} {device.flops / 1e12:.4g} TFLOP/s, "
        f"{device.bandwidth / 1e9:.4g} GB/s"
    )


def _fits(peak: float, device: Device) -> str:
    return "fits" if peak <= USABLE * device.memory else "does not fit"


def _table(programs: Sequence[Call], device: Device) -> Iterator[str]:
    """A line for every program, between empty ones."""
    yield ""
    yield f"{'program':26s}{'rows':>6s}{'TFLOP':>10s}{'moved':>12s}{'results':>12s}{'temporary':>12s}{'time':>11s}"
    for call, times in collections.Counter(programs).items():
        name, time = f"{call.name} x {times}" if times > 1 else call.name, device.seconds(call.flops, call.moved)
        yield (
            f"{name:26s}{call.rows:>6d}{call.flops / 1e12:>10.3f}{_size(call.moved):>12s}"
            f"{_size(call.results):>12s}{_size(call.temporary):>12s} {_time(time):>10s}"
        )
    yield ""


def plan(job: Job, device: Device, *, together: int | None = None, measure: bool = False) -> Plan:
    """Plans a job on a device.

    Memory and time of a batch are taken as straight lines through those of a small and a larger one. Of the batches
    that fit, the smallest is chosen with which the whole job takes at most 5 % longer than with the best. Larger ones
    share fixed costs, such as reading the weights for every token that is generated; smaller ones have less padding.

    Args:
        job: the job.
        device: the device.
        together: prompts that go together; chosen by default.
        measure: ask XLA's compiler, for the devices of this process, what memory the programs need.

    Raises:
        OutOfMemoryError: if the weights do not fit, and a batch is to be chosen.
    """
    return _planned(job, device, together, measure) if together else _chosen(job, device, measure)


def fitting(model: Model, dtype: str, rows: int, copies: int, device: Device) -> int:
    """A batch that fits without asking a plan: prompts with some interventions each, in a quarter of the free memory.

    Args:
        model: the model; its parameters may be missing.
        dtype: of parameters and activations.
        rows: interventions of a prompt that run together.
        copies: copies of the model, each on a device of its own.
        device: one of these.

    Returns:
        A multiple of the copies.
    """
    text = model.config.text_config
    width = np.dtype(np.float32).itemsize if dtype == "float32" else 2
    tokens = model.processor.usual_tokens + 64
    trace_numbers = 2 * text.num_hidden_layers * tokens * text.num_key_value_heads * text.head_dim
    row_numbers = rows * 24 * text.hidden_size * 6
    scores = 2 * text.num_attention_heads * tokens * tokens
    fit = free_memory() // 4 // (width * (trace_numbers + row_numbers) + 4 * scores)
    most = LARGEST_BATCH * copies
    if device.platform == "cpu":  # its devices share their memory
        fit, most = fit // copies, LARGEST_BATCH
    return int(np.clip(fit, 1, max(1, most // copies))) * copies


def _chosen(job: Job, device: Device, measure: bool) -> Plan:
    """The plan with the best batch."""
    budget = USABLE * device.memory
    if job.weights >= budget:
        raise OutOfMemoryError(
            f"the weights of {_size(job.weights)} do not fit in the {_size(device.memory)} of a {device.name}; use "
            "--dtype bfloat16, a smaller model or a larger device."
        )
    sizes = _sizes(job)
    whole = [size for size in sizes if size % job.per_item == 0]  # less than an item says nothing of an item's time
    low, high = whole[min(1, len(whole) - 1)], whole[min(5, len(whole) - 1)]
    small, large = (_planned(job, device, size, measure=False, kinds=1) for size in (low, high))
    chosen = high
    if low < high:
        each = max(1.0, (large.peak - small.peak) / (high - low))
        fitting = low + (budget - small.peak) / each
        times = [_batch_seconds(one, device) for one in (small, large)]
        slope = max(1e-9, (times[1] - times[0]) / (high - low))
        fixed = max(0.0, times[0] - slope * low) + _BETWEEN
        possible = [size for size in whole if size <= fitting]
        if not possible:  # not even an item
            possible = [max((size for size in sizes if size <= fitting), default=sizes[0])]
        job_times = {size: sum(count for count, _ in job.batches(size)) * (fixed + slope * size) for size in possible}
        chosen = next(size for size, time in job_times.items() if time <= _WORTH * min(job_times.values()))
    for size in reversed([size for size in sizes if size <= chosen]):
        found = _planned(job, device, size, measure)
        if found.fits:
            break
    return found


def _sizes(job: Job) -> list[int]:
    """The batches to choose from, in prompts: parts of an item, and buckets of items."""
    buckets = [size for size in range(1, MOST + 1) if bucket(size) == size]
    parts = [size for size in buckets if size < job.per_item]
    least, most = job.axes.data * job.per_item, bucket(-(-job.most // job.axes.data))
    return parts + [size * least for size in buckets if size <= most and size * least <= max(MOST, least)]


def _batch_seconds(plan: Plan, device: Device) -> float:
    return sum(device.seconds(call.flops, call.moved) for call in plan.programs)


def _planned(job: Job, device: Device, together: int, measure: bool, kinds: int | None = None) -> Plan:
    """The plan with so many prompts together, of all kinds of batches or the first few."""
    programs: Sequence[Call] = ()
    batches, flops, moved, seconds, pairs, scoring = 0, 0.0, 0.0, 0.0, 0, 0.0
    for count, run in itertools.islice(job.batches(together), kinds):
        calls = dry_run(run, device, axes=job.axes, measure=measure)
        batches += count
        flops += count * sum(call.flops for call in calls)
        moved += count * sum(call.moved for call in calls)
        seconds += count * sum(device.seconds(call.flops, call.moved) for call in calls)
        for call in calls:
            if call.name == PAIRS:
                pairs += count * call.prompts * call.rows
                scoring += count * device.seconds(call.flops, call.moved)
        programs = max(programs, calls, key=_most)
    peak, each = job.weights + _most(programs), job.axes.data
    return Plan(
        device=device,
        axes=job.axes,
        weights=job.weights,
        items=job.items,
        together=together,
        batches=batches,
        fits=peak <= USABLE * device.memory,
        peak=peak,
        trace_per_prompt=max((each * _own(call) for call in programs if call.name in TRACES), default=0.0),
        rerun_per_row=max(
            (job.axes.data * _own(call) / call.rows for call in programs if call.name in RERUNS), default=0.0
        ),
        flops=flops,
        moved=moved,
        seconds=seconds,
        programs=programs,
        measured=measure and job.axes == ONE,
        pairs=pairs,
        pairs_per_second=pairs / scoring if pairs else 0.0,
    )


def _most(calls: Sequence[Call]) -> float:
    return max((call.memory for call in calls), default=0.0)


def _own(call: Call) -> float:
    """What a call needs for each prompt."""
    return (call.results + call.temporary) / call.prompts


def _size(count: float) -> str:
    """Bytes in a readable unit."""
    for unit, size in (("TiB", 1024 * GIB), ("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    """Seconds in a readable unit."""
    if seconds < 1:
        return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = seconds / 60
    return f"{minutes:.3g} min" if minutes < 120 else f"{minutes / 60:.3g} h"
