"""The scorer's kernel for TPUs, run step by step, against the plain form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import banded, lanes, scorer

SMALL = lanes.Block(pairs=8, dtype="float32")


def products_for(rows: int, columns: int, pairs: int) -> tuple[jax.Array, jax.Array]:
    """Products of two pictures and factors; nothing of what is beyond the maps is zero."""
    keys = jax.random.split(jax.random.key(rows), 2)
    shape = 2, rows + 1, lanes.padded_columns(columns), pairs
    return jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (2, lanes.FACTORS, pairs))


@pytest.mark.parametrize(("rows", "columns"), [(6, 5), (5, 33), pytest.param(4, 16, marks=pytest.mark.slow)])
def test_kernel_is_the_plain_form(rows: int, columns: int) -> None:
    """Maps of a part of a block, of one, and of three that have a part of their columns in common; odd rows too."""

    def both(network: scorer.CNN, products: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        maps = lanes.standardised(network, products, factors)
        expected = scorer.apply(network, maps.reshape(-1, rows, columns)).reshape(2, 16)
        own = lanes.weights(network, SMALL)
        return lanes.fused_scores(network, own, products, factors, SMALL, interpret=True), expected

    with jax.default_matmul_precision("highest"):
        found, expected = jax.jit(both)(
            scorer.init_cnn(jax.random.key(0), rows, columns), *products_for(rows, columns, 16)
        )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_standardised_maps() -> None:
    network, (products, factors) = scorer.init_cnn(jax.random.key(0), 3, 4), products_for(3, 4, 5)
    found = lanes.standardised(network, products, factors)
    given, by = np.asarray(products), np.asarray(factors)
    for picture, pair, row, column in ((0, 0, 0, 0), (1, 4, 2, 3), (1, 2, 0, 3)):
        own = given[picture, row, column, pair], given[picture, row, 4, pair], given[picture, 3, column, pair]
        expected = np.dot(own, by[picture, :3, pair]) + by[picture, 3, pair]
        np.testing.assert_allclose(found[picture, pair, row, column], expected, rtol=1e-5)


@pytest.mark.parametrize("columns", [3, 16, 17, 30, 31, 77, 128])
def test_blocks_cover_the_map(columns: int) -> None:
    begin = lanes.starts(columns)
    assert begin[-1] + lanes.COLUMNS >= columns > begin[-1] + (2 if len(begin) > 1 else 0)
    assert np.diff(begin).tolist() == [lanes.COLUMNS - 2] * (len(begin) - 1)


def test_distance_in_16_bits() -> None:
    """In parts of the scores' standard deviation."""
    block, network = lanes.Block(pairs=64), scorer.init_cnn(jax.random.key(2), 5, 30)
    products, _ = products_for(5, 30, 64)
    factors = jnp.ones((2, lanes.FACTORS, 64)).at[:, 1:].set(0.0)

    def both(network: scorer.CNN, products: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = lanes.weights(network, block)
        found = lanes.fused_scores(network, own, products.astype(block.dtype), factors, block, interpret=True)
        return found, scorer.apply(network, lanes.standardised(network, products, factors).reshape(-1, 5, 30))

    found, expected = (np.asarray(value) for value in jax.jit(both)(network, products, factors))
    distance = np.abs(found.ravel() - expected).max() / expected.std()
    assert 1.5e-3 < distance < 3e-2


def test_gradients_of_the_kernel() -> None:
    network, (products, factors) = scorer.init_cnn(jax.random.key(1), 4, 18), products_for(4, 18, 8)
    weights = jnp.sin(jnp.arange(16.0)).reshape(2, 8)

    def fused(network: scorer.CNN, products: jax.Array, factors: jax.Array) -> jax.Array:
        own = lanes.weights(network, SMALL)
        return (weights * lanes.fused_scores(network, own, products, factors, SMALL, interpret=True)).sum()

    def plain(network: scorer.CNN, products: jax.Array, factors: jax.Array) -> jax.Array:
        maps = lanes.standardised(network, products, factors).reshape(-1, 4, 18)
        return (weights * banded.scores(network, maps).reshape(2, 8)).sum()

    with jax.default_matmul_precision("highest"):
        found, expected = (
            jax.jit(jax.grad(form, argnums=(0, 1, 2)))(network, products, factors) for form in (fused, plain)
        )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
