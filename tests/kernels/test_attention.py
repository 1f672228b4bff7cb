"""Attention against a naive loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels.attention import attend, causal_mask


def naive(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query, one head at a time, over the allowed keys alone, in float64."""
    batch, length, heads, width = query.shape
    shared = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for s in range(length):
            allowed = np.flatnonzero(mask[b, s])
            for h in range(heads):
                scores = [float(np.dot(query[b, s, h], key[b, t, h // shared])) / np.sqrt(width) for t in allowed]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                out[b, s, h] = sum(w * value[b, t, h // shared] for w, t in zip(weights, allowed, strict=True))
    return out


def arrays(heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(heads * 10 + kv_heads)
    shapes = [(2, 5, heads, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8)]
    query, key, value = (2 * rng.standard_normal(shape) for shape in shapes)
    return query, key, value


def single(*inputs: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = (jnp.asarray(array, jnp.float32) for array in inputs)
    return query, key, value


@pytest.mark.parametrize(
    ("heads", "kv_heads", "masked"), [(4, 4, True), (4, 2, True), (4, 2, False), (6, 2, True), (3, 1, True)]
)
def test_equals_the_loop(heads: int, kv_heads: int, masked: bool) -> None:
    query, key, value = arrays(heads, kv_heads)
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    mask[:, :, 3] = True  # every query reads something
    expected = naive(query, key, value, mask if masked else np.ones_like(mask))
    found = attend(*single(query, key, value), jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_one_mask_for_the_whole_batch() -> None:
    query, key, value = arrays(4, 2)
    mask = np.tril(np.ones((5, 7), bool), 2)
    found = attend(*single(query, key, value), jnp.asarray(mask)[None])
    np.testing.assert_allclose(found, naive(query, key, value, np.stack([mask, mask])), atol=2e-6)


def test_forbidden_keys_have_no_effect_at_all() -> None:
    query, key, value = arrays(4, 2)
    mask = np.ones((2, 5, 7), bool)
    mask[:, :, 4] = False
    far_key, far_value = key.copy(), value.copy()
    far_key[:, 4], far_value[:, 4] = 1e4, -1e6
    before = attend(*single(query, key, value), jnp.asarray(mask))
    after = attend(*single(query, far_key, far_value), jnp.asarray(mask))
    np.testing.assert_array_equal(before, after)


def test_a_query_without_keys_stays_finite_and_so_does_its_gradient() -> None:
    query, key, value = single(*arrays(2, 2))
    mask = jnp.zeros((2, 5, 7), bool)
    value_and_slope = jax.value_and_grad(lambda q: attend(q, key, value, mask).sum())
    total, slope = value_and_slope(query)
    assert np.isfinite(total) and np.isfinite(slope).all()


def test_large_scores_do_not_overflow() -> None:
    query, key, value = arrays(2, 2)
    mask = np.ones((2, 5, 7), bool)
    found = attend(*single(300 * query, 300 * key, value))
    np.testing.assert_allclose(found, naive(300 * query, 300 * key, value, mask), atol=1e-4)


def test_bfloat16_in_and_out_with_float32_scores() -> None:
    query, key, value = arrays(4, 2)
    mask = np.ones((2, 5, 7), bool)
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
    found = attend(*rounded)
    exact = [np.asarray(array, np.float64) for array in rounded]
    expected = naive(exact[0], exact[1], exact[2], mask)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.03)


def test_causal_mask_is_the_worked_example() -> None:
    positions, valid = jnp.arange(4)[None], jnp.array([[True, True, True, False]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    np.testing.assert_array_equal(causal_mask(positions, positions, valid)[0], np.array(expected, bool))


def test_causal_mask_of_later_queries() -> None:
    """Two queries behind a prefix of three keys, as in a continued prompt; row 1 has one key less."""
    queries = jnp.array([[3, 4], [2, 3]])
    keys = jnp.array([[0, 1, 2, 3, 4], [0, 1, 9, 2, 3]])
    valid = jnp.array([[True] * 5, [True, True, False, True, True]])
    expected = [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], [[1, 1, 0, 1, 0], [1, 1, 0, 1, 1]]]
    np.testing.assert_array_equal(causal_mask(queries, keys, valid), np.array(expected, bool))
