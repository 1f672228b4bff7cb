"""The scorer's kernel for GPUs, run step by step, and its plain form, against the form for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import banded, scorer

SMALL = banded.Block(columns=4, window=16, pairs=16, dtype="float32")
"""A block that cuts maps of 18 columns into several."""


def maps_for(block: banded.Block, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Two blocks of maps: plain, and as the kernel reads them."""
    plain = jax.random.normal(jax.random.key(rows), (2 * block.pairs, rows, columns))
    padded = jnp.pad(plain, ((0, 0), (0, 0), (0, banded.padded_columns(columns, block) - columns)))
    return plain, jnp.moveaxis(padded, 0, 1).astype(block.dtype)


@pytest.mark.parametrize("columns", [5, 18])
def test_kernel_is_the_plain_form(columns: int) -> None:
    def forms(network: scorer.CNN, plain: jax.Array, maps: jax.Array) -> tuple[jax.Array, ...]:
        found = banded.fused_scores(network, banded.bands(network, SMALL), maps, SMALL, interpret=True)
        return found, banded.scores(network, plain), scorer.apply(network, plain)

    with jax.default_matmul_precision("highest"):
        network = scorer.init_cnn(jax.random.key(0), 6, columns)
        *found, expected = jax.jit(forms)(network, *maps_for(SMALL, 6, columns))
    for form in found:
        np.testing.assert_allclose(form, expected, atol=1e-6)


def test_distance_in_16_bits() -> None:
    """In parts of the scores' standard deviation."""
    block, network = banded.BLOCK._replace(pairs=64), scorer.init_cnn(jax.random.key(2), 5, 30)

    def both(network: scorer.CNN, plain: jax.Array, maps: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = banded.fused_scores(network, banded.bands(network, block), maps, block, interpret=True)
        return found, scorer.apply(network, plain)

    found, expected = (np.asarray(value) for value in jax.jit(both)(network, *maps_for(block, 5, 30)))
    distance = np.abs(found - expected).max() / expected.std()
    assert 2e-4 < distance < 4e-3


def test_gradients_of_the_kernel() -> None:
    block, network = SMALL, scorer.init_cnn(jax.random.key(1), 4, 18)
    plain, maps = maps_for(block, 4, 18)
    weights = jnp.sin(jnp.arange(2 * block.pairs))

    def fused(network: scorer.CNN, maps: jax.Array) -> jax.Array:
        found = banded.fused_scores(network, banded.bands(network, block), maps, block, interpret=True)
        return (weights * found).sum()

    with jax.default_matmul_precision("highest"):
        own, by_maps = jax.jit(jax.grad(fused, argnums=(0, 1)))(network, maps)
        expected, by_plain = jax.jit(
            jax.grad(lambda network, maps: (weights * scorer.apply(network, maps)).sum(), argnums=(0, 1))
        )(network, plain)
    by_maps = jnp.moveaxis(by_maps, 1, 0)[..., :18]
    for one, other in zip([*own, by_maps], [*expected, by_plain], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


def test_form_of_training() -> None:
    """Gradients and dropout of the form that GPUs and TPUs train."""
    network = scorer.init_cnn(jax.random.key(4), 7, 5)
    maps = jax.random.normal(jax.random.key(5), (6, 7, 5))
    weights = jnp.linspace(-1.0, 1.0, 6)
    with jax.default_matmul_precision("highest"):
        found, expected = (
            jax.jit(jax.grad(lambda network, form=form: (weights * form(network, maps)).sum()))(network)
            for form in (banded.scores, scorer.apply)
        )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    layers = []
    banded.scores(network, maps, lambda x, layer: layers.append((layer, x.shape)) or x)
    assert layers == [(0, (6, 7, 20)), (1, (6, 7, 20)), (2, (6, 128))]
