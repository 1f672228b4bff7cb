"""What holds for every model family alike: interventions, causal reuse, generation, compilation."""

import copy
import dataclasses
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
from experiments import oracle
from families import EACH, UNLIKE, Case, over
from fixtures import distance
from flax import nnx
from transformers import GenerationConfig

import jaxid.interp.forward
import jaxid.interp.trace
from jaxid.experiments import belief_swap
from jaxid.experiments.relations import prepare_questions
from jaxid.families.base import Model
from jaxid.ids.extract import activations_at
from jaxid.interp.forward import forward
from jaxid.interp.generate import generate
from jaxid.interp.interventions import add, chain, replace, scale
from jaxid.interp.trace import rerun, residuals_at, trace
from jaxid.nn.sites import SITES, Capture

EXACT = 1e-5
STEPS = 20

each = over(UNLIKE, among=EACH)
"""One model of every way to read pictures."""

unlike = over(UNLIKE, among=UNLIKE)
"""Every kind of decoder, for what happens there only."""

layered = over(("gemma3", "mllama"), among=("gemma3", "mllama"))
"""Decoders whose layers are not alike, for what the positions of tokens do not touch."""


def vectors(case: Case, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, fixtures.model(case).width)).astype(np.float32)


def endless(model: Model) -> Model:
    """The model without stop tokens."""
    processor = copy.copy(model.processor)
    processor.stop_ids = ()
    return dataclasses.replace(model, processor=processor)


def words(case: Case) -> np.ndarray:
    """A word of each prompt, and the place where its answer is read."""
    prompts = fixtures.prompts(case)
    return np.stack([prompts.word(["star", "fish"]), prompts.last()], axis=1)


@unlike
def test_a_trace_is_the_clean_pass(case: Case) -> None:
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    at = words(case)
    clean = forward(model, prompts, capture=Capture(("embed", "resid_post"), positions=jnp.asarray(at)))
    assert distance(recorded.logits, clean.logits) < EXACT
    states = np.concatenate([clean.captured["embed"][None], clean.captured["resid_post"]])
    assert distance(recorded.at(at), states) < EXACT
    assert distance(residuals_at(model, prompts, at), states) < EXACT


@unlike
def test_a_rerun_is_the_full_pass(case: Case) -> None:
    """Edits of every kind at every layer, in a chain; and sweeps equal their members one by one."""
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    layers, at = np.arange(model.num_layers), words(case)
    edit = chain(
        add(layers, at[:, 1:], vectors(case, len(layers)), 2.0),
        replace(layers, at[:, :1], vectors(case, len(layers), seed=1)),
        scale(layers, at, 0.5),
    )
    whole, again = forward(model, prompts, edit).logits, rerun(model, recorded, edit, chunk=2).logits
    assert distance(again, whole) < EXACT
    for layer in (0, model.num_layers - 1):
        single = jax.tree.map(lambda leaf, layer=layer: leaf[layer], edit)
        assert distance(forward(model, prompts, single).logits, whole[layer]) < EXACT
    assert distance(whole, np.broadcast_to(recorded.logits, whole.shape)) > 1e-3


@layered
def test_an_edit_changes_nothing_before_it(case: Case) -> None:
    """Nor do captures change anything, nor an edit by nothing."""
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    layer, at = model.num_layers // 2, words(case)[:, :1]
    push = add(np.array([layer, layer]), at, np.stack([vectors(case), 0 * vectors(case)]), 3.0)
    edited = forward(model, prompts, push, capture=Capture(SITES))
    assert distance(edited.logits[1], recorded.logits) < EXACT
    valid = np.asarray(prompts.inputs.valid)
    before = np.arange(valid.shape[1]) < at
    for site in SITES[1:]:
        ours, plain = edited.captured[site]
        for k in range(model.num_layers):
            if k < layer or (k == layer and site != "resid_post"):
                assert distance(ours[k], plain[k], valid) < EXACT, (site, k)
            assert distance(ours[k], plain[k], valid & before) < EXACT, (site, k)
        assert distance(ours[-1], plain[-1], valid) > 1e-3 or layer == model.num_layers - 1


@unlike
def test_wanted_tokens_are_those_of_the_whole_pass(case: Case) -> None:
    """Of the last block only they and the captured ones are computed, edits in it and its captures among them."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    inputs, at = fixtures.device_inputs(prompts), jnp.asarray(words(case))
    push = add(model.num_layers - 1, words(case)[:, :1], vectors(case), 3.0)

    def run(parameters: Any, wanted: Any) -> Any:
        network = nnx.merge(model.definition, nnx.State(parameters))
        return network(inputs, push, Capture(SITES, positions=at), wanted)

    whole, some = (jax.jit(run)(model.parameters, wanted) for wanted in (None, at[:, ::-1]))
    assert distance(some.hidden, jnp.take_along_axis(whole.hidden, at[:, ::-1, None], axis=1)) < EXACT
    for site in SITES:
        assert some.captured[site].shape == whole.captured[site].shape
        assert distance(some.captured[site], whole.captured[site]) < EXACT, site


@each
def test_tokens_are_those_of_hugging_face(case: Case) -> None:
    """Written from prompts of unequal length in one batch."""
    model, prompts = endless(fixtures.model(case)), fixtures.prompts(case)
    written = generate(model, prompts, max_new_tokens=STEPS)
    network = fixtures.reference(case)
    for row, picture in enumerate(fixtures.shown(case)):
        alone = model.prepare([picture], fixtures.QUESTIONS[row], pad_to_multiple=1)
        settings = GenerationConfig(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        theirs = network.generate(**case.arguments(alone), generation_config=settings)[0, -STEPS:].numpy()
        np.testing.assert_array_equal(written.tokens[row], theirs)


@layered
def test_steered_writing_is_that_of_full_passes(case: Case) -> None:
    """An edited prompt is written on from, token by token, as a full pass over prompt and tokens would."""
    model, prompts = endless(fixtures.model(case)), fixtures.prompts(case)
    edit = add(np.array([0, model.num_layers - 1]), words(case)[:, :1], vectors(case, 2), 4.0)
    written = generate(model, fixtures.recorded(case), edit, max_new_tokens=STEPS)
    assert written.tokens.shape == (2, 2, STEPS)
    assert distance(written.first.logits, forward(model, prompts, edit).logits) < EXACT
    for row in range(2):
        single = jax.tree.map(lambda leaf, row=row: leaf[row], edit)
        longer = prompts.extended(written.tokens[row, :, : STEPS - 1], np.full(2, STEPS - 1))
        expected = np.asarray(forward(model, longer, single).logits).argmax(axis=-1)
        np.testing.assert_array_equal(written.tokens[row, :, -1], expected)


@each
def test_a_swap_of_the_picture(case: Case) -> None:
    """Behind the last block it changes nothing; behind the first it is what the picture's own tokens carry."""
    model, pictures = fixtures.model(case), fixtures.shown(case)
    prompts = model.prepare([pictures[0]] * 2, fixtures.QUESTIONS)
    ours = trace(model, prompts)
    changed = [mirrored(pictures[0])] * 2
    theirs = trace(model, model.prepare(changed, fixtures.QUESTIONS))
    layers = np.arange(model.num_layers)
    swapped = rerun(model, ours, pictures_of=theirs, after=layers).logits
    assert distance(swapped[-1], ours.logits) < EXACT
    if model.config.text_config.cross_attention_layers:  # the picture enters there, not by tokens
        first = min(model.config.text_config.cross_attention_layers)
        expected = np.broadcast_to(theirs.logits, swapped[:first].shape)
        assert distance(swapped[:first], expected) < EXACT
        assert distance(swapped[first:], np.broadcast_to(theirs.logits, swapped[first:].shape)) > 1e-3
        return
    at = prompts.image_tokens()
    everything = forward(model, theirs.prompts, capture=Capture(("resid_post",), positions=jnp.asarray(at)))
    by_hand = replace(layers, at, everything.captured["resid_post"])
    assert distance(swapped, forward(model, prompts, by_hand).logits) < EXACT
    assert distance(swapped[0], ours.logits) > 1e-3


def mirrored(picture: Any) -> Any:
    """A picture, or every frame of a clip, with left and right exchanged."""
    if isinstance(picture, np.ndarray):
        return np.ascontiguousarray(picture[:, ::-1])
    return dataclasses.replace(picture, frames=[mirrored(frame) for frame in picture.frames])


@over((), among=("mllama", "qwen2.5-vl-windows", "video-grid"))
def test_experiments_run(case: Case) -> None:
    """Beliefs are swapped, and IDs extracted, through the public functions that every family shares."""
    model, count = fixtures.model(case), 2
    names, asked, answers = [("star", "fish")] * count, [fixtures.QUESTIONS[0]] * count, ["left", "right"]
    shown = fixtures.shown(case)
    batch = prepare_questions(model, shown, asked, names, axis="horizontal", answers=answers, truth=[0, 1])
    found = belief_swap.swap_beliefs(
        model, batch, oracle.ids(model.num_layers, model.width), layers=[0], max_new_tokens=2
    )
    states = forward(model, batch.prompts, capture=Capture(("resid_post",), positions=jnp.asarray(batch.words)))
    norms = jnp.linalg.norm(states.captured["resid_post"][0].astype(jnp.float32), axis=-1)
    ids, believed = oracle.ids(model.num_layers, model.width), found.control.argmax(axis=-1)
    pushes = np.asarray(belief_swap.directions(ids, "horizontal", believed, np.array([0])))[0]
    vectors = 5 * pushes / np.linalg.norm(pushes, axis=-1, keepdims=True) * np.asarray(norms)[..., None]
    edited = forward(model, batch.prompts, add(0, batch.words, vectors.astype(np.float32)))
    np.testing.assert_allclose(found.steered[0, 0, 0], batch.read(edited), atol=1e-3)
    read = activations_at(model, batch.prompts, batch.prompts.word("star"))
    np.testing.assert_allclose(read[:, 1], states.captured["resid_post"][0][:, 0], atol=1e-3)


@layered
def test_one_program_for_any_layer_place_and_strength(case: Case) -> None:
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    at = words(case)[:, :1]
    sizes = []
    for number in range(3):
        layers = np.array([number % model.num_layers, 0])
        edit = add(layers, at, vectors(case, 2, seed=number), float(number + 1))
        forward(model, prompts, edit)
        rerun(model, recorded, edit, chunk=1)
        programs = (jaxid.interp.forward._run, jaxid.interp.trace._resume)
        sizes.append([getattr(program, "_cache_size")() for program in programs])  # noqa: B009 - not in jax.jit's type
    assert sizes[0] == sizes[1] == sizes[2]
