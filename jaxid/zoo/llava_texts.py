"""What tiny-llava reads and says: its words, and texts about a scene with their answers.

The mechanism under study arises from *grounded captions*: prompts that end with an object's word and are continued
with that object's column or with its row, never with both ("column of the star" -> "B"). Questions alone can be
answered without binding a place to the word. The same captions end with words for places ("column of what is left"),
and texts without a picture say where things are, so that these words have places, too.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from jaxid.data.relations import is_between, is_in_front, is_near
from jaxid.data.scenes import COLORS, OBJECTS

COLUMN_WORDS = ("A", "B", "C", "D")
"""Names of the four columns, left to right."""
ROW_WORDS = ("1", "2", "3", "4")
"""Names of the four rows, top to bottom."""
AXIS_WORDS = (COLUMN_WORDS, ROW_WORDS)

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
_WORDS = """USER ASSISTANT QUESTION ANSWER : ? . , " ' - Is Are the The a an there of to in or and on at is Where What
color column row picture image object Answer only yes no Yes No left right above below Left Right Above Below near far
Near Far front behind Front Behind between before after Before After not without with one two three four It
from what true false""".split()
VOCABULARY = tuple(
    dict.fromkeys(
        [*_SPECIAL, *_WORDS, *COLUMN_WORDS, *ROW_WORDS, *OBJECTS, *COLORS]
        + [column + row for row in ROW_WORDS for column in COLUMN_WORDS]
    )
)
"""All tokens of the word-level tokenizer, in the order of their ids."""
VOCABULARY_SIZE = -(-len(VOCABULARY) // 16) * 16
"""Rows of the embedding: the number of words, padded."""


@lru_cache
def _ids() -> dict[str, int]:
    return {word: index for index, word in enumerate(VOCABULARY)}


def encode(text: str) -> list[int]:
    """Token ids of a text whose tokens are separated by spaces."""
    ids = _ids()
    return [ids[word] for word in text.split()]


# --- answers -------------------------------------------------------------------------------------------------------

BINS = 16
"""Places along each axis that targets tell apart: four to a cell."""

REGIONS = ("left", "right", "above", "below")
"""Words for halves of the picture."""

_AXIS, _CELL = VOCABULARY_SIZE, VOCABULARY_SIZE + 2 * BINS
_REGION = _CELL + BINS**2


def word_label(word: str) -> int:
    """The label of an answer that is exactly one word."""
    return encode(word)[0]


def word_places(ids: Sequence[int]) -> dict[int, int]:
    """The words for places in a text: their indices, and the labels of the columns or rows that they mean."""
    words = {word_label(word): region_label(word) for word in REGIONS}
    return {index: words[token] for index, token in enumerate(ids) if token in words}


def axis_label(axis: int, place: float) -> int:
    """The label of the column (axis 0) or row (axis 1) of a place between 0 and 1."""
    return _AXIS + axis * BINS + _bin(place)


def cell_label(center: Float[np.ndarray, "2"]) -> int:
    """The label of the cell of a place."""
    column, row = (_bin(float(place)) for place in center)
    return _CELL + row * BINS + column


def region_label(word: str) -> int:
    """The label of the columns or rows that lie `left`, `right`, `above` or `below`."""
    return _REGION + REGIONS.index(word)


def spoken(label: int) -> int:
    """The id of the word that a question with this label is answered with: of a place, the name of its cell."""
    if label < VOCABULARY_SIZE:
        return label
    row, column = divmod(label - _CELL, BINS)
    return word_label(COLUMN_WORDS[column * 4 // BINS] + ROW_WORDS[row * 4 // BINS])


def _bin(place: float) -> int:
    return int(np.clip(place * BINS, 0, BINS - 1))


def near_cells(blur: float) -> Float[np.ndarray, "P 4"]:
    """Target distribution over the four columns or rows, for each of the `BINS` places along an axis.

    The logarithm of a target is linear in the place but for a constant. With exact targets every column would be a
    separate class, as far from its neighbours as from all other columns.
    """
    places = (np.arange(BINS)[:, None] + 0.5) / BINS * 4
    weights = np.exp(-0.5 * ((places - np.arange(4) - 0.5) / blur) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


CELL_BLUR = 0.4
"""Standard deviation of the targets over the names of cells, in cells; the answer to "Where is the star?" is a name."""


def targets(blur: float) -> Float[np.ndarray, "M V"]:
    """Target distribution over the vocabulary for every label: exact for words, blurred for places."""
    near, sharp = near_cells(blur), near_cells(CELL_BLUR)
    halves = np.stack([near[: BINS // 2].mean(axis=0), near[BINS // 2 :].mean(axis=0)])
    table = np.zeros((_REGION + len(REGIONS), VOCABULARY_SIZE), np.float32)
    table[:VOCABULARY_SIZE] = np.eye(VOCABULARY_SIZE)
    for axis, words in enumerate(AXIS_WORDS):
        ids = np.array(encode(" ".join(words)))
        table[_AXIS + axis * BINS + np.arange(BINS)[:, None], ids] = near
        table[_REGION + 2 * axis + np.arange(2)[:, None], ids] = halves
    cells = np.array(encode(" ".join(column + row for row in ROW_WORDS for column in COLUMN_WORDS)))
    both = sharp[:, None, :, None] * sharp[None, :, None, :]  # row bin, column bin, row, column
    table[_CELL : _CELL + BINS**2, cells] = both.reshape(BINS**2, 16)
    return table


# --- texts about a scene ---------------------------------------------------------------------------------------------

MIN_GAP = 0.09
"""Smallest distance along the axis of a relation question, as a fraction of the picture's side."""
RELATION_TEXT = ("Is the {} to the left or right of the {} ?", "Is the {} above or below the {} ?")
RELATION_WORDS = (("left", "right"), ("above", "below"))

Text = tuple[str, int]
"""A text, its tokens separated by spaces, and the label of its continuation."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """The objects of one scene, as texts speak of them."""

    names: list[str]
    colors: list[str]
    centers: Float[np.ndarray, "K 2"]
    depths: Float[np.ndarray, "K"]  # distance from the viewer; 0 if the scene has no depth


def _pair(rng: np.random.Generator, seen: Seen) -> tuple[int, int, int] | None:
    """A random (axis, first, second) with an unambiguous relation, or None."""
    gaps = np.abs(seen.centers[:, None] - seen.centers[None]).transpose(2, 0, 1) >= MIN_GAP
    choices = np.argwhere(gaps)
    if len(choices) == 0:
        return None
    axis, first, second = choices[rng.integers(len(choices))]
    return int(axis), int(first), int(second)


def _word(seen: Seen, axis: int, first: int, second: int) -> str:
    return RELATION_WORDS[axis][int(seen.centers[first, axis] > seen.centers[second, axis])]


def relation(rng: np.random.Generator, seen: Seen) -> Text | None:
    """Left or right, or above or below."""
    if (chosen := _pair(rng, seen)) is None:
        return None
    axis, first, second = chosen
    text = RELATION_TEXT[axis].format(seen.names[first], seen.names[second])
    return text, word_label(_word(seen, *chosen))


def long_relation(rng: np.random.Generator, seen: Seen) -> Text | None:
    """The same, mostly with the published instruction."""
    if (found := relation(rng, seen)) is None or rng.random() < 0.3:
        return found
    words = RELATION_WORDS["above" in found[0]]
    return f'{found[0]} Answer " {words[0]} " or " {words[1]} " only .', found[1]


def statement(rng: np.random.Generator, seen: Seen) -> Text | None:
    """A statement about a relation, true or false."""
    if (chosen := _pair(rng, seen)) is None:
        return None
    axis, first, second = chosen
    said = RELATION_WORDS[axis][int(rng.integers(2))]
    phrase = said if axis else ("{} of", "to the {} of")[int(rng.integers(2))].format(said)
    truth = "true" if said == _word(seen, *chosen) else "false"
    return f"The {seen.names[first]} is {phrase} the {seen.names[second]} .", word_label(truth)


def near_far(rng: np.random.Generator, seen: Seen) -> Text | None:
    """Near to or far from another object."""
    pairs = itertools.permutations(range(len(seen.names)), 2)
    truths = {pair: is_near(seen.centers[list(pair)]) for pair in pairs}
    return _balanced(rng, "Is the {} near or far from the {} ?", seen, truths, ("near", "far"))


def depth(rng: np.random.Generator, seen: Seen) -> Text | None:
    """In front of or behind another object."""
    pairs = itertools.permutations(range(len(seen.names)), 2)
    truths = {pair: is_in_front(seen.depths[list(pair)]) for pair in pairs}
    return _balanced(rng, "Is the {} in front or behind the {} ?", seen, truths, ("front", "behind"))


def between(rng: np.random.Generator, seen: Seen) -> Text | None:
    """In between two other objects, or not; only asked about scenes in which an object is."""
    triples = itertools.permutations(range(len(seen.names)), 3)
    truths = {(c, a, b): is_between(seen.centers[[a, b, c]]) for a, b, c in triples}
    if True not in truths.values():
        return None
    return _balanced(rng, "Is the {} in between {} and {} ?", seen, truths, ("yes", "no"))


def _balanced(
    rng: np.random.Generator,
    text: str,
    seen: Seen,
    truths: Mapping[tuple[int, ...], bool | None],
    answers: tuple[str, str],
) -> Text | None:
    """A question with either answer, equally often where both are possible, about random objects with that answer."""
    options = [[chosen for chosen, truth in truths.items() if truth is wanted] for wanted in (True, False)]
    possible = [index for index in range(2) if options[index]]
    if not possible:
        return None
    index = possible[int(rng.integers(len(possible)))]
    chosen = options[index][int(rng.integers(len(options[index])))]
    return text.format(*(seen.names[slot] for slot in chosen)), word_label(answers[index])


def where(rng: np.random.Generator, seen: Seen) -> Text:
    """The cell of an object."""
    chosen = int(rng.integers(len(seen.names)))
    return f"Where is the {seen.names[chosen]} ?", cell_label(seen.centers[chosen])


def exists(rng: np.random.Generator, seen: Seen) -> Text:
    """Whether there is such an object."""
    if rng.random() < 0.5:
        absent = [name for name in OBJECTS if name not in seen.names]
        return f"Is there a {absent[rng.integers(len(absent))]} ?", word_label("no")
    return f"Is there a {seen.names[rng.integers(len(seen.names))]} ?", word_label("yes")


def color(rng: np.random.Generator, seen: Seen) -> Text:
    """The colour of an object."""
    chosen = int(rng.integers(len(seen.names)))
    return f"What color is the {seen.names[chosen]} ?", word_label(seen.colors[chosen])


KINDS: dict[str, Callable[[np.random.Generator, Seen], Text | None]] = {
    "relation": relation,
    "statement": statement,
    "near_far": near_far,
    "depth": depth,
    "between": between,
    "where": where,
    "exists": exists,
    "color": color,
}
"""The kinds of short questions; one returns None if a scene does not allow it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mix:
    """Weight of each kind of short question, among those that a scene allows."""

    relation: float = 0.15
    statement: float = 0.15
    near_far: float = 0.1
    depth: float = 0.5
    between: float = 0.5
    where: float = 0.1
    exists: float = 0.3
    color: float = 0.08


def question(rng: np.random.Generator, seen: Seen, mix: Mix) -> Text:
    """A short question of a random kind."""
    weights: dict[str, float] = dataclasses.asdict(mix)
    while True:
        names = list(weights)
        shares = np.array([weights[name] for name in names])
        name = names[rng.choice(len(names), p=shares / shares.sum())]
        if (found := KINDS[name](rng, seen)) is not None:
            return found
        del weights[name]


def caption(rng: np.random.Generator, seen: Seen, axis: int) -> Text:
    """A grounded caption: the column (axis 0) or row (axis 1) of an object, of a word for a place, or what is there."""
    kind = rng.random()
    if kind < 0.06:
        return region(rng, axis)
    if kind < 0.12 and (found := outermost(rng, seen, axis)) is not None:
        return found
    chosen = rng.integers(len(seen.names))
    return f"{('column', 'row')[axis]} of the {seen.names[chosen]}", axis_label(axis, float(seen.centers[chosen, axis]))


def color_caption(rng: np.random.Generator, seen: Seen) -> Text:
    """A caption continued with an object's colour, which is found the same way as its place."""
    chosen = int(rng.integers(len(seen.names)))
    return f"color of the {seen.names[chosen]}", word_label(seen.colors[chosen])


def region(rng: np.random.Generator, axis: int) -> Text:
    """The columns that are left or right, or the rows that are above or below."""
    word = RELATION_WORDS[axis][int(rng.integers(2))]
    return f"{('column', 'row')[axis]} of what is {word}", region_label(word)


def outermost(rng: np.random.Generator, seen: Seen, axis: int) -> Text | None:
    """The object that is furthest left, right, above or below, if one clearly is."""
    side = int(rng.integers(2))
    places = seen.centers[:, axis] * (1 - 2 * side)
    order = places.argsort()
    if len(order) < 2 or places[order[1]] - places[order[0]] < MIN_GAP:
        return None
    return f"{RELATION_WORDS[axis][side]} : the", word_label(seen.names[order[0]])


def caption_alone(rng: np.random.Generator) -> Text:
    """A caption without a picture: of a word for a place, or of an object of which the text says where it is."""
    axis = int(rng.integers(2))
    if rng.random() < 0.5:
        return region(rng, axis)
    word, name = RELATION_WORDS[axis][int(rng.integers(2))], OBJECTS[int(rng.integers(len(OBJECTS)))]
    return f"{word} : the {name} . {('column', 'row')[axis]} of the {name}", region_label(word)


def without_picture(rng: np.random.Generator) -> tuple[Text, bool]:
    """A text that says where things are, and its continuation; and whether that is an answer to a question."""
    if rng.random() < 0.4:
        return caption_alone(rng), False
    axis, side = (int(index) for index in rng.integers(2, size=2))
    first, second = (OBJECTS[index] for index in rng.choice(len(OBJECTS), 2, replace=False))
    words = list(RELATION_WORDS[axis])
    if rng.random() < 0.5:
        cells = rng.integers(4, size=(2, 2))
        cells[:, axis] = np.sort(rng.choice(4, 2, replace=False))
        words = [COLUMN_WORDS[column] + ROW_WORDS[row] for column, row in cells]
    said = [f"{words[side]} : the {first} .", f"{words[1 - side]} : the {second} ."]
    said = [said[index] for index in rng.permutation(2)]
    text = f"{' '.join(said)} {RELATION_TEXT[axis].format(first, second)}"
    return (text, word_label(RELATION_WORDS[axis][side])), True
