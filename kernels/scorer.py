"""The scorer of dense similarity maps: a small CNN or MLP, over single maps or tiled over pictures x captions.

There are two forms of the same sums. GPUs and TPUs get matrix products over tiles of thousands of pairs (`banded`). The
form for CPUs follows three observations. (1) With the pairs of a tile as the fastest axis, a 3 x 3 convolution of few
channels is nine (or 36) multiply-adds of a vector and a number. (2) If rows are one zero longer than the map, shifting
a map in either direction is one shift of flat memory. (3) The matrix product that makes the maps can make the borders
too, if the picture tokens are padded with rows around them and the caption tokens with a column after them. Both sides
are centred, so that maps of nearly equal numbers keep their differences, and the contributions of the means are in the
borders (`score_tile`).
Source: [DCSM] arXiv 2503.08723, section 4.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxid.kernels import banded
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

LARGE_TILE = (64, 256)
"""Pictures and captions in a tile on GPUs and TPUs, if there are as many. The maps of a tile are written to memory, 12
KB each for 197 x 30 tokens."""


def apply(
    network: Network, maps: Float[Array, "B I T"], key: Array | None = None, rate: float = 0.5
) -> Float[Array, "B"]:
    """Scores of standardised maps, for training.

    Args:
        network: the scorer.
        maps: standardised maps.
        key: random key of the dropout after every hidden layer of a CNN; nothing is dropped without one.
        rate: probability that a number is dropped.
    """
    keys = () if key is None or not rate else (key,)

    def flat(network: Network, maps: Array, *keys: Array) -> Array:
        padded = jnp.pad(maps, ((0, 0), (BORDER, BORDER), (0, 1)))
        flat = jnp.moveaxis(padded.reshape(len(maps), -1), 0, 1)
        return _head(network, _weights(network), flat, keys[0] if keys else None, rate)

    def plain(network: Network, maps: Array, *keys: Array) -> Array:
        if isinstance(network, MLP):
            return _perceptron(network, maps)
        return banded.scores(network, maps, partial(_dropped, key=keys[0] if keys else None, rate=rate))

    return jax.lax.platform_dependent(network, maps, *keys, cpu=flat, default=plain)


def _dropped(x: Float[Array, "*B"], layer: int, key: Array | None, rate: float) -> Float[Array, "*B"]:
    if key is None:
        return x
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape), x / (1 - rate), 0)


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
    return _by_platform(_score_tiles, _score_large_tiles, network, images, texts, offset, deviation)


def _score_tiles(
    network: Network, images: Array, texts: Array, offset: Float[Array, "N M"], deviation: Float[Array, "N M"]
) -> Float[Array, "N M"]:
    """`score` on CPU."""
    count, captions = offset.shape
    width = min(captions, PAIRS)
    height = min(max(1, PAIRS // width), count)
    rows, columns = -(-count // height), -(-captions // width)
    tiles = _blocks(offset, rows, height, columns, width), _blocks(deviation, rows, height, columns, width, fill=1.0)
    images = _padded(images, rows * height).reshape(rows, height, *images.shape[1:])
    texts = _padded(texts, columns * width).reshape(columns, width, *texts.shape[1:])
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
    return _by_platform(_score_row_tiles, _score_large_row_tiles, network, images, texts, offset, deviation)


def _score_row_tiles(
    network: Network, images: Array, texts: Array, offset: Float[Array, "N C"], deviation: Float[Array, "N C"]
) -> Float[Array, "N C"]:
    """`score_rows` on CPU."""
    count, captions = offset.shape
    height = min(max(1, PAIRS // captions), count)
    rows = -(-count // height)
    tiles = _row_tiles((images, texts, offset, deviation), rows, height)
    weights = _weights(network)

    def row(tile: list[Array]) -> Float[Array, "p q"]:
        pictures, captions_of, offset, deviation = tile
        maps = jnp.einsum("pie,pej->pij", _picture_side(pictures), jax.vmap(_caption_side)(captions_of))
        return score_tile(network, weights, maps.reshape(height, -1, captions), offset, deviation)

    return jax.lax.map(row, tiles).reshape(rows * height, captions)[:count]


# --- tiles on GPUs and TPUs ----------------------------------------------------------------------------------------


def _by_platform(
    cpu: Callable[..., Array], accelerator: Callable[..., Array], network: Network, *given: Array
) -> Array:
    """CPU's form, or an accelerator's with the platform's block; None for products in float32, and for wide maps."""
    config: Any = jax.config
    exact = config.jax_default_matmul_precision not in (None, "default", "fastest", "bfloat16")
    forms = {
        name: partial(accelerator, block)
        for name, block in banded.BLOCKS.items()
        if not exact and map_shape(network)[1] <= block.most
    }
    return jax.lax.platform_dependent(network, *given, cpu=cpu, default=partial(accelerator, None), **forms)


class _Side(NamedTuple):
    """Tokens of pictures or captions minus their mean, and then the mean; 16-bit numbers are divided by the largest."""

    tokens: Float[Array, "*n S E"]
    rest_scale: Float[Array, "*n"]
    mean_scale: Float[Array, "*n"]


def _side(tokens: Float[Array, "*n S E"], block: banded.Block | None) -> _Side:
    """One side of the products, ready before the first tile."""
    mean, rest = centred(tokens, -2)
    if not block:
        ones = jnp.ones(tokens.shape[:-2])
        return _Side(jnp.concatenate([rest, mean], axis=-2), ones, ones)
    rest_scale, mean_scale = (jax.lax.stop_gradient(jnp.abs(part).max(axis=(-2, -1))) for part in (rest, mean))
    parts = [
        part / jnp.where(scale > 0, scale, 1)[..., None, None]
        for part, scale in ((rest, rest_scale), (mean, mean_scale))
    ]
    whole = jnp.concatenate(parts, axis=-2).astype(block.dtype)
    gap = [(0, 0)] * (whole.ndim - 1) + [(0, -whole.shape[-1] % 16)]  # matrix units read 16 numbers at a time
    return _Side(jnp.pad(whole, gap), rest_scale, mean_scale)


@partial(jax.jit, static_argnums=0)
def _score_large_tiles(
    block: banded.Block | None, network: Network, images: Array, texts: Array, offset: Array, deviation: Array
) -> Float[Array, "N M"]:
    """`score` on an accelerator."""
    count, captions = offset.shape
    width = min(captions, max(LARGE_TILE[1], math.prod(LARGE_TILE) // count))
    height = min(count, max(1, math.prod(LARGE_TILE) // width))
    rows, columns = -(-count // height), -(-captions // width)
    tiles = _blocks(offset, rows, height, columns, width), _blocks(deviation, rows, height, columns, width, fill=1.0)
    left, right = _side(_padded(images, rows * height), block), _side(_padded(texts, columns * width), block)
    left, right = (
        jax.tree.map(lambda leaf, number=number: leaf.reshape(number, -1, *leaf.shape[1:]), side)
        for side, number in ((left, rows), (right, columns))
    )
    own = banded.bands(network, block) if block and isinstance(network, CNN) else None

    def row(given: tuple[_Side, Array, Array]) -> Float[Array, "c p q"]:
        pictures, offsets, deviations = given

        def tile(given: tuple[_Side, Array, Array]) -> Float[Array, "p q"]:
            captions, offset, deviation = given
            maps = _maps(pictures, captions, offset, deviation, block)
            return _maps_scores(network, own, maps, deviation, block)

        return jax.lax.map(tile, (right, offsets, deviations))

    found = jax.lax.map(row, (left, *tiles))  # [rows, columns, height, width]
    return jnp.moveaxis(found, 2, 1).reshape(rows * height, columns * width)[:count, :captions]


@partial(jax.jit, static_argnums=0)
def _score_large_row_tiles(
    block: banded.Block | None, network: Network, images: Array, texts: Array, offset: Array, deviation: Array
) -> Float[Array, "N C"]:
    """`score_rows` on an accelerator."""
    count, captions = offset.shape
    height = min(count, max(1, math.prod(LARGE_TILE) // captions))
    rows = -(-count // height)
    tiles = _row_tiles((images[:, None], texts, offset[:, None], deviation[:, None]), rows, height)
    own = banded.bands(network, block) if block and isinstance(network, CNN) else None
    axis = 2 if block and block.pairs_last else 1

    def row(tile: list[Array]) -> Float[Array, "p q"]:
        pictures, captions_of, offset, deviation = tile
        make = jax.vmap(partial(_maps, block=block), out_axes=axis)
        maps = make(_side(pictures, block), _side(captions_of, block), offset, deviation)
        maps = maps.reshape(*maps.shape[:axis], -1, *maps.shape[axis + 3 :])
        return _maps_scores(network, own, maps, deviation[:, 0], block)

    return jax.lax.map(row, tiles).reshape(rows * height, captions)[:count]


def _maps(
    images: _Side,
    texts: _Side,
    offset: Float[Array, "p q"],
    deviation: Float[Array, "p q"],
    block: banded.Block | None,
) -> Float[Array, "I *a"]:
    """Standardised maps [I, p, q, T], or [I, T, p, q] if a block has its pairs last; columns padded as it needs.

    One product makes the maps, and as a last row and column what the means contribute (`similarity.moments`), which is
    small when it is added.
    """
    last = bool(block and block.pairs_last)
    right = jnp.transpose(texts.tokens, (2, 1, 0) if last else (2, 0, 1))
    found = images.tokens.reshape(-1, len(right)) @ right.reshape(len(right), -1)
    found = found.reshape(*images.tokens.shape[:2], *right.shape[1:])
    column = 2 if last else 3

    def spread(value: Float[Array, "#p #q"]) -> Array:
        return jnp.expand_dims(value, (1, column))

    def term(row: slice, place: slice, left: Float[Array, "p"], right: Float[Array, "q"]) -> Array:
        part = found[:, row, place] if last else found[:, row, :, place]
        return part.astype(jnp.float32) * spread(left[:, None] * right)

    tokens, mean = slice(None, -1), slice(-1, None)
    whole = term(tokens, tokens, images.rest_scale, texts.rest_scale)
    whole += term(tokens, mean, images.rest_scale, texts.mean_scale)
    whole += term(mean, tokens, images.mean_scale, texts.rest_scale)
    whole = (whole + spread(offset)) / spread(deviation)
    if block:
        extra = banded.padded_columns(whole.shape[column], block) - whole.shape[column]
        gaps = [(0, extra if axis == column else 0) for axis in range(4)]
        whole = jnp.pad(whole.astype(block.dtype), gaps)
    return jnp.moveaxis(whole, 0, 2 if last else 1)


def _maps_scores(
    network: Network,
    own: banded.Bands | None,
    maps: Float[Array, "I *a"],
    deviation: Float[Array, "p q"],
    block: banded.Block | None,
) -> Float[Array, "p q"]:
    """Scores of standardised maps of all pairs, in the order of `_maps`; NaN without a deviation."""
    rows, pairs = len(maps), deviation.size
    axis = 2 if block and block.pairs_last else 1
    flat = maps.reshape(rows, -1, pairs) if axis == 2 else maps.reshape(rows, pairs, -1)
    if block and own and isinstance(network, CNN):
        gap = [(0, -pairs % block.pairs if place == axis else 0) for place in range(3)]
        scores = banded.fused_scores(network, own, jnp.pad(flat, gap), block)[:pairs]
    elif isinstance(network, MLP):
        scores = _perceptron(network, jnp.moveaxis(flat, axis, 0))
    else:
        scores = banded.scores(network, jnp.moveaxis(flat, axis, 0))
    return jnp.where(deviation > 0, scores.reshape(deviation.shape), jnp.nan)


def _perceptron(network: MLP, maps: Float[Array, "B I T"]) -> Float[Array, "B"]:
    """An MLP's scores of maps whose columns may be padded."""
    extra = maps.shape[2] - network.fc1.shape[2]
    weights = jnp.pad(network.fc1, ((0, 0), (0, 0), (0, extra))).astype(maps.dtype)
    hidden = jnp.einsum("bit,hit->bh", maps, weights, preferred_element_type=jnp.float32)
    hidden = jax.nn.relu(hidden + network.fc1_bias)
    hidden = jax.nn.relu(hidden @ network.fc2.T + network.fc2_bias)
    return hidden @ network.fc3 + network.fc3_bias


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
    """Scores of standardised maps, flat and padded as in `apply`, pairs last; with dropout if there is a key."""
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
    x = _dropped(jax.nn.relu(x) * jnp.repeat(inside, pairs), 0, key, rate)
    x = correlate(x, network.conv2, stride, pairs) + network.conv2_bias[:, None]
    x = _dropped(jax.nn.relu(x), 1, key, rate).reshape(-1, pairs)
    hidden = _dropped(jax.nn.relu(weights @ x + network.fc1_bias[:, None]), 2, key, rate)
    return network.fc2 @ hidden + network.fc2_bias


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


def _padded(x: Float[Array, "n *B"], count: int, fill: float = 0.0) -> Float[Array, "m *B"]:
    """The array padded along its first axis to a length of `count`."""
    return jnp.pad(x, [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def _row_tiles(given: tuple[Array, Array, Array, Array], rows: int, height: int) -> list[Array]:
    """Pictures, captions, offsets and deviations cut into tiles of whole pictures; deviations are padded with ones."""
    return [
        _padded(side, rows * height, fill).reshape(rows, height, *side.shape[1:])
        for side, fill in zip(given, (0.0, 0.0, 0.0, 1.0), strict=True)
    ]


def _blocks(
    x: Float[Array, "N M"], rows: int, height: int, columns: int, width: int, fill: float = 0.0
) -> Float[Array, "rows columns height width"]:
    """The matrix cut into tiles, padded where they exceed it."""
    gaps = ((0, rows * height - x.shape[0]), (0, columns * width - x.shape[1]))
    padded = jnp.pad(x, gaps, constant_values=fill)
    return jnp.moveaxis(padded.reshape(rows, height, columns, width), 2, 1)
