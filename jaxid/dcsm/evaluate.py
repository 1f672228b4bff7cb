"""Questions about pictures, answered by pooled cosine and by a scorer of dense maps ([DCSM] arXiv 2503.08723, 6)."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from jaxid.dcsm.embedding import TEXT_TOKENS, Pictures, Texts, embed_images, embed_texts
from jaxid.dcsm.scoring import Scorer, score_own
from jaxid.errors import InputError
from jaxid.families.base import Encoder
from jaxid.prompts.pictures import Picture
from jaxid.stats import confidence_interval


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
    words = Wording.read(encoder, captions, scorer, scorer_captions)
    return answered(encoder, embed_images(encoder, pictures), words, scorer, shown=shown, group=group)


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


def answered(
    encoder: Encoder,
    encoded: Pictures,
    words: Wording,
    scorer: Scorer | None,
    *,
    shown: Sequence[int],
    group: str = "row",
) -> Answers:
    """`answer`, about pictures that are encoded and captions that are tokenised."""
    known, texts = words.cosine, embed_texts(encoder, words.cosine.tokens, words.cosine.length)
    cosine = np.zeros(len(known.captions), bool)
    for rows, own in known.by_count(texts):
        pooled = own.pooled.reshape(len(rows), -1, own.pooled.shape[1])
        scores = np.einsum("ne,nce->nc", encoded.pooled[[shown[row] for row in rows]], pooled)
        bad = [rows[index] for index in np.flatnonzero(~np.isfinite(scores).all(axis=1))]
        if bad:
            named = f"{', '.join(map(str, bad[:5]))}{' and others' if len(bad) > 5 else ''}"
            raise InputError(f"questions {named} have no cosine: the encoder gives NaN or infinity for them.")
        cosine[rows] = _first_is_best(scores)
    if scorer is None:
        return Answers(cosine, None)
    if words.scorer is not None:
        known, texts = words.scorer, embed_texts(encoder, words.scorer.tokens, words.scorer.length)
    dcsm = np.zeros(len(known.captions), bool)
    for rows, own in known.by_count(texts):
        scores = score_own(
            scorer,
            encoded[[shown[row] for row in rows]],
            own,
            len(own) // len(rows),
            group=group,
            name=lambda at, rows=rows: f"question {rows[at]}",
            mesh=encoder.mesh,
        )
        dcsm[rows] = _first_is_best(scores)
    return Answers(cosine, dcsm)


def _first_is_best(scores: np.ndarray) -> np.ndarray:
    # Rounding must not decide between captions that the encoder cannot tell apart: then no answer is right.
    return scores[:, 0] > scores[:, 1:].max(axis=1) + 1e-6 * np.abs(scores).max()


def summary(rows: Mapping[str, object]) -> dict[str, dict[str, dict[str, float]]]:
    """Shares of correct answers by method and benchmark, with 95 % intervals.

    Args:
        rows: columns "benchmark", "cosine" and, if there was a scorer, "dcsm"; and "chance", the share of correct
            answers that guessing would give, if it is to be reported.
    """
    names = np.asarray(rows["benchmark"])
    found: dict[str, dict[str, dict[str, float]]] = {}
    for method in [name for name in ("cosine", "dcsm") if name in rows]:
        right = np.asarray(rows[method], bool)
        for name in dict.fromkeys(names.tolist()):
            own = right[names == name]
            low, high = confidence_interval(int(own.sum()), len(own))
            entry = {"accuracy": float(own.mean()), "low": low, "high": high, "questions": len(own)}
            if "chance" in rows:
                entry["chance"] = float(np.asarray(rows["chance"])[names == name].mean())
            found.setdefault(method, {})[name] = entry
    return found
