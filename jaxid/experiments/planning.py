"""Plans of experiments: what a run needs on a device, and the batch it would choose."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxid import plan as plans
from jaxid.checkpoints import encoders
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.data.clips import AppearItem, read_appear_folder
from jaxid.devices import Device
from jaxid.errors import InputError
from jaxid.experiments.base import Command, Experiment
from jaxid.experiments.dcsm_evaluate import Asked, EvaluateScorers
from jaxid.experiments.finetune_run import Finetune
from jaxid.experiments.planning_finetune import plan_finetune
from jaxid.experiments.session import Session, padded
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.experiments.temporal_ids import ExtractTemporalIDs
from jaxid.families.base import Encoder
from jaxid.ids.extract import SPATIAL_QUESTION, TEMPORAL_QUESTION, ask
from jaxid.interp.trace import residuals_at
from jaxid.plan import Plan, TrainingPlan

PLANNED = (Experiment, ExtractIDs, ExtractTemporalIDs, Finetune, EvaluateScorers)
"""Kinds of commands that can be planned."""


def plan(command: Command[Any], device: Device, *, measure: bool = False) -> Plan | TrainingPlan:
    """Plans a command, without reading weights or writing anything.

    Args:
        command: an experiment, or an extraction of IDs.
        device: the device.
        measure: ask XLA's compiler, for this process's device, what memory the programs need.

    Raises:
        InputError: for other commands.
        JaxidError: what the command itself raises for its model, its IDs or its data.
    """
    if isinstance(command, ExtractIDs | ExtractTemporalIDs):
        return plans.plan(_Extraction(command, device), device, together=command.batch_size, measure=measure)
    if isinstance(command, Finetune):
        return plan_finetune(command, device, measure=measure)
    if isinstance(command, EvaluateScorers):
        found = plans.plan(_Evaluation(command), device, together=command.batch_size, measure=measure)
        return dataclasses.replace(found, unit="question")
    if not isinstance(command, Experiment):
        raise InputError(f"a {type(command).__name__} cannot be planned.")
    if command.reference_bugs:
        from jaxid.experiments.reference import with_bugs  # it knows all experiments

        command = with_bugs(command)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(dataclasses.replace(command, out=Path(folder), progress=False), device=device)
        session.about(command.items(session))
        job = ExperimentJob(session)
        chosen = session.prompts_together if command.batch_size or device.platform == "cpu" else None
        return plans.plan(job, device, together=chosen, measure=measure)


class ExperimentJob:
    """The batches of an experiment, with abstract parameters."""

    def __init__(self, session: Session):
        """Takes a session that knows its items."""
        self._session = session
        experiment, self.items = session.experiment, len(session.items)
        self.per_item = experiment.prompts_per_item
        self.most = max(map(len, experiment.groups(session.items)))
        self.axes = session.axes
        self._model = session.checkpoint.on(None).abstract()
        self.weights = session.checkpoint.held(session.axes)

    def batches(self, together: int) -> Iterator[tuple[int, Callable[[], object]]]:
        """A batch of every group of items: the last, whose questions are the longest where items are sorted."""
        session, experiment = self._session, self._session.experiment
        model, before = session.model, session.halving.together
        session.model, session.halving.together = self._model, together
        try:
            for group in experiment.groups(session.items):
                size = session.batch_size
                yield -(-len(group) // size), lambda group=group, size=size: self._run(group[-size:])
        finally:
            session.model, session.halving.together = model, before

    def _run(self, items: Sequence[Any]) -> None:
        session, experiment = self._session, self._session.experiment
        for group, batch in experiment.read(session, list(items)):
            rows = experiment.compute(session, group, batch)
            if callable(rows):
                rows()


class _Extraction:
    """The batches of an extraction of IDs: the residual stream at every asked word."""

    per_item = 1

    def __init__(self, command: ExtractIDs | ExtractTemporalIDs, device: Device):
        checkpoint = open_checkpoint(command.model, dtype=command.dtype)
        self._model = checkpoint.abstract()
        self._items: Sequence[Any]
        if isinstance(command, ExtractTemporalIDs):
            self._items = read_appear_folder(command.data, bad=[] if command.skip_bad else None)
        else:
            self._items = command.items()
        self.items = self.most = len(self._items)
        self.axes = checkpoint.axes(command.mesh, jax.device_count(), device)
        self.weights = checkpoint.held(self.axes)

    def batches(self, together: int) -> Iterable[tuple[int, Callable[[], object]]]:
        """All batches are alike."""
        some = padded(self._items[-together:], together)
        return [(-(-self.items // together), lambda: self._run(some))]

    def _run(self, items: Sequence[Any]) -> None:
        names = [(item.object_a, item.object_b) for item in items]
        clips = isinstance(items[0], AppearItem)
        shown = [item.open() if clips else item.picture for item in items]
        prompts = ask(self._model, names, shown, TEMPORAL_QUESTION if clips else SPATIAL_QUESTION)
        for words in zip(*names, strict=True) if clips else [[b for _, b in names]]:
            residuals_at(self._model, prompts, prompts.word(list(words), beside=names))


class _Evaluation:
    """The batches of an evaluation of encoders and their scorers on benchmarks."""

    per_item = 1

    def __init__(self, command: EvaluateScorers):
        self._command, self._asked, self._scorers = command, command.asked(), command.scorers()
        self._encoders = [encoders.load_encoder(name, abstract=True) for name in command.model]
        self.items = self.most = len(self._asked)
        self.axes = encoders.axes(command.mesh, jax.device_count())
        self.weights = max(encoders.held(encoder, self.axes) for encoder in self._encoders)

    def batches(self, together: int) -> Iterator[tuple[int, Callable[[], object]]]:
        """For every encoder, of the batches of the same benchmarks that with most captions."""
        kinds: dict[frozenset[str], list[Sequence[Asked]]] = {}
        for start in range(0, self.items, together):
            asked = self._asked[start : start + together]
            kinds.setdefault(frozenset(name for name, _ in asked), []).append(asked)
        for encoder in self._encoders:
            for alike in kinds.values():
                most = max(alike, key=lambda asked: sum(len(question.captions) for _, question in asked))
                yield len(alike), partial(self._run, encoder, most)

    def _run(self, encoder: Encoder, asked: Sequence[Asked]) -> None:
        scorer = self._scorers[encoder.name]
        self._command.compute(encoder, scorer, self._command.opened(encoder, scorer, asked))
