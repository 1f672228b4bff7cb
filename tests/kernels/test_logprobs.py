"""`kernels.logprobs` against `jax.nn.log_softmax` of the whole table."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels.logprobs import log_probs

WIDTH = 16

blocks_of_16 = jax.jit(partial(log_probs, block=16))


def _case(vocabulary: int, rows: tuple[int, ...] = (2, 3), scale: float = 1.0):
    rng = np.random.default_rng(vocabulary)
    hidden = jnp.asarray(scale * rng.normal(size=(*rows, WIDTH)), jnp.float32)
    unembedding = jnp.asarray(rng.normal(size=(WIDTH, vocabulary)) / WIDTH**0.5, jnp.float32)
    ids = jnp.asarray(rng.integers(0, vocabulary, size=(*rows, 4)))
    return hidden, unembedding, ids


@jax.jit
def _expected(hidden, unembedding, ids):
    logits = jnp.matmul(hidden, unembedding, precision="highest")
    table = jax.nn.log_softmax(logits, axis=-1)
    return table[..., ids] if ids.ndim == 1 else jnp.take_along_axis(table, ids, axis=-1)


# Smaller than a block, one block, one entry more, one entry less than two blocks, whole blocks, a prime.
@pytest.mark.parametrize("vocabulary", [5, 32, 33, 63, 128, 211])
def test_equals_log_softmax(vocabulary):
    hidden, unembedding, ids = _case(vocabulary)
    result = jax.jit(log_probs, static_argnames="block")(hidden, unembedding, ids, block=32)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, _expected(hidden, unembedding, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("rows", "vocabulary"), [((), 101), ((3,), 7), ((2, 3), 101)])
def test_ids_shared_by_all_rows(rows, vocabulary):
    hidden, unembedding, _ = _case(vocabulary, rows)
    ids = jnp.array([0, vocabulary - 1, 3])
    result = blocks_of_16(hidden, unembedding, ids)
    assert result.shape == (*rows, 3)
    np.testing.assert_allclose(result, _expected(hidden, unembedding, ids), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [24, 77])
def test_gradients(vocabulary):
    hidden, unembedding, ids = _case(vocabulary)
    weights = jnp.asarray(np.random.default_rng(9).normal(size=ids.shape), jnp.float32)

    def total(function):
        return lambda hidden, unembedding: (weights * function(hidden, unembedding)).sum()

    ours = jax.grad(total(lambda h, u: log_probs(h, u, ids, block=24)), argnums=(0, 1))(hidden, unembedding)
    theirs = jax.grad(total(lambda h, u: _expected(h, u, ids)), argnums=(0, 1))(hidden, unembedding)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_extreme_logits_stay_finite():
    hidden, unembedding, ids = _case(75, scale=1e4)
    result = blocks_of_16(hidden, unembedding, ids)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result, _expected(hidden, unembedding, ids), rtol=1e-5)


def test_vmap_equals_loop():
    hidden, unembedding, ids = _case(50, (4, 3))
    mapped = jax.jit(jax.vmap(blocks_of_16, in_axes=(0, None, 0)))(hidden, unembedding, ids)
    looped = np.stack([blocks_of_16(h, unembedding, i) for h, i in zip(hidden, ids, strict=True)])
    np.testing.assert_allclose(mapped, looped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("same_type", [True, False])
def test_bfloat16_inputs_are_summed_in_float32(same_type):
    hidden, unembedding, ids = _case(90)
    unembedding = unembedding.astype(jnp.bfloat16)
    hidden = hidden.astype(jnp.bfloat16) if same_type else hidden
    result = blocks_of_16(hidden, unembedding, ids)
    expected = _expected(hidden.astype(jnp.float32), unembedding.astype(jnp.float32), ids)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_id_outside_the_vocabulary_is_nan():
    hidden, unembedding, _ = _case(40)
    result = blocks_of_16(hidden, unembedding, jnp.array([39, 40]))
    assert np.isfinite(result[..., 0]).all()
    assert np.isnan(result[..., 1]).all()


@pytest.mark.parametrize("differentiate", [False, True])
def test_never_builds_the_table(differentiate):
    hidden, unembedding, ids = _case(1000, (8,))

    def total(hidden):
        return log_probs(hidden, unembedding, ids, block=50).sum()

    text = str(jax.make_jaxpr(jax.grad(total) if differentiate else total)(hidden))
    assert "[8,50]" in text
    for table in ("[8,1000]", "[20,8,50]"):
        assert table not in text
