"""The scorer of dense similarity maps on GPUs and TPUs, over tiles of thousands of pairs.

A product makes a tile's maps, which a kernel scores (`banded`, `lanes`), or XLA's own products and convolutions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxid.kernels import banded, cutting, lanes
from jaxid.kernels.networks import CNN, MLP, Network, map_shape
from jaxid.kernels.similarity import centred

LARGE_TILE = (64, 256)
"""Pictures and captions in a tile, if there are as many: enough for all multiprocessors of a GPU. A tile's maps are
written to memory, 12 KB each for 197 x 30 tokens."""

Block = banded.Block | lanes.Block
"""How a platform's kernel cuts its work."""

BLOCKS: dict[str, Block] = {"cuda": banded.BLOCK, "tpu": lanes.Block()}
"""By platform."""


def by_platform(cpu: Callable[..., Array], accelerator: Callable[..., Array], network: Network, *given: Array) -> Array:
    """CPU's form, or an accelerator's with the platform's block; None for products in float32, and for wide maps."""
    config: Any = jax.config
    exact = config.jax_default_matmul_precision not in (None, "default", "fastest", "bfloat16")
    forms = {
        name: partial(accelerator, block)
        for name, block in BLOCKS.items()
        if not exact and map_shape(network)[1] <= block.most
    }
    return jax.lax.platform_dependent(network, *given, cpu=cpu, default=partial(accelerator, None), **forms)


class _Side(NamedTuple):
    """Tokens of pictures or captions minus their mean, and then the mean; 16-bit numbers are divided by the largest."""

    tokens: Float[Array, "*n S E"]
    rest_scale: Float[Array, "*n"]
    mean_scale: Float[Array, "*n"]


def _side(tokens: Float[Array, "*n S E"], block: Block | None) -> _Side:
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
def score_tiles(
    block: Block | None, network: Network, images: Array, texts: Array, offset: Array, deviation: Array
) -> Float[Array, "N M"]:
    """`score` on an accelerator."""
    count, captions = offset.shape
    width = min(captions, max(LARGE_TILE[1], math.prod(LARGE_TILE) // count))
    height = min(count, max(1, math.prod(LARGE_TILE) // width))
    rows, columns = -(-count // height), -(-captions // width)
    cut = partial(cutting.blocks, rows=rows, height=height, columns=columns, width=width)
    tiles = cut(offset), cut(deviation, fill=1.0)
    left = _side(cutting.padded(images, rows * height), block)
    right = _side(cutting.padded(texts, columns * width), block)
    left, right = (
        jax.tree.map(lambda leaf, number=number: leaf.reshape(number, -1, *leaf.shape[1:]), side)
        for side, number in ((left, rows), (right, columns))
    )
    own = _arranged(network, block)

    def row(given: tuple[_Side, Array, Array]) -> Float[Array, "c p q"]:
        pictures, offsets, deviations = given

        def tile(given: tuple[_Side, Array, Array]) -> Float[Array, "p q"]:
            captions, offset, deviation = given
            if isinstance(own, lanes.Weights) and isinstance(block, lanes.Block):
                return _lane_scores(network, own, *_products(pictures, captions, offset, deviation), deviation, block)
            return _maps_scores(network, own, _maps(pictures, captions, offset, deviation, block), deviation, block)

        return jax.lax.map(tile, (right, offsets, deviations))

    found = jax.lax.map(row, (left, *tiles))  # [rows, columns, height, width]
    return jnp.moveaxis(found, 2, 1).reshape(rows * height, columns * width)[:count, :captions]


@partial(jax.jit, static_argnums=0)
def score_row_tiles(
    block: Block | None, network: Network, images: Array, texts: Array, offset: Array, deviation: Array
) -> Float[Array, "N C"]:
    """`score_rows` on an accelerator."""
    count, captions = offset.shape
    height = min(count, max(1, math.prod(LARGE_TILE) // captions))
    rows = -(-count // height)
    tiles = cutting.row_tiles((images[:, None], texts, offset[:, None], deviation[:, None]), rows, height)
    own = _arranged(network, block)

    def row(tile: list[Array]) -> Float[Array, "p q"]:
        pictures, captions_of, offset, deviation = tile
        given = _side(pictures, block), _side(captions_of, block), offset, deviation
        if isinstance(own, lanes.Weights) and isinstance(block, lanes.Block):
            products, factors = jax.vmap(_products)(*given)
            return _lane_scores(network, own, products[:, 0], factors[:, 0], deviation[:, 0], block)
        maps = jax.vmap(partial(_maps, block=block), out_axes=1)(*given)
        return _maps_scores(network, own, maps.reshape(len(maps), -1, maps.shape[-1]), deviation[:, 0], block)

    return jax.lax.map(row, tiles).reshape(rows * height, captions)[:count]


def _arranged(network: Network, block: Block | None) -> banded.Bands | lanes.Weights | None:
    """A CNN's weights for its kernel; None if there is none."""
    if block is None or isinstance(network, MLP):
        return None
    return lanes.weights(network, block) if isinstance(block, lanes.Block) else banded.bands(network, block)


def _products(
    images: _Side, texts: _Side, offset: Float[Array, "p q"], deviation: Float[Array, "p q"]
) -> tuple[Float[Array, "p R W q"], Float[Array, "p F q"]]:
    """What a TPU's kernel reads, see `lanes.fused_scores`, for any number of captions."""
    columns = lanes.padded_columns(texts.tokens.shape[1] - 1)
    right = jnp.transpose(cutting.padded(jnp.moveaxis(texts.tokens, 1, 0), columns), (2, 0, 1))
    found = images.tokens.reshape(-1, len(right)) @ right.reshape(len(right), -1)
    scales = [
        left[:, None] * right
        for left, right in (
            (images.rest_scale, texts.rest_scale),
            (images.rest_scale, texts.mean_scale),
            (images.mean_scale, texts.rest_scale),
        )
    ]
    factors = jnp.stack([*scales, offset], axis=1) / deviation[:, None]
    return found.reshape(*images.tokens.shape[:2], *right.shape[1:]), factors


def _lane_scores(
    network: Network,
    own: lanes.Weights,
    products: Float[Array, "p R W q"],
    factors: Float[Array, "p F q"],
    deviation: Float[Array, "p q"],
    block: lanes.Block,
) -> Float[Array, "p q"]:
    """Scores by a TPU's kernel, a picture at a time; of all pictures together if they have few captions each."""
    assert isinstance(network, CNN), "an MLP has no weights of that kind"
    gap = -deviation.shape[1] % block.pairs
    if 4 * gap > deviation.shape[1]:
        products, factors = (
            jnp.moveaxis(one, 0, -2).reshape(1, *one.shape[1:-1], deviation.size) for one in (products, factors)
        )
        gap = -deviation.size % block.pairs
    products, factors = (jnp.pad(one, [(0, 0)] * (one.ndim - 1) + [(0, gap)]) for one in (products, factors))
    scores = lanes.fused_scores(network, own, products, factors, block)
    scores = scores[:, : scores.shape[1] - gap].reshape(deviation.shape)
    return jnp.where(deviation > 0, scores, jnp.nan)


def _maps(
    images: _Side,
    texts: _Side,
    offset: Float[Array, "p q"],
    deviation: Float[Array, "p q"],
    block: Block | None,
) -> Float[Array, "I p q T"]:
    """Standardised maps, with columns padded as a GPU's kernel needs.

    One product makes the maps, and as a last row and column what the means contribute (`similarity.moments`), which is
    small when it is added.
    """
    right = jnp.transpose(texts.tokens, (2, 0, 1))
    found = images.tokens.reshape(-1, len(right)) @ right.reshape(len(right), -1)
    found = found.reshape(*images.tokens.shape[:2], *right.shape[1:])

    def term(row: slice, column: slice, left: Float[Array, "p"], right: Float[Array, "q"]) -> Array:
        return found[:, row, :, column].astype(jnp.float32) * (left[:, None] * right)[:, None, :, None]

    tokens, mean = slice(None, -1), slice(-1, None)
    whole = term(tokens, tokens, images.rest_scale, texts.rest_scale)
    whole += term(tokens, mean, images.rest_scale, texts.mean_scale)
    whole += term(mean, tokens, images.mean_scale, texts.rest_scale)
    whole = (whole + offset[:, None, :, None]) / deviation[:, None, :, None]
    if block:
        extra = banded.padded_columns(whole.shape[3], block) - whole.shape[3] if isinstance(block, banded.Block) else 0
        whole = jnp.pad(whole.astype(block.dtype), ((0, 0), (0, 0), (0, 0), (0, extra)))
    return jnp.moveaxis(whole, 0, 1)


def _maps_scores(
    network: Network,
    own: banded.Bands | lanes.Weights | None,
    maps: Float[Array, "I *a"],
    deviation: Float[Array, "p q"],
    block: Block | None,
) -> Float[Array, "p q"]:
    """Scores of standardised maps of all pairs; NaN without a deviation."""
    flat = maps.reshape(len(maps), deviation.size, maps.shape[-1])
    if isinstance(own, banded.Bands) and isinstance(network, CNN) and isinstance(block, banded.Block):
        gap = ((0, 0), (0, -deviation.size % block.pairs), (0, 0))
        scores = banded.fused_scores(network, own, jnp.pad(flat, gap), block)[: deviation.size]
    else:
        flat = jnp.moveaxis(flat, 1, 0)
        scores = perceptron(network, flat) if isinstance(network, MLP) else banded.scores(network, flat)
    return jnp.where(deviation > 0, scores.reshape(deviation.shape), jnp.nan)


def perceptron(network: MLP, maps: Float[Array, "B I T"]) -> Float[Array, "B"]:
    """An MLP's scores of maps whose columns may be padded."""
    extra = maps.shape[2] - network.fc1.shape[2]
    weights = jnp.pad(network.fc1, ((0, 0), (0, 0), (0, extra))).astype(maps.dtype)
    hidden = jnp.einsum("bit,hit->bh", maps, weights, preferred_element_type=jnp.float32)
    hidden = jax.nn.relu(hidden + network.fc1_bias)
    hidden = jax.nn.relu(hidden @ network.fc2.T + network.fc2_bias)
    return hidden @ network.fc3 + network.fc3_bias
