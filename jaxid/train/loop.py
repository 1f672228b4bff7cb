"""The training loop: seeded, resumable after a kill, on the devices of a mesh."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Int, PyTree

from jaxid import meshes
from jaxid.errors import InputError, JaxidWarning, OutOfMemoryError
from jaxid.halving import Exhausted, Halving
from jaxid.interp.programs import Program, program
from jaxid.pipeline import read_ahead
from jaxid.train.folder import Row, States, metrics_rows
from jaxid.train.folder import append_metrics as append_metrics
from jaxid.train.folder import begun as begun
from jaxid.train.folder import check_folder as check_folder
from jaxid.train.folder import leads as leads
from jaxid.train.folder import read_metrics as read_metrics
from jaxid.train.gradients import mean
from jaxid.train.placement import Layout, Placement, complete, placement, skip_not_finite

if TYPE_CHECKING:
    from tqdm import tqdm

Metrics = dict[str, Array]
Batch = Mapping[str, PyTree]
Loss = Callable[[PyTree, dict[str, Array]], tuple[Array, Metrics]]

_MOST_SKIPPED = 20
"""The number of consecutive steps without a finite gradient that ends a run."""


class State(TypedDict):
    """What a step of training changes."""

    parameters: PyTree
    optimizer: PyTree


class Stage(NamedTuple):
    """One stage of training, with its own loss, data and schedule.

    Attributes:
        name: its name in the progress bar and the metrics.
        first: index of its first step, counted over the whole run.
        steps: number of steps.
        loss: maps parameters and a batch to the loss and further metrics.
        batch: maps the index of a step to its arrays; a pure function, so that a resumed run sees the same data.
        optimizer: turns gradients into updates.
        whole: names of the arrays that every device has whole, rather than a share along their first axis.
        constants: further entries of every batch that no step changes, such as frozen parameters.
        accumulate: the arrays' first axis counts small batches, whose gradients are computed in turn (on a mesh whose
            axis "data" divides them, in parallel) and averaged, so that only one batch has to fit in memory.
        sparing: the same loss with less memory, for devices that run out of it.
    """

    name: str
    first: int
    steps: int
    loss: Loss
    batch: Callable[[int], Batch]
    optimizer: optax.GradientTransformation
    whole: tuple[str, ...] = ()
    constants: Mapping[str, PyTree] = {}
    accumulate: bool = False
    sparing: Loss | None = None


def fit(
    folder: Path,
    parameters: PyTree,
    stages: Sequence[Stage],
    *,
    columns: Sequence[str],
    save_every: int = 100,
    record_every: int = 20,
    progress: bool = True,
    log: Callable[[Row], None] | None = None,
    check: Callable[[int, PyTree], None] | None = None,
    check_every: int = 100,
    advice: str = "use a larger device",
    mesh: Mesh | None = None,
    layout: Layout | None = None,
) -> PyTree:
    """Trains, or resumes from the last saved step, and returns the parameters. Call it inside `begun`.

    The next batches are drawn while a step is computed. The step is given the state's memory (it is donated); a batch's
    has no use, since no output has its shape.

    A step whose gradient is not finite changes nothing; it is counted in the column "skipped" of `metrics.csv`.

    If the device runs out of memory, the losses that spare it are used from there on. The step is computed again, or,
    if its state was lost with the memory, all steps since the last saved one.

    Args:
        folder: folder for the run's state and metrics (`state/`, `metrics.csv`).
        parameters: the initial parameters, a pytree of float arrays.
        stages: the stages, trained in turn.
        columns: columns of `metrics.csv`, to which "skipped" is added.
        save_every: steps between saves.
        record_every: steps between rows of metrics.
        progress: show a progress bar, on terminals.
        log: called with every row of metrics.
        check: called with the number of steps done and the parameters every `check_every` steps and at the end. Steps
            that are repeated after a kill, or since the memory did not suffice, are checked again.
        check_every: steps between checks.
        advice: what to do if the memory does not suffice, in half a sentence.
        mesh: the devices; by default all of them, each with a copy of the parameters. A run may be resumed on another
            mesh. If they belong to several processes, all of them call this with the same arguments, and the first
            one writes.
        layout: where the parameters lie on the mesh, by dotted path; those without an entry are replicated.

    Returns:
        The parameters, in host memory.

    Raises:
        CheckpointError: if there are saved states, but none is intact.
        OutputError: if the state or the metrics cannot be written, or the metrics are damaged.
        InputError: if training diverges: too many gradients in a row, or the parameters, are not finite.
        OutOfMemoryError: if the device's memory does not suffice for a step.
    """
    columns = (*columns, "skipped")
    metrics_rows(folder / "metrics.csv", columns)
    run = _Run(
        folder=folder,
        stages=stages,
        columns=columns,
        save_every=save_every,
        record_every=record_every,
        progress=progress,
        log=log,
        check=check,
        check_every=check_every,
        advice=advice,
        placement=placement(mesh, layout, parameters),
    )
    parameters = complete(parameters)  # the device's memory is for the state
    while True:
        try:
            return _MEMORY.guarded(partial(run.trained, parameters))
        except Exhausted as shortage:
            run.spare(shortage)


_MEMORY = Halving(1, unit="training step")
"""Turns JAX's errors into `Exhausted`; a step is never halved."""


@dataclasses.dataclass(kw_only=True)
class _Run:
    """A run of training, whose first fields are arguments of `fit`.

    Attributes:
        spared: whether the losses that spare memory are used.
        step: index of the step at work.
        logged: the last step whose metrics were passed to `log`.
    """

    folder: Path
    stages: Sequence[Stage]
    columns: Sequence[str]
    save_every: int
    record_every: int
    progress: bool
    log: Callable[[Row], None] | None
    check: Callable[[int, PyTree], None] | None
    check_every: int
    advice: str
    placement: Placement
    spared: bool = False
    step: int = 0
    logged: int = 0

    def trained(self, parameters: PyTree) -> PyTree:
        """The parameters after all stages, which begin with these, or are resumed from the last saved step."""

        def abstract(step: int) -> PyTree:
            for stage in self.stages:
                if stage.first < step <= stage.first + stage.steps:
                    shapes = jax.eval_shape(partial(_start, stage), parameters)
                    return jax.tree.map(_abstract, shapes, self.placement.state(stage.optimizer))
            return None

        with States(self.folder / "state") as states:
            done, saved = states.restore(abstract)
            for stage in self.stages:
                if done > stage.first + stage.steps or not stage.steps:
                    continue
                state: Any = saved if done > stage.first else _placed_start(stage, parameters, self.placement)
                saved = None
                parameters = self._through(stage, state, max(done, stage.first), states)
        return complete(parameters)

    def _through(self, stage: Stage, state: State, first: int, states: States) -> PyTree:
        """The parameters after a stage, beginning with the state before step `first`."""
        from tqdm import tqdm

        step_function, end = self._function(stage), stage.first + stage.steps
        constants = self.placement.constants(dict(stage.constants))
        late: Callable[[], None] | None = None
        disable = None if self.progress and leads() else True
        with (
            tqdm(total=end, initial=first, unit="step", disable=disable, desc=stage.name) as bar,
            contextlib.closing(batches(stage, first)) as drawn,
        ):
            for step, batch in drawn:
                self.step = step
                placed = self.placement.batch(batch, stage.whole)
                with jax.profiler.StepTraceAnnotation("compute", step_num=step):
                    try:
                        state, metrics = _MEMORY.guarded(partial(step_function, state, placed, constants))
                    except Exhausted as shortage:
                        if jax.process_count() > 1 or not _intact(state):
                            raise
                        self.spare(shortage)
                        step_function = self._function(stage)
                        state, metrics = step_function(state, placed, constants)
                if late is not None:  # the numbers of the step before are fetched while this one is computed
                    late()
                now, last = step + 1, step + 1 == end
                record, save = (now % every == 0 or last for every in (self.record_every, self.save_every))
                due = self.check is not None and (now % self.check_every == 0 or (last and stage is self.stages[-1]))
                late = None
                if record or save or due:
                    late = partial(self._report, stage, now, _health(state), metrics if record else None, bar)
                if late is not None and (save or due):
                    late()
                    late = None
                if self.check is not None and due:
                    self.check(now, state["parameters"])
                if save:
                    states.save(now, state)
        return state["parameters"]

    def _function(self, stage: Stage) -> Callable[..., tuple[State, Metrics]]:
        """The step of a stage, with the loss that is to be used."""
        return _step_function(stage._replace(loss=(self.spared and stage.sparing) or stage.loss), self.placement)

    def _report(self, stage: Stage, now: int, health: Array, metrics: Metrics | None, bar: "tqdm[Any]") -> None:
        """Checks the numbers of a step, and writes those that are to be recorded."""
        skipped = _check_health(health, stage, now)
        if metrics is None or not leads():
            return
        numbers = {name: round(float(value), 4) for name, value in metrics.items()}
        row: Row = {"step": now, "stage": stage.name, **numbers, "skipped": skipped}
        append_metrics(self.folder / "metrics.csv", self.columns, row)
        if self.log is not None and now > self.logged:
            self.log(row)
        self.logged = max(now, self.logged)
        bar.set_postfix({name: numbers[name] for name in ("loss", "accuracy") if name in numbers})
        bar.update(now - bar.n)

    def spare(self, shortage: Exhausted) -> None:
        """Takes the losses that spare memory, from here on.

        Raises:
            OutOfMemoryError: if they are taken already, or there are none.
        """
        several = jax.process_count() > 1  # which would have to agree
        if self.spared or several or not any(stage.sparing for stage in self.stages):
            steps = [int(path.name) for path in (self.folder / "state").glob("*") if path.name.isdecimal()]
            saved = f"the same command resumes from step {max(steps)}" if steps else "no step is saved yet"
            even = ", even with --recompute all" if self.spared else ""
            advice = f"begin anew with --recompute all, or {self.advice}" if several else self.advice
            raise OutOfMemoryError(
                f"the device's memory does not suffice for training step {self.step + 1}{even}; {saved}; "
                f"{advice}: {shortage}."
            )
        self.spared = True
        warnings.warn(
            f"the device's memory did not suffice for training step {self.step + 1}; from here on the backward pass "
            "recomputes all that it can (as with --recompute all), which gives the same numbers, and nothing is lost.",
            JaxidWarning,
            stacklevel=3,
        )


def _intact(state: State) -> bool:
    """Whether a state that was donated to a failed step is still there, and was computed."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
        return False
    try:
        jax.block_until_ready(state)
    except jax.errors.JaxRuntimeError:  # an earlier step failed only when it was at work
        return False
    return True


def _start(stage: Stage, parameters: PyTree) -> State:
    """The initial state of a stage."""
    return {"parameters": parameters, "optimizer": skip_not_finite(stage.optimizer).init(parameters)}


def _abstract(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _placed_start(stage: Stage, parameters: PyTree, placement: Placement) -> State:
    """The initial state of a stage on the devices, none of which ever holds more than its part of it."""

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        return meshes.put(placement.devices, leaf, sharding.spec)

    placed = jax.tree.map(put, parameters, placement.parameters())
    return jax.jit(partial(_start, stage), out_shardings=placement.state(stage.optimizer))(placed)


def _check_health(health: Int[Array, "3"], stage: Stage, step: int) -> int:
    """The number of a stage's steps that were skipped, from `_health` after a step.

    Raises:
        InputError: if all of them or too many in a row were skipped, or if the parameters are not finite.
    """
    last = step == stage.first + stage.steps
    in_row, skipped, finite = np.asarray(health).tolist()
    advice = "lower the learning rate, or check the data and weights"
    if in_row >= _MOST_SKIPPED or (last and in_row == stage.steps):
        raise InputError(
            f"training diverges: in all of the steps {step - in_row + 1} to {step} ({stage.name}) the gradient is NaN "
            f"or infinite; {advice}."
        )
    if not finite:
        raise InputError(
            f"training diverges: after step {step} ({stage.name}) parameters are NaN or infinite; {advice}."
        )
    if last and skipped and leads():
        warnings.warn(
            f"{skipped} of the {stage.steps} steps of {stage.name} had a gradient that is NaN or infinite, and were "
            f"skipped.",
            JaxidWarning,
            stacklevel=2,
        )
    return skipped


@jax.jit
def _health(state: State) -> Int[Array, "3"]:
    """Steps without a finite gradient: the last ones in a row, and all; and 1 if all parameters are finite, else 0."""
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state["parameters"])]
    counts = state["optimizer"]
    return jnp.stack([counts.notfinite_count, counts.total_notfinite, jnp.stack(finite).all().astype(jnp.int32)])


def batches(stage: Stage, first: int) -> Generator[tuple[int, Batch], None, None]:
    """Steps and batches of a stage, starting at step `first`; the next batches are drawn during the current step."""
    with read_ahead(stage.batch, range(first, stage.first + stage.steps)) as drawn:
        for step, batch in drawn:
            yield step, batch.result()


def adamw(
    learning_rate: float, steps: int, *, warmup_steps: int, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """AdamW with a linear warm-up, a cosine to zero, and decay of stacked block matrices only."""
    warmup = min(warmup_steps, max(steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warmup, max(steps, 1))
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        optax.adamw(
            schedule,
            b2=0.98,
            weight_decay=weight_decay,
            # Stacked block matrices have three or more axes; embeddings, norms and biases have fewer.
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree),
        ),
    )


def abstract_step(
    stage: Stage, parameters: PyTree, placement: Placement | None = None
) -> tuple[Program[..., tuple[State, Metrics]], State]:
    """A step of a stage and the shapes of its state, from the shapes of the parameters; for plans.

    Args:
        stage: the stage.
        parameters: their shapes.
        placement: where the state lies; on one device by default.
    """
    state: Any = jax.eval_shape(partial(_start, stage), parameters)
    if placement is not None:
        state = jax.tree.map(_abstract, state, placement.state(stage.optimizer))
    return _step_function(stage, placement), state


def _step_function(stage: Stage, placement: Placement | None = None) -> Program[..., tuple[State, Metrics]]:
    """A step of a stage: maps a state (whose memory it takes), a batch and constants.

    Args:
        stage: the stage.
        placement: where state and batches lie; on one device by default.
    """
    options = {} if placement is None else {"out_shardings": (placement.state(stage.optimizer), placement.whole)}

    @program(donate_argnums=0, **options)
    def training_step(state: State, batch: dict[str, PyTree], constants: dict[str, PyTree]) -> tuple[State, Metrics]:
        parameters = state["parameters"]

        def gradients(parameters: PyTree, own: dict[str, PyTree], constants: dict[str, PyTree]) -> PyTree:
            return jax.grad(lambda values: stage.loss(values, {**constants, **own}), has_aux=True)(parameters)

        averaged = mean(gradients, placement) if stage.accumulate else gradients
        found, metrics = averaged(parameters, batch, constants)
        if placement is not None:
            found = jax.lax.with_sharding_constraint(found, placement.divided())
        updates, optimizer_state = skip_not_finite(stage.optimizer).update(found, state["optimizer"], parameters)
        if placement is not None:
            updates = jax.lax.with_sharding_constraint(updates, placement.divided())
        parameters = optax.apply_updates(parameters, updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, metrics

    return training_step
