"""Maps, functional rows and group moments against their plain forms."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxid.kernels import similarity


def sides(pictures: int, captions: int, image_tokens: int = 7, text_tokens: int = 5, width: int = 6) -> tuple:
    keys = jax.random.split(jax.random.key(pictures + 10 * captions), 2)
    images = similarity.unit(jax.random.normal(keys[0], (pictures, image_tokens, width)))
    return images, similarity.unit(jax.random.normal(keys[1], (captions, text_tokens, width)) + 0.3)


moments = jax.jit(similarity.moments, static_argnums=2)
standardised = jax.jit(
    lambda images, texts, group: similarity.standardise(similarity.similarity_maps(images, texts), group),
    static_argnums=2,
)


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
    found = moments(images, texts, group)
    shape = (*found.mean.shape, 1, 1)
    np.testing.assert_allclose(found.mean.reshape(shape), maps.mean(axis=axes, keepdims=True), atol=1e-6)
    expected = maps.std(axis=axes, ddof=1, keepdims=True)
    np.testing.assert_allclose(found.deviation.reshape(shape), expected, rtol=1e-5)
    plain = standardised(images, texts, group)
    np.testing.assert_allclose(plain, (maps - maps.mean(axis=axes, keepdims=True)) / expected, atol=1e-4)


@pytest.mark.parametrize("group", similarity.GROUPS)
@pytest.mark.parametrize("right", [False, True], ids=["second moments", "right angles"])
def test_moments_of_several_pictures_together(group: str, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs and TPUs: two pictures at a time of five, by second moments or by the products themselves."""
    images, texts = (
        near_constant("right angles", 1e-3) if right else (np.asarray(side) for side in sides(5, 9, width=24))
    )
    turned = np.linalg.qr(np.random.default_rng(5).standard_normal((24, 24)))[0].astype(np.float32)
    images, texts = images @ turned, texts @ turned  # no coordinate is small by itself
    expected = moments(images, texts, group)
    sizes, mapped = [], jax.lax.map

    def noted(function: Callable[..., object], pictures: jax.Array, *, batch_size: int | None) -> object:
        sizes.append(batch_size)
        return mapped(function, pictures, batch_size=batch_size)

    monkeypatch.setattr(jax.lax, "map", noted)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, default, **_: default(*given))
    monkeypatch.setattr(similarity, "_NUMBERS_TOGETHER", 2 * 7 * 5 * 9)
    found = jax.jit(lambda images, texts: similarity.moments(images, texts, group))(images, texts)
    assert 2 in sizes
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.deviation, expected.deviation, rtol=1e-4)


def test_unit_keeps_zero() -> None:
    np.testing.assert_array_equal(similarity.unit(jnp.zeros((2, 3))), 0)


# --- maps of nearly equal numbers -----------------------------------------------------------------------------------


def near_constant(kind: str, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of 5 pictures and 9 captions whose maps have a large mean beside their deviation."""
    rng = np.random.default_rng(11)
    images, texts = rng.standard_normal((5, 7, 24)), rng.standard_normal((9, 5, 24))
    if kind == "one coordinate":
        images[..., 0] = texts[..., 0] = 2 * size**-0.5
    elif kind == "one vector":
        base = rng.standard_normal(24)
        images, texts = base + images * size, base + texts * size
    elif kind == "one each":
        images = rng.standard_normal((5, 1, 24)) + 1 + images * size
        texts = rng.standard_normal((9, 1, 24)) + 1 + texts * size
    else:  # at right angles but for one coordinate
        images[..., 12:], texts[..., :12] = images[..., 12:] * size, texts[..., :12] * size
        images[..., 0] = texts[..., 0] = 1
    if kind.startswith("one "):
        images, texts = (side / np.linalg.norm(side, axis=-1, keepdims=True) for side in (images, texts))
    return images.astype(np.float32), texts.astype(np.float32)


def two_pass(images: np.ndarray, texts: np.ndarray, group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maps standardised in float64, and their groups' mean and deviation."""
    maps = np.einsum("nie,mte->nmit", images.astype(np.float64), texts.astype(np.float64))
    axes = {"pair": (2, 3), "row": (1, 2, 3), "call": (0, 1, 2, 3)}[group]
    mean, deviation = maps.mean(axis=axes, keepdims=True), maps.std(axis=axes, ddof=1, keepdims=True)
    return (maps - mean) / deviation, mean[..., 0, 0], deviation[..., 0, 0]


@pytest.mark.parametrize("group", similarity.GROUPS)
@pytest.mark.parametrize(
    ("kind", "sizes", "most"),
    [
        ("one coordinate", (1.0, 1e-2, 1e-3, 5e-5), 8_000),
        ("one vector", (1.0, 0.1, 0.05, 0.02), 5_000),
        ("one each", (1.0, 1e-2, 1e-3), 0),  # only single pairs are nearly constant
        ("right angles", (1.0, 1e-2, 1e-3, 1e-4), 1_500),
    ],
)
def test_nearly_constant_maps(kind: str, sizes: tuple[float, ...], most: float, group: str) -> None:
    for size in sizes:
        images, texts = near_constant(kind, size)
        whole, mean, deviation = two_pass(images, texts, group)
        own = moments(images, texts, group)
        np.testing.assert_allclose(own.deviation, deviation, rtol=2e-4)
        np.testing.assert_allclose(own.mean, mean, rtol=1e-5, atol=1e-6)
        apart = whole.mean(axis=(2, 3)) * deviation
        np.testing.assert_allclose(own.offset + 0 * apart, apart, atol=1e-3 * float(deviation.min()))
        ratio = float(np.abs(mean / deviation).min())
        plain = similarity.standardise(similarity.similarity_maps(jnp.asarray(images), jnp.asarray(texts)), group)
        np.testing.assert_allclose(plain, whole, atol=1e-5 + 1e-6 * float(np.abs(mean / deviation).max()))
    assert ratio > most


@pytest.mark.parametrize("group", similarity.GROUPS)
def test_gradients_of_nearly_constant_maps(group: str) -> None:
    """Against float64 in PyTorch."""
    images, texts = near_constant("one coordinate", 1e-3)
    weights = np.random.default_rng(0).standard_normal((5, 9, 1, 1)).astype(np.float32)

    def ours(images: jax.Array, texts: jax.Array) -> jax.Array:
        own = similarity.moments(images, texts, group)
        return (weights[..., 0, 0] * (own.deviation + own.offset)).sum()

    found = jax.jit(jax.grad(ours, argnums=(0, 1)))(images, texts)
    given = [torch.tensor(side, dtype=torch.float64, requires_grad=True) for side in (images, texts)]
    maps = torch.einsum("nie,mte->nmit", *given)
    axes = {"pair": (2, 3), "row": (1, 2, 3), "call": (0, 1, 2, 3)}[group]
    deviation = maps.std(dim=axes, keepdim=True)
    apart = maps.mean(dim=(2, 3), keepdim=True) - maps.mean(dim=axes, keepdim=True)
    (torch.from_numpy(weights) * (deviation + apart)).sum().backward()
    for own, side in zip(found, given, strict=True):
        assert side.grad is not None
        np.testing.assert_allclose(own, side.grad, atol=2e-4 * float(side.grad.abs().max()))


@pytest.mark.parametrize("group", similarity.GROUPS)
def test_constant_maps_have_no_deviation(group: str) -> None:
    images, texts = np.ones((3, 7, 6), np.float32) * 0.3, np.ones((40, 5, 6), np.float32) * np.float32(0.7)
    np.testing.assert_array_equal(similarity.moments(jnp.asarray(images), jnp.asarray(texts), group).deviation, 0)
    maps = similarity.similarity_maps(jnp.asarray(images), jnp.asarray(texts))
    assert not np.isfinite(similarity.standardise(maps, group)).any()
