"""The mirror swap against PyTorch, and at its ends: everything swapped, nothing that counts swapped."""

import dataclasses
import functools

import fixtures
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from families import VOCABULARY

from jaxid.experiments import activation_swap
from jaxid.experiments.activation_swap import swap_score
from jaxid.experiments.relations import RelationBatch
from jaxid.interp.forward import forward
from jaxid.interp.interventions import replace
from jaxid.nn.sites import Capture
from jaxid.prompts.processor import Prompts


@functools.cache
def mirrored() -> Prompts:
    """The control items' questions about pictures reversed left to right."""
    batch = oracle.batch("horizontal")
    pictures = [np.ascontiguousarray(np.asarray(item.picture)[:, ::-1]) for item in oracle.items("horizontal")]
    return fixtures.model(oracle.CASE).prepare(pictures, list(batch.prompts.questions))


@functools.cache
def found() -> activation_swap.Patched:
    return activation_swap.swap_activations(
        fixtures.model(oracle.CASE), oracle.batch("horizontal"), mirrored(), chunk=2
    )


def token_sets(batch: RelationBatch) -> dict[str, np.ndarray]:
    """Positions of what is swapped, by name."""
    positions = (batch.prompts.image_tokens(), batch.prompts.text_tokens(), batch.words[:, :2])
    return dict(zip(activation_swap.TOKEN_SETS, positions, strict=True))


def scores() -> dict[str, np.ndarray]:
    return found().scores


def test_score_by_hand() -> None:
    control, target = jnp.array([[-1.0, -2.0]]), jnp.array([[-3.0, -1.0]])
    np.testing.assert_array_equal(swap_score(control, control, target), [[0, 0]])
    np.testing.assert_array_equal(swap_score(control, target, target), [[1, 1]])
    np.testing.assert_array_equal(swap_score(control, jnp.array([[-2.0, -1.5]]), target), [[0.5, 0.5]])
    # Nothing to carry over: neither 0 / 0 nor 1 / 0 may come out.
    np.testing.assert_array_equal(swap_score(control, jnp.array([[-1.0, -9.0]]), control), [[0, 0]])


def test_mirrored_prompts_differ_in_the_pixels_alone() -> None:
    control, changed = oracle.batch("horizontal").prompts.inputs, mirrored().inputs
    assert control.pixels is not None and changed.pixels is not None
    np.testing.assert_allclose(changed.pixels, np.asarray(control.pixels)[..., ::-1], atol=1e-6)
    np.testing.assert_array_equal(changed.token_ids, control.token_ids)


def test_token_sets_cover_the_prompt_after_the_picture() -> None:
    batch = oracle.batch("horizontal")
    sets = token_sets(batch)
    assert tuple(sets) == ("image", "text", "words")
    for row, token_ids in enumerate(np.asarray(batch.prompts.inputs.token_ids)):
        here = {name: [int(place) for place in at[row]] for name, at in sets.items()}
        picture = np.flatnonzero(token_ids == VOCABULARY.index("<image>")).tolist()
        assert here["image"] == picture
        last = int(np.asarray(batch.prompts.inputs.last)[row])
        assert sorted(set(here["text"])) == list(range(picture[-1] + 1, last + 1))
        assert [VOCABULARY[token_ids[place]] for place in here["words"]] == list(oracle.PAIRS[row])


def test_scores_equal_pytorch_edit_by_edit() -> None:
    batch = oracle.batch("horizontal")
    record = fixtures.record(oracle.CASE, mirrored())
    control = oracle.torch_logprobs(batch)
    target = oracle.torch_logprobs(dataclasses.replace(batch, prompts=mirrored()))
    np.testing.assert_allclose(found().control, control, atol=1e-4)
    np.testing.assert_allclose(found().intervened, target, atol=1e-4)
    carried = np.abs(control - target)
    assert carried.max() > 0.05
    for name, at in token_sets(batch).items():
        assert scores()[name].shape == (oracle.LAYERS, 4, 2)
        for layer in range(oracle.LAYERS):
            edit = oracle.replacing(layer, at, record["resid_post"][layer])
            patched = oracle.torch_logprobs(batch, [edit])
            # Multiplied out: where little is carried over, the quotient magnifies rounding.
            product = scores()[name][layer] * (control - target)
            np.testing.assert_allclose(product, control - patched, atol=2e-4)


def test_chosen_layers_are_those_of_the_whole_sweep() -> None:
    chosen = [2, 0, 0]  # as many as there are: the same programs
    some = activation_swap.swap_activations(
        fixtures.model(oracle.CASE), oracle.batch("horizontal"), mirrored(), layers=chosen, chunk=2
    )
    np.testing.assert_array_equal(some.layers, chosen)
    np.testing.assert_allclose(some.patched, found().patched[:, chosen], atol=1e-5)


def test_only_the_text_counts_after_the_last_block() -> None:
    np.testing.assert_allclose(scores()["image"][-1], 0, atol=1e-3)
    np.testing.assert_allclose(scores()["words"][-1], 0, atol=1e-3)
    np.testing.assert_allclose(scores()["text"][-1], 1, atol=1e-3)
    assert np.abs(scores()["image"][0]).max() > 0.01


@pytest.mark.parametrize("of_mirror", [True, False])
def test_all_tokens_swapped_at_any_layer_give_the_other_run(of_mirror: bool) -> None:
    model, batch = fixtures.model(oracle.CASE), oracle.batch("horizontal")
    sets = token_sets(batch)
    everywhere = np.concatenate([sets["image"], sets["text"]], axis=1)
    source = mirrored() if of_mirror else batch.prompts
    captured = forward(model, source, capture=Capture(("resid_post",), positions=jnp.asarray(everywhere))).captured
    edit = replace(layer=jnp.arange(oracle.LAYERS), positions=everywhere, vector=captured["resid_post"])
    control, target = (forward(model, prompts).logprobs(batch.answers) for prompts in (batch.prompts, mirrored()))
    patched = forward(model, batch.prompts, edit, chunk=2).logprobs(batch.answers)
    np.testing.assert_allclose(swap_score(control, patched, target), float(of_mirror), atol=1e-2)
    np.testing.assert_allclose(
        patched, np.broadcast_to(target if of_mirror else control, patched.shape), rtol=0, atol=1e-4
    )
