"""Answers to questions against the published procedure in PyTorch, one question at a time, and their summary."""

import functools
from collections.abc import Sequence
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
import torch
from benchmark_files import importable
from encoders import ENCODER_CASES, encoder, reference

from jaxid.dcsm import evaluate
from jaxid.dcsm.evaluate import answer, summary
from jaxid.dcsm.scoring import Scorer
from jaxid.errors import InputError

CASE = ENCODER_CASES[0]
LENGTH = 11
ASKED = (
    (0, ("red star above a fish", "a fish but no star", "star")),
    (1, ("a big fish to the left of a star", "not small")),
    (0, ("star", "fish", "a red star", "blue fish without a star")),
    (2, ("not small", "red star above a fish")),
    (1, ("a fish but no star", "star", "fish below a blue star")),
)
"""Number of the picture, and captions of which none is the right one yet."""

SHOWN = [picture for picture, _ in ASKED]


def pictures() -> list[np.ndarray]:
    return [*fixtures.pictures(), fixtures.pictures()[0][::-1].copy()]


@functools.cache
def scorer() -> Scorer:
    return Scorer.init(jax.random.key(1), 17, LENGTH, placement="replace")


@pytest.fixture(scope="module")
def published() -> Any:
    """Scores of one question by the published procedure: pooled cosine, and the scorer of maps."""
    with importable() as load:
        module = load("published_dcsm")
    network = module.ScorerCNN(17, LENGTH).eval()
    module.set_weights(network, scorer().network._asdict())
    vectors = torch.from_numpy(np.array(scorer().vectors))
    theirs = module.Scorer(network=network, vectors=vectors, placement="replace")

    def scores(picture: int, captions: Sequence[str], *, alone: bool = False) -> tuple[np.ndarray, np.ndarray]:
        processor, model = encoder(CASE).processor, reference(CASE)
        batch = processor.captions(captions, LENGTH)
        ids, mask = torch.tensor(batch.token_ids).long(), torch.tensor(batch.valid).long()
        pixels = torch.from_numpy(processor.pixels([pictures()[picture]]))
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "TEXT_TOKENS", LENGTH)
            left, right = module.image_tokens(model, pixels), module.text_tokens(model, ids, mask)
            made = model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
            rows = [[number] for number in range(len(captions))] if alone else [list(range(len(captions)))]
            maps = [module.score_pairs(theirs, left, right[row], [captions[i] for i in row])[0] for row in rows]
        return (made.image_embeds @ made.text_embeds.T)[0].numpy(), torch.cat(maps).numpy()

    return scores


def first(captions: Sequence[str], number: Any) -> list[str]:
    """The captions, one of them moved to the front."""
    return [str(captions[number]), *(str(caption) for at, caption in enumerate(captions) if at != number)]


@pytest.mark.parametrize("group", ["row", "pair"])
def test_the_caption_that_wins_in_pytorch_is_the_answer(published: Any, group: str) -> None:
    """Every question twice: the winner first, which is right, and then the loser."""
    found = [published(*question, alone=group == "pair") for question in ASKED]
    captions = [own for _, own in ASKED]
    cosine_won = [first(own, cosine.argmax()) for own, (cosine, _) in zip(captions, found, strict=True)]
    cosine_lost = [first(own, cosine.argmin()) for own, (cosine, _) in zip(captions, found, strict=True)]
    maps_won = [first(own, maps.argmax()) for own, (_, maps) in zip(captions, found, strict=True)]
    maps_lost = [first(own, maps.argmin()) for own, (_, maps) in zip(captions, found, strict=True)]
    asked, told = [*cosine_won, *cosine_lost], [*maps_lost, *maps_won]
    answers = answer(encoder(CASE), pictures(), asked, scorer(), scorer_captions=told, shown=SHOWN + SHOWN, group=group)
    assert answers.dcsm is not None
    assert answers.cosine.tolist() == [True] * 5 + [False] * 5
    assert answers.dcsm.tolist() == [False] * 5 + [True] * 5
    # What the scorer is shown is what the question asks, unless told otherwise.
    answers = answer(encoder(CASE), pictures(), told, scorer(), shown=SHOWN + SHOWN, group=group)
    assert answers.dcsm is not None and answers.dcsm.tolist() == [False] * 5 + [True] * 5


def test_everything_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    for name in ("embed_images", "embed_texts"):
        run = getattr(evaluate, name)

        def recorded(model: Any, given: Sequence[Any], *rest: Any, run: Any = run) -> Any:
            encoded.append(getattr(given, "texts", given))
            return run(model, given, *rest)

        monkeypatch.setattr(evaluate, name, recorded)
    answer(encoder(CASE), pictures(), [own for _, own in ASKED], scorer(), shown=SHOWN)
    seen, read = encoded
    assert len(seen) == 3 and len(read) == len(set(read)) == len({text for _, own in ASKED for text in own})


def test_captions_alike_are_not_told_apart() -> None:
    asked = [["star", "star"], ["fish", "star", "fish"], ["fish", "fish"], ["star", "fish", "star"]]
    answers = answer(encoder(CASE), pictures(), asked, scorer(), shown=[0, 1, 2, 2])
    assert answers.dcsm is not None and not answers.cosine.any() and not answers.dcsm.any()


def test_questions_that_do_not_fit() -> None:
    asked = [["star", "fish"], ["a star", "fish"]]
    with pytest.raises(InputError, match="2 questions about 3 pictures"):
        answer(encoder(CASE), pictures(), asked)
    with pytest.raises(InputError, match="2 questions about 1 pictures"):
        answer(encoder(CASE), pictures(), asked, shown=[0])
    with pytest.raises(InputError, match="0 questions about 0 pictures"):
        answer(encoder(CASE), pictures(), [], shown=[])
    with pytest.raises(InputError, match="question 1 has 1 captions; at least two"):
        answer(encoder(CASE), pictures()[:2], [["star", "fish"], ["star"]])
    with pytest.raises(InputError, match="a group 'pair' or 'row'"):
        answer(encoder(CASE), pictures()[:2], asked, scorer(), group="call")


def wilson(right: int, count: int) -> tuple[float, float]:
    """The interval's textbook formula."""
    z, share = 1.959964, right / count
    middle, half = share + z**2 / (2 * count), z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)


def test_summary_of_two_benchmarks() -> None:
    rows = {"benchmark": ["b", "a", "b", "b", "b"], "cosine": [1, 1, 0, 1, 1], "dcsm": np.array([0, 1, 0, 1, 0], bool)}
    found = summary(rows)
    assert {method: list(own) for method, own in found.items()} == {"cosine": ["b", "a"], "dcsm": ["b", "a"]}
    for method, name, right, count in [("cosine", "b", 3, 4), ("cosine", "a", 1, 1), ("dcsm", "b", 1, 4)]:
        own = found[method][name]
        assert (own["accuracy"], own["questions"]) == (right / count, count)
        np.testing.assert_allclose((own["low"], own["high"]), wilson(right, count), atol=1e-6)
    assert list(summary({"benchmark": ["a"], "cosine": [True]})) == ["cosine"]


def test_pairs_and_sets_need_all_their_questions() -> None:
    """Objects "b" lack a picture, and so a pair and the set; "c" are shown twice on the left, once answered wrongly."""
    asked = [
        *[("a", kind, right) for kind, right in (("left", 1), ("right", 1), ("above", 1), ("below", 0))],
        *[("b", kind, 1) for kind in ("left", "right", "in-front")],
        *[
            ("c", kind, right)
            for kind, right in (("left", 1), ("left", 0), ("right", 1), ("behind", 1), ("in-front", 1))
        ],
        *[("d", kind, 1) for kind in ("below", "above", "right", "left")],
    ]
    scenes, kinds, right = zip(*asked, strict=True)
    entry = summary({"benchmark": ["w"] * len(asked), "cosine": right, "kind": kinds, "scene": scenes})["cosine"]["w"]
    # a: left-right right, above-below wrong. b: left-right right. c: left-right wrong, depth right. d: both right.
    assert (entry["pairs"], entry["pair_accuracy"]) == (7, 5 / 7)
    assert (entry["sets"], entry["set_accuracy"]) == (3, 1 / 3)
    assert entry["kinds"]["left"]["accuracy"] == 4 / 5 and entry["kinds"]["below"]["questions"] == 2
    assert entry["accuracy"] == 14 / 16


def test_questions_without_a_scene_have_no_pairs() -> None:
    rows = {"benchmark": ["n"] * 2, "cosine": [True, False], "kind": ["hybrid", "positive"], "scene": ["", ""]}
    entry = summary(rows)["cosine"]["n"]
    assert set(entry) == {"accuracy", "low", "high", "questions", "kinds"}
    assert entry["kinds"]["hybrid"]["accuracy"] == 1 and entry["kinds"]["positive"]["accuracy"] == 0
