"""The scorer of dense similarity maps: a small CNN or MLP, over single maps or tiled over pictures x captions.

There are two forms of the same sums. GPUs and TPUs get matrix products over tiles of thousands of pairs
(`large_tiles`). The form for CPUs follows three observations. (1) With the pairs of a tile as the fastest axis, a 3 x 3
convolution of few channels is nine (or 36) multiply-adds of a vector and a number. (2) If rows are one zero longer than
the map, shifting a map in either direction is one shift of flat memory. (3) The matrix product that makes the maps can
make the borders too, if the picture tokens are padded with rows around them and the caption tokens with a column after
them. Both sides are centred, so that maps of nearly equal numbers keep their differences, and the contributions of the
means are in the borders (`score_tile`).
Source: [DCSM] arXiv 2503.08723, section 4.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxid.kernels import banded, cutting, large_tiles
from jaxid.kernels.networks import CHANNELS as CHANNELS
from jaxid.kernels.networks import CNN as CNN
from jaxid.kernels.networks import MLP as MLP
from jaxid.kernels.networks import Network as Network
from jaxid.kernels.networks import init_cnn as init_cnn
from jaxid.kernels.networks import init_mlp as init_mlp
from jaxid.kernels.networks import map_shape as map_shape
from jaxid.kernels.networks import misfit as misfit
from jaxid.kernels.similarity import Moments, centred

BORDER = 3
"""Zero rows above and below a map: the reach of two convolutions, and one more for shifts along the row."""

PAIRS = 64
"""Pairs in a tile on CPU: enough to fill vector registers, and few enough for a core's caches to hold the activations.
"""


def apply(
    network: Network, maps: Float[Array, "B I T"], key: Array | None = None, rate: float = 0.5
) -> Float[Array, "B"]:
    """Scores of standardised maps, for training.

    Args:
        network: the scorer.
        maps: standardised maps.
        key: random key of a CNN's dropout: of channels after the convolutions, of numbers after the hidden layer, and
            of the score. Nothing is dropped without one, and nothing in an MLP.
        rate: probability that a channel or a number is dropped.
    """
    keys = () if key is None or not rate or isinstance(network, MLP) else (key,)

    def flat(network: Network, maps: Array, *keys: Array) -> Array:
        padded = jnp.pad(maps, ((0, 0), (BORDER, BORDER), (0, 1)))
        flat = jnp.moveaxis(padded.reshape(len(maps), -1), 0, 1)
        return _head(network, _weights(network), flat, keys[0] if keys else None, rate)

    def plain(network: Network, maps: Array, *keys: Array) -> Array:
        if isinstance(network, MLP):
            return large_tiles.perceptron(network, maps)
        return banded.scores(network, maps, partial(_dropped, key=keys[0], rate=rate) if keys else lambda x, _: x)

    scores = jax.lax.platform_dependent(network, maps, *keys, cpu=flat, default=plain)
    return scores * _kept(keys[0], 3, rate, len(maps)) if keys else scores


def _kept(key: Array, layer: int, rate: float, *shape: int) -> Float[Array, "*S"]:
    """Factors of a layer's channels or numbers, 0 where they are dropped; the first axis is that of maps."""
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, shape), 1 / (1 - rate), 0.0)


def _dropped(x: Float[Array, "B *J"], layer: int, key: Array, rate: float) -> Float[Array, "B *J"]:
    """The output of a layer of `banded.scores`; after a convolution, channels are the fastest part of its last axis."""
    if x.ndim == 2:
        return x * _kept(key, layer, rate, *x.shape)
    return x * jnp.tile(_kept(key, layer, rate, len(x), CHANNELS), x.shape[2] // CHANNELS)[:, None]


# --- pictures x captions -------------------------------------------------------------------------------------------


def score(
    network: Network,
    images: Float[Array, "N I E"],
    texts: Float[Array, "M T E"],
    moments: Moments,
) -> Float[Array, "N M"]:
    """Scores of every picture with every caption, in tiles of bounded memory.

    The score of a constant map is NaN.

    Args:
        network: the scorer.
        images: tokens of pictures, as returned by `similarity.with_functional_rows`.
        texts: tokens of captions, as returned by `similarity.with_functional_rows`.
        moments: moments of the maps, as returned by `similarity.moments`.
    """
    count, captions = len(images), len(texts)
    offset, deviation = (jnp.broadcast_to(value, (count, captions)) for value in (moments.offset, moments.deviation))
    given = images, texts, offset, deviation
    return large_tiles.by_platform(_score_tiles, large_tiles.score_tiles, network, *given)


def _score_tiles(
    network: Network, images: Array, texts: Array, offset: Float[Array, "N M"], deviation: Float[Array, "N M"]
) -> Float[Array, "N M"]:
    """`score` on CPU."""
    count, captions = offset.shape
    width = min(captions, PAIRS)
    height = min(max(1, PAIRS // width), count)
    rows, columns = -(-count // height), -(-captions // width)
    cut = partial(cutting.blocks, rows=rows, height=height, columns=columns, width=width)
    tiles = cut(offset), cut(deviation, fill=1.0)
    images = cutting.padded(images, rows * height).reshape(rows, height, *images.shape[1:])
    texts = cutting.padded(texts, columns * width).reshape(columns, width, *texts.shape[1:])
    texts = jax.vmap(_caption_side)(texts)
    weights = _weights(network)

    def row(given: tuple[Array, Array, Array]) -> Float[Array, "c p q"]:
        pictures, offsets, deviations = given
        padded = _picture_side(pictures)

        def tile(given: tuple[Array, Array, Array]) -> Float[Array, "p q"]:
            captions, offset, deviation = given
            maps = (padded.reshape(-1, padded.shape[-1]) @ captions).reshape(height, -1, width)
            return score_tile(network, weights, maps, offset, deviation)

        return jax.lax.map(tile, (texts, offsets, deviations))

    found = jax.lax.map(row, (images, *tiles))  # [rows, columns, height, width]
    return jnp.moveaxis(found, 2, 1).reshape(rows * height, columns * width)[:count, :captions]


def score_rows(
    network: Network,
    images: Float[Array, "N I E"],
    texts: Float[Array, "N C T E"],
    moments: Moments,
) -> Float[Array, "N C"]:
    """Scores of every picture with its own captions, in tiles of bounded memory.

    Args:
        network: the scorer.
        images: tokens of pictures, as returned by `similarity.with_functional_rows`.
        texts: tokens of captions, as returned by `similarity.with_functional_rows`.
        moments: moments of every pair, [N, C], or of every picture, [N, 1].
    """
    shape = texts.shape[:2]
    offset, deviation = (jnp.broadcast_to(value, shape) for value in (moments.offset, moments.deviation))
    return large_tiles.by_platform(
        _score_row_tiles, large_tiles.score_row_tiles, network, images, texts, offset, deviation
    )


def _score_row_tiles(
    network: Network, images: Array, texts: Array, offset: Float[Array, "N C"], deviation: Float[Array, "N C"]
) -> Float[Array, "N C"]:
    """`score_rows` on CPU."""
    count, captions = offset.shape
    height = min(max(1, PAIRS // captions), count)
    rows = -(-count // height)
    tiles = cutting.row_tiles((images, texts, offset, deviation), rows, height)
    weights = _weights(network)

    def row(tile: list[Array]) -> Float[Array, "p q"]:
        pictures, captions_of, offset, deviation = tile
        maps = jnp.einsum("pie,pej->pij", _picture_side(pictures), jax.vmap(_caption_side)(captions_of))
        return score_tile(network, weights, maps.reshape(height, -1, captions), offset, deviation)

    return jax.lax.map(row, tiles).reshape(rows * height, captions)[:count]


# --- a tile on CPU -------------------------------------------------------------------------------------------------


def score_tile(
    network: Network,
    weights: Float[Array, "H K"],
    maps: Float[Array, "p S q"],
    offset: Float[Array, "p q"],
    deviation: Float[Array, "p q"],
) -> Float[Array, "p q"]:
    """Scores of the pairs of p pictures and q captions in one tile.

    Args:
        network: the scorer.
        weights: its first wide layer, as returned by `_weights`.
        maps: products of centred tokens, flat, with `BORDER` rows above and below and a column after each row. The
            first row comes from the picture's mean token, the last column from the caption's. Added to all others, they
            turn the products into maps about their own mean.
        offset: difference of every pair's mean from its group's.
        deviation: standard deviation of every pair's group.
    """
    inside = _inside(*map_shape(network))
    flat = jnp.moveaxis(maps, 0, 1).reshape(maps.shape[1], -1)
    grid = flat.reshape(-1, map_shape(network)[1] + 1, flat.shape[1])
    whole = (grid + grid[:1] + grid[:, -1:] + offset.reshape(-1)) / deviation.reshape(-1)
    return _head(network, weights, jnp.where(inside[:, None], whole.reshape(flat.shape), 0)).reshape(offset.shape)


def _head(
    network: Network,
    weights: Float[Array, "H K"],
    maps: Float[Array, "S B"],
    key: Array | None = None,
    rate: float = 0.0,
) -> Float[Array, "B"]:
    """Scores of standardised maps, flat and padded as in `apply`, pairs last; with dropout inside if there is a key."""
    if isinstance(network, MLP):
        hidden = jax.nn.relu(weights @ maps + network.fc1_bias[:, None])
        hidden = jax.nn.relu(network.fc2 @ hidden + network.fc2_bias[:, None])
        return network.fc3 @ hidden + network.fc3_bias
    (image_tokens, text_tokens), pairs = map_shape(network), maps.shape[1]
    stride = text_tokens + 1
    # The first convolution is needed one row and one number beyond the map on both sides.
    start, length = (BORDER - 1) * stride - 1, (image_tokens + 2) * stride + 2
    around = stride + 1
    inside = jnp.asarray(_inside(image_tokens, text_tokens)[start : start + length], maps.dtype)
    flat = maps[start - around : start + length + around].reshape(1, -1)
    x = correlate(flat, network.conv1[:, None], stride, pairs) + network.conv1_bias[:, None]
    x = jax.nn.relu(x) * jnp.repeat(inside, pairs)
    x = x if key is None else _without_channels(x, _kept(key, 0, rate, pairs, len(x)))
    x = jax.nn.relu(correlate(x, network.conv2, stride, pairs) + network.conv2_bias[:, None])
    x = x if key is None else _without_channels(x, _kept(key, 1, rate, pairs, len(x)))
    hidden = jax.nn.relu(weights @ x.reshape(-1, pairs) + network.fc1_bias[:, None])
    hidden = hidden if key is None else hidden * _kept(key, 2, rate, pairs, len(hidden)).T
    return network.fc2 @ hidden + network.fc2_bias


def _without_channels(x: Float[Array, "C S"], kept: Float[Array, "p C"]) -> Float[Array, "C S"]:
    """Flat maps, pairs fastest, each times its pair's factor of the channel."""
    return (x.reshape(len(x), -1, len(kept)) * kept.T[:, None]).reshape(x.shape)


def correlate(x: Float[Array, "K S"], kernel: Float[Array, "C K 3 3"], stride: int, pairs: int) -> Float[Array, "C s"]:
    """A 3 x 3 correlation of flat maps, pairs fastest, at the numbers that have all eight neighbours.

    Its gradient with respect to the maps is a correlation too. Scanning over the output channels makes each of them one
    loop over memory. If unrolled, the compiler would recompute one convolution for each of the 36 terms of the next.

    Args:
        x: maps of K channels.
        kernel: weights, output channels first.
        stride: length of a row.
        pairs: number of maps that are interleaved.

    Returns:
        Maps of C channels, shorter by a row and a number at both ends.
    """
    return _correlate(x, kernel, stride, pairs)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _correlate(x: Array, kernel: Array, stride: int, pairs: int) -> Array:
    length = x.shape[1] - 2 * (stride + 1) * pairs

    def channel(_: None, own: Float[Array, "K 3 3"]) -> tuple[None, Float[Array, "s"]]:
        terms = [
            own[source, down, across] * _shifted(x, source, down, across, stride, pairs, length)
            for source in range(len(x))
            for down in range(3)
            for across in range(3)
        ]
        return None, sum(terms[1:], terms[0])

    return jax.lax.scan(channel, None, kernel)[1]


def _shifted(x: Array, source: int, down: int, across: int, stride: int, pairs: int, length: int) -> Float[Array, "s"]:
    first = (down * stride + across) * pairs
    return jax.lax.slice(x, (source, first), (source + 1, first + length))[0]


def _correlate_forward(x: Array, kernel: Array, stride: int, pairs: int) -> tuple[Array, tuple[Array, Array]]:
    return _correlate(x, kernel, stride, pairs), (x, kernel)


def _correlate_backward(stride: int, pairs: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    around = 2 * (stride + 1) * pairs
    rotated = jnp.swapaxes(kernel[:, :, ::-1, ::-1], 0, 1)
    back = correlate(jnp.pad(gradient, ((0, 0), (around, around))), rotated, stride, pairs)
    # One row at a time, so that the nine shifted copies stay in the cache.
    row = stride * pairs
    count = -(-gradient.shape[1] // row)
    gradient, x = (jnp.pad(side, ((0, 0), (0, count * row - gradient.shape[1]))) for side in (gradient, x))

    def add(total: Float[Array, "C n"], index: Array) -> tuple[Float[Array, "C n"], None]:
        first = index * row
        shifts = [
            jax.lax.dynamic_slice_in_dim(x, first + (down * stride + across) * pairs, row, axis=1)
            for down in range(3)
            for across in range(3)
        ]
        return total + jax.lax.dynamic_slice_in_dim(gradient, first, row, axis=1) @ jnp.concatenate(shifts).T, None

    total, _ = jax.lax.scan(add, jnp.zeros((len(kernel), 9 * len(x)), x.dtype), jnp.arange(count))
    return back, jnp.moveaxis(total.reshape(len(kernel), 3, 3, len(x)), -1, 1)


_correlate.defvjp(_correlate_forward, _correlate_backward)


def _weights(network: Network) -> Float[Array, "H K"]:
    """The first wide layer as a matrix over flat, padded maps, with zeros at the padding."""
    around = [(0, 0)] * (network.fc1.ndim - 2) + [(BORDER, BORDER) if isinstance(network, MLP) else (0, 0), (0, 1)]
    return jnp.pad(network.fc1, around).reshape(len(network.fc1), -1)


def _inside(image_tokens: int, text_tokens: int) -> np.ndarray:
    """Which numbers of a flat, padded map are not padding."""
    return np.pad(np.ones((image_tokens, text_tokens), bool), ((BORDER, BORDER), (0, 1))).reshape(-1)


def _picture_side(pictures: Float[Array, "p I E"]) -> Float[Array, "p R E"]:
    """Pictures as the left side of the product: tokens minus their mean, and the mean in the border's first row."""
    mean, rest = centred(pictures, 1)
    padded = jnp.pad(rest, ((0, 0), (BORDER - 1, BORDER), (0, 0)))
    return jnp.concatenate([mean, padded], axis=1)


def _caption_side(texts: Float[Array, "m T E"]) -> Float[Array, "E J"]:
    """Captions as the right side of the product: tokens minus their mean, followed by the mean; captions fastest."""
    mean, rest = centred(texts, 1)
    padded = jnp.concatenate([rest, mean], axis=1)
    return jnp.transpose(padded, (2, 1, 0)).reshape(texts.shape[-1], -1)
