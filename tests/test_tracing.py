"""What a trace holds, and reruns under jit, vmap and grad; equality with full passes is in test_rerun.py."""

import dataclasses
import functools
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

import jaxid.interp.trace
from jaxid.checkpoints.loading import load
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.interp.forward import Output, forward
from jaxid.interp.generate import generate
from jaxid.interp.interventions import add, chain, project_out, scale
from jaxid.interp.trace import Trace, rerun, residuals_at, trace
from jaxid.nn.sites import Capture, clean
from jaxid.prompts.processor import Prompts

EXACT = 1e-5
over_cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
GQA = CASES[1]


@pytest.fixture
def model() -> Model:
    return fixtures.model(GQA)


@pytest.fixture
def prompts() -> Prompts:
    return fixtures.prompts(GQA)


@pytest.fixture
def recorded() -> Trace:
    return fixtures.recorded(GQA)


@functools.cache
def whole(case: Case) -> Output:
    """The full pass over `prompts`."""
    return forward(fixtures.model(case), fixtures.prompts(case), clean, Capture(("embed", "resid_post")))


def residuals(case: Case, at: np.ndarray) -> np.ndarray:
    """Embeddings and what leaves every block of the full pass, at places [B, P]."""
    captured = {site: np.asarray(value) for site, value in whole(case).captured.items()}
    stacked = np.concatenate([captured["embed"][None], captured["resid_post"]])
    return stacked[:, np.arange(at.shape[0])[:, None], at]


def vectors(*shape: int, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, 32)).astype(np.float32)


@pytest.fixture
def no_full_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rerun that falls back fails."""
    monkeypatch.setattr(jaxid.interp.trace, "forward", None)


quickly = pytest.mark.usefixtures("no_full_pass")


# --- traces ---------------------------------------------------------------------------------------------------------


@over_cases
def test_a_trace_is_the_full_pass(case: Case) -> None:
    model, prompts, recorded = fixtures.model(case), fixtures.prompts(case), fixtures.recorded(case)
    assert distance(recorded.hidden, whole(case).hidden) < EXACT
    assert distance(recorded.logits, whole(case).logits) < EXACT
    words = ["left", "right"]
    np.testing.assert_allclose(recorded.logprobs(words), whole(case).logprobs(words), atol=1e-4)
    assert rerun(model, recorded).hidden is recorded.hidden
    at = prompts.text_tokens()
    assert distance(recorded.at(at), residuals(case, at)) < EXACT
    assert distance(recorded.at(prompts.last()), residuals(case, prompts.last()[:, None])) < EXACT


@over_cases
def test_a_trace_is_as_small_as_it_says(case: Case) -> None:
    recorded, config = fixtures.recorded(case), fixtures.model(case).config.text_config
    prompts, layers = recorded.prompts, config.num_hidden_layers
    batch, tokens = prompts.inputs.token_ids.shape
    text = tokens - prompts.text_start().min()
    heads = (layers, batch, config.num_key_value_heads, tokens, config.head_dim)
    shapes = [(batch, 32), heads, heads, (layers + 1, batch, text, 32)]
    parameters = len(jax.tree.leaves(recorded.model))
    assert [leaf.shape for leaf in jax.tree.leaves(recorded)[:-parameters]] == shapes
    assert {leaf.dtype for leaf in jax.tree.leaves(recorded)} == {jnp.dtype("float32")}
    assert not recorded.edited


@over_cases
def test_keys_and_values_are_those_of_pytorch(case: Case) -> None:
    recorded, inputs = fixtures.recorded(case), fixtures.prompts(case).inputs
    with torch.no_grad():
        output = fixtures.reference(case)(
            input_ids=torch.tensor(np.asarray(inputs.token_ids)).long(),
            attention_mask=torch.tensor(np.asarray(inputs.valid)).long(),
            pixel_values=torch.tensor(np.asarray(inputs.pixels)),
            use_cache=True,
        )
    (cache,) = fixtures.carried(output).values()
    valid = np.asarray(inputs.valid)
    for ours, name in ((recorded.keys, "keys"), (recorded.values, "values")):
        theirs = torch.stack([getattr(layer, name) for layer in cache.layers]).numpy()
        assert distance(np.moveaxis(ours, 2, 3)[:, valid], np.moveaxis(theirs, 2, 3)[:, valid]) < EXACT


def test_residuals_at_any_place(model: Model, prompts: Prompts) -> None:
    """Pictures' tokens too, in any order and repeated."""
    at = np.array([[26, 3, 13, 12, 0, 3], [19, 19, 11, 2, 7, 1]])
    assert distance(residuals_at(model, prompts, at), residuals(GQA, at)) < EXACT


def test_an_edited_trace(model: Model, prompts: Prompts) -> None:
    """Answers and activations are the edited pass's; what would leave its edit out is refused."""
    edit = chain(add(1, prompts.word("fish"), vectors(), 2.0), add(0, prompts.image_tokens(), vectors(seed=4)))
    edited = trace(model, prompts, edit)
    full = forward(model, prompts, edit, Capture(("resid_post",)))
    assert distance(edited.hidden, full.hidden) < EXACT
    assert distance(edited.hidden, whole(GQA).hidden) > 0.01
    at = prompts.text_tokens()
    found = np.asarray(full.captured["resid_post"])[:, np.arange(2)[:, None], at]
    assert distance(edited.at(at)[1:], found) < EXACT
    assert edited.edited and distance(rerun(model, edited).hidden, full.hidden) < EXACT
    with pytest.raises(InputError, match="the trace is of an edited pass; chain its edit and this one"):
        rerun(model, edited, edit)


def test_bfloat16_reruns_stay_as_close_as_full_passes() -> None:
    """To float32 as close as a full pass in bfloat16 (by a factor of 2), and to that pass within 3 %."""
    model, prompts = fixtures.model(GQA, "bfloat16"), fixtures.prompts(GQA)
    recorded = trace(model, prompts)
    assert {leaf.dtype for leaf in jax.tree.leaves(recorded)} == {jnp.dtype("bfloat16")}
    edit = chain(add(np.arange(3), prompts.word("fish"), vectors(3), 2.0), scale(np.arange(3), prompts.last(), 0.5))
    again, full = rerun(model, recorded, edit), forward(model, prompts, edit)
    exact = forward(fixtures.model(GQA), prompts, edit)
    assert again.hidden.dtype == jnp.bfloat16 and again.logits.dtype == jnp.float32
    assert distance(again.hidden, full.hidden) < 0.03
    assert distance(again.hidden, exact.hidden) < 2 * distance(full.hidden, exact.hidden) < 0.1


# --- one program ----------------------------------------------------------------------------------------------------


def compiled() -> int:
    return getattr(jaxid.interp.trace._resume, "_cache_size")()  # noqa: B009 - jax.jit's type does not list it


@quickly
def test_one_program_for_any_layer_vector_strength_and_word(model: Model, prompts: Prompts, recorded: Trace) -> None:
    at = prompts.word("fish")

    def run(layer: Any, at: np.ndarray, strength: float, seed: int) -> jax.Array:
        return rerun(model, recorded, add(layer, at, vectors(seed=seed), strength, site="attn_out")).hidden

    first = run(0, at, 1.0, 0)
    before = compiled()
    for layer, strength, seed in ((1, 2.0, 1), (2, -3, 2), (np.int64(0), np.float64(0.5), 3)):
        assert distance(run(layer, at, strength, seed), first) > 1e-4
    for places in (at + 1, np.array([at[0], at[1] + 1]), np.stack([at], axis=1)):
        run(1, places, 1.0, 0)
    questions = ["Is the cat to the right or left of the star?", "Where is the star?"]
    other = trace(model, model.prepare(fixtures.pictures()[::-1], questions))
    rerun(model, other, add(1, other.prompts.word("star"), vectors(), 1.0, site="attn_out"))
    assert compiled() == before


@quickly
def test_first_layers_of_a_sweep_are_data(model: Model, prompts: Prompts, recorded: Trace) -> None:
    """With a chunk of one's own too."""
    at = prompts.last()
    sweeps = ([0, 1, 2, 2], [2, 1, 0, 0], [2, 2, 2, 2], [0, 0, 0, 0])
    results = []
    before = compiled()
    for layers in sweeps:
        results.append(rerun(model, recorded, scale(np.array(layers), at, -1.0, site="mlp_out"), chunk=3).hidden)
    assert compiled() == before + 1
    by_layer = np.asarray(results[0])[:3]
    for layers, result in zip(sweeps, results, strict=True):
        assert distance(result, by_layer[layers]) < 1e-6
    assert distance(by_layer[0], by_layer[1]) > 1e-3


def test_few_shapes_for_all_places() -> None:
    """Lengths are even and prefixes multiples of 8, so that the places of a text need few programs."""
    recorded = fixtures.recorded(CASES[0])
    start, last = recorded.prompts.text_start()[0], recorded.prompts.last()
    plans = [jaxid.interp.trace.plan(recorded, np.array([place])) for place in range(start, last[0] + 5)]
    shapes = {(found.prefix, found.length) for found in plans if found is not None}
    assert None not in plans and len(shapes) <= 8
    assert all(found.prefix >= found.first.max() for found in plans if found is not None)
    assert all((found.first + found.length > last).all() for found in plans if found is not None)
    assert jaxid.interp.trace.plan(recorded, np.array([start, start - 1])) is None


# --- jit, vmap, grad ------------------------------------------------------------------------------------------------


@quickly
def test_under_jit(model: Model, prompts: Prompts, recorded: Trace) -> None:
    """Model and trace as arguments or closed over; layers may be traced, places not."""
    at, pushes, layers = prompts.word("fish"), vectors(3), np.array([2, 0, 1])

    def run(model: Model, trace: Trace, layer: Any, vector: Any) -> jax.Array:
        return rerun(model, trace, add(layer, at, vector, 2.0)).logits

    wanted = run(model, recorded, layers, pushes)
    passed = jax.jit(run)
    assert distance(passed(model, recorded, layers, pushes), wanted) < EXACT
    assert distance(passed(model, recorded, layers[::-1], pushes[::-1]), wanted[::-1]) < EXACT
    assert getattr(passed, "_cache_size")() == 1  # noqa: B009
    closed = jax.jit(lambda vector: run(model, recorded, layers, vector))
    assert distance(closed(pushes), wanted) < EXACT


def test_traced_places_fall_back(model: Model, prompts: Prompts, recorded: Trace) -> None:
    at = prompts.word("fish")
    found = jax.jit(lambda at: rerun(model, recorded, add(1, at, vectors())).hidden)(at)
    assert distance(found, rerun(model, recorded, add(1, at, vectors())).hidden) < EXACT
    whole_edit = jax.jit(lambda edit: rerun(model, recorded, edit).hidden)(add(1, at, vectors()))
    assert distance(whole_edit, found) < 1e-6


@quickly
def test_vmap_is_a_loop(model: Model, prompts: Prompts, recorded: Trace) -> None:
    at, pushes, layers = prompts.word("fish"), vectors(3), np.array([2, 0, 1])

    def run(layer: Any, vector: Any) -> jax.Array:
        return rerun(model, recorded, project_out(layer, at, vector)).hidden

    looped = np.stack([run(layer, push) for layer, push in zip(layers, pushes, strict=True)])
    assert distance(jax.vmap(run)(layers, pushes), looped) < EXACT
    assert distance(jax.vmap(functools.partial(run, 1))(pushes)[2], looped[2]) < EXACT


@quickly
def test_gradients_are_those_of_the_full_pass(model: Model, prompts: Prompts, recorded: Trace) -> None:
    """Of a log-probability gap, over a sweep whose rows begin in different blocks."""
    at, layers = np.stack([prompts.word("fish"), prompts.last()], axis=1), np.array([2, 0, 1])
    start, direction = jnp.asarray(vectors(3)), jnp.asarray(vectors(3, seed=8))

    def gap(vector: jax.Array, run: Callable[..., Output]) -> jax.Array:
        left, right = jnp.moveaxis(run(add(layers, at, vector, 2.0)).logprobs(np.array([14, 16])), -1, 0)
        return (left - right).sum()

    by_rerun = jax.jit(jax.value_and_grad(lambda vector: gap(vector, lambda edit: rerun(model, recorded, edit))))
    by_forward = jax.jit(jax.value_and_grad(lambda vector: gap(vector, lambda edit: forward(model, prompts, edit))))
    value, slope = by_rerun(start)
    wanted, wanted_slope = by_forward(start)
    assert float(value) == pytest.approx(float(wanted), abs=1e-4)
    assert distance(slope, wanted_slope) < EXACT
    assert (np.abs(slope).max(axis=1) > 1e-3).all()
    step = 1e-2
    finite = (by_rerun(start + step * direction)[0] - by_rerun(start - step * direction)[0]) / (2 * step)
    assert abs(float(finite)) > 0.01
    assert float((slope * direction).sum()) == pytest.approx(float(finite), rel=0.01)


# --- what is refused ------------------------------------------------------------------------------------------------


def test_places_that_were_not_recorded(recorded: Trace, prompts: Prompts) -> None:
    for at, named in (
        (prompts.image_tokens(), "position 3 is not among the text tokens after the picture"),
        (np.array([14, 12]), "position 12 is not among"),
        (np.array([[14, -1], [14, 14]]), "position -1 is negative"),
        (np.array([14, 20]), "position 20 lies outside prompt 1, which ends at 19; what follows is padding"),
        (np.array([32, 14]), "position 32 lies outside prompt 0"),
    ):
        with pytest.raises(InputError, match=named):
            recorded.at(at)


def test_traces_of_another_model(prompts: Prompts, recorded: Trace) -> None:
    other = fixtures.model(CASES[0])
    for edit in (clean, add(1, prompts.last(), vectors())):
        with pytest.raises(InputError, match=r"the trace was made by .*full-odd, not by .*llava-plain \(\w+\)"):
            rerun(other, recorded, edit)
    foreign = dataclasses.replace(fixtures.model(GQA), fingerprint="another")
    with pytest.raises(InputError, match=r"not by .* \(another\)"):
        rerun(foreign, recorded)


def changed(model: Model, change: Callable[[jax.Array], jax.Array], which: int = -1) -> Model:
    """The model with one parameter changed."""
    leaves, structure = jax.tree.flatten(model.parameters)
    leaves[which] = change(leaves[which])
    return dataclasses.replace(model, parameters=jax.tree.unflatten(structure, leaves))


@pytest.mark.parametrize("name", ["one value", "all values", "dtype", "NaN"])
def test_traces_of_other_parameters(name: str, model: Model, recorded: Trace) -> None:
    changes: dict[str, Callable[[jax.Array], jax.Array]] = {
        "one value": lambda leaf: leaf.at[(0,) * leaf.ndim].add(1e-3),
        "all values": lambda leaf: leaf * 1.01,
        "dtype": lambda leaf: leaf.astype(jnp.bfloat16),
        "NaN": lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan),
    }
    other = changed(model, changes[name])
    edit = add(1, recorded.prompts.last(), vectors())
    foreign = dataclasses.replace(recorded, model=other)
    for run in (
        lambda: rerun(other, recorded, edit),
        lambda: rerun(other, recorded),
        lambda: rerun(other, recorded, pictures_of=recorded, after=1),
        lambda: rerun(other, foreign, pictures_of=recorded, after=1),
        lambda: rerun(model, foreign, edit),
        lambda: generate(other, recorded, edit),
        lambda: generate(other, recorded),
        lambda: jax.jit(lambda vector: rerun(other, recorded, add(1, recorded.prompts.last(), vector)).hidden)(
            vectors()
        ),
    ):
        with pytest.raises(
            InputError, match=r"the parameters of .* have changed since the trace was made; trace again"
        ):
            run()


def test_traces_of_equal_parameters(model: Model, recorded: Trace) -> None:
    """Read again, copied, on the host, half of them the same; NaN is equal to NaN."""
    edit = add(1, recorded.prompts.last(), vectors())
    expected = rerun(model, recorded, edit).hidden
    again = load(fixtures.folder(GQA))
    half = changed(model, lambda leaf: leaf + 0)
    host = dataclasses.replace(model, parameters=jax.tree.map(np.asarray, model.parameters))
    for same in (again, half, host):
        assert distance(rerun(same, recorded, edit).hidden, expected) < EXACT
    broken = changed(model, lambda leaf: leaf.at[(0,) * leaf.ndim].set(jnp.nan))
    copy = changed(broken, lambda leaf: leaf + 0)
    rerun(copy, dataclasses.replace(recorded, model=broken), edit)
    passed = jax.jit(lambda model, vector: rerun(model, recorded, add(1, recorded.prompts.last(), vector)).hidden)
    assert distance(passed(half, vectors()), expected) < EXACT


def test_traces_of_deleted_parameters(model: Model, recorded: Trace) -> None:
    copy = changed(model, lambda leaf: leaf + 0)
    old = dataclasses.replace(recorded, model=copy)
    jax.tree.leaves(copy.parameters)[-1].delete()
    for run in (lambda: rerun(model, old), lambda: rerun(copy, old), lambda: rerun(copy, recorded)):
        with pytest.raises(InputError, match=r"have been deleted \(donated\); trace again"):
            run()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda at, v: add(3, at, v), "layer 3 is out of range for site 'resid_post': .* has layers 0..2"),
        (lambda at, v: add([0, -1], at, v[None].repeat(2, 0)), "layer -1 is out of range for site 'resid_post'"),
        (lambda at, v: add(0, at, v, site="embed"), "layer 0 is out of range for site 'embed': .* layer -1"),
        (lambda at, v: chain(scale(0, at, 1.0), chain(scale(7, at, 1.0))), "layer 7 is out of range"),
        (lambda at, v: add(1, [at[0]] * 3, v), "the edit is for 3 prompts, but the batch holds 2"),
        (lambda at, v: add(1, at, v[:-1]), "the edit's vector has width 31, the model's residual stream 32"),
        (lambda at, v: add(1, at + 1000, v), "position 10.. lies outside prompt 0, which ends at 26"),
    ],
)
def test_edits_that_do_not_fit(make: Callable[..., Any], named: str, model: Model, recorded: Trace) -> None:
    edit = make(recorded.prompts.word("fish"), vectors())
    with pytest.raises(InputError, match=named):
        rerun(model, recorded, edit)
    with pytest.raises(InputError, match=named):
        trace(model, recorded.prompts, edit)


def test_a_trace_is_of_one_pass_and_chunks_hold_rows(model: Model, recorded: Trace) -> None:
    sweep = add([0, 1], recorded.prompts.last(), vectors(2))
    with pytest.raises(InputError, match=r"a trace is of one pass; the intervention has sweep axes \(2,\)"):
        trace(model, recorded.prompts, sweep)
    for chunk in (0, -1):
        with pytest.raises(InputError, match=f"chunk must be 1 or more, not {chunk}"):
            rerun(model, recorded, sweep, chunk=chunk)


def test_interventions_of_ones_own_may_have_a_layer(model: Model, recorded: Trace) -> None:
    """`check` looks into jaxid's own edits alone."""

    class Own:
        layer = 1

        def __call__(self, site: Any, value: jax.Array) -> jax.Array:
            return value

    assert distance(forward(model, recorded.prompts, Own()).hidden, recorded.hidden) < EXACT
