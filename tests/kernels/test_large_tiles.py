"""The scorer's tiles on GPUs and TPUs, whose kernels run step by step, against the form for CPUs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import banded, lanes, large_tiles, scorer, similarity

BLOCKS: dict[str, large_tiles.Block] = {
    "gpu": banded.Block(columns=4, window=16, pairs=16, dtype="float32"),
    "tpu": lanes.Block(pairs=16, dtype="float32"),
}


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run step by step, on tiles of few pairs."""
    monkeypatch.setattr(banded, "fused_scores", functools.partial(banded.fused_scores, interpret=True))
    monkeypatch.setattr(lanes, "fused_scores", functools.partial(lanes.fused_scores, interpret=True))
    monkeypatch.setattr(large_tiles, "LARGE_TILE", (2, 16))


@functools.cache
def sides(pictures: int, *captions: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(7), 2)
    images = similarity.unit(jax.random.normal(keys[0], (pictures, 7, 6)))
    return images, similarity.unit(jax.random.normal(keys[1], (*captions, 5, 6)) + 0.2)


@functools.cache
def network_of(kind: str) -> scorer.Network:
    return {"cnn": scorer.init_cnn, "mlp": scorer.init_mlp}[kind](jax.random.key(0), 7, 5)


moments_of = jax.jit(similarity.moments, static_argnums=2)
score, score_rows = jax.jit(scorer.score), jax.jit(scorer.score_rows)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(
    ("form", "kind", "captions"),
    [("gpu", "cnn", 19), ("tpu", "cnn", 19), ("tpu", "cnn", 14), ("tpu", "mlp", 19), ("plain", "cnn", 19)],
)
def test_tiles(form: str, kind: str, captions: int) -> None:
    """Five pictures and 19 captions are three rows of two tiles; fewer captions may not fill a block."""
    network, (images, texts) = network_of(kind), sides(5, captions)
    pair, call = (moments_of(images, texts, group) for group in ("pair", "call"))
    moments = similarity.Moments(call.mean, pair.deviation, call.offset)  # unlike for every pair
    found = large_tiles.score_tiles(BLOCKS.get(form), network, images, texts, moments.offset, moments.deviation)
    expected = score(network, images, texts, moments)
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("form", ["gpu", "tpu", "plain"])
def test_tiles_of_own_captions(form: str) -> None:
    network, (images, texts) = network_of("cnn"), sides(13, 13, 3)
    offset, deviation = (np.linspace(*ends, 39, dtype=np.float32).reshape(13, 3) for ends in ((-0.1, 0.1), (0.2, 0.5)))
    found = large_tiles.score_row_tiles(BLOCKS.get(form), network, images, texts, offset, deviation)
    expected = score_rows(network, images, texts, similarity.Moments(*map(jnp.asarray, (offset, deviation, offset))))
    np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


WEIGHTS = np.sin(np.arange(95, dtype=np.float32)).reshape(5, 19)


@functools.cache
def plain_gradients() -> tuple[tuple, tuple, tuple]:
    """What is scored, the moments of every pair, and the gradients in the form for CPUs."""
    given = network_of("cnn"), *sides(5, 19), sides(5, 5, 5)[1]
    moments = moments_of(*given[1:3], "call")
    offset, deviation = (np.broadcast_to(np.asarray(value), (5, 19)) for value in (moments.offset, moments.deviation))
    rows = similarity.Moments(moments.mean, moments.deviation, jnp.asarray(offset[:, :5]))

    def plain(network: scorer.Network, images: jax.Array, texts: jax.Array, own: jax.Array) -> jax.Array:
        every = scorer.score(network, images, texts, moments)
        few = scorer.score_rows(network, images, own, rows)
        return (WEIGHTS * every).sum() + (WEIGHTS[:, :5] * few).sum()

    return given, (offset, deviation), jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(*given)


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize("form", ["gpu", "tpu", "plain"])
def test_gradients_of_tiles(form: str) -> None:
    """Padded pairs contribute nothing, and no NaN."""
    given, (offset, deviation), expected = plain_gradients()

    def fast(network: scorer.Network, images: jax.Array, texts: jax.Array, own: jax.Array) -> jax.Array:
        every = large_tiles.score_tiles(BLOCKS.get(form), network, images, texts, offset, deviation)
        few = large_tiles.score_row_tiles(BLOCKS.get(form), network, images, own, offset[:, :5], deviation[:, :5])
        return (WEIGHTS * every).sum() + (WEIGHTS[:, :5] * few).sum()

    found = jax.jit(jax.grad(fast, argnums=(0, 1, 2, 3)))(*given)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))


@pytest.mark.usefixtures("accelerated")
def test_nearly_constant_maps_in_16_bits() -> None:
    """Tokens that differ by a thousandth of their length keep their differences, and constant maps have no score."""
    network, rng = network_of("cnn"), np.random.default_rng(3)
    images, texts = (0.4 + 4e-4 * rng.standard_normal(shape).astype(np.float32) for shape in ((4, 7, 6), (6, 5, 6)))
    images[3] = texts[5] = 0.4
    moments = moments_of(images, texts, "pair")
    offset, deviation = (np.broadcast_to(np.asarray(value), (4, 6)) for value in (moments.offset, moments.deviation))
    block = BLOCKS["gpu"]._replace(dtype="float16")
    found = np.asarray(large_tiles.score_tiles(block, network, images, texts, offset, deviation))
    expected = np.asarray(score(network, images, texts, moments))
    assert np.isnan(expected[3, 5])
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=5e-3 * float(np.nanstd(expected)))


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_other_platforms(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where there is no kernel: scores, training and dropout, each chosen by its own call."""
    network, (images, texts) = network_of(kind), sides(5, 19)
    _, own = sides(5, 5, 3)
    maps = jax.random.normal(jax.random.key(5), (6, 7, 5))
    moments = moments_of(images, texts, "call")
    few = similarity.Moments(moments.mean, moments.deviation, moments.offset[:, :3])

    def results() -> list[jax.Array]:
        def run(network: scorer.Network, images: jax.Array, texts: jax.Array, own: jax.Array) -> list[jax.Array]:
            scores = scorer.score(network, images, texts, moments), scorer.score_rows(network, images, own, few)
            return [*scores, scorer.apply(network, maps), scorer.apply(network, maps, jax.random.key(0), 0.0)]

        return jax.jit(run)(network, images, texts, own)

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
