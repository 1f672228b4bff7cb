"""Indices of spatial IDs: inside the grid they are NumPy's, outside they are refused, or NaN where they are traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.errors import InputError
from jaxid.ids.spatial import SpatialIDs

LAYERS, WIDTH = 3, 20


@pytest.fixture
def ids() -> SpatialIDs:
    return SpatialIDs(
        values=np.random.default_rng(0).standard_normal((LAYERS, 3, 2, 4, 4, WIDTH)).astype(np.float32),
        counts=np.ones((3, 2, 4, 4), np.int32),
        objects=("star", "fish", "cup"),
        sizes=(224, 124),
        layer_names=("a", "b", "c"),
    )


def test_traced_indices_out_of_range_give_nan(ids: SpatialIDs) -> None:
    index = [-1, 0, 3, 4, -(2**31), 2**31 - 1]
    by_layer = jax.jit(lambda k: ids[k, 1, 2])
    by_cell = jax.vmap(lambda x, y: ids[:, x, y])(jnp.array(index), jnp.array(index[::-1]))
    boxed = jax.jit(lambda k: ids.at_box(k, (0, 0, 56, 56), (224, 224)))
    for layer in index:
        known = 0 <= layer < LAYERS
        expected = ids[layer, 1, 2] if known else np.full(WIDTH, np.nan)
        np.testing.assert_allclose(by_layer(layer), expected, rtol=1e-6)
        assert np.isnan(boxed(layer)).any() != known
    for row, (x, y) in enumerate(zip(index, index[::-1], strict=True)):
        known = 0 <= x < 4 and 0 <= y < 4
        expected = ids[:, x, y] if known else np.full((LAYERS, WIDTH), np.nan)
        np.testing.assert_allclose(by_cell[row], expected, rtol=1e-6)
    with pytest.raises(InputError, match="a layer is an integer from 0 to 2, not float32"):
        jax.jit(lambda k: ids[k, 0, 0])(1.0)


def test_slices_stay_inside(ids: SpatialIDs) -> None:
    np.testing.assert_array_equal(ids[1:3, 0, 0], ids[[1, 2], 0, 0])
    np.testing.assert_array_equal(ids[::-1, 0, 0], ids[[2, 1, 0], 0, 0])
    for key in (slice(-2, None), slice(0, 4), slice(0, -1), slice(0.0, 2), slice(None, None, 0)):
        with pytest.raises(InputError, match="a slice of layers must lie between 0 and 3"):
            ids[key, 0, 0]


def test_counts_and_boxes_that_are_no_numbers_of_them(ids: SpatialIDs) -> None:
    with pytest.raises(InputError, match="counts must be integers of 0 or more"):
        dataclasses.replace(ids, counts=ids.counts - 1000)
    with pytest.raises(InputError, match="boxes must be finite"):
        ids.at_box(1, (0, np.nan, 56, 56), (224, 224))


def test_means_of_half_precision_ids_are_in_float32(ids):
    half = dataclasses.replace(ids, values=ids.values.astype(np.float16))
    assert half.universal.dtype == jnp.float32
    exact = half.values[:, :, 0].astype(np.float64).mean(axis=1)
    np.testing.assert_allclose(half.universal, exact, rtol=1e-6, atol=1e-6)


def test_places_and_axes_of_the_published_code(ids: SpatialIDs) -> None:
    # A box of 2 x 2 centred at (80, 30) of 100 x 100: beyond 3/4 of the width, a fifth is left.
    lost = ids.at_box(1, (79, 29, 2, 2), (100, 100), half_cell=False)
    np.testing.assert_allclose(lost, 0.2 * (0.8 * ids[1, 3, 1] + 0.2 * ids[1, 3, 2]), atol=1e-5)
    # At 3/4 exactly nothing is left, whatever the units; a share of 0.65 is no exact number.
    for box, size in (((325, 29, 100, 2), (500, 100)), ((0.65, 0.29, 0.2, 0.02), (1, 1))):
        np.testing.assert_allclose(ids.at_box(1, box, size, half_cell=False), np.zeros(WIDTH), atol=1e-5)
    for shorter, whole in zip(ids.axes(equal_pairs=True), ids.axes(), strict=True):
        np.testing.assert_allclose(shorter, whole * 2 / 3, atol=1e-6)
