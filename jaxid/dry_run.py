"""Running a job up to its programs: what each would cost, without running it.

A watcher (`jaxid.interp.programs`) sees every call with the shapes of its arguments, adds up what it costs
(`jaxid.costs`), or what XLA's compiler says of it, and answers with zeros.
"""

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxid.costs import cost_of, nbytes
from jaxid.devices import Device, supposed
from jaxid.interp.programs import Program, watched
from jaxid.meshes import ONE, Axes

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


def dry_run(run: Callable[[], object], device: Device, *, axes: Axes = ONE, measure: bool = False) -> list[Call]:
    """The calls of programs in a function, none of which is run.

    Args:
        run: the function; parameters of models may be abstract.
        device: for which programs are planned.
        axes: of a mesh of such devices, each of which runs its part of every program.
        measure: compile the programs, and take the memory for temporaries from XLA; on one device only.
    """
    watcher = _Watcher(device, axes, measure)
    with warnings.catch_warnings(), np.errstate(all="ignore"), supposed(device), watched(watcher):
        warnings.simplefilter("ignore")  # about numbers, which are all 0
        run()
    return watcher.calls


class _Watcher:
    """Answers programs with zeros, and notes what they would cost and which results are still in use."""

    def __init__(self, device: Device, axes: Axes, measure: bool):
        self.device, self.axes, self.measure = device, axes, measure and axes == ONE
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
        copies, devices = self.axes.data, self.axes.data * self.axes.model
        self.calls.append(
            Call(
                name=name,
                prompts=prompts,
                rows=rows,
                flops=share * cost.flops / devices,
                moved=share * cost.moved / devices,
                results=max(0.0, size - donated) / copies,
                temporary=temporary / copies,
                held=(sum(self._live.values()) - size + other) / copies,
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
