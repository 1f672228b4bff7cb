"""Every activation equals Hugging Face's PyTorch model, through the real loader, in float32."""

import dataclasses
import functools

import fixtures
import jax
import numpy as np
import pytest
from families import CASES, EACH, QUICK, Case, over
from fixtures import distance

from jaxid.interp.forward import Output, forward
from jaxid.nn.sites import DECODER_SITES, SITES, Capture

EXACT = 2e-5  # relative to the largest activation; float32 rounding gives 1e-6 to 1e-5


@functools.cache
def passed(case: Case) -> Output:
    """The clean pass, with its values at every site."""
    return forward(fixtures.model(case), fixtures.prompts(case), capture=Capture(SITES))


over_cases = over([*QUICK, *(case.name for case in CASES)])

each = over((*QUICK, "llava-plain"), among=EACH)
"""One model of every way to read pictures, for what a model's variants do not touch."""

ROUNDED = ("gemma3", "llava-plain", "mllama", "qwen2.5-vl-windows", "video-grid")
"""Every kind of decoder, behind unlike towers."""

POOLED = ("onevision-pictures-shrunk", "video-frame-pairs-tied")
"""Models that pool a picture's tokens in further ways, by arrays of numbers or by means."""


@over_cases
def test_picture_side(case: Case) -> None:
    model, theirs, batch = fixtures.model(case), fixtures.clean_record(case), fixtures.prompts(case)
    run = jax.jit(lambda model, inputs: case.picture_side(model.network(), inputs))
    ours = run(model, fixtures.device_inputs(batch))
    for layer in range(len(theirs["tower"])):
        states = case.alike("tower", np.asarray(ours["tower"][layer]), theirs["tower"][layer], batch)
        assert distance(*states) < EXACT, layer
    assert len(ours["tower"]) >= len(theirs["tower"]) - 1
    assert distance(*case.alike("projector", np.asarray(ours["projector"]), theirs["projector"], batch)) < EXACT


@over_cases
def test_ends_of_the_decoder(case: Case) -> None:
    prompts, ours, theirs = fixtures.prompts(case), passed(case), fixtures.clean_record(case)
    assert distance(ours.captured["embed"], theirs["embed"], np.asarray(prompts.inputs.valid)) < EXACT
    assert distance(ours.hidden, theirs["norm"][np.arange(len(prompts)), prompts.last()]) < EXACT


@over_cases
@pytest.mark.parametrize("site", DECODER_SITES)
def test_every_site_of_every_block(case: Case, site: str) -> None:
    valid = np.asarray(fixtures.prompts(case).inputs.valid)
    ours, theirs = passed(case).captured[site], fixtures.clean_record(case)[site]
    assert len(ours) == fixtures.model(case).num_layers
    for layer in range(len(theirs)):
        assert distance(ours[layer], theirs[layer], valid) < EXACT, layer


@over_cases
def test_logits(case: Case) -> None:
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    theirs = fixtures.clean_record(case)["logits"][np.arange(len(prompts)), prompts.last()]
    output = passed(case)
    assert distance(output.logits, theirs) < EXACT
    words = ["left", "right"]
    expected = np.asarray(jax.nn.log_softmax(theirs, axis=-1))[:, model.processor.answer_ids(words)]
    np.testing.assert_allclose(output.logprobs(words), expected, atol=2e-5)
    assert np.ptp(expected) > 0.1


@over_cases
def test_the_cases_can_tell_right_from_wrong(case: Case) -> None:
    """Padding, pictures and positions must matter, or the comparisons above would prove nothing."""
    prompts, found = fixtures.prompts(case), fixtures.clean_record(case)
    valid = np.asarray(prompts.inputs.valid)
    assert valid[0].sum() != valid[1].sum() and not valid.all()
    features = found["projector"].reshape(-1, found["projector"].shape[-1])
    assert np.std(features, axis=0).max() > 0.03 * np.abs(features).max()
    fish = prompts.word("fish")
    assert distance(found["embed"][0, fish[0]], found["embed"][1, fish[1]]) == 0
    assert distance(found["resid_post"][-1, 0, fish[0]], found["resid_post"][-1, 1, fish[1]]) > 0.01


def test_a_token_that_is_not_valid_is_never_read() -> None:
    """The causal mask alone would hide padding on the right, but not a gap in the middle."""
    case = CASES[1]
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    valid = np.array(prompts.inputs.valid)
    valid[np.arange(2), prompts.word("fish")] = False
    gap = dataclasses.replace(prompts, inputs=dataclasses.replace(prompts.inputs, valid=valid))
    theirs = fixtures.record(case, gap)["logits"][np.arange(2), prompts.last()]
    assert distance(forward(model, gap).logits, theirs) < EXACT
    assert distance(forward(model, prompts).logits, theirs) > 0.01


@each
def test_text_alone(case: Case) -> None:
    model = fixtures.model(case)
    prompts = model.prepare(None, fixtures.QUESTIONS)
    theirs = fixtures.record(case, prompts)
    valid = np.asarray(prompts.inputs.valid)
    output = forward(model, prompts, capture=Capture(("resid_post",)))
    assert distance(output.logits, theirs["logits"][np.arange(2), prompts.last()]) < EXACT
    # Without a picture, blocks that would read it are not even called.
    crossing = model.config.text_config.cross_attention_layers
    called = [layer for layer in range(model.num_layers) if layer not in crossing]
    assert len(theirs["resid_post"]) == len(called)
    for layer, expected in zip(called, theirs["resid_post"], strict=True):
        assert distance(output.captured["resid_post"][layer], expected, valid) < EXACT, layer


@each
def test_two_pictures_in_one_prompt(case: Case) -> None:
    """In two prompts, in both orders, so that a mix-up would show."""
    model, (first, second) = fixtures.model(case), fixtures.shown(case)
    prompts = model.prepare([[first, second], [second, first]], fixtures.QUESTIONS)
    theirs = fixtures.record(case, prompts)["logits"][np.arange(2), prompts.last()]
    assert distance(forward(model, prompts).logits, theirs) < EXACT
    swapped = model.prepare([[second, first], [first, second]], fixtures.QUESTIONS)
    assert distance(forward(model, swapped).logits, theirs) > 0.01


@each
def test_batch_padding_and_a_shared_picture_change_nothing(case: Case) -> None:
    """The second prompt is the shorter one."""
    model, (_, second) = fixtures.model(case), fixtures.shown(case)
    shared = forward(model, model.prepare(second, fixtures.QUESTIONS))
    assert shared.model is model
    for row, question in enumerate(fixtures.QUESTIONS):
        alone = forward(model, model.prepare(second, question, pad_to_multiple=32)).logits
        assert distance(shared.logits[row], alone[0]) < EXACT
    assert distance(alone[0], passed(case).logits[1]) < EXACT


@over(ROUNDED, among=(*ROUNDED, *POOLED))
def test_bfloat16_stays_near(case: Case) -> None:
    """Two digits remain: the rounding of 8 bits of mantissa, over a few blocks."""
    rounded = fixtures.model(case, "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(rounded.parameters)} == {"bfloat16"}
    output = forward(rounded, fixtures.prompts(case))
    theirs = fixtures.clean_record(case)["logits"][np.arange(2), fixtures.prompts(case).last()]
    assert output.hidden.dtype.name == "bfloat16" and output.logits.dtype.name == "float32"
    assert 1e-4 < distance(output.logits, theirs) < 0.1
