"""Every activation equals Hugging Face's PyTorch model, through the real loader, in float32."""

import dataclasses
import functools
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from families import CASES, VOCABULARY, Case
from fixtures import distance

from jaxid.engine import forward
from jaxid.models.sites import DECODER_SITES, SITES, Capture, clean

EXACT = 1e-5  # relative to the largest activation; float32 rounding gives about 1e-6


@functools.cache
def everything(case: Case) -> dict[str, Any]:
    model, prompts = fixtures.model(case), fixtures.prompts(case)

    @jax.jit
    def run(model: Any, inputs: Any) -> dict[str, Any]:
        network = model.network()
        hidden, captured = network(inputs, clean, Capture(SITES))
        tower, projector = network.tower(inputs.pixels), network.image_features(inputs.pixels)
        return {"tower": tower, "projector": projector, "norm": hidden, **captured}

    return run(model, fixtures.device_inputs(prompts))


over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@over_cases
@pytest.mark.parametrize("name", ["tower", "projector"])
def test_picture_side(case: Case, name: str) -> None:
    ours, theirs = everything(case)[name], fixtures.clean_record(case)[name]
    for layer in range(len(theirs)):
        assert distance(ours[layer], theirs[layer]) < EXACT, layer


@over_cases
@pytest.mark.parametrize("site", ["embed", "norm"])
def test_ends_of_the_decoder(case: Case, site: str) -> None:
    valid = np.asarray(fixtures.prompts(case).inputs.valid)
    assert distance(everything(case)[site], fixtures.clean_record(case)[site], valid) < EXACT


@over_cases
@pytest.mark.parametrize("site", DECODER_SITES)
def test_every_site_of_every_block(case: Case, site: str) -> None:
    valid = np.asarray(fixtures.prompts(case).inputs.valid)
    ours, theirs = everything(case)[site], fixtures.clean_record(case)[site]
    assert len(ours) == fixtures.model(case).num_layers
    for layer in range(len(theirs)):
        assert distance(ours[layer], theirs[layer], valid) < EXACT, layer


@over_cases
def test_logits(case: Case) -> None:
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    theirs = fixtures.clean_record(case)["logits"][np.arange(len(prompts)), prompts.last()]
    output = forward(model, prompts)
    assert distance(output.logits, theirs) < EXACT
    words = ["left", "right"]
    expected = np.asarray(jax.nn.log_softmax(theirs, axis=-1))[:, [VOCABULARY.index(word) for word in words]]
    np.testing.assert_allclose(output.logprobs(words), expected, atol=2e-5)
    assert np.ptp(expected) > 0.1


@over_cases
def test_the_cases_can_tell_right_from_wrong(case: Case) -> None:
    """Padding, pictures and positions must matter, or the comparisons above would prove nothing."""
    prompts, found = fixtures.prompts(case), fixtures.clean_record(case)
    valid = np.asarray(prompts.inputs.valid)
    assert valid[0].sum() > valid[1].sum() and not valid[0].all()
    first, second = found["projector"]
    assert distance(first, second) > 0.1
    assert np.std(first, axis=0).max() > 0.1 * np.abs(first).max()
    fish = prompts.word("fish")
    assert distance(found["embed"][0, fish[0]], found["embed"][1, fish[1]]) == 0
    assert distance(found["resid_post"][-1, 0, fish[0]], found["resid_post"][-1, 1, fish[1]]) > 0.01


def test_a_token_that_is_not_valid_is_never_read() -> None:
    """Behind the causal mask, padding on the right would go unread anyway; a gap in the middle would not."""
    case = CASES[1]
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    valid = np.array(prompts.inputs.valid)
    valid[np.arange(2), prompts.word("fish")] = False
    gap = dataclasses.replace(prompts, inputs=dataclasses.replace(prompts.inputs, valid=valid))
    theirs = fixtures.record(case, gap)["logits"][np.arange(2), prompts.last()]
    assert distance(forward(model, gap).logits, theirs) < EXACT
    assert distance(forward(model, prompts).logits, theirs) > 0.01


def test_text_alone() -> None:
    import torch

    case = CASES[0]
    model = fixtures.model(case)
    prompts = model.prepare(None, fixtures.QUESTIONS)
    with torch.no_grad():
        theirs = fixtures.reference(case)(
            input_ids=torch.tensor(prompts.inputs.token_ids).long(),
            attention_mask=torch.tensor(prompts.inputs.valid).long(),
        ).logits.numpy()[np.arange(2), prompts.last()]
    assert distance(forward(model, prompts).logits, theirs) < EXACT


def test_one_picture_for_two_questions() -> None:
    case = CASES[0]
    model, (first, _) = fixtures.model(case), fixtures.pictures()
    shared = forward(model, model.prepare(first, fixtures.QUESTIONS))
    apart = forward(model, model.prepare([first, first], fixtures.QUESTIONS))
    assert shared.model is model
    assert distance(shared.logits, apart.logits) < EXACT


def test_batch_and_padding_change_nothing() -> None:
    case = CASES[1]
    model, pictures = fixtures.model(case), fixtures.pictures()
    both = forward(model, fixtures.prompts(case)).logits
    for row, question in enumerate(fixtures.QUESTIONS):
        alone = forward(model, model.prepare(pictures[row], question, pad_to_multiple=32)).logits
        assert distance(alone[0], both[row]) < EXACT


def test_bfloat16_stays_near() -> None:
    """Two digits remain: the rounding of 8 bits of mantissa, over three blocks."""
    case = CASES[1]
    rounded = fixtures.model(case, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded.parameters)} == {"bfloat16"}
    output = forward(rounded, fixtures.prompts(case))
    theirs = fixtures.clean_record(case)["logits"][np.arange(2), fixtures.prompts(case).last()]
    assert output.hidden.dtype.name == "bfloat16" and output.logits.dtype.name == "float32"
    assert 1e-4 < distance(output.logits, theirs) < 0.05
