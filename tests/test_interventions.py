"""Interventions on plain arrays: what each edit does to the rows that it names, and what constructors refuse."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxid.errors import InputError
from jaxid.interventions import Edit, add, chain, project_out, replace, scale, stack, sweep_shape
from jaxid.models.sites import SITES, Site

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
    assert sweep_shape(combined) == (3,)
    assert [leaf.shape for leaf in jax.tree.leaves(combined)] == [(3,), (3, 1, 1), (3, 1, 1, D), (3,)]
    single = jax.tree.map(lambda leaf: leaf[1], combined)
    np.testing.assert_allclose(apply(single, site("embed")), VALUE + 1, atol=1e-6)
    np.testing.assert_allclose(apply(single, site(layer=1))[:, 0], VALUE[:, 0] + 1, atol=1e-6)


def test_sweep_axes() -> None:
    layers, factors = np.array([[0, 1, 2], [3, 4, 5]]), np.arange(6.0).reshape(2, 3)
    vectors = RNG.standard_normal((2, 3, B, D)).astype(np.float32)
    swept = add(layers, [1, 4], vectors, factors)
    assert sweep_shape(swept) == (2, 3)
    assert swept.at.shape == (2, 3, B, 1) and swept.vector.shape == (2, 3, B, 1, D)
    for index in np.ndindex(2, 3):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], swept)
        alone = add(layers[index], [1, 4], vectors[index], factors[index])
        assert jax.tree.structure(one) == jax.tree.structure(alone)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(a, b)
    same = stack([jax.tree.map(lambda leaf, k=k: leaf[k], swept) for k in range(2)])
    assert sweep_shape(same) == (2, 3)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(swept), strict=True):
        np.testing.assert_array_equal(a, b)
    assert sweep_shape(scale(layers, [1, 4], 2.0)) == (2, 3)
    assert sweep_shape(add(1, [0], VECTOR)) == sweep_shape(lambda at, value: value) == ()


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


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: add(3, [1], VECTOR, site="resid"), "'resid' is not one of embed, resid_pre, attn_out"),
        (lambda: add(1.0, [1], VECTOR), "`layer` must hold integers, not float64"),
        (lambda: add(3, [1.5], VECTOR), "`at` must hold integers, not float64"),
        (lambda: add(3, [True], VECTOR), "`at` must hold integers, not bool"),
        (lambda: add(3, 1, VECTOR), "`at` must have shape [B] or [B, P], not []"),
        (lambda: add(3, [[[1]]], VECTOR), "not [1, 1, 1]"),
        (lambda: add([1, 2], [1], VECTOR), "`vector` of shape [4] does not fit: expected [2, D]"),
        (lambda: add(3, [1], 2.0), "`vector` of shape [] does not fit"),
        (lambda: add(3, [1], np.ones((1, 1, 1, D), np.float32)), "`vector` of shape [1, 1, 1, 4]"),
        (lambda: add(3, [1, 4], np.ones((3, D), np.float32)), "`vector` is for 3 prompts, but `at` names 2"),
        (lambda: add(3, [[1, 4]], np.ones((1, 3, D), np.float32)), "`vector` is for 3 positions, but `at` names 2"),
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
