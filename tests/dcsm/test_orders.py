"""Captions with their words in a wrong order."""

from collections import Counter

import numpy as np
import pytest

from jaxid.dcsm import orders
from jaxid.dcsm.orders import plain, wrong_orders

CAPTION = "A red cat sits near two big dogs."
TAGS = {
    "A": "DT",
    "red": "JJ",
    "cat": "NN",
    "sits": "VBZ",
    "near": "IN",
    "two": "CD",
    "big": "JJ",
    "dogs": "NNS",
    ".": ".",
    "runs": "VBZ",
}


def tag(text: str) -> list[tuple[str, str]]:
    return [(word, TAGS[word]) for word in text.replace(".", " .").split()]


def drawn(caption: str = CAPTION, seed: int = 0, tagger: orders.Tagger | None = tag) -> tuple[str, ...]:
    return wrong_orders(caption, np.random.default_rng(seed), tagger)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('A "cat", (two) dogs: #1!', "a cat , two dogs 1"),
        ("  Two\n dogs ; run ~ ", "two dogs run"),
        (" ".join(map(str, range(50))), " ".join(map(str, range(30)))),
        ("The man's well-kept hat, isn't it?", "the man's well-kept hat, isn't it?"),
    ],
)
def test_captions_as_aro_words_them(caption: str, expected: str) -> None:
    assert plain(caption) == expected


@pytest.mark.parametrize("seed", range(8))
def test_what_changes_places(seed: int) -> None:
    """Words of the caption by index: adjectives 1 and 6, nouns 2 and 7, and the full stop, which is dropped."""
    right = "a red cat sits near two big dogs".split()
    tagged, others, within, threes = (wrong.split() for wrong in drawn(seed=seed))
    for wrong in (tagged, others, within, threes):
        assert Counter(wrong) == Counter(right) and wrong != right
    fixed = [0, 3, 4, 5]
    assert [tagged[index] for index in fixed] == [right[index] for index in fixed]
    assert {tagged[1], tagged[6]} == {"red", "big"} and {tagged[2], tagged[7]} == {"cat", "dogs"}
    assert sorted(within[:3]) == sorted(right[:3]) and sorted(within[3:6]) == sorted(right[3:6])
    assert [" ".join(threes).find(" ".join(right[at : at + 3])) >= 0 for at in (0, 3, 6)] == [True] * 3


def test_other_words_leave_nouns_and_adjectives_where_they_are() -> None:
    """The full stop is one of the words that change places, so that the others' indices may shift by one."""
    kept = [word for word in drawn()[1].split() if word in ("red", "cat", "big", "dogs")]
    assert kept == ["red", "cat", "big", "dogs"]


def test_without_a_tagger_there_are_two() -> None:
    within, threes = drawn(tagger=None)
    assert within.split()[:3] != "a red cat".split() or within.split()[3:6] != "sits near two".split()
    assert Counter(within.split()) == Counter(threes.split()) == Counter("a red cat sits near two big dogs".split())


def test_clitics_and_marks_are_words_of_their_own() -> None:
    found = drawn("The man's hat, isn't", tagger=None)
    assert Counter(found[0].split()) == Counter(["the", "man", "'s", "hat", ",", "is", "n't"])


def test_orders_come_from_the_seed() -> None:
    assert drawn(seed=3) == drawn(seed=3)
    assert len({drawn(seed=seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(("caption", "count"), [("A cat runs.", 2), ("cat", 0), ("cat cat cat cat", 0), ("cat.", 0)])
def test_shuffles_that_change_nothing_are_left_out(caption: str, count: int) -> None:
    """A single noun has no other to change places with; three words make one group of three and a full stop."""
    found = drawn(caption)
    assert plain(caption) not in found and len(set(found)) == len(found)
    assert len(found) >= count if count else found == ()


def test_no_tagger_is_installed_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "spacy", None)
    orders.tagger.cache_clear()
    try:
        assert orders.tagger() is None
    finally:
        orders.tagger.cache_clear()
