"""Questions about two or more objects: their prompts, the positions of their words, and how answers are read."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.coco_spatial import ANSWERS, SpatialItem, axis_of
from jaxid.errors import InputError, PromptError
from jaxid.experiments.published import fill, is_raw
from jaxid.families.base import Model
from jaxid.interp.forward import Output
from jaxid.interp.trace import Trace
from jaxid.prompts.pictures import Clip, Picture
from jaxid.prompts.processor import Processor, Prompts
from jaxid.prompts.words import word_spans

Case = Literal["lower", "capital", "both", "published"]
"""The form of an answer word that is read: "lower" (left), "capital" (Left), "both" (their probabilities are added), or
"published" (the form that the published code reads for the model's family; of two, the more probable one)."""

_FORMS = {"lower": (str.lower,), "capital": (str.capitalize,), "both": (str.lower, str.capitalize)}


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
        answer_ids: tokens that are read instead of the answer words.
    """

    prompts: Prompts
    words: Int[np.ndarray, "B W"]
    names: Sequence[tuple[str, ...]]
    truth: Int[np.ndarray, "B"]
    axis: str
    answers: list[str]
    case: Case = "lower"
    answer_ids: tuple[int, int] | None = None

    def forms(self, processor: Processor) -> list[Int[np.ndarray, "n"]]:
        """Token ids of the answers in every form that is read; see `answer_forms`."""
        if self.answer_ids is not None:
            return [np.array(self.answer_ids, np.int32)]
        after = self.prompts.questions[0] if self.prompts.raw else None
        return answer_forms(processor, self.answers, self.case, after)

    def read(self, output: Output | Trace) -> Float[Array, "*S B n"]:
        """Log-probabilities of the two answers as the next token.

        Raises:
            PromptError: if a word in the wanted form is not a single token.
        """
        found = jnp.stack([output.logprobs(ids) for ids in self.forms(output.model.processor)])
        return found.max(axis=0) if self.case == "published" else jax.nn.logsumexp(found, axis=0)


def answer_forms(
    processor: Processor, answers: Sequence[str], case: Case, after: str | None = None
) -> list[Int[np.ndarray, "n"]]:
    """Token ids of answer words in every form that is read. Forms with a word of several tokens are skipped.

    Args:
        processor: the model's processor.
        answers: the answer words.
        case: the forms; the published ones are always those after the generation prompt, in lower case if the
            vocabulary lacks the family's own.
        after: the end of a raw prompt. If a space ends it, an answer's token may hold that space or follow it, and both
            forms are read.

    Raises:
        PromptError: if no form is left.
    """
    if case == "published":
        try:
            return answer_forms(processor, answers, processor.case)
        except PromptError:
            return answer_forms(processor, answers, "lower")
    found, errors = [], []
    for form in _FORMS[case]:
        for spaced in (True, False) if after and after.endswith(" ") else (True,):
            try:
                ids = processor.answer_ids([form(word) for word in answers], after=after, spaced=spaced)
            except PromptError as error:
                errors.append(error)
                continue
            if not any((ids == known).any() for known in found):
                found.append(ids)
    if not found:
        raise errors[0]
    return found


def answer_of(text: str, words: Sequence[str]) -> int:
    """Index of the answer word in a generated text; -1 if the text contains none or both."""
    found = [index for index, spans in enumerate(word_spans(text, words, ignore_case=True)) if spans]
    return found[0] if len(found) == 1 else -1


def verdicts(answers: Int[np.ndarray, "..."], truth: Int[np.ndarray, "..."]) -> np.ndarray:
    """Whether answers, as indices from `answer_of`, are "correct" or "wrong"; "nonsense" is no answer."""
    return np.where(answers < 0, "nonsense", np.where(answers == truth, "correct", "wrong"))


def prepare(
    model: Model, items: Sequence[SpatialItem], *, prompt: str = "{query}", case: Case = "lower"
) -> RelationBatch:
    """Prepares COCO-Spatial items of one axis.

    Args:
        model: the model.
        items: at least one, all of the same axis.
        prompt: the user's text, such as '{query} Answer "{first}" or "{second}" only.'; see `fill`.
        case: the form of the answer words that is read.

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
        [fill(prompt, item.query, answers) for item in items],
        [(item.subject, item.object) for item in items],
        axis=axis,
        answers=answers,
        truth=[answers.index(item.relation) for item in items],
        case=case,
        raw=is_raw(prompt),
    )


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
    raw: bool = False,
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
        raw: whether prompts are pictures and questions alone, without the chat template.

    Raises:
        PromptError: if a question does not contain a name.
        InputError: if two objects of a question have the same name.
    """
    prompts = model.prepare(list(pictures), list(questions), raw=raw)
    return RelationBatch(
        prompts=prompts,
        words=prompts.words(names),
        names=tuple(names),
        truth=np.asarray(truth, np.int64),
        axis=axis,
        answers=list(answers),
        case=case,
    )
