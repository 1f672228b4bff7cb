"""The published prompts, and prompts that a user names or writes ([ID] arXiv 2601.12626, its code)."""

from collections.abc import Sequence

from jaxid import zoo
from jaxid.errors import InputError

PICTURE = "<image>"
"""Begins a prompt that is sent without the chat template, where it stands for the picture."""

QUOTED = '{query} Answer "{first}" or "{second}" only.'
"""The belief swap's prompts ([ID] arXiv 2601.12626, belief steering)."""

RAW = PICTURE + "\nQUESTION: {query}Answer {first} or {second}. ANSWER: "
"""The prompts of the activation swaps, without the chat template."""

RAW_CAPITALS = RAW.replace("first", "First").replace("second", "Second")
"""The steering prompts, likewise ([ID] arXiv 2601.12626, arbitrary steering)."""

PLAIN = "{query}"
"""The query alone."""

PROMPTS = ("published", "plain")
"""Names of prompts; every other one is the user's text."""


def check_prompt(prompt: str | None) -> None:
    """Refuses a prompt that is neither a name nor a text with a query.

    Raises:
        InputError: also for one that shows the picture after its beginning.
    """
    if prompt is None or prompt in PROMPTS:
        return
    if "{query}" not in prompt:
        raise InputError(f"the prompt {prompt!r} is not {' or '.join(PROMPTS)}, and does not contain {{query}}.")
    if PICTURE in prompt.removeprefix(PICTURE):
        raise InputError(f"the prompt {prompt!r} must have {PICTURE} at its beginning, once, or not at all.")


def resolved(prompt: str | None, model: str, published: str) -> str:
    """The user's text of a prompt that may be a name.

    Args:
        prompt: "published", "plain", the text itself, or None for the model's default.
        model: its name.
        published: the published text.
    """
    if prompt is None:  # shipped models were trained on plain questions only
        prompt = "plain" if model in zoo.SHIPPED else "published"
    return {"published": published, "plain": PLAIN}.get(prompt, prompt)


def is_raw(prompt: str) -> bool:
    """Whether a prompt is sent without the chat template."""
    return prompt.startswith(PICTURE)


def fill(prompt: str, query: str, answers: Sequence[str]) -> str:
    """The question of a prompt: without the mark of the picture, with the query and the answer words filled in.

    Args:
        prompt: a text in which {query} stands for the query, {first} and {second} for the answer words, {First} and
            {Second} for their capitalised forms.
        query: the query.
        answers: the two answer words.
    """
    (first, second), text = answers, prompt.removeprefix(PICTURE)
    for mark, value in (
        ("{query}", query),
        ("{first}", first),
        ("{second}", second),
        ("{First}", first.capitalize()),
        ("{Second}", second.capitalize()),
    ):
        text = text.replace(mark, value)
    return text
