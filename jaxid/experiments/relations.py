"""What the two-object experiments share: items, their prompts, the words of each relation, and how answers are read."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.coco_spatial import ANSWERS, SpatialItem, axis_of
from jaxid.errors import InputError, PromptError
from jaxid.families.base import Model
from jaxid.interp.forward import Output
from jaxid.interp.trace import Trace
from jaxid.prompts.processor import Processor, Prompts
from jaxid.prompts.words import word_spans

Case = Literal["lower", "capital", "both"]
"""Which form of an answer word is read: "lower" (left), "capital" (Left), or "both", their probabilities together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelationBatch:
    """Questions of one kind about two (or more) objects, prepared.

    Attributes:
        prompts: their prompts.
        words: position of the subject's, the object's and any further word, Int[B, W].
        names: those words, by prompt.
        truth: index of the true answer among the two answer words, -1 where it is not known, Int[B].
        axis: along which of the picture's axes it is asked or steered, "horizontal" or "vertical".
        answers: the two answer words.
        case: which form of them is read.
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
            PromptError: if a word has no token of its own in the wanted form.
        """
        found = [output.logprobs(ids) for ids in answer_forms(output.model.processor, self.answers, self.case)]
        return found[0] if len(found) == 1 else jnp.logaddexp(*found)


def answer_forms(processor: Processor, answers: Sequence[str], case: Case) -> list[Int[np.ndarray, "n"]]:
    """Token ids of answer words in every form that is read, but forms in which one has no token of its own.

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
    """Index of the answer word that a generated text holds, -1 unless it is exactly one of them."""
    found = [index for index, spans in enumerate(word_spans(text, words, ignore_case=True)) if spans]
    return found[0] if len(found) == 1 else -1


def prepare(
    model: Model, items: Sequence[SpatialItem], *, suffix: str = "", case: Case = "lower", template: str = "{query}"
) -> RelationBatch:
    """Prepares COCO-Spatial items of one axis.

    Args:
        model: the model.
        items: at least one, all of the same axis.
        suffix: added to every question, e.g. ' Answer "left" or "right" only.'; {first} and {second} stand for the
            answer words, {First} and {Second} for their capitalised forms.
        case: which form of the answer words is read.
        template: the user's text, with a place for the {query} and those of the suffix.

    Raises:
        InputError: if there are none, or of both axes.
        PromptError: if a question does not hold a word.
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
    """A template with its query and answer words, see `prepare`."""
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
    pictures: Sequence[Any],
    questions: Sequence[str],
    names: Sequence[tuple[str, ...]],
    *,
    axis: str,
    answers: Sequence[str],
    truth: Sequence[int],
    case: Case = "lower",
) -> RelationBatch:
    """Prepares questions about named objects; the first place of each name in its question is located.

    A name inside a longer one ("dog" in "hot dog") is not a place of its own.

    Args:
        model: the model.
        pictures: one a question.
        questions: the user's texts.
        names: of every question's objects, the steered one first.
        axis: "horizontal" or "vertical".
        answers: the two answer words.
        truth: index of the true one, -1 where it is not known.
        case: which form of the answer words is read.

    Raises:
        PromptError: if a question does not hold a name.
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
