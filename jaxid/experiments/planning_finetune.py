"""Plans of fine-tuning: what a run needs on a device, from its own task, stage and step.

On a mesh, axis "model" is taken to divide the work and the state of a step, but not its temporaries; "data" divides the
optimizer's state, and the small batches if their number is a multiple of it.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from jax.sharding import AbstractMesh

from jaxid.checkpoints.loading import Checkpoint, abstract_parameters, open_checkpoint
from jaxid.checkpoints.sharding import layout
from jaxid.checkpoints.tensors import flatten
from jaxid.costs import nbytes
from jaxid.data.coco_spatial import ANSWERS
from jaxid.devices import Device
from jaxid.dry_run import Call, dry_run
from jaxid.experiments.finetune import Task, resolved, rows_of, task
from jaxid.experiments.finetune_evaluation import BATCH, evaluate
from jaxid.experiments.finetune_geometry import word_activations
from jaxid.experiments.finetune_run import Finetune, Read
from jaxid.meshes import AXES, ONE, Axes
from jaxid.plan import USABLE, TrainingPlan
from jaxid.train.loop import Batch, Stage, abstract_step
from jaxid.train.placement import placement

_LOOKED_AT = 8
"""Steps whose batches are read: their questions may differ in length."""


def plan_finetune(command: Finetune, device: Device, *, measure: bool = False) -> TrainingPlan:
    """Plans a run, without reading weights or writing anything.

    Args:
        command: the run; without a mesh it is planned for one device.
        device: the device, or one of those of the mesh.
        measure: ask XLA's compiler, for this process's device, what memory the programs need.

    Raises:
        JaxidError: what the command itself raises for its model, its IDs or its data.
    """
    if command.reference_bugs:
        from jaxid.experiments.reference import with_bugs  # it knows all experiments

        command = with_bugs(command)
    checkpoint = open_checkpoint(command.model, dtype=command.dtype)
    axes = command.axes(checkpoint, jax.device_count(), device)
    model, measure = checkpoint.abstract(), measure and axes == ONE
    read = command.read()
    job = task(model, read.training, read.ids, resolved(command, model), foreign=command.ids_from_another_model)
    read.check(model)
    stage, groups = job.stage(), job.config.groups or 1
    trained = jax.eval_shape(job.selection.split, model.parameters)
    weights, (copies, state) = checkpoint.held(axes), _state(checkpoint, stage, trained, axes)
    held = weights + copies + state

    shares = axes.model * (axes.data if groups % axes.data == 0 else 1)
    steps = _scaled(
        [(count, _share(_step(stage, trained, batch, device, measure), shares)) for count, batch in _batches(stage)],
        stage,
    )
    merged, evaluations = _evaluation(job, read, device, axes, measure)
    asked = max((merged + call.memory for _, call in evaluations), default=0.0)
    peak = held + max(asked, *(call.memory for _, call in steps))
    fits, sparing = peak <= USABLE * device.memory, None
    if not fits and stage.sparing is not None:
        lean = stage._replace(loss=stage.sparing)
        spared = (_step(lean, trained, batch, device, measure).memory for _, batch in _batches(lean))
        sparing = held + max(asked, *spared)

    rounds = command.evaluated
    every = [*steps, *((rounds * count, call) for count, call in evaluations)]
    return TrainingPlan(
        device=device,
        weights=weights,
        trained=copies,
        optimizer=state,
        steps=stage.steps,
        small_batches=groups,
        batch_size=rows_of(job.groups, job.config),
        fits=fits,
        peak=peak,
        sparing_peak=sparing,
        evaluations=rounds,
        evaluation_seconds=sum(count * device.seconds(call.flops, call.moved) for count, call in evaluations),
        flops=sum(count * call.flops for count, call in every),
        moved=sum(count * call.moved for count, call in every),
        seconds=sum(count * device.seconds(call.flops, call.moved) for count, call in every),
        programs=[
            max((call for _, call in steps), key=lambda call: call.memory),
            *(call for _, call in evaluations),
        ],
        measured=measure,
        axes=axes,
    )


def _state(checkpoint: Checkpoint, stage: Stage, trained: Any, axes: Axes) -> tuple[float, float]:
    """Bytes of the trained tensors and of the optimizer's state that a device holds."""
    _, state = abstract_step(stage, trained)
    mesh = AbstractMesh(tuple(axes), AXES)
    definition, leaves = abstract_parameters(checkpoint.kind, checkpoint.model.config)
    where = placement(mesh, layout(definition, leaves, mesh).shardings, trained).state(stage.optimizer)
    return _shares(state["parameters"], where["parameters"]), _shares(state["optimizer"], where["optimizer"])


def _shares(tree: Any, shardings: Any) -> float:
    """Bytes of the parts of arrays that a device holds."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    return sum(math.prod(place.shard_shape(leaf.shape)) * float(leaf.dtype.itemsize) for leaf, place in pairs)


def _share(call: Call, shares: int) -> Call:
    """A call whose work devices share."""
    return dataclasses.replace(call, flops=call.flops / shares, moved=call.moved / shares)


def _batches(stage: Stage) -> list[tuple[int, Batch]]:
    """The first steps' batches, one of each shape, and how many have it."""
    drawn = [stage.batch(step) for step in range(min(_LOOKED_AT, stage.steps))]
    shapes = [tuple(leaf.shape for leaf in jax.tree.leaves(batch)) for batch in drawn]
    return [(count, drawn[shapes.index(shape)]) for shape, count in Counter(shapes).items()]


def _step(stage: Stage, trained: Any, batch: Batch, device: Device, measure: bool) -> Call:
    """A step of the stage on a batch."""
    function, state = abstract_step(stage, trained)
    (call,) = dry_run(lambda: function(state, dict(batch), dict(stage.constants)), device, measure=measure)
    return call


def _scaled(looked_at: Sequence[tuple[int, Call]], stage: Stage) -> list[tuple[float, Call]]:
    """The calls with the numbers of times that all of a stage's steps take, if the others are like them."""
    whole = sum(count for count, _ in looked_at)
    return [(stage.steps * count / whole, call) for count, call in looked_at]


def _evaluation(
    job: Task, read: Read, device: Device, axes: Axes, measure: bool
) -> tuple[float, list[tuple[int, Call]]]:
    """The memory of the tensors that an evaluation puts together, and its programs, with how often each is called."""
    trained = jax.eval_shape(job.selection.split, job.model.parameters)
    parameters = jax.eval_shape(job.selection.merge, job.model.parameters, trained)
    model, found = job.model.with_parameters(parameters), []
    asked = partial(evaluate, model, prompt=job.config.prompt or "plain", answered=job.config.answered)
    for questions in read.sets.values():
        for words in ANSWERS.values():
            own = [item for item in questions if item.relation in words]
            if own:
                calls = dry_run(partial(asked, own[:BATCH]), device, axes=axes, measure=measure)
                found += [(-(-len(own) // BATCH), call) for call in calls]
    questions = [question for folder in read.folders for question in folder]
    for axis in ANSWERS:
        own = [question for question in questions if question.axis == axis]
        if own:
            described = partial(word_activations, model, own[:BATCH], job.config)
            calls = dry_run(described, device, axes=axes, measure=measure)
            found += [(-(-len(own) // BATCH), call) for call in calls]
    flat = flatten(parameters)
    return sum(nbytes(flat[path]) for path, _ in job.selection.rows) / axes.model, found
