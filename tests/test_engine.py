"""Forward passes under interventions, against PyTorch hooks and against what must hold by construction."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from families import CASES, Case
from fixtures import distance

import jaxid.interp.forward
from jaxid.errors import InputError
from jaxid.interp.forward import Output, forward
from jaxid.interp.interventions import Edit, add, chain, project_out, replace, scale, stack
from jaxid.nn.sites import DECODER_SITES, SITES, Capture, Site, clean

EXACT = 1e-5
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
GQA = CASES[1]
EVERYTHING = Capture(SITES)


@functools.cache
def run(case: Case) -> Callable[..., Output]:
    """`forward` on the case's prompts; captures every site unless told otherwise."""

    def call(intervention: Any = clean, capture: Capture | None = EVERYTHING, **options: Any) -> Output:
        return forward(fixtures.model(case), fixtures.prompts(case), intervention, capture, **options)

    return call


@functools.cache
def unchanged(case: Case) -> Output:
    return run(case)()


def vectors(case: Case, *shape: int, seed: int = 3) -> np.ndarray:
    width = fixtures.model(case).width
    return np.random.default_rng(seed).standard_normal((*shape, width)).astype(np.float32)


def valid(case: Case) -> np.ndarray:
    return np.asarray(fixtures.prompts(case).inputs.valid)


# --- against PyTorch ------------------------------------------------------------------------------------------------

OPERATIONS: dict[str, tuple[Callable[..., Edit], Callable[..., torch.Tensor]]] = {
    "add": (add, lambda value, vector, strength: value + strength * vector),
    "replace": (replace, lambda value, vector, strength: (1 - strength) * value + strength * vector),
    "scale": (lambda layer, at, _, strength, **site: scale(layer, at, strength, **site), lambda v, _, s: s * v),
    "project_out": (
        project_out,
        lambda value, vector, strength: value - strength * (value @ vector) / (vector @ vector) * vector,
    ),
}


def in_torch(
    operation: str, at: np.ndarray, vector: np.ndarray, strength: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The same edit by a PyTorch hook, row by row."""

    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        for prompt, place in {(prompt, place) for prompt, row in enumerate(at.tolist()) for place in row}:
            value[prompt, place] = OPERATIONS[operation][1](
                value[prompt, place], torch.tensor(vector[prompt]), strength
            )
        return value

    return change


def compare(case: Case, output: Output, record: dict[str, np.ndarray]) -> None:
    for site in SITES:
        assert distance(output.captured[site], record[site], valid(case)) < EXACT, site
    last = record["logits"][np.arange(2), fixtures.prompts(case).last()]
    assert distance(output.logits, last) < EXACT
    assert distance(unchanged(case).logits, last) > 100 * EXACT


REACHED = [(case, "resid_post") for case in CASES] + [
    (GQA, site) for site in ("embed", "resid_pre", "attn_out", "mlp_out")
]


@pytest.mark.parametrize(("case", "site"), REACHED, ids=[f"{case.name}-{site}" for case, site in REACHED])
def test_every_operation_and_site_equals_a_pytorch_hook(case: Case, site: str) -> None:
    """All four operations in one run, in layers and at places of their own; the second prompt's are padded."""
    prompts = fixtures.prompts(case)
    places = prompts.text_tokens()[:, :8].reshape(2, 4, 2)
    places[1, :, 1] = places[1, :, 0]
    layers = [-1] * 4 if site == "embed" else [0, 1, 1, 2]
    edits, hooks = [], []
    for number, (name, (make, _)) in enumerate(OPERATIONS.items()):
        at, vector, strength = places[:, number], 3 * vectors(case, 2, seed=number), 0.5 + number
        edits.append(make(layers[number], at, vector[:, None], strength, site=site))
        hooks.append((site, layers[number], in_torch(name, at, vector, strength)))
    compare(case, run(case)(chain(*edits)), fixtures.record(case, prompts, hooks))


def test_resid_mid_is_between_attention_and_mlp() -> None:
    """No hook reaches it, but adding there is adding to the attention's output."""
    at, vector = fixtures.prompts(GQA).word("fish"), vectors(GQA)
    middle = run(GQA)(add(1, at, vector, site="resid_mid"))
    attention = run(GQA)(add(1, at, vector, site="attn_out"))
    assert distance(middle.logits, attention.logits) < EXACT
    assert distance(middle.captured["resid_mid"], attention.captured["resid_mid"]) < EXACT
    assert distance(middle.captured["attn_out"], attention.captured["attn_out"]) > 0.01
    assert distance(middle.logits, unchanged(GQA).logits) > 0.01


# --- by construction ------------------------------------------------------------------------------------------------


@over_cases
def test_identity_is_the_clean_run_and_capturing_changes_nothing(case: Case) -> None:
    at = fixtures.prompts(case).word("fish")
    nothing = chain(
        chain(),
        add(1, at, vectors(case), 0.0),
        scale(2, at, 1.0, site="attn_out"),
        replace(0, at, vectors(case), 0.0, site="mlp_out"),
        project_out(1, at, 0 * vectors(case)),
    )
    output = run(case)(nothing, None)
    assert output.captured == {}
    assert distance(output.hidden, unchanged(case).hidden) < 1e-6
    assert distance(run(case)(clean, None).logits, unchanged(case).logits) < 1e-6


def test_putting_back_what_was_captured_changes_nothing() -> None:
    at = fixtures.prompts(GQA).text_tokens()
    rows = np.arange(2)[:, None]
    found = {site: np.asarray(unchanged(GQA).captured[site])[2][rows, at] for site in ("resid_pre", "resid_post")}
    back = chain(*(replace(2, at, value, site=site) for site, value in found.items()))
    assert distance(run(GQA)(back, None).hidden, unchanged(GQA).hidden) < 1e-6
    swapped = chain(*(replace(2, at, value[::-1], site=site) for site, value in found.items()))
    assert distance(run(GQA)(swapped, None).hidden[:1], unchanged(GQA).hidden[:1]) > 0.01


def test_captures_are_the_wanted_sites_and_positions() -> None:
    case = GQA
    prompts, whole = fixtures.prompts(case), unchanged(case).captured
    at = np.stack([prompts.last(), prompts.word("fish"), prompts.image_tokens()[:, 3]], axis=1)
    found = run(case)(clean, Capture(("embed", "mlp_out"), jnp.asarray(at))).captured
    assert set(found) == {"embed", "mlp_out"} and set(whole) == set(SITES)
    rows = np.arange(2)[:, None]
    np.testing.assert_allclose(found["embed"], np.asarray(whole["embed"])[rows, at], atol=1e-6)
    np.testing.assert_allclose(found["mlp_out"], np.asarray(whole["mlp_out"])[:, rows, at], atol=1e-5)
    layers, (batch, tokens), width = fixtures.model(case).num_layers, valid(case).shape, fixtures.model(case).width
    assert whole["embed"].shape == (batch, tokens, width)
    assert {whole[site].shape for site in DECODER_SITES} == {(layers, batch, tokens, width)}


def test_captured_sites_add_up() -> None:
    found = {site: np.asarray(value) for site, value in unchanged(GQA).captured.items()}
    np.testing.assert_array_equal(found["resid_pre"][0], found["embed"])
    np.testing.assert_array_equal(found["resid_pre"][1:], found["resid_post"][:-1])
    np.testing.assert_allclose(found["resid_pre"] + found["attn_out"], found["resid_mid"], atol=1e-5)
    np.testing.assert_allclose(found["resid_mid"] + found["mlp_out"], found["resid_post"], atol=1e-5)


@over_cases
def test_an_edit_changes_only_what_lies_above_and_behind(case: Case) -> None:
    prompts, before = fixtures.prompts(case), unchanged(case).captured
    at = prompts.word("fish")
    after = run(case)(add(1, at, vectors(case))).captured
    change = np.abs(np.asarray(after["resid_post"]) - np.asarray(before["resid_post"])).max(axis=-1)
    assert change[0].max() == 0
    for row in range(2):
        assert change[:, row, : at[row]].max() == 0
        assert change[1, row, at[row]] > 0.1 and np.count_nonzero(change[1, row]) == 1
        behind = change[2, row, at[row] + 1 : prompts.last()[row] + 1]
        assert (behind > 1e-4).all()
    assert distance(after["resid_mid"][1], before["resid_mid"][1]) == 0


@over_cases
def test_a_sweep_equals_a_loop(case: Case) -> None:
    """Layers x strengths in one call, in chunks that do not divide the sweep."""
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    layers, strengths = np.array([[0, 1, 2], [2, 1, 0]]), np.array([[0.5, 1, 2], [-1, 0, 3]], np.float32)
    pushes, at = vectors(case, 2, 3), prompts.word("fish")
    output = run(case)(add(layers, at, pushes, strengths), chunk=4)
    assert output.hidden.shape == (2, 3, 2, model.width)
    assert output.captured["resid_post"].shape == (2, 3, model.num_layers, *valid(case).shape, model.width)
    for index in np.ndindex(2, 3):
        alone = run(case)(add(layers[index], at, pushes[index], strengths[index]))
        assert distance(output.hidden[index], alone.hidden) < EXACT
        assert distance(output.captured["resid_post"][index], alone.captured["resid_post"]) < EXACT
    assert distance(output.hidden[0, 0], output.hidden[0, 1]) > 0.01


def test_a_sweep_has_logits_and_equals_vmap() -> None:
    model, prompts = fixtures.model(GQA), fixtures.prompts(GQA)
    sweep = add(np.array([[0, 1, 2]] * 2), prompts.word("fish"), vectors(GQA, 2, 3))
    output = run(GQA)(sweep, None, chunk=100)
    words = ["left", "right"]
    assert output.logits.shape == (2, 3, 2, 40) and output.logprobs(words).shape == (2, 3, 2, 2)
    ids = model.processor.answer_ids(words)
    np.testing.assert_allclose(output.logprobs(words), jax.nn.log_softmax(output.logits)[..., ids], atol=1e-5)
    mapped = jax.vmap(jax.vmap(lambda edit: forward(model, prompts, edit).hidden))(sweep)
    assert distance(mapped, output.hidden) < EXACT


def test_a_sweep_of_chains() -> None:
    case = GQA
    at, pushes = fixtures.prompts(case).word("fish"), vectors(case, 3)
    parts = [chain(add(k, at, pushes[k]), scale(2, at, 0.5, site="mlp_out")) for k in range(3)]
    swept = run(case)(stack(parts), None)
    for k, part in enumerate(parts):
        assert distance(swept.hidden[k], run(case)(part, None).hidden) < EXACT


def test_plain_functions() -> None:
    case = GQA
    at, vector = fixtures.prompts(case).word("fish"), vectors(case)

    def push(site: Site, value: jax.Array) -> jax.Array:
        if site.name != "resid_post":
            return value
        here = (site.positions == jnp.asarray(at)[:, None]) & (site.layer == 1)
        return jnp.where(here[..., None], value + vector, value)

    edited = run(case)(add(1, at, vector), None)
    assert distance(run(case)(push, None).hidden, edited.hidden) < 1e-6
    assert distance(run(case)(chain(push), None).hidden, edited.hidden) < 1e-6
    assert distance(run(case)(jax.tree_util.Partial(push), None).hidden, edited.hidden) < 1e-6


def compiled_passes() -> int:
    return getattr(jaxid.interp.forward._run, "_cache_size")()  # noqa: B009 - jax.jit's type does not list it


def test_one_compile_for_any_layer_position_vector_and_strength() -> None:
    case = GQA
    prompts = fixtures.prompts(case)
    run(case)(replace(0, prompts.word("fish"), vectors(case), 1.0, site="mlp_out"), None)
    before = compiled_passes()
    for layer, strength, seed in ((1, 2.0, 1), (2, -3, 2), (np.int64(0), np.float64(0.5), 3)):
        run(case)(replace(layer, prompts.last(), vectors(case, seed=seed), strength, site="mlp_out"), None)
    other = fixtures.model(case).prepare(fixtures.pictures()[::-1], ["Where is the star?", fixtures.QUESTIONS[0]])
    assert other.inputs.token_ids.shape == prompts.inputs.token_ids.shape
    forward(fixtures.model(case), other, replace(0, other.last(), vectors(case), 1.0, site="mlp_out"))
    assert compiled_passes() == before
    run(case)(
        replace(0, prompts.last(), vectors(case, 2), 1.0, site="mlp_out"), None
    )  # a vector per prompt: other shapes
    assert compiled_passes() == before + 1


def test_gradient_with_respect_to_a_steering_vector() -> None:
    case = GQA
    model, prompts = fixtures.model(case), fixtures.prompts(case)
    at, start, direction = prompts.word("fish"), jnp.asarray(vectors(case)), jnp.asarray(vectors(case, seed=8))

    @jax.jit
    def gap(vector: jax.Array) -> jax.Array:
        left, right = jnp.moveaxis(forward(model, prompts, add(1, at, vector, 2.0)).logprobs(np.array([14, 16])), -1, 0)
        return (left - right).sum()

    slope = jax.jit(jax.grad(gap))(start)
    assert slope.shape == start.shape and np.isfinite(slope).all()
    step = 1e-2
    finite = (gap(start + step * direction) - gap(start - step * direction)) / (2 * step)
    assert abs(float(finite)) > 0.01
    assert float(slope @ direction) == pytest.approx(float(finite), rel=0.01)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda at, v: add(3, at, v), "layer 3 is out of range for site 'resid_post': .* has layers 0..2"),
        (lambda at, v: add(-1, at, v), "layer -1 is out of range for site 'resid_post'"),
        (lambda at, v: scale([0, 1, 9], at, 1.0), "layer 9 is out of range"),
        (lambda at, v: add(0, at, v, site="embed"), "layer 0 is out of range for site 'embed': .* layer -1"),
        (lambda at, v: chain(scale(0, at, 1.0), chain(scale(7, at, 1.0))), "layer 7 is out of range"),
        (lambda at, v: add(1, [at[0]] * 3, v), "the edit is for 3 prompts, but the batch holds 2"),
        (lambda at, v: add(1, at, v[:-1]), "the edit's vector has width 31, the model's residual stream 32"),
        (lambda at, v: add(1, at, v[:1]), "the edit's vector has width 1, the model's residual stream 32"),
        (lambda at, v: add(1, at + 1000, v), "position 10.. lies outside prompt 0, which ends at 26"),
    ],
)
def test_edits_that_do_not_fit(make: Callable[..., Any], named: str) -> None:
    edit = make(fixtures.prompts(GQA).word("fish"), vectors(GQA))
    with pytest.raises(InputError, match=named):
        run(GQA)(edit)


def test_unknown_sites_cannot_be_captured() -> None:
    with pytest.raises(InputError, match=re.escape("unknown sites ['logits', 'resid']; known: embed, resid_pre")):
        run(GQA)(clean, Capture(("resid", "embed", "logits")))


def test_pictures_of_the_wrong_size_are_refused() -> None:
    prompts = fixtures.prompts(GQA)
    pixels = np.zeros((2, 3, 40, 30), np.float32)
    wrong = dataclasses.replace(prompts, inputs=dataclasses.replace(prompts.inputs, pixels=pixels))
    with pytest.raises(InputError, match="40 x 30 pixels, the tower takes 30 x 30"):
        forward(fixtures.model(GQA), wrong)
