"""Where functional words stand in captions, and which columns of a map they take."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int

from jaxid.errors import InputError
from jaxid.prompts.dual import Captions
from jaxid.prompts.words import word_spans

PUBLISHED = ("above", "below", "left", "right", "small", "big", "not", "no", "without", "but", "absent")
"""The published functional words ([DCSM] arXiv 2503.08723)."""

Placement = Literal["token", "replace", "insert"]
"""Where a functional word's column is put. "token": at the word's own first token. The two published code paths put it
at the token whose index is the word's among the caption's words split at spaces, which the start token and words of
several tokens shift: "replace" takes that column's place, "insert" pushes it and all after it to the right."""

PLACEMENTS = get_args(Placement)


class Columns(NamedTuple):
    """What stands in every column of the maps of M captions.

    Attributes:
        words: index of the functional word, or -1.
        sources: index of the caption token, where no functional word stands.
    """

    words: Int[np.ndarray, "M T"]
    sources: Int[np.ndarray, "M T"]


def find(caption: str, vocabulary: Sequence[str]) -> list[tuple[int, int, int]]:
    """First occurrence of every functional word: (its index, first character, last character + 1), by place.

    Matches whole words in any case; entries of several words too, longer ones first, none within another.

    Args:
        caption: the text.
        vocabulary: functional words.
    """
    spans = word_spans(caption, vocabulary, ignore_case=True)
    return sorted(((index, *own[0]) for index, own in enumerate(spans) if own), key=lambda one: one[1])


def place(captions: Captions, vocabulary: Sequence[str], placement: str = "token") -> Columns:
    """The columns of captions' maps.

    A functional word whose place the window cuts off has no column.

    Args:
        captions: texts and their tokens.
        vocabulary: functional words.
        placement: see `Placement`.

    Raises:
        InputError: for an unknown placement.
    """
    if placement not in PLACEMENTS:
        raise InputError(f"placement {placement!r} is not one of {', '.join(PLACEMENTS)}.")
    count, length = captions.token_ids.shape
    words = np.full((count, length), -1, np.int32)
    sources = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    for row in range(count):
        for index, column in _columns(captions, row, vocabulary, placement):
            if column is None or column >= length:
                continue
            if placement == "insert":
                words[row, column + 1 :] = words[row, column:-1].copy()
                sources[row, column + 1 :] = sources[row, column:-1].copy()
            words[row, column] = index
    return Columns(words, sources)


def _columns(captions: Captions, row: int, vocabulary: Sequence[str], placement: str) -> list[tuple[int, int | None]]:
    """Every functional word of a caption and its column, in the caption's order."""
    caption = captions.texts[row]
    if placement == "token":
        return [(index, captions.token_at(row, start, stop)) for index, start, stop in find(caption, vocabulary)]
    split = caption.split(" ")
    found = sorted((split.index(word), index) for index, word in enumerate(vocabulary) if word in split)
    return [(index, column) for column, index in found]
