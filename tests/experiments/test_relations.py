"""Items become batches of one axis: positions, truths and the control pass."""

import dataclasses
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import VOCABULARY

from jaxid.errors import InputError, PromptError
from jaxid.experiments import relations


@pytest.mark.parametrize(
    ("relation", "axis"),
    [("left", "horizontal"), ("right", "horizontal"), ("above", "vertical"), ("below", "vertical")],
)
def test_axis_of_each_relation(relation: str, axis: str) -> None:
    item = dataclasses.replace(oracle.items("horizontal")[0], relation=relation)
    assert relations.axis_of(item) == axis
    assert relation in relations.ANSWERS[axis]


def test_unknown_relation_is_refused() -> None:
    with pytest.raises(InputError, match="'behind'"):
        relations.axis_of(dataclasses.replace(oracle.items("horizontal")[0], relation="behind"))


@pytest.mark.parametrize(("axis", "answers"), [("horizontal", ["left", "right"]), ("vertical", ["above", "below"])])
def test_prepared_items(axis: str, answers: list[str]) -> None:
    batch = oracle.batch(axis)
    assert (batch.axis, batch.answers) == (axis, answers)
    assert [answers[truth] for truth in batch.truth] == [item.relation for item in oracle.items(axis)]
    token_ids = np.asarray(batch.prompts.inputs.token_ids)
    found = [[VOCABULARY[token_ids[row, place]] for place in words] for row, words in enumerate(batch.words)]
    assert found == [list(pair) for pair in oracle.PAIRS]
    assert [item.image_id for item in batch.items] == [0, 1, 2, 3]


def test_suffix_is_added_to_every_question() -> None:
    batch = relations.prepare(fixtures.model(oracle.CASE), oracle.items("vertical"), suffix=" Is the star below?")
    assert all(question.endswith("? Is the star below?") for question in batch.prompts.questions)
    # The star of the suffix is not taken for the star that is asked about.
    np.testing.assert_array_equal(batch.words, oracle.batch("vertical").words)


def test_control_pass_equals_pytorch() -> None:
    batch = oracle.batch("vertical")
    logprobs, residuals = relations.control(fixtures.model(oracle.CASE), batch)
    np.testing.assert_allclose(logprobs, oracle.torch_logprobs(batch), atol=1e-4)
    expected = oracle.torch_residuals(batch)[:, np.arange(4)[:, None], batch.words]
    assert residuals.shape == expected.shape == (oracle.LAYERS, 4, 2, oracle.WIDTH)
    assert fixtures.distance(residuals, expected) < 1e-5


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
        words = relations.prepare(fixtures.model(oracle.CASE), items).words
        np.testing.assert_array_equal(words, oracle.batch("horizontal").words)
    else:
        with pytest.raises(error, match=message):
            relations.prepare(fixtures.model(oracle.CASE), items)
