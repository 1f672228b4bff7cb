"""Interventions on plain arrays: what each edit does to the rows that it names, and what constructors refuse."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from jaxid.errors import InputError
from jaxid.interp.interventions import Edit, add, as_intervention, chain, project_out, replace, scale, stack
from jaxid.nn.sites import SITES, Site

B, T, D = 2, 6, 4
RNG = np.random.default_rng(5)
VALUE = RNG.standard_normal((B, T, D)).astype(np.float32)
VECTOR = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


def site(name: str = "resid_post", layer: int = 3) -> Site:
    return Site(name, jnp.asarray(layer), jnp.tile(jnp.arange(T), (B, 1)))


def apply(edit: Any, at: Site | None = None, value: np.ndarray = VALUE) -> np.ndarray:
    return np.asarray(edit(at or site(), jnp.asarray(value)))


def expected(rows: dict[tuple[int, int], np.ndarray]) -> np.ndarray:
    """VALUE, but for the rows given by (prompt, position)."""
    whole = VALUE.copy()
    for (prompt, position), row in rows.items():
        whole[prompt, position] = row
    return whole


def without(value: np.ndarray, direction: np.ndarray, strength: float = 1.0) -> np.ndarray:
    unit = direction / np.linalg.norm(direction)
    return value - strength * np.dot(value, unit) * unit


@pytest.mark.parametrize(
    ("edit", "first", "second"),
    [
        (add(3, [1, 4], VECTOR), VALUE[0, 1] + VECTOR, VALUE[1, 4] + VECTOR),
        (add(3, [1, 4], VECTOR, 2.5), VALUE[0, 1] + 2.5 * VECTOR, VALUE[1, 4] + 2.5 * VECTOR),
        (replace(3, [1, 4], VECTOR), VECTOR, VECTOR),
        (replace(3, [1, 4], VECTOR, 0.25), 0.75 * VALUE[0, 1] + 0.25 * VECTOR, 0.75 * VALUE[1, 4] + 0.25 * VECTOR),
        (scale(3, [1, 4], 0.0), np.zeros(D), np.zeros(D)),
        (scale(3, [1, 4], -1.5), -1.5 * VALUE[0, 1], -1.5 * VALUE[1, 4]),
        (project_out(3, [1, 4], VECTOR), without(VALUE[0, 1], VECTOR), without(VALUE[1, 4], VECTOR)),
        (project_out(3, [1, 4], VECTOR, 2.0), without(VALUE[0, 1], VECTOR, 2), without(VALUE[1, 4], VECTOR, 2)),
        (project_out(3, [1, 4], 0 * VECTOR), VALUE[0, 1], VALUE[1, 4]),
        (add(3, [1, 4], [1, -2, 0, 3], 0.5), VALUE[0, 1] + [0.5, -1, 0, 1.5], VALUE[1, 4] + [0.5, -1, 0, 1.5]),
    ],
    ids="add add*s replace replace*s ablate scale project project*s zero-direction integers".split(),
)
def test_operations(edit: Edit, first: np.ndarray, second: np.ndarray) -> None:
    np.testing.assert_allclose(apply(edit), expected({(0, 1): first, (1, 4): second}), atol=1e-6)


def test_nothing_is_left_along_a_direction_that_was_projected_out() -> None:
    left = apply(project_out(3, [1, 4], VECTOR))
    assert abs(left[0, 1] @ VECTOR) < 1e-5 < abs(VALUE[0, 1] @ VECTOR)


def test_only_the_named_site_and_layer() -> None:
    edit = add(3, [1, 4], VECTOR, site="mlp_out")
    for name in SITES:
        for layer in (-1, 0, 2, 3, 4):
            changed = not np.array_equal(apply(edit, site(name, layer)), VALUE)
            assert changed == (name == "mlp_out" and layer == 3)


def test_several_positions_and_padding() -> None:
    edit = add(3, [[1, 4], [2, 2]], VECTOR)  # once, however often it is named
    wanted = {(0, 1): VALUE[0, 1] + VECTOR, (0, 4): VALUE[0, 4] + VECTOR, (1, 2): VALUE[1, 2] + VECTOR}
    np.testing.assert_allclose(apply(edit), expected(wanted), atol=1e-6)
    traced = jax.jit(lambda at: add(3, at, VECTOR)(site(), jnp.asarray(VALUE)))
    np.testing.assert_allclose(traced(np.array([[1, 4], [2, -1]])), apply(edit), atol=1e-6)
    np.testing.assert_array_equal(traced(np.array([[-1, -7], [T, 10**6]])), VALUE)


def test_positions_are_places_in_the_prompt_not_rows() -> None:
    later = Site("resid_post", jnp.asarray(3), jnp.array([[5, 1, 7, 8, 9, 10]] * B))
    found = apply(replace(3, [[1]], VECTOR), later)
    np.testing.assert_allclose(found, expected({(0, 1): VECTOR, (1, 1): VECTOR}), atol=1e-6)


def test_a_vector_per_prompt_and_per_position() -> None:
    prompts = RNG.standard_normal((B, D)).astype(np.float32)
    found = apply(replace(3, [1, 4], prompts))
    np.testing.assert_allclose(found, expected({(0, 1): prompts[0], (1, 4): prompts[1]}), atol=1e-6)
    places = RNG.standard_normal((B, 3, D)).astype(np.float32)
    found = apply(replace(3, [[5, 0, 2], [4, 4, 3]], places))
    rows = {(0, 5): places[0, 0], (0, 0): places[0, 1], (0, 2): places[0, 2]}
    rows |= {(1, 4): places[1, 0], (1, 3): places[1, 2]}  # the first of two vectors for one place wins
    np.testing.assert_allclose(found, expected(rows), atol=1e-6)
    shared = RNG.standard_normal((1, 2, D)).astype(np.float32)
    found = apply(replace(3, [[0, 1]], shared))
    rows = {(prompt, place): shared[0, place] for prompt in range(B) for place in range(2)}
    np.testing.assert_allclose(found, expected(rows), atol=1e-6)


def test_chain_applies_in_order() -> None:
    first, second = add(3, [1, 4], VECTOR), scale(3, [1, 4], 2.0)
    wanted = {(0, 1): 2 * (VALUE[0, 1] + VECTOR), (1, 4): 2 * (VALUE[1, 4] + VECTOR)}
    np.testing.assert_allclose(apply(chain(first, second)), expected(wanted), atol=1e-6)
    wanted = {(0, 1): 2 * VALUE[0, 1] + VECTOR, (1, 4): 2 * VALUE[1, 4] + VECTOR}
    np.testing.assert_allclose(apply(chain(second, first)), expected(wanted), atol=1e-6)
    np.testing.assert_array_equal(apply(chain()), VALUE)
    nested = chain(chain(first), chain(second, chain()))
    np.testing.assert_array_equal(apply(nested), apply(chain(first, second)))


def test_chain_takes_plain_functions_and_stays_a_pytree() -> None:
    combined = chain(
        lambda at, value: value + 1.0 if at.name == "embed" else value, add(jnp.arange(3), [0], jnp.ones((3, D)))
    )
    assert combined.sweep_shape == (3,)
    assert [leaf.shape for leaf in jax.tree.leaves(combined)] == [(3,), (3, 1, 1), (3,), (3, 1, 1, D)]
    single = jax.tree.map(lambda leaf: leaf[1], combined)
    np.testing.assert_allclose(apply(single, site("embed")), VALUE + 1, atol=1e-6)
    np.testing.assert_allclose(apply(single, site(layer=1))[:, 0], VALUE[:, 0] + 1, atol=1e-6)


def test_sweep_axes() -> None:
    layers, factors = np.array([[0, 1, 2], [3, 4, 5]]), np.arange(6.0).reshape(2, 3)
    vectors = RNG.standard_normal((2, 3, B, D)).astype(np.float32)
    swept = add(layers, [1, 4], vectors, factors)
    assert swept.sweep_shape == (2, 3)
    assert swept.positions.shape == (2, 3, B, 1) and swept.vector.shape == (2, 3, B, 1, D)
    for index in np.ndindex(2, 3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], swept)
        alone = add(layers[index], [1, 4], vectors[index], factors[index])
        assert jax.tree.structure(one) == jax.tree.structure(alone)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a, b)
    same = stack([jax.tree.map(lambda leaf, k=k: leaf[k], swept) for k in range(2)])
    assert same.sweep_shape == (2, 3)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(swept), strict=True):
        np.testing.assert_array_equal(a, b)
    assert scale(layers, [1, 4], 2.0).sweep_shape == (2, 3)
    assert add(1, [0], VECTOR).sweep_shape == as_intervention(lambda at, value: value).sweep_shape == ()


def test_operation_and_site_are_static_everything_else_is_an_array() -> None:
    structures = {jax.tree.structure(add(layer, [at, 0], VECTOR, s)) for layer, at, s in ((0, 1, 1), (5, 2, 0.5))}
    assert len(structures) == 1
    assert structures.isdisjoint({jax.tree.structure(add(-1, [1, 0], VECTOR, site="embed"))})
    assert structures.isdisjoint({jax.tree.structure(replace(0, [1, 0], VECTOR))})


def test_bfloat16_values_stay_bfloat16() -> None:
    value = jnp.asarray(VALUE, jnp.bfloat16)
    for edit in (add(3, [1, 4], VECTOR, 0.5), scale(3, [1, 4], 3.0), project_out(3, [1, 4], VECTOR)):
        changed = edit(site(), value)
        assert changed.dtype == jnp.bfloat16 and not np.array_equal(changed, value)
        np.testing.assert_allclose(np.asarray(changed, np.float32), apply(edit), atol=0.1)


# --- precision ------------------------------------------------------------------------------------------------------

ORACLES: dict[str, Any] = {
    "add": (add, lambda value, vector, s: value + s * vector),
    "replace": (replace, lambda value, vector, s: (1 - s) * value + s * vector),
    "scale": (lambda layer, at, _, s: scale(layer, at, s), lambda value, _, s: s * value),
    "project_out": (project_out, lambda v, u, s: v - s * (v * u).sum(-1, keepdims=True) / (u * u).sum() * u),
}


@pytest.mark.parametrize("operation", ORACLES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("width", [7, 4096])
def test_results_are_exact_to_the_rounding_of_their_dtype(operation: str, dtype: str, width: int) -> None:
    """Against float64, at norms from 1e-6 (and below what a square in float32 holds) to 1e4."""
    make, oracle = ORACLES[operation]
    rng = np.random.default_rng(width)
    value = jnp.asarray(30 * rng.standard_normal((1, 6, width)), dtype)
    at = Site("resid_post", jnp.asarray(3), jnp.arange(6)[None])
    unit = rng.standard_normal(width) / np.sqrt(width)
    for norm in (1e-30, 1e-6, 1e-2, 1.0, 256.0, 1e4) + (1e25,) * (operation == "project_out"):
        for strength in (1.0, 0.3):
            vector = (norm * unit).astype(np.float32)
            edit = make(3, [list(range(6))], vector, strength)
            exact = oracle(np.asarray(value, np.float64), vector.astype(np.float64), float(np.float32(strength)))
            found = np.asarray(edit(at, value), np.float64)
            largest = np.abs(np.asarray(value, np.float64)).max() + np.abs(exact).max()
            rounding = float(jnp.finfo(dtype).eps) / 2 * np.abs(exact) * 1.001 + 2e-6 * largest
            rounding += float(jnp.finfo(dtype).smallest_subnormal)
            assert (np.abs(found - exact) <= rounding).all(), (norm, strength)


def test_a_product_may_overflow_where_its_sum_does_not() -> None:
    value = jnp.full((1, 1, 2), -6e4, jnp.float16)
    edit = add(3, [[0]], np.full(2, 6e4, np.float16), 2.0)
    at = Site("resid_post", jnp.asarray(3), jnp.zeros((1, 1), jnp.int32))
    np.testing.assert_array_equal(edit(at, value), np.full((1, 1, 2), 6e4, np.float16))


def test_strengths_are_not_rounded_to_the_vectors_dtype() -> None:
    for dtype in (jnp.float16, jnp.bfloat16):
        assert add(3, [0], jnp.ones(4, dtype), 0.1).strength == np.float32(0.1)


@pytest.mark.parametrize("vector", [VECTOR, np.array([0, 2.0, 0, 0], np.float32), 1e-25 * VECTOR])
def test_gradients_of_projections(vector: np.ndarray) -> None:
    """Also of a direction along one axis; they are inversely proportional to its length."""

    def loss(vector: jax.Array) -> jax.Array:
        return jnp.sin(project_out(3, [1, 4], vector)(site(), jnp.asarray(VALUE))).sum()

    length = np.linalg.norm(vector.astype(np.float64))
    found = np.asarray(jax.grad(loss)(jnp.asarray(vector))) * length
    unit = (vector / length).astype(np.float32)
    for axis in np.eye(D, dtype=np.float32):
        finite = (loss(jnp.asarray(unit + 1e-2 * axis)) - loss(jnp.asarray(unit - 1e-2 * axis))) / 2e-2
        assert found @ axis == pytest.approx(float(finite), abs=2e-3)


# --- what vectors and strengths may be ------------------------------------------------------------------------------


def test_tensors_of_pytorch_are_vectors() -> None:
    for tensor in (
        torch.tensor(VECTOR),
        torch.tensor(VECTOR, dtype=torch.bfloat16),
        torch.tensor(VECTOR, dtype=torch.float64, requires_grad=True),
        torch.nn.Parameter(torch.tensor(VECTOR, dtype=torch.float16)),
        torch.tensor(VECTOR.tolist()).repeat(2)[:D],
    ):
        np.testing.assert_array_equal(add(3, [1], tensor).vector[0, 0], VECTOR)
        np.testing.assert_array_equal(scale(3, [1], tensor[0]).strength, VECTOR[0])
    assert add(torch.tensor(3), torch.tensor([1]), VECTOR).positions.tolist() == [[1]]


def test_lists_of_traced_numbers_are_strengths() -> None:
    found = jax.jit(lambda s: scale([1, 2], [1], [s, 2 * s]).strength)(1.5)
    np.testing.assert_array_equal(found, [1.5, 3.0])


NAN, INF = float("nan"), float("inf")
NO_NUMBERS: list[tuple[Any, str]] = [
    (VECTOR * NAN, "must be finite, but 4 of its 4 entries are NaN or infinite"),
    ([1.0, INF, 0, 0], "must be finite, but 1 of its 4 entries"),
    (jnp.array([1, NAN, 0, 0]), "must be finite"),
    (jnp.array([1, NAN, 0, 0], jnp.bfloat16), "must be finite"),
    (np.full(D, 1e300), "must be finite"),
    (VECTOR * 1j, "must hold real numbers, not complex64"),
    (jnp.asarray(VECTOR, jnp.complex64), "must hold real numbers, not complex64"),
    (torch.tensor(VECTOR) * 1j, "must hold real numbers, not complex64"),
    (torch.tensor(VECTOR * NAN), "must be finite"),
    (torch.empty(D, device="meta"), "cannot be read as an array of numbers"),
    (["a"] * D, "must hold real numbers, not <U1"),
    (VECTOR.astype(object), "must hold real numbers, not object"),
    (None, "must hold real numbers, not object"),
    ([True] * D, "must hold real numbers, not bool"),
    ([[1.0], [1.0, 2.0]], "cannot be read as an array of numbers"),
]


@pytest.mark.parametrize(("numbers", "named"), NO_NUMBERS)
def test_what_is_no_number_is_refused(numbers: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"`vector` {re.escape(named)}"):
        project_out(3, [1], numbers)
    with pytest.raises(InputError, match=f"`strength` {re.escape(named)}"):
        scale([0] * D, [1], numbers)

    def within(scale: jax.Array) -> jax.Array:
        return scale * add(3, [1], numbers).vector

    if numbers is not None:
        with pytest.raises(InputError, match=f"`vector` {re.escape(named)}"):
            jax.jit(within)(1.0)


def test_traced_vectors_are_not_looked_at() -> None:
    found = jax.jit(lambda vector: add(3, [1, 4], vector)(site(), jnp.asarray(VALUE)))(VECTOR * NAN)
    assert np.isnan(found).any(axis=-1).sum() == 2
    with pytest.raises(InputError, match="must hold real numbers, not complex64"):
        jax.jit(lambda vector: add(3, [1], vector).vector)(VECTOR * 1j)


EDIT = add(3, [1, 4], VECTOR)


@pytest.mark.parametrize(
    ("edits", "named"),
    [
        ([], "one or more interventions"),
        (EDIT, "one or more interventions"),
        (3, "one or more interventions"),
        ([EDIT, 3], "3 cannot be called"),
        ([EDIT, replace(3, [1, 4], VECTOR)], "index 0 is Add at resid_post .*index 1 is Replace at resid_post"),
        ([EDIT, EDIT, add(3, [1, 4], VECTOR, site="mlp_out")], "index 2 is Add at mlp_out"),
        ([EDIT, add(3, [[1, 2], [1, 4]], VECTOR)], r"\[2, 1\], .* is Add .*\[2, 2\]"),
        ([EDIT, add([3], [1, 4], VECTOR[None])], r"shapes \[\].* is Add .*shapes \[1\]"),
        ([EDIT, add(3, [1, 4], np.ones((2, D), np.float32))], "index 0 is Add at resid_post"),
        ([EDIT, chain(EDIT)], r"index 1 is chain\(Add at resid_post"),
        ([chain(EDIT, EDIT), chain(EDIT)], "chain"),
        ([EDIT, lambda site, value: value], r"intervention 1 of the stack holds no arrays"),
        ([lambda site, value: value] * 2, "intervention 0 of the stack holds no arrays"),
        ([chain(EDIT, lambda s, v: v), chain(EDIT, lambda s, v: 2 * v)], "intervention 1 .* another function"),
    ],
)
def test_what_cannot_be_stacked(edits: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        stack(edits)


def test_stacks_stay_on_the_host_where_they_are_known() -> None:
    whole: Any = stack(add(layer, [1, 4], VECTOR) for layer in (2, 3))
    assert isinstance(whole.positions, np.ndarray) and whole.layer.tolist() == [2, 3]
    assert whole.reach is not None and whole.reach.position.tolist() == [1, 4]


def test_chains_of_what_is_no_intervention() -> None:
    with pytest.raises(InputError, match="'add' cannot be called"):
        as_intervention("add")
    assert chain().reach is not None


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: add(3, [1], VECTOR, site="resid"), "'resid' is not one of embed, resid_pre, attn_out"),
        (lambda: add(1.0, [1], VECTOR), "`layer` must hold integers, not float64"),
        (lambda: add(3, [1.5], VECTOR), "`positions` must hold integers, not float64"),
        (lambda: add(3, [True], VECTOR), "`positions` must hold integers, not bool"),
        (lambda: add(3, 1, VECTOR), "`positions` must have shape [B] or [B, P], not []"),
        (lambda: add(3, [[[1]]], VECTOR), "not [1, 1, 1]"),
        (lambda: add([1, 2], [1], VECTOR), "`vector` of shape [4] does not fit: expected [2, D]"),
        (lambda: add(3, [1], 2.0), "`vector` of shape [] does not fit"),
        (lambda: add(3, [1], np.ones((1, 1, 1, D), np.float32)), "`vector` of shape [1, 1, 1, 4]"),
        (lambda: add(3, [1, 4], np.ones((3, D), np.float32)), "`vector` is for 3 prompts, but `positions` names 2"),
        (
            lambda: add(3, [[1, 4]], np.ones((1, 3, D), np.float32)),
            "`vector` is for 3 positions, but `positions` names 2",
        ),
        (lambda: add(3, [1], VECTOR, [1.0, 2.0]), "strength of shape [2] does not fit sweep axes []"),
        (lambda: scale([1, 2], [1], [1.0, 2.0, 3.0]), "strength of shape [3] does not fit sweep axes [2]"),
        (lambda: chain(scale([1, 2], [1], 1.0), scale(1, [1], 1.0)), "different sweep axes: [(), (2,)]"),
        (lambda: scale(np.zeros((0,), int), [1], 1.0), "the sweep is empty"),
    ],
)
def test_what_constructors_refuse(make: Any, named: str) -> None:
    with pytest.raises(InputError, match=re.escape(named)):
        make()


def test_a_value_of_another_shape_is_noticed() -> None:
    with pytest.raises((TypeError, ValueError, TypeCheckError)):
        apply(add(3, [1, 4], np.ones(D + 1, np.float32)))
