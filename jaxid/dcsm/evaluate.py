"""Questions about pictures, answered by pooled cosine and by a scorer of dense maps ([DCSM] arXiv 2503.08723, 6)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from jaxid.dcsm.embedding import TEXT_TOKENS, Pictures, Texts, embed_images, embed_texts
from jaxid.dcsm.scoring import Scorer, score_own
from jaxid.errors import InputError
from jaxid.families.base import Encoder
from jaxid.prompts.pictures import Picture
from jaxid.stats import confidence_interval

OPPOSITES = (("left", "right"), ("above", "below"), ("in-front", "behind"))
"""Relations of What'sUp whose pictures make a pair."""

Scores = Sequence[Float[np.ndarray, "_"]]
"""Of every question, the scores of its captions."""


class Answers(NamedTuple):
    """Which questions were answered correctly; the correct caption must score highest, without ties."""

    cosine: Bool[np.ndarray, "N"]
    dcsm: Bool[np.ndarray, "N"] | None  # None without a scorer


def answer(
    encoder: Encoder,
    pictures: Sequence[Picture],
    captions: Sequence[Sequence[str]],
    scorer: Scorer | None = None,
    *,
    scorer_captions: Sequence[Sequence[str]] | None = None,
    shown: Sequence[int] | None = None,
    group: str = "row",
) -> Answers:
    """Answers questions, encoding every picture and every caption once.

    Args:
        encoder: the model.
        pictures: of the questions.
        captions: of every question, the correct one first; their number may differ.
        scorer: of dense maps, trained for this encoder.
        scorer_captions: captions for the scorer, if they differ.
        shown: index of the picture of every question; by default, question k is about picture k.
        group: the maps that are standardised together: "row", those of a question, as published, or "pair".

    Raises:
        InputError: if there are no questions, one has no wrong caption, counts do not match, or scores are not finite;
            the message names the questions.
    """
    shown = range(len(pictures)) if shown is None else shown
    if not len(captions) or len(captions) != len(shown):
        raise InputError(f"{len(captions)} questions about {len(shown)} pictures; give as many of both, at least one.")
    words, encoded = Wording.read(encoder, captions, scorer, scorer_captions), embed_images(encoder, pictures)
    texts, told = embedded(encoder, words)
    cosine = is_highest(cosines(encoded.pooled, texts.pooled, words, shown))
    if scorer is None:
        return Answers(cosine, None)
    return Answers(cosine, is_highest(map_scores(scorer, encoded, told, words, shown, group=group, mesh=encoder.mesh)))


class _Captions:
    """The distinct captions of some questions, as tokens."""

    def __init__(self, encoder: Encoder, captions: Sequence[Sequence[str]], length: int):
        self.captions, self.length, self.indices = captions, length, dict[str, int]()
        for own in captions:
            for caption in own:
                self.indices.setdefault(caption, len(self.indices))
        self.tokens = encoder.processor.captions(list(self.indices), length)

    def by_count(self, texts: Texts) -> Iterator[tuple[list[int], Texts]]:
        """Questions grouped by their number of captions: their indices, and all their encoded captions."""
        groups: dict[int, list[int]] = {}
        for row, own in enumerate(self.captions):
            groups.setdefault(len(own), []).append(row)
        for rows in groups.values():
            yield rows, texts[[self.indices[caption] for row in rows for caption in self.captions[row]]]


class Wording(NamedTuple):
    """The captions of some questions as tokens: for the cosine, and for the scorer, if they differ."""

    cosine: _Captions
    scorer: _Captions | None

    @classmethod
    def read(
        cls,
        encoder: Encoder,
        captions: Sequence[Sequence[str]],
        scorer: Scorer | None = None,
        scorer_captions: Sequence[Sequence[str]] | None = None,
    ) -> "Wording":
        """Tokenises captions; arguments and errors as in `answer`."""
        alone = [index for index, own in enumerate(captions) if len(own) < 2]
        if alone:
            raise InputError(f"question {alone[0]} has {len(captions[alone[0]])} captions; at least two are needed.")
        # Cosine uses captions up to the encoder's context; the scorer uses the tokens of its maps.
        context, length = encoder.processor.context, TEXT_TOKENS if scorer is None else scorer.map_shape[1]
        fits = length <= context and encoder.processor.longest([text for own in captions for text in own]) <= length
        cosine = _Captions(encoder, captions, length if fits else context)
        if scorer is None or (fits and scorer_captions is None):
            return cls(cosine, None)
        return cls(cosine, _Captions(encoder, captions if scorer_captions is None else scorer_captions, length))


def embedded(encoder: Encoder, words: Wording) -> tuple[Texts, Texts]:
    """The distinct captions for the cosine and those for the scorer, each encoded once."""
    texts = embed_texts(encoder, words.cosine.tokens, words.cosine.length)
    return texts, texts if words.scorer is None else embed_texts(encoder, words.scorer.tokens, words.scorer.length)


def cosines(
    pictures: Float[np.ndarray, "N E"], captions: Float[np.ndarray, "M E"], words: Wording, shown: Sequence[int]
) -> Scores:
    """Cosines of pictures and captions, for every question.

    Args:
        pictures: a unit vector for each.
        captions: a unit vector for each of the distinct captions.
        words: the captions of every question.
        shown: index of the picture of every question.

    Raises:
        InputError: if some are not finite; the message names the questions.
    """
    asked = [[words.cosine.indices[caption] for caption in own] for own in words.cosine.captions]
    found = [captions[own] @ pictures[picture] for own, picture in zip(asked, shown, strict=True)]
    bad = [row for row, own in enumerate(found) if not np.isfinite(own).all()]
    if bad:
        named = f"{', '.join(map(str, bad[:5]))}{' and others' if len(bad) > 5 else ''}"
        raise InputError(f"questions {named} have no cosine: the encoder gives NaN or infinity for them.")
    return found


def map_scores(
    scorer: Scorer,
    pictures: Pictures,
    captions: Texts,
    words: Wording,
    shown: Sequence[int],
    *,
    group: str = "row",
    mesh: Mesh | None = None,
) -> Scores:
    """Scores of dense maps, for every question.

    Args:
        scorer: of dense maps.
        pictures: encoded.
        captions: the distinct captions for the scorer, encoded.
        words: the captions of every question.
        shown: index of the picture of every question.
        group: the maps that are standardised together, as in `answer`.
        mesh: devices that divide the pictures.

    Raises:
        InputError: if some are not finite; the message names the questions.
    """
    known = words.cosine if words.scorer is None else words.scorer
    found: dict[int, np.ndarray] = {}
    for rows, own in known.by_count(captions):
        scores = score_own(
            scorer,
            pictures[[shown[row] for row in rows]],
            own,
            len(own) // len(rows),
            group=group,
            name=lambda at, rows=rows: f"question {rows[at]}",
            mesh=mesh,
        )
        found |= dict(zip(rows, scores, strict=True))
    return [found[row] for row in range(len(known.captions))]


def is_highest(scores: Scores) -> Bool[np.ndarray, "N"]:
    """Whether caption 0 alone has the highest score, by more than rounding.

    Rounding must not decide between captions that the encoder cannot tell apart: then no answer is right.
    """
    return np.array([own[0] > own[1:].max() + 1e-6 * max(1, np.abs(own).max()) for own in scores], bool)


def is_first(scores: Scores) -> Bool[np.ndarray, "N"]:
    """Whether no caption scores higher than caption 0, as published."""
    return np.array([own.argmax() == 0 for own in scores], bool)


def summary(rows: Mapping[str, object]) -> dict[str, dict[str, dict[str, Any]]]:
    """Shares of correct answers by method and benchmark, with 95 % intervals.

    A benchmark whose questions are of several kinds gets the shares of each, "kinds". What'sUp gets the shares of pairs
    and of sets all of whose questions are answered correctly, "pair_accuracy" and "set_accuracy", and the numbers of
    "pairs" and "sets". The questions of a pair are about the same objects in opposite relations (see `OPPOSITES`); a
    set has two pairs. A pair or a set of which a question is missing does not count.

    Args:
        rows: columns "benchmark", "cosine" and, if there was a scorer, "dcsm"; and, where they are to be reported,
            "chance", the share of correct answers that guessing would give, "kind" of the question, and "scene", the
            objects that it is about.
    """
    names = np.asarray(rows["benchmark"])
    kinds, scenes = (np.asarray(rows.get(name, np.full(len(names), "")), object) for name in ("kind", "scene"))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for method in [name for name in ("cosine", "dcsm") if name in rows]:
        right = np.asarray(rows[method], bool)
        for name in dict.fromkeys(names.tolist()):
            chosen = names == name
            entry: dict[str, Any] = _share(right[chosen])
            if "chance" in rows:
                entry["chance"] = float(np.asarray(rows["chance"])[chosen].mean())
            several = sorted(set(kinds[chosen]) - {""})
            if len(several) > 1:
                entry["kinds"] = {kind: _share(right[chosen & (kinds == kind)]) for kind in several}
            found.setdefault(method, {})[name] = entry | _together(right[chosen], kinds[chosen], scenes[chosen])
    return found


def _share(right: np.ndarray) -> dict[str, float]:
    low, high = confidence_interval(int(right.sum()), len(right))
    return {"accuracy": float(right.mean()), "low": low, "high": high, "questions": len(right)}


def _together(right: np.ndarray, kinds: np.ndarray, scenes: np.ndarray) -> dict[str, float]:
    """Shares of pairs and sets that are answered correctly; empty if there are none."""
    pairs, sets = [], []
    for scene in dict.fromkeys(scenes[scenes != ""].tolist()):
        own = {kind: bool(right[(scenes == scene) & (kinds == kind)].all()) for kind in set(kinds[scenes == scene])}
        both = [own[one] and own[other] for one, other in OPPOSITES if one in own and other in own]
        pairs += both
        sets += [all(both)] if len(both) == 2 else []
    counts = {"pair": pairs, "set": sets}
    shares = {f"{name}_accuracy": float(np.mean(own)) for name, own in counts.items() if own}
    return shares | {f"{name}s": len(own) for name, own in counts.items() if own}
