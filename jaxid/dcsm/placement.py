"""Where functional words occur in captions, and which columns of a map they take."""

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
"""Where a functional word's column is put. "token": at the word's first token. The two published code paths put it at
the token whose index is the word's index among the caption's words, split at spaces; the start token and words of
several tokens shift it. "replace" overwrites that column, "insert" moves it and all later columns to the right,
word after word in the order of the vocabulary, so that one insertion can move the column of another."""

PLACEMENTS = get_args(Placement)


class Columns(NamedTuple):
    """The content of every column of the maps of M captions.

    Attributes:
        words: index of the functional word, or -1.
        sources: index of the caption token, for columns without a functional word.
    """

    words: Int[np.ndarray, "M T"]
    sources: Int[np.ndarray, "M T"]


def find(caption: str, vocabulary: Sequence[str]) -> list[tuple[int, int, int]]:
    """First occurrence of every functional word, in order: (its index, first character, last character + 1).

    Matches whole words in any case, including entries of several words; longer entries go first, and matches do not
    overlap.

    Args:
        caption: the text.
        vocabulary: functional words.
    """
    spans = word_spans(caption, vocabulary, ignore_case=True)
    return sorted(((index, *own[0]) for index, own in enumerate(spans) if own), key=lambda one: one[1])


def place(captions: Captions, vocabulary: Sequence[str], placement: str = "token") -> Columns:
    """The columns of captions' maps.

    A functional word beyond the end of the window has no column.

    Args:
        captions: the texts and their tokens.
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
    """The functional words of a caption with their columns; as published, in the order of the vocabulary."""
    caption = captions.texts[row]
    if placement == "token":
        return [(index, captions.token_at(row, start, stop)) for index, start, stop in find(caption, vocabulary)]
    split = caption.split(" ")
    return [(index, split.index(word)) for index, word in enumerate(vocabulary) if word in split]
