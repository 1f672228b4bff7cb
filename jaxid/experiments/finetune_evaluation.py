"""Evaluations of fine-tuned models: the questions that grid pictures allow, and how many are answered correctly."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from jaxid.checks import check_finite
from jaxid.data.coco_spatial import ANSWERS, SpatialItem, axis_of
from jaxid.data.grid import GridItem
from jaxid.experiments.finetune_data import questions_of, text_of
from jaxid.experiments.relations import RelationBatch, prepare_questions
from jaxid.experiments.session import padded
from jaxid.families.base import Model
from jaxid.halving import Batches, Exhausted, Halving
from jaxid.interp.forward import forward
from jaxid.pipeline import overlapped
from jaxid.train.placement import complete

BATCH = 32
"""Questions that go together."""

Item = TypeVar("Item")
Ready = TypeVar("Ready")
Made = TypeVar("Made")


Answered = Callable[[Model, RelationBatch], Callable[[], Int[np.ndarray, "B"]]]
"""Asks questions, and returns what fetches the index of each one's answer; -1 for none."""


def spatial_items(items: Sequence[GridItem]) -> list[SpatialItem]:
    """Every question that grid pictures allow: left/right where columns differ, above/below where rows do."""
    return [question.spatial for question in questions_of(items)]


def by_probability(model: Model, batch: RelationBatch) -> Callable[[], Int[np.ndarray, "B"]]:
    """The answer is the more probable one of the two words; the probabilities of both forms of a word are added."""
    answers = batch.read(forward(model, batch.prompts))

    def fetched() -> Int[np.ndarray, "B"]:
        found = np.asarray(complete(answers))
        check_finite(f"log-probabilities of {model.name}'s answers", found)
        return found.argmax(axis=-1)

    return fetched


def in_batches(
    parts: Sequence[list[Item]],
    read: Callable[[list[Item], int], Ready],
    begun: Callable[[Ready], Callable[[], Made]],
    join: Callable[[list[Made]], Made],
    size: int = BATCH,
) -> Iterator[Made]:
    """The results of batches of questions; while one is computed, the next ones are read.

    Args:
        parts: the batches.
        read: opens a batch, which is padded to a number of questions.
        begun: begins the computation of what was read, and returns what fetches the results.
        join: makes one result of those of several batches.
        size: the number of questions that go together; fewer where the device's memory does not suffice.

    Raises:
        OutOfMemoryError: if the memory does not suffice for one question.
    """
    halving = Halving(size, unit="question", advice="use --dtype bfloat16 or a larger device")

    def opened(part: list[Item]) -> Ready:
        return read(part, halving.size)

    steps = Batches(halving, opened, begun, join)
    with overlapped(parts, steps.read, steps.compute, lambda _, fetch: fetch()) as results:
        for part, result in results:
            try:
                yield result.result()
            except Exhausted as shortage:
                yield steps.again(part, shortage)


def evaluate(
    model: Model,
    items: Sequence[SpatialItem],
    *,
    prompt: str = "plain",
    batch_size: int = BATCH,
    answered: Answered = by_probability,
) -> tuple[int, int]:
    """How many questions are answered correctly.

    Args:
        model: the model.
        items: questions.
        prompt: published, plain, or the user's text.
        batch_size: questions of one kind that are asked together; fewer where the device's memory does not suffice.
        answered: how answers are read.

    Returns:
        Number of correct answers, and number of questions.

    Raises:
        OutOfMemoryError: if the memory does not suffice for one question.
    """

    def read(part: list[SpatialItem], size: int) -> tuple[int, RelationBatch]:
        items = padded(part, size)
        axis = axis_of(items[0])
        batch = prepare_questions(
            model,
            [item.picture for item in items],
            [text_of(item, prompt) for item in items],
            [(item.subject, item.object) for item in items],
            axis=axis,
            answers=ANSWERS[axis],
            truth=[ANSWERS[axis].index(item.relation) for item in items],
            case="both",
        )
        return len(part), batch

    def begun(opened: tuple[int, RelationBatch]) -> Callable[[], int]:
        count, batch = opened
        found = answered(model, batch)
        return lambda: int((found()[:count] == batch.truth[:count]).sum())

    axes = [[item for item in items if item.relation in words] for words in ANSWERS.values()]
    parts = [axis[start : start + batch_size] for axis in axes for start in range(0, len(axis), batch_size)]
    return sum(in_batches(parts, read, begun, sum, batch_size)), len(items)
