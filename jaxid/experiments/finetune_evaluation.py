"""Evaluations of fine-tuned models: the questions that grid pictures allow, and how many are answered correctly."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxid.checks import check_finite
from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.data.grid import GridItem
from jaxid.experiments.relations import RelationBatch, prepare
from jaxid.experiments.session import padded
from jaxid.families.base import Model
from jaxid.halving import Batches, Exhausted, Halving
from jaxid.interp.forward import forward
from jaxid.pipeline import overlapped
from jaxid.train.placement import complete

BATCH = 32
"""Questions that go together."""


def spatial_items(items: Sequence[GridItem]) -> list[SpatialItem]:
    """Every question that grid pictures allow: left/right where columns differ, above/below where rows do."""
    return [
        SpatialItem(
            image_id=row,
            picture=item.picture,
            subject=item.object_b,
            object=item.object_a,
            relation=words[int(item.cell_b[along] > item.cell_a[along])],
            row=row,
        )
        for row, item in enumerate(items)
        for along, words in enumerate(ANSWERS.values())
        if item.cell_a[along] != item.cell_b[along]
    ]


def evaluate(
    model: Model, items: Sequence[SpatialItem], *, template: str = "{query}", batch_size: int = BATCH
) -> tuple[int, int]:
    """How many questions are answered correctly: the true word is more probable than the other one.

    The probabilities of both forms of a word are added up.

    Args:
        model: the model.
        items: questions.
        template: the user's text.
        batch_size: questions of one kind that are asked together; fewer where the device's memory does not suffice.

    Returns:
        Number of correct answers, and number of questions.

    Raises:
        OutOfMemoryError: if the memory does not suffice for one question.
    """
    halving = Halving(batch_size, unit="question", advice="use --dtype bfloat16 or a larger device")

    def read(part: list[SpatialItem]) -> tuple[int, RelationBatch]:
        return len(part), prepare(model, padded(part, halving.size), template=template, case="both")

    def begun(opened: tuple[int, RelationBatch]) -> Callable[[], int]:
        count, batch = opened
        answers = batch.read(forward(model, batch.prompts))

        def right() -> int:
            found = np.asarray(complete(answers))[:count]
            check_finite(f"log-probabilities of {model.name}'s answers", found)
            return int((found.argmax(axis=-1) == batch.truth[:count]).sum())

        return right

    steps, total = Batches(halving, read, begun, sum), 0
    axes = [[item for item in items if item.relation in words] for words in ANSWERS.values()]
    parts = [axis[start : start + batch_size] for axis in axes for start in range(0, len(axis), batch_size)]
    with overlapped(parts, steps.read, steps.compute, lambda _, fetch: fetch()) as results:
        for part, result in results:
            try:
                total += result.result()
            except Exhausted as shortage:
                total += steps.again(part, shortage)
    return total, len(items)
