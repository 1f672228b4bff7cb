"""Depth diagnosis: are height and depth the same to the model? ([ID] arXiv 2601.12626, Figure 7)."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxid.data.coco_spatial import SpatialItem
from jaxid.errors import InputError
from jaxid.experiments import steering
from jaxid.experiments.relations import ANSWERS, Case, Compat, RelationBatch, axis_of, fill, prepare_questions
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs

QUESTIONS = {
    "height": ("Is the {subject} above or below the {object}?", ANSWERS["vertical"]),
    "depth": ("Is the {subject} in front or behind the {object}?", ("front", "behind")),
}
"""What is asked about the same pictures: question and answer words. Only the true height is known."""


class Depth(NamedTuple):
    """Steering along the vertical axis under both questions, by layer and cell, see `steering.Steering`."""

    height: steering.Steering
    depth: steering.Steering


def prepare(
    model: Model, items: Sequence[SpatialItem], *, template: str = "{query}", case: Case = "lower"
) -> dict[str, RelationBatch]:
    """The same pictures and objects under both questions.

    Args:
        model: the model.
        items: above/below items.
        template: of the user's text, see `relations.prepare`.
        case: which form of the answer words is read.

    Raises:
        InputError: for a left/right item.
        PromptError: if a question does not hold a word.
    """
    if any(axis_of(item) != "vertical" for item in items):
        raise InputError("the depth diagnosis needs above/below items: height is what depth may be mistaken for.")
    batches = {}
    for name, (question, answers) in QUESTIONS.items():
        asked = [question.format(subject=item.subject, object=item.object) for item in items]
        batches[name] = prepare_questions(
            model,
            [item.picture for item in items],
            [fill(template, text, answers) for text in asked],
            [(item.subject, item.object) for item in items],
            axis="vertical",
            answers=answers,
            truth=[answers.index(item.relation) if name == "height" else -1 for item in items],
            case=case,
        )
    return batches


def run(
    model: Model,
    batches: dict[str, RelationBatch],
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    multiplier: float = 5.0,
    compat: Compat = "none",
    chunk: int | None = None,
) -> Depth:
    """Steers every subject to each cell along the vertical axis, U(x, y) - U(x, 3 - y), under both questions.

    A model that keeps height and depth apart changes its answer to the first question only.

    Args:
        model: the model.
        batches: made by `prepare`.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vector is added.
        multiplier: of the vectors, which are not rescaled.
        compat: "reference" reproduces the slips of `steering.run`.
        chunk: edits that run side by side.

    Raises:
        InputError: if IDs and model differ, or a layer is out of range.
    """
    found = {
        name: steering.run(model, batch, ids, layers=layers, multiplier=multiplier, compat=compat, chunk=chunk)
        for name, batch in batches.items()
    }
    return Depth(**found)
