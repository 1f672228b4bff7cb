"""The bugs and conventions of the published evaluation of dense maps, for `reference.py` ([DCSM] arXiv 2503.08723)."""

from collections import defaultdict

import numpy as np
from jaxtyping import Float

from jaxid.dcsm import evaluate
from jaxid.dcsm.embedding import Pictures, Texts, embed_class_tokens, embed_texts
from jaxid.dcsm.evaluate import Scores, Wording
from jaxid.experiments.dcsm_evaluate import EvaluateScorers, Opened
from jaxid.families.base import Encoder
from jaxid.families.blip import BlipConfig
from jaxid.families.siglip import SiglipConfig


class PublishedEvaluation(EvaluateScorers):
    """The first of the captions with the highest score is chosen, and two families are read in another way.

    BLIP's class tokens are compared without their projections. SigLIP's captions are padded to the longest of their
    question, although the model was trained with the whole window and reads the last token, padding or not.
    """

    correct = staticmethod(evaluate.is_first)

    def cosines(self, encoder: Encoder, opened: Opened, pictures: Pictures, captions: Texts) -> Scores:
        """Cosines of pooled vectors, for every question."""
        words, shown = opened.words, opened.shown
        if isinstance(encoder.config, BlipConfig):
            left, right = embed_class_tokens(encoder, opened.pixels, words.cosine.tokens)
            return evaluate.cosines(left, right, words, shown)
        if isinstance(encoder.config, SiglipConfig):
            asked = padded_to_longest(encoder, words)
            return [own @ pictures.pooled[picture] for own, picture in zip(asked, shown, strict=True)]
        return super().cosines(encoder, opened, pictures, captions)


def padded_to_longest(encoder: Encoder, words: Wording) -> list[Float[np.ndarray, "C E"]]:
    """Pooled captions of every question, all padded to the longest of them."""
    known = words.cosine
    rows = [[known.indices[caption] for caption in own] for own in known.captions]
    lengths = known.tokens.valid.sum(axis=1)
    alike: dict[int, list[int]] = defaultdict(list)
    for question, own in enumerate(rows):
        alike[int(lengths[own].max())].append(question)
    found = {}
    for length, questions in alike.items():
        distinct = sorted({row for question in questions for row in rows[question]})
        place = {row: index for index, row in enumerate(distinct)}
        pooled = embed_texts(encoder, known.tokens[distinct].cut(length), length).pooled
        found |= {question: pooled[[place[row] for row in rows[question]]] for question in questions}
    return [found[question] for question in range(len(rows))]
