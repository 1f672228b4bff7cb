"""Layers and positions that do not exist: refused where they are known, without effect or NaN where they are traced."""

import dataclasses
from collections.abc import Callable
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import CASES
from fixtures import distance

from jaxid.errors import InputError
from jaxid.interp.forward import forward
from jaxid.interp.generate import generate
from jaxid.interp.interventions import Edit, add, chain, replace
from jaxid.interp.trace import rerun, residuals_at, swap, trace
from jaxid.nn.sites import Capture, clean

EXACT = 1e-5
GQA = CASES[1]
LAYERS = [-5, -1, 0, 2, 3, 6, 2**31 - 1, -(2**31)]
"""The model has layers 0..2."""

LASTS = [26, 19]
POSITIONS = np.array([[17, 19], [27, 19], [17, 20], [-1, -1], [31, 31], [32, -27], [10**6, -(2**31)]])
"""Of two prompts that end at `LASTS`, padded to 32 tokens; pictures end before 13."""


def inside(positions: np.ndarray) -> np.ndarray:
    return (positions >= 0) & (positions <= LASTS)


def vectors(*shape: int) -> np.ndarray:
    return 3 * np.random.default_rng(3).standard_normal((*shape, 32)).astype(np.float32)


def mirrored() -> Any:
    model = fixtures.model(GQA)
    return trace(model, model.prepare([picture[:, ::-1] for picture in fixtures.pictures()], fixtures.QUESTIONS))


# --- traced layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["embed", "resid_pre", "mlp_out", "resid_post"])
def test_traced_layers_of_edits(site: str) -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    at = np.stack([prompts.word("fish"), prompts.last()], axis=1)
    valid = [-1] if site == "embed" else [0, 2]

    def edited(run: Callable[[Edit], Any]) -> Callable[[Any], jax.Array]:
        return lambda layer: run(add(layer, at, vectors(), site=site)).hidden

    again = edited(lambda edit: rerun(model, recorded, edit))
    jitted, swept = jax.jit(again), jax.vmap(again)(np.array(LAYERS))
    full = jax.jit(edited(lambda edit: forward(model, prompts, edit)))
    for row, layer in enumerate(LAYERS):
        expected = full(layer)
        assert distance(jitted(layer), expected) < EXACT, layer
        assert distance(swept[row], expected) < EXACT, layer
        changed = distance(expected, recorded.hidden)
        assert changed > 0.01 if layer in valid else changed < 1e-6, layer


def test_traced_layers_of_chains_and_sweeps() -> None:
    """Parts with layers of their own; also as a sweep in one call."""
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    at, bare = np.array([[0, 9], [3, 4]]), fixtures.model(GQA).prepare(None, list(fixtures.QUESTIONS))
    first, second = np.array([-1, -2, 1, -7, 3]), np.array([-1, 2, 9, 0, 1])

    def edit(first: Any, second: Any, at: np.ndarray) -> Any:
        pushes = vectors(5)
        return chain(add(first, at, pushes, site="embed"), replace(second, at[:, ::-1], pushes[::-1]))

    text = trace(model, bare)
    for batch, source, places in ((bare, text, at), (prompts, recorded, np.array([[13, 19], [14, 19]]))):
        found = jax.jit(lambda a, b, p=places, t=source: rerun(model, t, edit(a, b, p), chunk=2).hidden)(first, second)
        expected = jax.jit(lambda a, b, p=places, x=batch: forward(model, x, edit(a, b, p)).hidden)(first, second)
        assert distance(found, expected) < EXACT
        assert distance(expected[0], source.hidden) > 0.01


def test_traced_layers_of_image_swaps() -> None:
    """Beside an edit."""
    model, prompts, ours, theirs = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA), mirrored()
    places = prompts.image_tokens()
    found = forward(model, theirs.prompts, clean, Capture(("resid_post",), positions=places)).captured["resid_post"]
    edit = add(0, prompts.last(), vectors())
    again = jax.jit(lambda layer: rerun(model, ours, edit, pictures_of=theirs, after=layer).hidden)
    full = jax.jit(lambda layer: forward(model, prompts, chain(replace(layer, places, found[layer]), edit)).hidden)
    nothing = full(-1)
    for layer in LAYERS:
        assert distance(again(layer), full(layer)) < EXACT, layer
        assert (distance(again(layer), nothing) > 1e-3) == (layer == 0), layer


def test_traced_layers_and_positions_of_text_swaps() -> None:
    model, prompts, ours, theirs = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA), mirrored()
    by_layer = jax.jit(lambda layer: rerun(model, ours, swap(theirs, layer, "text")).hidden)
    for layer in LAYERS:
        expected = rerun(model, ours, swap(theirs, layer, "text")).hidden if 0 <= layer < 3 else ours.hidden
        assert distance(by_layer(layer), expected) < EXACT, layer
    by_position = jax.jit(lambda at: rerun(model, ours, swap(theirs, 1, at)).hidden)
    for at in POSITIONS:
        expected, here = np.array(ours.hidden), inside(at)
        if here.any():
            swapped = rerun(model, ours, swap(theirs, 1, np.where(here, at, prompts.last()))).hidden
            expected[here] = np.asarray(swapped)[here]
        assert distance(by_position(at), expected) < EXACT, at


# --- traced positions -----------------------------------------------------------------------------------------------


def test_traced_positions_of_edits() -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    again = jax.jit(lambda at: rerun(model, recorded, add(0, at, vectors())).hidden)
    full = jax.jit(lambda at: forward(model, prompts, add(0, at, vectors())).hidden)
    traced = jax.jit(lambda at: trace(model, prompts, add(0, at, vectors())).hidden)
    swept = jax.vmap(again)(POSITIONS)
    for row, at in enumerate(POSITIONS):
        expected, here = np.array(recorded.hidden), inside(at)
        if here.any():
            known = forward(model, prompts, add(0, np.where(here, at, prompts.last()), vectors())).hidden
            expected[here] = np.asarray(known)[here]
        for found in (again(at), full(at), traced(at), swept[row]):
            assert distance(found, expected) < EXACT, at


def test_traced_positions_that_are_read_give_nan() -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    whole = forward(model, prompts, clean, Capture(("embed", "resid_post"))).captured
    states = np.concatenate([np.asarray(whole["embed"])[None], whole["resid_post"]])
    captured = jax.jit(
        lambda at: forward(model, prompts, clean, Capture(("embed", "resid_post"), positions=at)).captured
    )
    readers = {"at": jax.jit(recorded.at), "residuals": jax.jit(lambda at: residuals_at(model, prompts, at))}
    for at in [*POSITIONS, np.array([12, 19])]:
        here = inside(at)
        expected = np.where(here[:, None], states[:, [0, 1], np.where(here, at, 0)], np.nan)[:, :, None]
        found = captured(at)
        np.testing.assert_allclose(found["embed"], expected[0], atol=1e-5)
        np.testing.assert_allclose(found["resid_post"], expected[1:], atol=1e-5)
        np.testing.assert_allclose(readers["residuals"](at), expected, atol=1e-5)
        expected[:, at < 13] = np.nan  # a trace does not record pictures
        np.testing.assert_allclose(readers["at"](at), expected, atol=1e-5)


def test_generation_under_jit() -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    at, pushes = prompts.last(), 10 * vectors()

    def written(layer: Any, at: Any, every_step: bool = False) -> np.ndarray:
        edit = add(layer, at, pushes)
        return generate(model, recorded, edit, max_new_tokens=3, every_step=every_step).tokens

    unedited = generate(model, prompts, max_new_tokens=3).tokens
    by_layer = jax.jit(lambda layer: written(layer, at))
    for layer in LAYERS[:6]:
        expected = written(layer, at) if 0 <= layer < 3 else unedited
        np.testing.assert_array_equal(by_layer(layer), expected)
    assert (written(0, at) != unedited).any()
    by_position = jax.jit(lambda at: written(0, at))
    np.testing.assert_array_equal(by_position(at), written(0, at))
    for beyond in (at + 1, at + 2, at - 1000, np.array([31, 31])):
        np.testing.assert_array_equal(by_position(beyond), unedited)
    every = jax.jit(lambda at: written(0, at, every_step=True))
    np.testing.assert_array_equal(every(at + 1), written(0, at + 1, every_step=True))


# --- known ones are refused -----------------------------------------------------------------------------------------


REFUSED: list[tuple[Any, str]] = [
    ([-1, -1], r"position -1 is negative: positions count from 0; .* prompts.last\(\)"),
    ([17, 20], "position 20 lies outside prompt 1, which ends at 19; what follows is padding"),
    ([27, 19], "position 27 lies outside prompt 0, which ends at 26"),
    ([[17, 9999], [17, 18]], "position 9999 lies outside prompt 0"),
    ([[25]], "position 25 lies outside prompt 1"),  # stands for all prompts
    ([17, 2**32 + 17], "out of range"),
    ([17, 18, 19], "3 prompts"),
    ([[17]] * 3, "3 prompts"),
    ([17.0, 18.0], "`positions` must hold integers, not float64"),
    ([True, False], "`positions` must hold integers, not bool"),
    (["17", "18"], "`positions` must hold integers"),
    ([[17], [17, 18]], "`positions` cannot be read as an array of integers"),
    (17, r"`positions` must have shape \[B\] or \[B, P\], not \[\]"),
    (np.zeros((2, 0), int), "names no positions"),
]


@pytest.mark.parametrize(("at", "named"), REFUSED, ids=[str(at)[:24] for at, _ in REFUSED])
def test_positions_that_a_prompt_does_not_have(at: Any, named: str) -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    for run in (
        lambda: forward(model, prompts, add(1, at, vectors())),
        lambda: rerun(model, recorded, add(1, at, vectors())),
        lambda: rerun(model, recorded, add([0, 1], at, vectors(2))),
        lambda: trace(model, prompts, add(1, at, vectors())),
        lambda: generate(model, prompts, add(1, at, vectors())),
        lambda: forward(model, prompts, clean, Capture(("embed",), positions=at)),
        lambda: recorded.at(at),
        lambda: residuals_at(model, prompts, at),
        lambda: rerun(model, recorded, swap(recorded, 1, at)),
    ):
        with pytest.raises(InputError, match=named):
            run()


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (-1, "layer -1 is out of range for site 'resid_post': .*the last is model.num_layers - 1"),
        (3, "layer 3 is out of range"),
        ([0, 9], "layer 9 is out of range"),
        (2**32, "out of range"),
        (True, "`layer` must hold integers, not bool"),
        (1.0, "`layer` must hold integers, not float64"),
        ("1", "`layer` must hold integers"),
        (None, "`layer` must hold integers, not object"),
    ],
)
def test_layers_that_a_model_does_not_have(layer: Any, named: str) -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    vector = vectors(*np.shape(layer))
    for run in (
        lambda: forward(model, prompts, add(layer, [17, 17], vector)),
        lambda: rerun(model, recorded, add(layer, [17, 17], vector)),
        lambda: generate(model, recorded, add(layer, [17, 17], vector)),
        lambda: swap(recorded, layer, "text"),
        lambda: swap(recorded, layer, [17, 17]),
    ):
        with pytest.raises(InputError, match=named):
            run()


def test_edits_made_by_hand_are_checked_too() -> None:
    model, prompts, recorded = fixtures.model(GQA), fixtures.prompts(GQA), fixtures.recorded(GQA)
    edit = add(1, [17, 17], vectors())
    for field, value, named in (
        ("layer", np.array(-1, np.int32), "layer -1 is out of range"),
        ("positions", -edit.positions, "position -17 is negative"),
    ):
        wrong = dataclasses.replace(edit, **{field: value})
        for run in (lambda edit: forward(model, prompts, edit), lambda edit: rerun(model, recorded, edit)):
            with pytest.raises(InputError, match=named):
                run(wrong)
    for layer in (-1, 3):
        with pytest.raises(InputError, match=f"layer {layer} is out of range"):
            rerun(model, recorded, pictures_of=recorded, after=layer)


def test_shapes_that_captures_take_as_edits_do() -> None:
    model, prompts = fixtures.model(GQA), fixtures.prompts(GQA)
    whole = np.asarray(forward(model, prompts, clean, Capture(("mlp_out",))).captured["mlp_out"])
    word = prompts.word("fish")
    given: list[Any] = [word, word.tolist(), jnp.asarray(word)[:, None], [[17, 14]]]
    for at, place in zip(given, [word[:, None]] * 3 + [np.array([[17, 14]] * 2)], strict=True):
        found = forward(model, prompts, clean, Capture(("mlp_out",), positions=at)).captured["mlp_out"]
        np.testing.assert_allclose(found, whole[:, [[0], [1]], place], atol=1e-5)


def test_answers_outside_the_vocabulary() -> None:
    output = fixtures.recorded(GQA).output
    entries = fixtures.model(GQA).config.text_config.vocab_size
    given: list[Any] = [np.array([-1, 3]), np.array([entries]), np.array([1.0]), [1.5], [True]]
    for ids in given:
        with pytest.raises(InputError, match="answers"):
            output.logprobs(ids)
    found = jax.jit(output.logprobs)(np.array([-1, 3, entries]))
    assert np.isnan(np.asarray(found)).all(axis=0).tolist() == [True, False, True]
    np.testing.assert_allclose(found[:, 1:2], output.logprobs(np.array([3])), atol=1e-6)
