"""Maps, functional rows and group moments against their plain forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import similarity


def sides(pictures: int, captions: int, image_tokens: int = 7, text_tokens: int = 5, width: int = 6) -> tuple:
    keys = jax.random.split(jax.random.key(pictures + 10 * captions), 2)
    images = similarity.unit(jax.random.normal(keys[0], (pictures, image_tokens, width)))
    return images, similarity.unit(jax.random.normal(keys[1], (captions, text_tokens, width)) + 0.3)


def test_functional_rows_are_replaced_columns() -> None:
    images, texts = sides(3, 4)
    vectors = similarity.functional_vectors(jax.random.key(5), 2, 7)
    words = np.full((4, 5), -1, np.int32)
    words[1, 2], words[3, 0], words[3, 4] = 0, 1, 0
    expected = np.array(similarity.similarity_maps(images, texts))
    for caption, column in np.argwhere(words >= 0):
        expected[:, caption, :, column] = vectors[words[caption, column]]
    found = similarity.similarity_maps(*similarity.with_functional_rows(images, texts, jnp.asarray(words), vectors))
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_functional_vectors_are_the_published_ones() -> None:
    vectors = similarity.functional_vectors(jax.random.key(0), 11, 50)
    centred = np.asarray(vectors) * 3 - 1
    np.testing.assert_allclose(np.linalg.norm(centred, axis=1), 1, rtol=1e-5)
    assert abs(centred.mean()) < 0.02


@pytest.mark.parametrize("captions", [1, 4, 30], ids=["one", "fewer tokens than coordinates", "more"])
@pytest.mark.parametrize("group", similarity.GROUPS)
def test_moments_are_those_of_the_maps(group: str, captions: int) -> None:
    images, texts = sides(3, captions, width=24)
    maps = np.asarray(similarity.similarity_maps(images, texts), np.float64)
    axes = {"pair": (2, 3), "row": (1, 2, 3), "call": (0, 1, 2, 3)}[group]
    found = jax.jit(similarity.moments, static_argnums=2)(images, texts, group)
    shape = (*found.mean.shape, 1, 1)
    np.testing.assert_allclose(found.mean.reshape(shape), maps.mean(axis=axes, keepdims=True), atol=1e-6)
    expected = maps.std(axis=axes, ddof=1, keepdims=True)
    np.testing.assert_allclose(found.deviation.reshape(shape), expected, rtol=1e-5)
    plain = similarity.standardise(similarity.similarity_maps(images, texts), group)
    np.testing.assert_allclose(plain, (maps - maps.mean(axis=axes, keepdims=True)) / expected, atol=1e-4)


def test_unit_keeps_zero() -> None:
    np.testing.assert_array_equal(similarity.unit(jnp.zeros((2, 3))), 0)
