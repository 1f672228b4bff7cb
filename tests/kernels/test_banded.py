"""The scorer's form for GPUs and TPUs: the kernel, run step by step, and its tiles, against the form for CPUs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import banded, scorer, similarity

SMALL = {
    "gpu": banded.Block(columns=4, window=16, pairs=16, pairs_last=False, dtype="float32"),
    "tpu": banded.Block(columns=16, window=0, pairs=16, pairs_last=True, dtype="float32"),
}
"""Blocks that cut maps of 18 columns into several."""


def maps_for(block: banded.Block, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Two blocks of maps: plain, and as the kernel reads them."""
    plain = jax.random.normal(jax.random.key(rows), (2 * block.pairs, rows, columns))
    padded = jnp.pad(plain, ((0, 0), (0, 0), (0, banded.padded_columns(columns, block) - columns)))
    return plain, jnp.moveaxis(padded, 0, 2 if block.pairs_last else 1).astype(block.dtype)


@pytest.mark.parametrize("columns", [5, 18, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SMALL)
def test_kernel_is_the_plain_form(kind: str, columns: int) -> None:
    block, network = SMALL[kind], scorer.init_cnn(jax.random.key(0), 6, columns)
    plain, maps = maps_for(block, 6, columns)
    with jax.default_matmul_precision("highest"):
        expected = scorer.apply(network, plain)
        own = banded.bands(network, block)
        found = jax.jit(lambda: banded.fused_scores(network, own, maps, block, interpret=True))()
        np.testing.assert_allclose(banded.scores(network, plain), expected, atol=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("platform", "most"), [("cuda", 4e-3), ("tpu", 3e-2)])
def test_distance_in_16_bits(platform: str, most: float) -> None:
    """In parts of the scores' standard deviation."""
    block, network = banded.BLOCKS[platform]._replace(pairs=64), scorer.init_cnn(jax.random.key(2), 5, 30)
    plain, maps = maps_for(block, 5, 30)
    own = banded.bands(network, block)
    found = jax.jit(lambda: banded.fused_scores(network, own, maps, block, interpret=True))()
    expected = np.asarray(scorer.apply(network, plain))
    distance = np.abs(np.asarray(found) - expected).max() / expected.std()
    assert most / 20 < distance < most


def test_gradients_of_the_kernel() -> None:
    block, network = SMALL["tpu"], scorer.init_cnn(jax.random.key(1), 4, 18)
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
    by_maps = jnp.moveaxis(by_maps, 2, 0)[..., :18]
    for one, other in zip([*own, by_maps], [*expected, by_plain], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run step by step, on tiles of few pairs."""
    monkeypatch.setattr(banded, "fused_scores", functools.partial(banded.fused_scores, interpret=True))
    monkeypatch.setattr(scorer, "LARGE_TILE", (2, 16))


def sides(pictures: int, *captions: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(7), 2)
    images = similarity.unit(jax.random.normal(keys[0], (pictures, 7, 6)))
    return images, similarity.unit(jax.random.normal(keys[1], (*captions, 5, 6)) + 0.2)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("group", [pytest.param("pair", marks=pytest.mark.slow), "call"])
@pytest.mark.parametrize(("form", "kind"), [("gpu", "cnn"), ("tpu", "cnn"), ("tpu", "mlp"), ("plain", "cnn")])
def test_tiles(form: str, kind: str, group: str) -> None:
    """Five pictures and 19 captions are three rows of two tiles."""
    network = {"cnn": scorer.init_cnn, "mlp": scorer.init_mlp}[kind](jax.random.key(0), 7, 5)
    images, texts = sides(5, 19)
    moments = similarity.moments(images, texts, group)
    offset, deviation = (jnp.broadcast_to(value, (5, 19)) for value in (moments.offset, moments.deviation))
    found = scorer._score_large_tiles(SMALL.get(form), network, images, texts, offset, deviation)
    expected = scorer.score(network, images, texts, moments)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("form", ["gpu", "tpu", "plain"])
def test_tiles_of_own_captions(form: str) -> None:
    network = scorer.init_cnn(jax.random.key(0), 7, 5)
    images, texts = sides(13, 13, 3)
    offset, deviation = jnp.linspace(-0.1, 0.1, 39).reshape(13, 3), jnp.linspace(0.2, 0.5, 39).reshape(13, 3)
    found = scorer._score_large_row_tiles(SMALL.get(form), network, images, texts, offset, deviation)
    expected = scorer.score_rows(network, images, texts, similarity.Moments(offset, deviation, offset))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("form", ["gpu", "plain"])
def test_gradients_of_tiles(form: str) -> None:
    """Padded pairs contribute nothing, and no NaN."""
    network, (images, texts) = scorer.init_cnn(jax.random.key(0), 7, 5), sides(5, 19)
    _, own = sides(5, 5, 5)
    moments = similarity.moments(images, texts, "call")
    offset, deviation = (jnp.broadcast_to(value, (5, 19)) for value in (moments.offset, moments.deviation))
    rows = similarity.Moments(moments.mean, moments.deviation, offset[:, :5])
    weights = jnp.sin(jnp.arange(95.0)).reshape(5, 19)

    def fast(network: scorer.Network, images: jax.Array, texts: jax.Array, own: jax.Array) -> jax.Array:
        every = scorer._score_large_tiles(SMALL.get(form), network, images, texts, offset, deviation)
        few = scorer._score_large_row_tiles(SMALL.get(form), network, images, own, offset[:, :5], deviation[:, :5])
        return (weights * every).sum() + (weights[:, :5] * few).sum()

    def plain(network: scorer.Network, images: jax.Array, texts: jax.Array, own: jax.Array) -> jax.Array:
        every = scorer.score(network, images, texts, moments)
        few = scorer.score_rows(network, images, own, rows)
        return (weights * every).sum() + (weights[:, :5] * few).sum()

    given = (network, images, texts, own)
    found, expected = (jax.jit(jax.grad(form, argnums=(0, 1, 2, 3)))(*given) for form in (fast, plain))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.usefixtures("accelerated")
def test_nearly_constant_maps_in_16_bits() -> None:
    """Tokens that differ by a thousandth of their length keep their differences, and constant maps have no score."""
    network = scorer.init_cnn(jax.random.key(0), 7, 5)
    keys = jax.random.split(jax.random.key(3), 2)
    images = 0.4 + 4e-4 * jax.random.normal(keys[0], (4, 7, 6))
    texts = 0.4 + 4e-4 * jax.random.normal(keys[1], (6, 5, 6))
    images, texts = images.at[3].set(0.4), texts.at[5].set(0.4)
    moments = similarity.moments(images, texts, "pair")
    offset, deviation = (jnp.broadcast_to(value, (4, 6)) for value in (moments.offset, moments.deviation))
    block = SMALL["gpu"]._replace(dtype="float16")
    found = np.asarray(scorer._score_large_tiles(block, network, images, texts, offset, deviation))
    expected = np.asarray(scorer.score(network, images, texts, moments))
    assert np.isnan(expected[3, 5])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=5e-3 * float(np.nanstd(expected)))


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_other_platforms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no kernel: scores, training and dropout, each chosen by its own call."""
    network = {"cnn": scorer.init_cnn, "mlp": scorer.init_mlp}[kind](jax.random.key(0), 7, 5)
    images, texts = sides(5, 19)
    _, own = sides(5, 5, 3)
    maps = jax.random.normal(jax.random.key(5), (6, 7, 5))
    moments = similarity.moments(images, texts, "call")
    few = similarity.Moments(moments.mean, moments.deviation, moments.offset[:, :3])

    def results() -> list[jax.Array]:
        scores = scorer.score(network, images, texts, moments), scorer.score_rows(network, images, own, few)
        return [*scores, scorer.apply(network, maps), scorer.apply(network, maps, jax.random.key(0), 0.0)]

    expected, calls = results(), []

    def elsewhere(*given: object, default: Callable[..., jax.Array], **_: object) -> jax.Array:
        calls.append(default)
        return default(*given)

    monkeypatch.setattr(jax.lax, "platform_dependent", elsewhere)
    for one, other in zip(results(), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    assert len(calls) == 4
    drawn = jax.jit(jax.vmap(lambda key: scorer.apply(network, maps, key, 0.3)))(
        jax.random.split(jax.random.key(2), 400)
    )
    dropped = drawn.std(axis=0)
    assert bool((dropped > 0).all()) is (kind == "cnn")


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
