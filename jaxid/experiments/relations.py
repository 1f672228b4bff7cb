"""Questions about two or more objects: their prompts, the positions of their words, and how answers are read."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.coco_spatial import ANSWERS, SpatialItem, axis_of
from jaxid.errors import InputError, PromptError
from jaxid.families.base import Model
from jaxid.interp.forward import Output
from jaxid.interp.trace import Trace
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Processor, Prompts
from jaxid.prompts.words import word_spans

Case = Literal["lower", "capital", "both"]
"""The form of an answer word that is read: "lower" (left), "capital" (Left), or "both" (the sum of the two)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationBatch:
    """Prepared questions of one kind about two or more objects.

    Attributes:
        prompts: the prompts.
        words: positions of the words for the subject, the object and any further objects.
        names: those words, by prompt.
        truth: index of the true answer word, -1 if unknown.
        axis: the axis of the picture that is asked about or steered along, "horizontal" or "vertical".
        answers: the two answer words.
        case: the form of them that is read.
    """

    prompts: Prompts
    words: Int[np.ndarray, "B W"]
    names: Sequence[tuple[str, ...]]
    truth: Int[np.ndarray, "B"]
    axis: str
    answers: list[str]
    case: Case = "lower"

    def read(self, output: Output | Trace) -> Float[Array, "*S B n"]:
        """Log-probabilities of the two answers as the next token.

        Raises:
            PromptError: if a word in the wanted form is not a single token.
        """
        found = [output.logprobs(ids) for ids in answer_forms(output.model.processor, self.answers, self.case)]
        return found[0] if len(found) == 1 else jnp.logaddexp(*found)


def answer_forms(processor: Processor, answers: Sequence[str], case: Case) -> list[Int[np.ndarray, "n"]]:
    """Token ids of answer words in every form that is read. Forms with a word of several tokens are skipped.

    Raises:
        PromptError: if no form is left.
    """
    forms = {"lower": (str.lower,), "capital": (str.capitalize,), "both": (str.lower, str.capitalize)}
    found, errors = [], []
    for form in forms[case]:
        try:
            found.append(processor.answer_ids([form(word) for word in answers]))
        except PromptError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def answer_of(text: str, words: Sequence[str]) -> int:
    """Index of the answer word in a generated text; -1 if the text contains none or both."""
    found = [index for index, spans in enumerate(word_spans(text, words, ignore_case=True)) if spans]
    return found[0] if len(found) == 1 else -1


def prepare(
    model: Model, items: Sequence[SpatialItem], *, suffix: str = "", case: Case = "lower", template: str = "{query}"
) -> RelationBatch:
    """Prepares COCO-Spatial items of one axis.

    Args:
        model: the model.
        items: at least one, all of the same axis.
        suffix: added to every question, such as ' Answer "left" or "right" only.'. {first} and {second} are replaced by
            the answer words, {First} and {Second} by their capitalised forms.
        case: the form of the answer words that is read.
        template: the user's text, with the placeholder {query} and those of the suffix.

    Raises:
        InputError: if there are no items, or items of both axes.
        PromptError: if a question does not contain a word.
    """
    axes = {axis_of(item) for item in items}
    if len(axes) != 1:
        raise InputError(f"a batch needs items of exactly one axis, got {sorted(axes) or 'none'}.")
    axis = axes.pop()
    answers = ANSWERS[axis]
    return prepare_questions(
        model,
        [item.picture for item in items],
        [fill(template, item.query, answers) + fill(suffix, item.query, answers) for item in items],
        [(item.subject, item.object) for item in items],
        axis=axis,
        answers=answers,
        truth=[answers.index(item.relation) for item in items],
        case=case,
    )


def fill(template: str, query: str, answers: Sequence[str]) -> str:
    """Fills in the query and the answer words; see `prepare`."""
    first, second = answers
    for mark, text in (
        ("{query}", query),
        ("{first}", first),
        ("{second}", second),
        ("{First}", first.capitalize()),
        ("{Second}", second.capitalize()),
    ):
        template = template.replace(mark, text)
    return template


def prepare_questions(
    model: Model,
    pictures: Sequence[Picture] | Sequence[Clip],
    questions: Sequence[str],
    names: Sequence[tuple[str, ...]],
    *,
    axis: str,
    answers: Sequence[str],
    truth: Sequence[int],
    case: Case = "lower",
) -> RelationBatch:
    """Prepares questions about named objects, and finds where each name first occurs in its question.

    A name inside a longer one ("dog" in "hot dog") is not an occurrence.

    Args:
        model: the model.
        pictures: a picture or clip for each question.
        questions: the user's texts.
        names: names of every question's objects, the steered one first.
        axis: "horizontal" or "vertical".
        answers: the two answer words.
        truth: index of the true answer, -1 if unknown.
        case: the form of the answer words that is read.

    Raises:
        PromptError: if a question does not contain a name.
        InputError: if two objects of a question have the same name.
    """
    prompts = model.prepare(list(pictures), list(questions))
    return RelationBatch(
        prompts=prompts,
        words=prompts.words(names),
        names=tuple(names),
        truth=np.asarray(truth, np.int64),
        axis=axis,
        answers=list(answers),
        case=case,
    )
