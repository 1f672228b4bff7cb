"""The tiled scorer against PyTorch's layers on single maps: scores, gradients, groups, odd numbers, memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxid.kernels import scorer, similarity

IMAGE_TOKENS, TEXT_TOKENS = 7, 5


@functools.cache
def network(kind: str, seed: int = 0) -> scorer.Network:
    make = {"cnn": scorer.init_cnn, "mlp": scorer.init_mlp}[kind]
    return make(jax.random.key(seed), IMAGE_TOKENS, TEXT_TOKENS)


def in_pytorch(found: scorer.Network, maps: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """The published layers, on maps [B, I, T]."""
    if isinstance(found, scorer.CNN):
        x = torch.conv2d(maps[:, None], parameters["conv1"][:, None], parameters["conv1_bias"], padding=1).relu()
        x = torch.conv2d(x, parameters["conv2"], parameters["conv2_bias"], padding=1).relu()
        hidden = (x.flatten(1) @ parameters["fc1"].flatten(1).T + parameters["fc1_bias"]).relu()
        return hidden @ parameters["fc2"] + parameters["fc2_bias"]
    hidden = (maps.flatten(1) @ parameters["fc1"].flatten(1).T + parameters["fc1_bias"]).relu()
    hidden = (hidden @ parameters["fc2"].T + parameters["fc2_bias"]).relu()
    return hidden @ parameters["fc3"] + parameters["fc3_bias"]


def tensors(found: scorer.Network) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(np.array(value), requires_grad=True) for name, value in found._asdict().items()}


def sides(pictures: int, captions: int) -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(7), 2)
    images = similarity.unit(jax.random.normal(keys[0], (pictures, IMAGE_TOKENS, 6)))
    return images, similarity.unit(jax.random.normal(keys[1], (captions, TEXT_TOKENS, 6)))


moments_of = jax.jit(similarity.moments, static_argnums=2)
score, apply = jax.jit(scorer.score), jax.jit(scorer.apply, static_argnums=3)


@pytest.mark.parametrize(
    ("kind", "pictures", "captions", "groups"),
    [
        ("cnn", 1, 1, ("row",)),
        ("cnn", 2, 70, similarity.GROUPS),
        pytest.param("cnn", 66, 3, ("row",), marks=pytest.mark.slow),
        ("mlp", 3, 5, ("row",)),
        ("mlp", 2, 70, ("row",)),
    ],
)
def test_tiles_are_single_maps(kind: str, pictures: int, captions: int, groups: tuple[str, ...]) -> None:
    images, texts = sides(pictures, captions)
    found = network(kind)
    for group in groups:
        maps = np.array(similarity.standardise(similarity.similarity_maps(images, texts), group))
        with torch.no_grad():
            flat = torch.from_numpy(maps.reshape(-1, IMAGE_TOKENS, TEXT_TOKENS))
            expected = in_pytorch(found, flat, tensors(found)).reshape(pictures, captions)
        with jax.default_matmul_precision("highest"):
            scores = score(found, images, texts, moments_of(images, texts, group))
        np.testing.assert_allclose(scores, expected, atol=1e-5 * float(expected.abs().max()) + 1e-6)


@pytest.mark.parametrize("captions", [3, 80])
def test_rows_of_their_own_captions(captions: int) -> None:
    images, _ = sides(5, 1)
    texts = similarity.unit(jax.random.normal(jax.random.key(3), (5, captions, TEXT_TOKENS, 6)))
    found = network("cnn")
    images, texts = np.asarray(images), np.asarray(texts)
    moments = [moments_of(images[row : row + 1], texts[row], "row") for row in range(5)]
    expected = [
        np.asarray(score(found, images[row : row + 1], texts[row], own))[0]
        for row, own in zip(range(5), moments, strict=True)
    ]
    together = similarity.Moments(*(jnp.concatenate(parts) for parts in zip(*moments, strict=True)))
    np.testing.assert_allclose(jax.jit(scorer.score_rows)(found, images, texts, together), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_gradients_are_pytorchs(kind: str) -> None:
    found = network(kind, 1)
    maps = np.random.default_rng(0).standard_normal((6, IMAGE_TOKENS, TEXT_TOKENS)).astype(np.float32)
    weights = np.linspace(-1, 1, 6, dtype=np.float32)
    parameters, given = tensors(found), torch.tensor(maps, requires_grad=True)
    (in_pytorch(found, given, parameters) * torch.from_numpy(weights)).sum().backward()
    with jax.default_matmul_precision("highest"):
        slopes = jax.grad(lambda found, maps: (scorer.apply(found, maps) * weights).sum(), argnums=(0, 1))
        own, by_maps = jax.jit(slopes)(found, jnp.asarray(maps))
    for name, gradient in [*own._asdict().items(), ("maps", by_maps)]:
        theirs = given.grad if name == "maps" else parameters[name].grad
        assert theirs is not None
        assert np.abs(np.asarray(gradient) - theirs.numpy()).max() <= 1e-5 * float(theirs.abs().max()) + 1e-7, name


def test_correlation_and_its_gradient() -> None:
    """Against one gather of all nine shifted copies, with unequal numbers of channels."""
    stride, pairs, length = 6, 4, 4 * 6 * 4 + 8  # no whole number of rows
    keys = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(keys[0], (2, length + 2 * (stride + 1) * pairs))
    kernel = jax.random.normal(keys[1], (3, 2, 3, 3))
    shifts = (np.arange(3)[:, None] * stride + np.arange(3)) * pairs

    def plain(x: Any, kernel: Any) -> Any:
        return jnp.einsum("kdas,ckda->cs", x[:, shifts[..., None] + np.arange(length)], kernel)

    def pulled(run: Any) -> Any:
        def both(x: Any, kernel: Any) -> Any:
            found, back = jax.vjp(run, x, kernel)
            return found, back(jax.random.normal(keys[2], found.shape))

        return jax.jit(both)(x, kernel)

    with jax.default_matmul_precision("highest"):
        ours, gradients = pulled(lambda x, kernel: scorer.correlate(x, kernel, stride, pairs))
        theirs, expected = pulled(plain)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for gradient, plainly in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, plainly, atol=1e-5 * float(jnp.abs(plainly).max()))


def test_many_scorers_at_once() -> None:
    images, texts = sides(3, 4)
    moments = moments_of(images, texts, "call")
    found = [network("cnn", seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)
    together = jax.jit(jax.vmap(scorer.score, in_axes=(0, None, None, None)))(stacked, images, texts, moments)
    for row, one in enumerate(found):
        np.testing.assert_allclose(together[row], score(one, images, texts, moments), atol=1e-6)


def test_dropout_is_scaled_and_repeatable() -> None:
    found = network("cnn")
    maps = jnp.asarray(np.random.default_rng(1).standard_normal((4, IMAGE_TOKENS, TEXT_TOKENS)), jnp.float32)
    plain = apply(found, maps)
    np.testing.assert_array_equal(apply(found, maps, jax.random.key(0), 0.0), plain)
    one, again, other = (apply(found, maps, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other) and not np.allclose(one, plain)
    # A layer that only sums has its expectation kept.
    ones = found._replace(fc1=jnp.ones_like(found.fc1) / 100)
    every = jax.jit(jax.vmap(lambda key: scorer.apply(ones, maps, key, 0.3)))
    drawn = np.asarray(every(jax.random.split(jax.random.key(2), 1500)))
    np.testing.assert_allclose(drawn.mean(axis=0), apply(ones, maps), rtol=0.1, atol=0.01)


def test_dropout_is_of_channels_of_numbers_and_of_the_score() -> None:
    """A network that tells from its score what was dropped, against PyTorch's layers as published."""
    identity = np.zeros((4, 4, 3, 3), np.float32)
    identity[range(4), range(4), 1, 1] = 1
    wide = np.zeros((128, 4, IMAGE_TOKENS, TEXT_TOKENS), np.float32)
    wide[range(4), range(4)] = 1 / (IMAGE_TOKENS * TEXT_TOKENS)  # the mean of each channel
    sums = np.zeros(128, np.float32)
    sums[:4] = 1, 10, 100, 1000
    zeros = {"conv1_bias": np.zeros(4), "conv2_bias": np.zeros(4), "fc1_bias": np.zeros(128), "fc2_bias": np.array(0.0)}
    layers = {"conv1": np.tile(identity[:1, 0], (4, 1, 1)), "conv2": identity, "fc1": wide, "fc2": sums}
    found = scorer.CNN(**{name: jnp.asarray(value, jnp.float32) for name, value in (layers | zeros).items()})
    count, kept = 4000, 0.5

    def drawn(key: Any) -> Any:
        return scorer.apply(found, jnp.ones((count, IMAGE_TOKENS, TEXT_TOKENS)), key, 1 - kept)

    ours = np.asarray(jax.jit(drawn)(jax.random.key(3)))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        channels, numbers = torch.nn.Dropout2d(1 - kept), torch.nn.Dropout(1 - kept)
        x = torch.ones(count, 4, IMAGE_TOKENS, TEXT_TOKENS)  # four copies of the map, as the first convolution makes
        hidden = numbers(channels(channels(x)).mean((2, 3))) @ torch.tensor([1.0, 10, 100, 1000])
        theirs = numbers(hidden).numpy()
    scale = kept**-4  # what is kept was scaled up in every layer
    digits = [np.round(scores / scale).astype(int) for scores in (ours, theirs)]
    for scores, read in zip((ours, theirs), digits, strict=True):
        np.testing.assert_allclose(scores, read * scale, rtol=1e-5)  # channels are there or not, nothing between
        assert set("".join(map(str, read.tolist()))) == {"0", "1"}
    assert abs(np.mean([read == 0 for read in digits[0]]) - np.mean([read == 0 for read in digits[1]])) < 0.04
    for place in (1, 10, 100, 1000):
        shares = [np.mean(read // place % 10) for read in digits]
        np.testing.assert_allclose(shares, kept**4, atol=0.02)


def test_other_platforms_drop_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, key = jax.random.normal(jax.random.key(5), (6, IMAGE_TOKENS, TEXT_TOKENS)), jax.random.key(1)
    here = apply(network("cnn"), maps, key, 0.4)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *given, default, **_: default(*given))
    elsewhere = jax.jit(lambda found: scorer.apply(found, maps, key, 0.4))(network("cnn"))
    np.testing.assert_allclose(elsewhere, here, atol=1e-5)
    monkeypatch.undo()
    assert not np.allclose(here, apply(network("cnn"), maps))


@pytest.mark.slow
def test_memory_does_not_grow_with_pairs() -> None:
    found = network("cnn")
    used = []
    for count in (64, 512):
        images, texts = jax.eval_shape(lambda count=count: sides(count, count))
        moments = jax.eval_shape(lambda images, texts: similarity.moments(images, texts, "call"), images, texts)
        analysis: Any = jax.jit(scorer.score).lower(found, images, texts, moments).compile().memory_analysis()
        inputs = 4 * (images.size + texts.size + 4 * count * count)  # copies of what came in, and what goes out
        used.append(analysis.temp_size_in_bytes - inputs)
    pair = 4 * 4 * IMAGE_TOKENS * TEXT_TOKENS
    assert used[1] - used[0] < 0.02 * (512**2 - 64**2) * pair
