"""The training loop: seeded, resumable after a kill, data-parallel over local devices."""

import contextlib
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, PyTree

from jaxid.errors import InputError, JaxidWarning
from jaxid.pipeline import read_ahead
from jaxid.train.folder import Row, States, metrics_rows
from jaxid.train.folder import append_metrics as append_metrics
from jaxid.train.folder import begun as begun
from jaxid.train.folder import check_folder as check_folder
from jaxid.train.folder import read_metrics as read_metrics

if TYPE_CHECKING:
    from tqdm import tqdm

Metrics = dict[str, Array]
Batch = Mapping[str, PyTree]

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
        whole: names of the arrays that are replicated rather than split over the devices.
        constants: further entries of every batch that no step changes, such as frozen parameters.
        accumulate: the arrays' first axis counts small batches, whose gradients are computed in turn (on several
            devices, in parallel) and averaged, so that only one batch has to fit in memory.
    """

    name: str
    first: int
    steps: int
    loss: Callable[[PyTree, dict[str, Array]], tuple[Array, Metrics]]
    batch: Callable[[int], Batch]
    optimizer: optax.GradientTransformation
    whole: tuple[str, ...] = ()
    constants: Mapping[str, PyTree] = {}
    accumulate: bool = False


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
) -> PyTree:
    """Trains, or resumes from the last saved step, and returns the parameters. Call it inside `begun`.

    The next batches are drawn while a step is computed. The step is given the state's memory (it is donated); a batch's
    has no use, since no output has its shape.

    A step whose gradient is not finite changes nothing; it is counted in the column "skipped" of `metrics.csv`.

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
            that are repeated after a kill are checked again.
        check_every: steps between checks.

    Raises:
        CheckpointError: if there are saved states, but none is intact.
        OutputError: if the state or the metrics cannot be written, or the metrics are damaged.
        InputError: if training diverges: too many gradients in a row, or the parameters, are not finite.
    """
    from tqdm import tqdm

    columns, metrics_file = (*columns, "skipped"), folder / "metrics.csv"
    metrics_rows(metrics_file, columns)
    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def abstract(step: int) -> PyTree:
        for stage in stages:
            if stage.first < step <= stage.first + stage.steps:
                shapes = jax.eval_shape(partial(_start, stage), parameters)
                return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=same), shapes)
        return None

    with States(folder / "state") as states:
        done, saved = states.restore(abstract)
        for stage in stages:
            end = stage.first + stage.steps
            if done > end or not stage.steps:
                continue
            first = max(done, stage.first)
            state = saved if done > stage.first else jax.device_put(_start(stage, parameters), same)
            step_function = _step_function(stage, mesh.size)
            constants = jax.device_put(dict(stage.constants), same)
            bar = tqdm(total=end, initial=first, unit="step", disable=None if progress else True, desc=stage.name)

            def report(
                now: int, health: Array, metrics: Metrics, record: bool, stage: Stage = stage, bar: "tqdm[Any]" = bar
            ) -> None:
                skipped = _check_health(health, stage, now)
                if not record:
                    return
                numbers = {name: round(float(value), 4) for name, value in metrics.items()}
                row: Row = {"step": now, "stage": stage.name, **numbers, "skipped": skipped}
                append_metrics(metrics_file, columns, row)
                if log is not None:
                    log(row)
                bar.set_postfix({name: numbers[name] for name in ("loss", "accuracy") if name in numbers})
                bar.update(now - bar.n)

            late: Callable[[], None] | None = None
            with contextlib.closing(batches(stage, first)) as drawn:
                for step, batch in drawn:
                    whole = stage.accumulate and jax.tree.leaves(dict(batch))[0].shape[0] % mesh.size
                    placed = {
                        name: jax.device_put(value, same if whole or name in stage.whole else split)
                        for name, value in batch.items()
                    }
                    with jax.profiler.StepTraceAnnotation("compute", step_num=step):
                        state, metrics = step_function(state, placed, constants)
                    if late is not None:  # the numbers of the step before are fetched while this one is computed
                        late()
                    now, last = step + 1, step + 1 == end
                    record, save = (now % every == 0 or last for every in (record_every, save_every))
                    due = check is not None and (now % check_every == 0 or (last and stage is stages[-1]))
                    late = partial(report, now, _health(state), metrics, record) if record or save or due else None
                    if late is not None and (save or due):
                        late()
                        late = None
                    if check is not None and due:
                        check(now, state["parameters"])
                    if save:
                        states.save(now, state)
            bar.close()
            parameters = state["parameters"]
    return jax.device_get(parameters)


def _start(stage: Stage, parameters: PyTree) -> State:
    """The initial state of a stage."""
    return {"parameters": parameters, "optimizer": skip_not_finite(stage.optimizer).init(parameters)}


def skip_not_finite(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer that skips, and counts, steps whose gradient is not finite."""
    # After this many skipped steps in a row, optax would apply updates that are not finite.
    return optax.apply_if_finite(optimizer, max_consecutive_errors=int(jnp.iinfo(jnp.int32).max))


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
    if last and skipped:
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


def _step_function(stage: Stage, devices: int) -> Callable[..., tuple[State, Metrics]]:
    @partial(jax.jit, donate_argnums=0)
    def step_function(state: State, batch: dict[str, PyTree], constants: dict[str, PyTree]) -> tuple[State, Metrics]:
        parameters = state["parameters"]

        def gradients(own: dict[str, PyTree]) -> tuple[PyTree, Metrics]:
            return jax.grad(lambda values: stage.loss(values, {**constants, **own}), has_aux=True)(parameters)

        found, metrics = _averaged(gradients, batch, devices) if stage.accumulate else gradients(batch)
        updates, optimizer_state = skip_not_finite(stage.optimizer).update(found, state["optimizer"], parameters)
        parameters = optax.apply_updates(parameters, updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, metrics

    return step_function


def _averaged(function: Callable[[PyTree], PyTree], batch: dict[str, PyTree], devices: int) -> PyTree:
    """The mean of a function over the first axis of a batch; each device computes its share sequentially."""
    count = jax.tree.leaves(batch)[0].shape[0]
    together = devices if count % devices == 0 else 1

    def several(part: PyTree) -> PyTree:
        if together == 1:
            return function(jax.tree.map(lambda leaf: leaf[0], part))
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(function)(part))

    if count == together:
        total = several(batch)
    else:  # each device's share is contiguous, so those that run in parallel are `count // together` apart
        rows = jax.tree.map(
            lambda leaf: leaf.reshape(together, count // together, *leaf.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(several, jax.tree.map(lambda leaf: leaf[0], rows)),
        )
        total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, several(part)), None), zeros, rows)
    return jax.tree.map(lambda leaf: leaf / count, total)
