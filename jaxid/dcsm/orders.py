"""Captions with their words in a wrong order, as in ARO's COCO-Order and Flickr30k-Order (arXiv 2210.01936).

ARO makes four wrong captions of every right one: nouns change places with nouns, and adjectives with adjectives; all
other words change places; words change places within each group of three; the groups of three change places. The first
two need a tagger of parts of speech. ARO's is spaCy's English pipeline `en_core_web_sm`, which is used here too if it
is installed; without it there are only the last two.
"""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

MOST_WORDS = 30
"""Captions are cut to this many words, as in ARO."""

PIPELINE = "en_core_web_sm"
"""spaCy's pipeline that tags words."""

Tagger = Callable[[str], list[tuple[str, str]]]
"""Splits a caption into words, each with its tag of the Penn Treebank."""

_ATTEMPTS = 20
"""Draws before a shuffle that always gives the caption itself is left out."""

_PARTS = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|m|d|re|ve|ll)\b|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
"""Words, clitics ("is", "n't"; "man", "'s") and punctuation marks, about as the Penn Treebank splits them."""


@functools.cache
def tagger() -> Tagger | None:
    """SpaCy's tagger, or None if it is not installed."""
    try:
        import spacy  # pyright: ignore[reportMissingImports] - optional

        pipeline = spacy.load(PIPELINE, disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return None
    return lambda text: [(token.text, token.tag_) for token in pipeline(text)]


def plain(caption: str) -> str:
    """A caption as ARO words it: lower case, without most punctuation, and at most 30 words long."""
    kept = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    return " ".join(kept.split()[:MOST_WORDS])


def wrong_orders(caption: str, rng: np.random.Generator, tag: Tagger | None) -> tuple[str, ...]:
    """A caption's wrong orders, reworded by `plain`: four with a tagger, two without.

    A shuffle that gives the caption itself is drawn again. It is left out if no draw changes the order, as in a caption
    with a single noun; and so is an order that is there already.

    Args:
        caption: the text.
        rng: source of the shuffles.
        tag: the tagger, if there is one.
    """
    shuffles: list[tuple[list[str], Callable[[list[str]], list[str]]]] = []
    if tag is not None:
        tagged = tag(caption)
        nouns = [index for index, (_, name) in enumerate(tagged) if name.startswith("NN")]
        adjectives = [index for index, (_, name) in enumerate(tagged) if name.startswith("JJ")]
        others = sorted(set(range(len(tagged))) - {*nouns, *adjectives})
        words = [word for word, _ in tagged]
        shuffles += [
            (words, lambda words: _permuted(_permuted(words, nouns, rng), adjectives, rng)),
            (words, lambda words: _permuted(words, others, rng)),
        ]
    parts = _PARTS.findall(caption)
    shuffles += [(parts, lambda words: _within_threes(words, rng)), (parts, lambda words: _threes(words, rng))]
    found: dict[str, None] = {}
    for words, shuffle in shuffles:
        right = _spoken(words)
        drawn = (shuffle(words) for _ in range(_ATTEMPTS))
        other = next((order for order in drawn if _spoken(order) != right), None)
        if other is not None:
            found.setdefault(plain(" ".join(other)))
    return tuple(found)


def _spoken(words: Sequence[str]) -> list[str]:
    """The words of a caption after `plain`."""
    return plain(" ".join(words)).split()


def _permuted(words: list[str], places: Sequence[int], rng: np.random.Generator) -> list[str]:
    """The words, with those at the given indices permuted."""
    order = list(words)
    for place, source in zip(places, rng.permutation(np.asarray(places, np.int64)).tolist(), strict=True):
        order[place] = words[source]
    return order


def _split(words: list[str]) -> list[list[str]]:
    return [words[start : start + 3] for start in range(0, len(words), 3)]


def _within_threes(words: list[str], rng: np.random.Generator) -> list[str]:
    return [three[index] for three in _split(words) for index in rng.permutation(len(three)).tolist()]


def _threes(words: list[str], rng: np.random.Generator) -> list[str]:
    threes = _split(words)
    return [word for index in rng.permutation(len(threes)).tolist() for word in threes[index]]
