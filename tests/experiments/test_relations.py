"""Items become batches of one axis: positions, truths and the control pass."""

import dataclasses
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import VOCABULARY

from jaxid.data import coco_spatial
from jaxid.errors import InputError, PromptError, UnknownWordsWarning
from jaxid.experiments import relations
from jaxid.interp.forward import forward

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")  # of the tiny vocabulary


@pytest.mark.parametrize(
    ("relation", "axis"),
    [("left", "horizontal"), ("right", "horizontal"), ("above", "vertical"), ("below", "vertical")],
)
def test_axis_of_each_relation(relation: str, axis: str) -> None:
    item = dataclasses.replace(oracle.items("horizontal")[0], relation=relation)
    assert coco_spatial.axis_of(item) == axis
    assert relation in coco_spatial.ANSWERS[axis]


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(InputError, match="'behind'"):
        coco_spatial.axis_of(dataclasses.replace(oracle.items("horizontal")[0], relation="behind"))


@pytest.mark.parametrize(("axis", "answers"), [("horizontal", ["left", "right"]), ("vertical", ["above", "below"])])
def test_prepared_items(axis: str, answers: list[str]) -> None:
    batch = oracle.batch(axis)
    assert (batch.axis, batch.answers) == (axis, answers)
    assert [answers[truth] for truth in batch.truth] == [item.relation for item in oracle.items(axis)]
    token_ids = np.asarray(batch.prompts.inputs.token_ids)
    found = [[VOCABULARY[token_ids[row, place]] for place in words] for row, words in enumerate(batch.words)]
    assert found == [list(pair) for pair in oracle.PAIRS]


def test_suffix_is_added_to_every_question() -> None:
    batch = relations.prepare(
        fixtures.model(oracle.CASE), oracle.items("vertical"), prompt="{query} Is the star below?"
    )
    assert all(question.endswith("? Is the star below?") for question in batch.prompts.questions)
    # The star of the suffix is not taken for the star that is asked about.
    np.testing.assert_array_equal(batch.words, oracle.batch("vertical").words)


def test_template_holds_query_and_answer_words() -> None:
    text = relations.fill("{query} Answer {First} or {Second}, {first} or {second}.", "A?", ("left", "right"))
    assert text == "A? Answer Left or Right, left or right."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("left", 0),
        ("It is to the Right.", 1),
        ("left or right", -1),
        ("upright", -1),
        ("", -1),
        ("LEFT left", 0),
    ],
)
def test_answer_of_a_text_is_the_only_word_it_holds(text: str, answer: int) -> None:
    assert relations.answer_of(text, ["left", "right"]) == answer


def test_reading_an_answer_in_either_case_adds_the_probabilities() -> None:
    model, batch = fixtures.model(oracle.CASE), oracle.batch("vertical")
    output = forward(model, batch.prompts)
    cased = dataclasses.replace(batch, answers=["is"], case="both")  # the one word with both forms
    lower, upper = (np.exp(output.logprobs([word])) for word in ("is", "Is"))
    np.testing.assert_allclose(np.exp(cased.read(output)), lower + upper, rtol=1e-5)
    np.testing.assert_allclose(np.exp(dataclasses.replace(cased, case="capital").read(output)), upper, rtol=1e-5)
    # A form that has no token is skipped; if neither has one, that is an error.
    np.testing.assert_array_equal(dataclasses.replace(batch, case="both").read(output), output.logprobs(batch.answers))
    with pytest.raises(PromptError, match="Above"):
        dataclasses.replace(batch, case="capital").read(output)


def test_items_must_share_one_axis() -> None:
    model = fixtures.model(oracle.CASE)
    with pytest.raises(InputError, match=r"horizontal.*vertical"):
        relations.prepare(model, [*oracle.items("vertical"), *oracle.items("horizontal")])
    with pytest.raises(InputError, match="none"):
        relations.prepare(model, [])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"object": "star"}, InputError, "item 0 .* same name, 'star'"),
        ({"subject": "st"}, None, ""),
        ({"subject": ""}, PromptError, "does not hold"),
    ],
)
def test_words_that_cannot_be_told(change: dict[str, Any], error: type[Exception] | None, message: str) -> None:
    first, *rest = oracle.items("horizontal")
    items = [dataclasses.replace(first, **change), *rest]
    if error is None:  # an unknown word is still a word of its own
        with pytest.warns(UnknownWordsWarning, match=r"<unk>: 'st'\.$"):
            words = relations.prepare(fixtures.model(oracle.CASE), items).words
        np.testing.assert_array_equal(words, oracle.batch("horizontal").words)
    else:
        with pytest.raises(error, match=message):
            relations.prepare(fixtures.model(oracle.CASE), items)


@pytest.mark.parametrize("pair", [("fish", "star fish"), ("star fish", "fish"), ("star", "star fish")])
def test_names_inside_names(pair: tuple[str, str]) -> None:
    """Each name is read at its own last token, whichever is asked for first."""
    first, *rest = oracle.items("horizontal")
    items = [dataclasses.replace(first, subject=pair[0], object=pair[1]), *rest]
    batch = relations.prepare(fixtures.model(oracle.CASE), items)
    token_ids = np.asarray(batch.prompts.inputs.token_ids)[0]
    for name, place in zip(pair, batch.words[0], strict=True):
        words = ["the", *name.split()]
        assert [VOCABULARY[token] for token in token_ids[place + 1 - len(words) : place + 1]] == words
    np.testing.assert_array_equal(batch.words[1:], oracle.batch("horizontal").words[1:])
