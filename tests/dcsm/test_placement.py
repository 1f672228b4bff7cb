"""Where functional words stand, against plain word lists, letter counts and the published code's own columns."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmark_files import importable
from encoders import write_word_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from jaxid.dcsm.placement import PUBLISHED, Columns, find, place
from jaxid.errors import InputError, UnknownWordsWarning
from jaxid.nn.dual import DualConfig
from jaxid.nn.text import TextConfig
from jaxid.nn.vision import VisionConfig
from jaxid.prompts.dual import Captions, DualProcessor
from jaxid.prompts.words import read_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:the captions hold words")  # of letters alone

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WINDOW = 24
"""Tokens of a caption: start, end, and 22 letters."""

ENTRIES = ("left", "to the left of", "no", "not", "no one", "of")
PIECES = (*"to the left of no not no one knot star NOT Left".split(), "left,", "(of)", "a\tb")


@pytest.fixture(scope="module")
def published() -> Any:
    """The published procedure in PyTorch."""
    with importable() as load:
        return load("published_dcsm")


CONFIG = DualConfig(
    text_config=TextConfig(max_position_embeddings=WINDOW), vision_config=VisionConfig(image_size=16, patch_size=8)
)


@pytest.fixture(scope="module")
def processor() -> DualProcessor:
    """Spells words letter by letter, so that a word's number says nothing about its tokens."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[])
    return DualProcessor(tokenizer, None, CONFIG)


def tokenised(processor: DualProcessor, *texts: str) -> Captions:
    """Captions of `WINDOW` tokens; some are cut on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="captions longer than")
        return processor.captions(texts)


def columns_of(columns: Columns, row: int) -> dict[int, int]:
    """Functional words by the column in which they stand."""
    return {int(column): int(columns.words[row, column]) for column in np.flatnonzero(columns.words[row] >= 0)}


def named(caption: str, vocabulary: Sequence[str]) -> list[tuple[str, str]]:
    """Entries that are found, and what stands in the caption at their places."""
    return [(vocabulary[number], caption[start:stop]) for number, start, stop in find(caption, vocabulary)]


# --- find -----------------------------------------------------------------------------------------------------------


def test_published_words(published: Any) -> None:
    assert PUBLISHED == published.FUNCTIONAL_WORDS


def test_only_the_first_occurrence_counts_and_places_come_in_order() -> None:
    assert find("no star but no egg, not above, but", PUBLISHED) == [(7, 0, 2), (9, 8, 11), (6, 20, 23), (0, 24, 29)]


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a knot and a note", []),
        ("a not_able no1", []),
        ("a star", []),
        ("(no), a star", [("no", "no")]),
        ("a star; not", [("not", "not")]),
        ("No star, NOT above", [("no", "No"), ("not", "NOT")]),
    ],
)
def test_whole_words_in_any_case(caption: str, expected: list[tuple[str, str]]) -> None:
    assert named(caption, ("not", "no")) == expected


@pytest.mark.parametrize("vocabulary", [("left", "to the left of", "of"), ("of", "to the left of", "left")])
def test_longer_entries_come_before_what_they_hold(vocabulary: tuple[str, ...]) -> None:
    phrase = "to the left of"
    assert named("egg To  the\tleft of star", vocabulary) == [(phrase, "To  the\tleft of")]
    assert named("a left egg to the left of a star", vocabulary) == [("left", "left"), (phrase, phrase)]
    twice = "a to the left of b to the left of c"
    assert find(twice, vocabulary) == [(vocabulary.index(phrase), 2, 16)]  # not the second one's "left" either
    assert named("to the far left of a star", vocabulary) == [("left", "left"), ("of", "of")]


def test_signs_in_entries_are_no_patterns() -> None:
    assert find("abc a.c", ("a.c",)) == [(0, 4, 7)]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from(PIECES), max_size=9), st.sampled_from([" ", "  ", ", "]))
def test_spans_hold_their_words_and_do_not_overlap(pieces: list[str], gap: str) -> None:
    caption = gap.join(pieces)
    found = find(caption, ENTRIES)
    for number, start, stop in found:
        assert caption[start:stop].lower().split() == ENTRIES[number].split()
        assert not caption[:start][-1:].isalnum() and not caption[stop : stop + 1].isalnum()
    numbers, ends = [number for number, _, _ in found], [0, *(stop for _, _, stop in found)]
    assert len(set(numbers)) == len(numbers)
    assert all(end <= start for end, (_, start, _) in zip(ends, found, strict=False))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*PUBLISHED, "star", "knot", "nowhere", "a"]), max_size=10))
def test_single_words_are_those_of_the_word_list(words: list[str]) -> None:
    """Between single spaces, in small letters, nothing differs from looking words up in the split caption."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])
    expected = [
        (PUBLISHED.index(word), int(starts[place]), int(starts[place]) + len(word))
        for place, word in enumerate(words)
        if word in PUBLISHED and word not in words[:place]
    ]
    assert find(" ".join(words), PUBLISHED) == expected


# --- place ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a star", {}),
        ("star above egg", {5: 0}),  # behind the start token and four letters
        ("Not a star, not", {1: 1}),
        ("egg to the left of star", {4: 3}),  # the first letter of the whole entry
        ("no star not egg", {1: 2, 7: 1}),
        ("abcdefghijklmnopqrst no", {21: 2}),
        ("abcdefghijklmnopqrstu above", {22: 0}),  # only its first letter is left
        ("abcdefghijklmnopqrstuv no", {}),  # cut off
        ("no abcdefghijklmnopqrstuv not", {1: 2}),
    ],
)
def test_a_word_takes_its_own_first_token(processor: DualProcessor, caption: str, expected: dict[int, int]) -> None:
    captions = tokenised(processor, "a star above no egg", caption)
    columns = place(captions, ("above", "not", "no", "to the left of"))
    assert columns_of(columns, 1) == expected
    assert columns_of(columns, 0) == {6: 0, 11: 2}, "the caption beside it"
    assert (columns.sources == np.arange(WINDOW)).all()


@settings(deadline=None, max_examples=60)
@given(words=st.lists(st.sampled_from([*PUBLISHED, "star", "egg", "a"]), min_size=1, max_size=8))
def test_letters_before_a_word_tell_its_token(processor: DualProcessor, words: list[str]) -> None:
    columns = columns_of(place(tokenised(processor, " ".join(words)), PUBLISHED), 0)
    expected = {}
    for number, word in enumerate(words):
        column = 1 + len("".join(words[:number]))
        if word in PUBLISHED and word not in words[:number] and column < WINDOW - 1:
            expected[column] = PUBLISHED.index(word)
    assert columns == expected


LONG = " ".join(LETTERS[k % 26] for k in range(WINDOW))  # a word a token, so that words are cut off where tokens are


@pytest.mark.parametrize("placement", ["replace", "insert"])
@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(
        st.lists(st.sampled_from([*PUBLISHED, "Above", "not,", "", "a", "egg"]), min_size=1, max_size=28).map(
            lambda words: " ".join(["a", *words])
        ),
        min_size=1,
        max_size=3,
    )
)
@example(texts=["a star", "an egg"])
@example(texts=["a star above an egg"])
@example(texts=["not a star but an egg", "a star", "no no star not"])
@example(texts=["above below left", "small  big"])  # two spaces hold an empty word between them
@example(texts=[f"{LONG[: 2 * WINDOW - 3]} no", f"{LONG} no but", f"{LONG[: 2 * WINDOW - 5]} not no but"])
def test_columns_are_the_published_ones(
    published: Any, processor: DualProcessor, placement: str, texts: list[str]
) -> None:
    drawn = torch.Generator().manual_seed(0)
    maps = torch.randn(2, len(texts), 3, WINDOW, generator=drawn)
    vectors = torch.randn(len(PUBLISHED), 3, generator=drawn)
    expected = published.place_functional(maps, texts, vectors, placement).numpy()

    words, sources = place(tokenised(processor, *texts), PUBLISHED, placement)
    kept = np.take_along_axis(maps.numpy(), np.broadcast_to(sources[None, :, None], maps.shape), axis=-1)
    rows = np.moveaxis(vectors.numpy()[words], -1, 1)
    np.testing.assert_array_equal(np.where((words >= 0)[:, None], rows, kept), expected)


def test_a_later_word_of_the_vocabulary_moves_an_earlier_one(processor: DualProcessor) -> None:
    columns = columns_of(place(tokenised(processor, "a star not above a fish"), PUBLISHED, "insert"), 0)
    assert columns == {2: PUBLISHED.index("not"), 4: PUBLISHED.index("above")}
    replaced = columns_of(place(tokenised(processor, "a star not above a fish"), PUBLISHED, "replace"), 0)
    assert replaced == {2: PUBLISHED.index("not"), 3: PUBLISHED.index("above")}


@settings(deadline=None, max_examples=80)
@given(words=st.lists(st.sampled_from([*PUBLISHED, "a", "egg"]), min_size=1, max_size=24))
def test_insertion_written_out(processor: DualProcessor, words: list[str]) -> None:
    """A list of columns into which functional words are inserted one by one, and which is cut at the window."""
    expected: list[str | int] = list(range(WINDOW))
    for word in ("above", "below", "left", "right", "small", "big", "not", "no", "without", "but", "absent"):
        if word in words:
            expected.insert(words.index(word), word)
    found = place(tokenised(processor, " ".join(words)), PUBLISHED, "insert")
    ours = [
        PUBLISHED[word] if word >= 0 else source
        for word, source in zip(found.words[0].tolist(), found.sources[0].tolist(), strict=True)
    ]
    assert ours == expected[:WINDOW]


def test_inserted_columns_push_the_last_ones_out(processor: DualProcessor) -> None:
    words, sources = place(tokenised(processor, "no star but egg"), PUBLISHED, "insert")
    kept = sources[0][words[0] < 0].tolist()
    assert columns_of(Columns(words, sources), 0) == {0: PUBLISHED.index("no"), 2: PUBLISHED.index("but")}, "no first"
    assert kept == list(range(WINDOW - 2))


@pytest.mark.parametrize("placement", ["", "Token", "shift"])
def test_refuses_other_placements(processor: DualProcessor, placement: str) -> None:
    with pytest.raises(InputError, match=f"placement '{placement}' is not one of token, replace, insert"):
        place(tokenised(processor, "a star"), PUBLISHED, placement)


# --- unknown words ----------------------------------------------------------------------------------------------------


def test_captions_of_unknown_words_are_warned_of(tmp_path: Path) -> None:
    write_word_tokenizer(tmp_path, first="<s>", last="</s>", padding="<pad>", window=WINDOW)
    words = DualProcessor(read_tokenizer(tmp_path), None, CONFIG)
    with pytest.warns(UnknownWordsWarning) as told:
        captions = words.captions(["a zebra above a star", "a giraffe, left", "a red star .", "a zebra"])
    assert captions.unknown == (("zebra",), ("giraffe", ","), (), ("zebra",))
    assert [str(one.message).partition(": ")[2] for one in told] == ["'zebra', 'giraffe', ','."]
    assert captions[[1, 2]].unknown == (("giraffe", ","), ()) and words.unknown("a giraffe") == ("giraffe",)
    for text, named in (("a </s> star", "special token '</s>'"), ("a\0", "NUL"), ("\ud800", "surrogates")):
        with pytest.raises(InputError, match=named):
            words.captions([text])


def test_known_captions_do_not_warn(processor: DualProcessor) -> None:
    assert tokenised(processor, "a star above", "knot").unknown == ((), ())
