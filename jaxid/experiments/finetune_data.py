"""What fine-tuning reads: questions about pictures of the grid, and the arrays of small batches of them.

In a picture {A}_{ax}-{ay}_{B}_{bx}-{by}.png, A is the subject of the question, and B, named second, is the object whose
activations the ID loss compares with the ID of its cell ([ID] arXiv 2601.12626, section on fine-tuning, and its code).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int, PyTree

from jaxid.data.coco_spatial import ANSWERS, SpatialItem, axis_of
from jaxid.data.grid import GridItem
from jaxid.errors import DataError
from jaxid.experiments import published
from jaxid.nn.inputs import Inputs
from jaxid.prompts.processor import Prompts

_BARE = {
    "horizontal": "Is {subject} to the left or right of {object}?",
    "vertical": "Is {subject} above or below {object}?",
}
_PUBLISHED = '{query} Answer with "{first}" or "{second}" only.'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Whether A is left or right of B, or above or below it.

    Attributes:
        item: the picture.
        axis: "horizontal" or "vertical".
        row: index of the picture.
    """

    item: GridItem
    axis: str
    row: int

    @property
    def spatial(self) -> SpatialItem:
        """The same question, as other experiments ask it."""
        along, item = list(ANSWERS).index(self.axis), self.item
        return SpatialItem(
            image_id=self.row,
            picture=item.picture,
            subject=item.object_a,
            object=item.object_b,
            relation=ANSWERS[self.axis][int(item.cell_a[along] > item.cell_b[along])],
            row=self.row,
        )


Group = tuple[Question, ...]
"""Questions that small batches are taken from."""


def questions_of(items: Sequence[GridItem]) -> list[Question]:
    """Every question that grid pictures allow: left/right where columns differ, above/below where rows do."""
    return [
        Question(item=item, axis=axis, row=row)
        for row, item in enumerate(items)
        for along, axis in enumerate(ANSWERS)
        if item.cell_a[along] != item.cell_b[along]
    ]


def groups_by(questions: Sequence[Question], key: Callable[[Question], tuple[object, ...]]) -> list[Group]:
    """Questions with the same key, in the order of their first ones."""
    found: dict[tuple[object, ...], list[Question]] = {}
    for question in questions:
        found.setdefault(key(question), []).append(question)
    return [tuple(group) for group in found.values()]


def placed(question: Question) -> tuple[object, ...]:
    """The pair of objects and the first one's cell: what the pictures of an ID share."""
    return question.item.object_a, question.item.cell_a, question.item.object_b


def text_of(question: SpatialItem, prompt: str) -> str:
    """The user's text.

    Args:
        question: the question.
        prompt: published, which names objects without "the"; plain; or the user's own text with {query}.
    """
    axis = axis_of(question)
    query = _BARE[axis].format(subject=question.subject, object=question.object)
    query = query if prompt == "published" else question.query
    return published.fill(published.resolved(prompt, "", _PUBLISHED), query, ANSWERS[axis])


def pair_of(item: GridItem) -> tuple[str, ...]:
    """The pair of objects in a picture."""
    return item.object_a, item.object_b


def split_pairs(items: Sequence[GridItem], share: float, seed: int) -> tuple[list[GridItem], list[GridItem]]:
    """Training items, and items of held-out pairs of objects; a pair is held out in both orders.

    Raises:
        DataError: if there are too few pairs to hold out a share of them.
    """

    def unordered(item: GridItem) -> tuple[str, ...]:
        return tuple(sorted(pair_of(item)))

    pairs = len({unordered(item) for item in items})
    return split_by(items, unordered, max(round(share * pairs), 1) if share else 0, seed)


def split_by(
    items: Sequence[GridItem], pair: Callable[[GridItem], tuple[str, ...]], count: int, seed: int
) -> tuple[list[GridItem], list[GridItem]]:
    """Training items, and those of a number of pairs that are drawn.

    Raises:
        DataError: if no pair is left to train on.
    """
    pairs = sorted({pair(item) for item in items})
    if len(pairs) <= count:
        raise DataError(f"the pictures hold {len(pairs)} pairs of objects, too few to hold out {count} of them.")
    rows = np.random.default_rng((seed, 15)).permutation(len(pairs))[:count]
    held = {pairs[row] for row in rows}
    sides: tuple[list[GridItem], list[GridItem]] = ([], [])
    for item in items:
        sides[pair(item) in held].append(item)
    return sides


def with_answers(
    prompts: Prompts, answers: Sequence[Sequence[int]], longest: int = 0
) -> tuple[Prompts, Int[np.ndarray, "B n"], Int[np.ndarray, "B n"]]:
    """Prompts continued by all but the last token of their answers; where each token is read, and its id or -1.

    Args:
        prompts: the prompts.
        answers: the tokens of each answer.
        longest: the least number n of tokens per row.
    """
    longest = max(longest, *map(len, answers))
    lengths = np.array([len(answer) for answer in answers])
    labels = np.array([[*answer, *[-1] * (longest - len(answer))] for answer in answers], np.int32)
    positions = prompts.last()[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
    if longest > 1:
        prompts = prompts.extended(np.maximum(labels[:, :-1], 0), lengths - 1)
    return prompts, positions.astype(np.int32), labels


def arrays_of(inputs: Inputs) -> dict[str, PyTree]:
    """The arrays of `Inputs` by name."""
    fields = dataclasses.fields(inputs)
    return {field.name: getattr(inputs, field.name) for field in fields if not field.metadata.get("static")}


def lengthened(inputs: Mapping[str, PyTree], tokens: int) -> dict[str, PyTree]:
    """The arrays of `Inputs`, padded to a number of tokens."""
    count, length = inputs["token_ids"].shape

    def longer(values: np.ndarray, padding: int) -> np.ndarray:
        widths = [(0, 0)] * (values.ndim - 1) + [(0, tokens - length)]
        return np.pad(np.asarray(values), widths, constant_values=padding)

    rope = inputs["rope_positions"]
    return {
        **inputs,
        "token_ids": longer(inputs["token_ids"], 0),
        "positions": np.tile(np.arange(tokens, dtype=np.int32), (count, 1)),
        "valid": longer(inputs["valid"], 0),
        "image_rows": longer(inputs["image_rows"], -1),
        "rope_positions": None if rope is None else longer(rope, 0),
    }
