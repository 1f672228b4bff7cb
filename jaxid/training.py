"""The training loop of all that jaxid trains: seeded, resumable after a kill, data-parallel over local devices."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxid.errors import CheckpointError
from jaxid.results import ensure_output_folder, whole_file, write_json

Metrics = dict[str, Array]
Batch = Mapping[str, Any]


class Stage(NamedTuple):
    """One stretch of training with its own loss, data and schedule.

    Attributes:
        name: how the progress bar and the metrics call it.
        first: number of its first step, counted over the whole run.
        steps: how many it has.
        loss: from parameters and a batch to the loss and what is worth recording.
        batch: arrays of a step, a pure function of its number, so that a resumed run sees the same data.
        optimizer: what turns gradients into updates.
        whole: names of those arrays that every device needs whole.
        constants: further entries of every batch that no step changes, such as frozen parameters.
        accumulate: the arrays' first axis counts small batches, whose gradients are averaged one after the other (on
            several devices, side by side), so that only one of them has to fit in memory.
    """

    name: str
    first: int
    steps: int
    loss: Callable[[Any, dict[str, Array]], tuple[Array, Metrics]]
    batch: Callable[[int], Batch]
    optimizer: optax.GradientTransformation
    whole: tuple[str, ...] = ()
    constants: Mapping[str, Any] = {}
    accumulate: bool = False


def train(
    folder: Path,
    settings: Mapping[str, Any],
    parameters: Any,
    stages: Sequence[Stage],
    *,
    columns: Sequence[str],
    save_every: int = 100,
    record_every: int = 20,
    progress: bool = True,
    log: Callable[[dict[str, Any]], None] | None = None,
    check: Callable[[int, Any], None] | None = None,
    check_every: int = 100,
) -> Any:
    """Trains, or goes on from the last saved step, and returns the parameters.

    Args:
        folder: where the run's state and metrics live (`state/`, `metrics.csv`, `run.json`).
        settings: all that decides the outcome; a folder begun with other settings is refused.
        parameters: a pytree of float arrays to begin with.
        stages: what to do, one after the other.
        columns: of `metrics.csv`.
        save_every: steps between saves.
        record_every: steps between rows of metrics.
        progress: show a progress bar.
        log: is also given every row of metrics.
        check: is given the number of steps done and the parameters, every so often and at the end; what a kill undid
            is checked again.
        check_every: steps between checks.

    Raises:
        CheckpointError: if the folder holds a run with other settings.
    """
    import orbax.checkpoint as ocp
    from tqdm import tqdm

    ensure_output_folder(folder)
    record = folder / "run.json"
    if record.exists() and json.loads(record.read_text()) != json.loads(json.dumps(settings)):
        raise CheckpointError(f"{folder} holds a training run with other settings; choose another folder.")
    write_json(record, settings)

    mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))
    split, same = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager((folder / "state").absolute(), options=options) as manager:
        done = manager.latest_step() or 0
        for stage in stages:
            end = stage.first + stage.steps
            if done > end or not stage.steps:
                continue
            state = jax.device_put({"parameters": parameters, "optimizer": stage.optimizer.init(parameters)}, same)
            if done > stage.first:
                state = manager.restore(done, args=ocp.args.StandardRestore(state))
            step_function = _step_function(stage, mesh.size)
            constants = jax.device_put(dict(stage.constants), same)
            bar = tqdm(total=end, initial=max(done, stage.first), unit="step", disable=not progress, desc=stage.name)
            for step, batch in batches(stage, max(done, stage.first)):
                whole = stage.accumulate and jax.tree.leaves(dict(batch))[0].shape[0] % mesh.size
                placed = {
                    name: jax.device_put(value, same if whole or name in stage.whole else split)
                    for name, value in batch.items()
                }
                state, metrics = step_function(state, placed, constants)
                if (step + 1) % record_every == 0 or step + 1 == end:
                    numbers = {name: round(float(value), 4) for name, value in metrics.items()}
                    row = {"step": step + 1, "stage": stage.name, **numbers}
                    append_metrics(folder / "metrics.csv", columns, row)
                    if log is not None:
                        log(row)
                    bar.set_postfix({name: numbers[name] for name in ("loss", "accuracy") if name in numbers})
                    bar.update(step + 1 - bar.n)
                if check is not None and ((step + 1) % check_every == 0 or (step + 1 == end and stage is stages[-1])):
                    check(step + 1, state["parameters"])
                if (step + 1) % save_every == 0 or step + 1 == end:
                    manager.save(step + 1, args=ocp.args.StandardSave(state))
            bar.close()
            parameters = state["parameters"]
        manager.wait_until_finished()
    return jax.device_get(parameters)


def batches(stage: Stage, first: int) -> Iterator[tuple[int, Batch]]:
    """Steps and batches of a stage from a step on, the next one drawn while the current one trains."""
    with ThreadPoolExecutor(1) as pool:
        upcoming = pool.submit(stage.batch, first)
        for step in range(first, stage.first + stage.steps):
            batch = upcoming.result()
            upcoming = pool.submit(stage.batch, step + 1)
            yield step, batch


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
            # Stacked block matrices have three axes and more; embeddings, norms and biases have fewer.
            mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 2, tree),
        ),
    )


def _step_function(stage: Stage, devices: int) -> Callable[..., Any]:
    @partial(jax.jit, donate_argnums=0)
    def step_function(
        state: dict[str, Any], batch: dict[str, Any], constants: dict[str, Any]
    ) -> tuple[dict[str, Any], Metrics]:
        parameters = state["parameters"]

        def gradients(own: dict[str, Any]) -> tuple[Any, Metrics]:
            return jax.grad(lambda values: stage.loss(values, {**constants, **own}), has_aux=True)(parameters)

        found, metrics = _averaged(gradients, batch, devices) if stage.accumulate else gradients(batch)
        updates, optimizer_state = stage.optimizer.update(found, state["optimizer"], parameters)
        parameters = optax.apply_updates(parameters, updates)
        return {"parameters": parameters, "optimizer": optimizer_state}, metrics

    return step_function


def _averaged(function: Callable[[Any], Any], batch: dict[str, Any], devices: int) -> Any:
    """The mean of a function over the first axis of a batch, each device taking its share of it one by one."""
    count = jax.tree.leaves(batch)[0].shape[0]
    together = devices if count % devices == 0 else 1

    def several(part: Any) -> Any:
        if together == 1:
            return function(jax.tree.map(lambda leaf: leaf[0], part))
        return jax.tree.map(lambda leaf: leaf.sum(axis=0), jax.vmap(function)(part))

    if count == together:
        total = several(batch)
    else:  # a device's share lies together, so the small batches that run side by side are far apart
        rows = jax.tree.map(
            lambda leaf: leaf.reshape(together, count // together, *leaf.shape[1:]).swapaxes(0, 1), batch
        )
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(several, jax.tree.map(lambda leaf: leaf[0], rows)),
        )
        total, _ = jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, several(part)), None), zeros, rows)
    return jax.tree.map(lambda leaf: leaf / count, total)


def append_metrics(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Adds a row; rows of steps that a kill undid are dropped first."""
    rows: list[Any] = []
    if path.exists():
        with path.open() as file:
            rows = [old for old in csv.DictReader(file) if int(old["step"]) < row["step"]]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows([*rows, row])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.csv`, numbers as numbers."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open() as file:
        return [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]
