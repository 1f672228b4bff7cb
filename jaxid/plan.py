"""Plans: what a job needs on a device, and how many prompts go together, before any weights are read.

A job is planned by its own code. A batch of every kind runs as it will, up to the compiled programs: a watcher
(`jaxid.interp.programs`) sees every call with the shapes of its arguments, adds up what it costs (`jaxid.costs`), or
what XLA's compiler says of it, and answers with zeros.
"""

import collections
import dataclasses
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxid.costs import cost_of, nbytes
from jaxid.devices import GIB, Device, supposed
from jaxid.errors import OutOfMemoryError
from jaxid.interp.programs import Program, watched
from jaxid.interp.sweep import bucket

USABLE = 0.92
"""The share of a device's memory that a plan fills; the rest is for the runtime, fragments and wrong estimates."""

MOST = 256
"""The most prompts that go together: their pictures wait on the host, and a killed run loses a batch."""

_BETWEEN = 0.02
"""Seconds that a batch takes besides its programs: an estimate for reading arguments, dispatching and fetching."""

_WORTH = 1.05
"""A smaller batch is preferred if the whole job takes at most so many times as long: a killed run loses less."""

_NAMES = {
    "_record": "trace",
    "_residuals": "trace at positions",
    "_run": "forward",
    "_resume": "rerun",
    "_prefill": "rerun before generation",
    "_decode": "generation",
    "_answer_log_probs": "answers",
    "_unembed": "logits",
    "take_tokens": "choice of tokens",
    "training_step": "training step",
    "_image": "encoding of pictures",
    "_text": "encoding of captions",
    "_score_own": "scores of pairs",
}
"""What tables call the programs."""

_SMALL = 1 << 25
"""Bytes up to which a result's zeros are made by JAX, like the results of programs that run."""

TRACES = ("trace", "trace at positions", "forward")
PAIRS = "scores of pairs"
RERUNS = ("rerun", "rerun before generation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a program; memory in bytes.

    Attributes:
        name: of the program.
        prompts: prompts of the batch.
        rows: interventions of a sweep, 1 if there is none.
        flops: floating-point operations.
        moved: bytes between memory and chip.
        results: what it returns, beside what takes the memory of donated arguments.
        temporary: what it needs meanwhile.
        held: results of earlier calls that are still in use, and the program's own other arguments.
    """

    name: str
    prompts: int
    rows: int
    flops: float
    moved: float
    results: float
    temporary: float
    held: float

    @property
    def memory(self) -> float:
        """All that it needs besides the weights."""
        return self.held + self.results + self.temporary


@runtime_checkable
class Job(Protocol):
    """A job that can be planned.

    Attributes:
        weights: bytes of the model's parameters.
        items: number of items.
        per_item: prompts of an item.
        most: the most items that can go together, as so many are of one kind.
    """

    weights: float
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
        device: the device.
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
    """What a training run needs on one device; memory in bytes.

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

    def report(self) -> Iterator[str]:
        """A readable table."""
        device = self.device
        yield _peaks(device)
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
    most = bucket(job.most)
    return parts + [
        size * job.per_item for size in buckets if size <= most and size * job.per_item <= max(MOST, job.per_item)
    ]


def _batch_seconds(plan: Plan, device: Device) -> float:
    return sum(device.seconds(call.flops, call.moved) for call in plan.programs)


def _planned(job: Job, device: Device, together: int, measure: bool, kinds: int | None = None) -> Plan:
    """The plan with so many prompts together, of all kinds of batches or the first few."""
    programs: Sequence[Call] = ()
    batches, flops, moved, seconds, pairs, scoring = 0, 0.0, 0.0, 0.0, 0, 0.0
    for count, run in itertools.islice(job.batches(together), kinds):
        calls = dry_run(run, device, measure=measure)
        batches += count
        flops += count * sum(call.flops for call in calls)
        moved += count * sum(call.moved for call in calls)
        seconds += count * sum(device.seconds(call.flops, call.moved) for call in calls)
        for call in calls:
            if call.name == PAIRS:
                pairs += count * call.prompts * call.rows
                scoring += count * device.seconds(call.flops, call.moved)
        programs = max(programs, calls, key=_most)
    peak = job.weights + _most(programs)
    return Plan(
        device=device,
        weights=job.weights,
        items=job.items,
        together=together,
        batches=batches,
        fits=peak <= USABLE * device.memory,
        peak=peak,
        trace_per_prompt=max((_own(call) for call in programs if call.name in TRACES), default=0.0),
        rerun_per_row=max((_own(call) / call.rows for call in programs if call.name in RERUNS), default=0.0),
        flops=flops,
        moved=moved,
        seconds=seconds,
        programs=programs,
        measured=measure,
        pairs=pairs,
        pairs_per_second=pairs / scoring if pairs else 0.0,
    )


def _most(calls: Sequence[Call]) -> float:
    return max((call.memory for call in calls), default=0.0)


def _own(call: Call) -> float:
    """What a call needs for each prompt."""
    return (call.results + call.temporary) / call.prompts


# --- running a job up to its programs --------------------------------------------------------------------------------


def dry_run(run: Callable[[], object], device: Device, *, measure: bool = False) -> list[Call]:
    """The calls of programs in a function, none of which is run.

    Args:
        run: the function; parameters of models may be abstract.
        device: for which programs are planned.
        measure: compile the programs, and take the memory for temporaries from XLA.
    """
    watcher = _Watcher(device, measure)
    with warnings.catch_warnings(), np.errstate(all="ignore"), supposed(device), watched(watcher):
        warnings.simplefilter("ignore")  # about numbers, which are all 0
        run()
    return watcher.calls


class _Watcher:
    """Answers programs with zeros, and notes what they would cost and which results are still in use."""

    def __init__(self, device: Device, measure: bool):
        self.device, self.measure = device, measure
        self.calls: list[Call] = []
        self._live: dict[int, float] = {}

    def __call__(self, program: Program[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> PyTree:
        """The results of a call, all 0."""
        with watched(None):  # programs within this one are parts of it
            traced = program.trace(*arguments, **settings)
        cost = cost_of(traced.jaxpr, self.device, trips=settings.get("steps", 1))
        temporary = cost.temporary
        if self.measure:
            found = traced.lower().compile().memory_analysis()
            temporary = cost.temporary if found is None else float(found.temp_size_in_bytes)
        name: str = _NAMES.get(program.__name__) or program.__name__.strip("_")
        prompts, rows = _prompts_and_rows(name, arguments, settings)
        share = _share(arguments, settings) if name == "rerun" else 1.0
        other = sum(nbytes(leaf) for leaf in jax.tree.leaves(arguments) if self._is_other(leaf))
        results = jax.tree.map(self._zeros, traced.out_info)
        size = sum(nbytes(leaf) for leaf in jax.tree.leaves(results))
        given = [arguments[index] for index in np.atleast_1d(program.options.get("donate_argnums", ())).astype(int)]
        donated = sum(nbytes(leaf) for leaf in jax.tree.leaves(given))
        self.calls.append(
            Call(
                name=name,
                prompts=prompts,
                rows=rows,
                flops=share * cost.flops,
                moved=share * cost.moved,
                results=max(0.0, size - donated),
                temporary=temporary,
                held=sum(self._live.values()) - size + other,
            )
        )
        return results

    def _zeros(self, leaf: Any) -> Any:
        """Zeros of a result, counted as long as anyone holds them; of large ones, the memory is not touched."""
        size = nbytes(leaf)
        array = (jnp if size <= _SMALL else np).zeros(leaf.shape, leaf.dtype)
        self._live[id(array)] = size
        weakref.finalize(array, self._live.pop, id(array), None)
        return array

    def _is_other(self, leaf: Any) -> bool:
        """Whether an argument is neither a parameter nor a result that is counted."""
        base = leaf
        while isinstance(base, np.ndarray) and isinstance(base.base, np.ndarray):
            base = base.base
        return not isinstance(leaf, jax.ShapeDtypeStruct) and id(base) not in self._live


def _prompts_and_rows(name: str, arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> tuple[int, int]:
    """Prompts of a call, and rows of its sweep."""
    if name in TRACES:
        rows = settings.get("chunk") and arguments[5] is not None and len(jax.tree.leaves(arguments[3])[0])
        return len(arguments[2].token_ids), int(rows or 1)
    if name in RERUNS:
        rows = settings["rows"] if "rows" in settings else len(arguments[4])
        return len(arguments[2].positions), int(rows)
    if name == "generation":
        rows, prompts = arguments[3].hidden.shape[:2]
        return int(prompts), int(rows)
    if name == "training step":
        return math.prod(arguments[1]["weight"].shape), 1
    if name in ("encoding of pictures", "encoding of captions"):
        return len(arguments[1]), 1
    if name == PAIRS:
        return len(arguments[3]), int(arguments[3].shape[1])
    return 1, 1


def _share(arguments: tuple[Any, ...], settings: Mapping[str, Any]) -> float:
    """The share of a rerun's blocks that run: a chunk joins where the first of its rows does, padding never."""
    suffix, start, count = arguments[2], np.asarray(arguments[4]), int(arguments[5])
    layers, chunk = suffix.residuals.shape[0] - 1, settings["chunk"]
    firsts = np.sort(np.where(np.arange(len(start)) < count, start, layers))[::chunk]
    return float((layers - firsts).sum() / (layers * len(firsts)))


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
