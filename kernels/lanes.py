"""The CNN scorer as products of matrices, for TPUs: the pairs of a tile are the last axis of every array.

TPUs multiply matrices of 128 x 128 in the time of any smaller ones, so that a convolution has to fill them. The first
hidden map is made in blocks of 16 columns, of which neighbours share two: all channels of two blocks' row, 128 numbers,
are one product with three rows of the map. Four of these rows are what two rows of a block of the second hidden map
read: 256 numbers make 128 others. That is two products of 128 x 128 for a row of 30 columns, where three neighbouring
rows of all columns would be three. All of it is one kernel that goes down the rows of a picture's maps two by two. It
reads the products of tokens, and standardises them itself.
Source: [DCSM] arXiv 2503.08723, section 4.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxid.kernels import banded
from jaxid.kernels.networks import CNN

COLUMNS = 16
"""Columns of a block of the first hidden map."""

FACTORS = 4
"""Numbers that standardise a pair's map: what its products, its two kinds of means' products are multiplied with, and
what is added."""


class Block(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
        pairs: maps that run together.
        dtype: of the factors of all products.
        most: columns of the widest map for which the kernel is used: all weights stay on the chip.
    """

    pairs: int = 256
    dtype: str = "bfloat16"
    most: int = 128


class Weights(NamedTuple):
    """Weights as the kernel reads them: n blocks, w columns of a map, K = 16 * C; two rows at each of S steps."""

    first: Float[Array, "m j"]  # m = n * K, j = 3 * w
    first_bias: Float[Array, "m 1"]
    second: Float[Array, "n l k"]  # l = 2 * K, k = 4 * K
    second_bias: Float[Array, "l 1"]
    wide: Float[Array, "S H h"]  # h = n * 2 * K; zero beyond the map
    wide_bias: Float[Array, "H 1"]
    last: Float[Array, "H 1"]
    last_bias: Float[Array, ""]


def padded_columns(columns: int) -> int:
    """Columns of the products that the kernel reads: those of the map, then the means', in whole registers."""
    return -(-(columns + 1) // 16) * 16


def starts(columns: int) -> list[int]:
    """First column of every block."""
    return [*range(0, max(1, columns - 2), COLUMNS - 2)]


def weights(network: CNN, block: Block) -> Weights:
    """Arranges a CNN's weights."""
    channels, (rows, columns) = len(network.conv1), network.fc1.shape[2:]
    begin, steps, every = starts(columns), -(-rows // 2), np.arange(padded_columns(columns))
    size, place = COLUMNS * channels, np.arange(COLUMNS)
    first, second, wide = [], [], []
    for index, start in enumerate(begin):
        here, own = start + place, start + place + (index > 0)
        band = banded.band(network.conv1[:, None], every, here)
        first.append(_inside(band, every, columns).reshape(-1, size).T)
        band = _inside(banded.band(network.conv2, here, own), here, columns).reshape(3, size, size)
        both = [jnp.pad(band, ((after, 1 - after), (0, 0), (0, 0))).reshape(4 * size, size) for after in (0, 1)]
        second.append(jnp.concatenate(both, axis=1).T)
        end = begin[index + 1] + 1 if index + 1 < len(begin) else columns
        read = jnp.take(network.fc1, jnp.asarray(np.minimum(own, columns - 1)), axis=3)
        read = jnp.pad(jnp.where(own < end, read, 0), ((0, 0), (0, 0), (0, 2 * steps - rows), (0, 0)))
        wide.append(jnp.transpose(read.reshape(*read.shape[:2], steps, 2, COLUMNS), (2, 0, 3, 4, 1)))
    hidden = len(network.fc1)
    return Weights(
        first=jnp.concatenate(first).astype(block.dtype),
        first_bias=_column(jnp.tile(network.conv1_bias, COLUMNS * len(begin))),
        second=jnp.stack(second).astype(block.dtype),
        second_bias=_column(jnp.tile(network.conv2_bias, 2 * COLUMNS)),
        wide=jnp.stack(wide, axis=2).reshape(steps, hidden, -1).astype(block.dtype),
        wide_bias=_column(network.fc1_bias),
        last=_column(network.fc2),
        last_bias=network.fc2_bias.astype(jnp.float32),
    )


def _inside(band: Float[Array, "3 w K s C"], read: np.ndarray, columns: int) -> Float[Array, "3 w K s C"]:
    """A band that reads nothing beyond the map."""
    return jnp.where((read < columns)[:, None, None, None], band, 0)


def _column(x: Float[Array, "K"]) -> Float[Array, "K 1"]:
    return x.astype(jnp.float32)[:, None]


def operations(own: Weights) -> int:
    """Floating-point operations of the kernel's products, per map."""
    return 2 * (len(own.wide) * (2 * own.first.size + own.second.size) + own.wide.size)


# --- the kernel ------------------------------------------------------------------------------------------------------


def standardised(
    network: CNN, products: Float[Array, "g R W P"], factors: Float[Array, "g F P"]
) -> Float[Array, "g P I T"]:
    """The maps themselves."""
    rows, columns = network.fc1.shape[2:]
    terms = products[:, :rows, :columns], products[:, :rows, columns, None], products[:, rows, None, :columns]
    scaled = [term.astype(jnp.float32) * factors[:, kind, None, None] for kind, term in enumerate(terms)]
    return jnp.moveaxis(sum(scaled) + factors[:, 3, None, None], 3, 1)


def fused_scores(
    network: CNN,
    own: Weights,
    products: Float[Array, "g R W P"],
    factors: Float[Array, "g F P"],
    block: Block,
    *,
    interpret: bool = False,
) -> Float[Array, "g P"]:
    """Scores of maps by one Pallas kernel; its backward pass is that of `banded.scores`.

    Args:
        network: the scorer, which the backward pass needs.
        own: its weights, as `weights` returns them.
        products: of centred tokens, [I + 1, W] for each pair: the last row comes from the picture's mean, column T from
            the caption's, in the block's dtype. W is `padded_columns`, P a multiple of the block's pairs.
        factors: of the products, of column T, of the last row, and what is then added: together the standardised map.
        block: how the kernel cuts its work.
        interpret: run the kernel's operations one by one, on any platform.
    """
    return _fused_scores(network, jax.lax.stop_gradient(own), products, factors, block, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused_scores(
    network: CNN, own: Weights, products: Array, factors: Array, block: Block, interpret: bool
) -> Float[Array, "g P"]:
    groups, rows, width, pairs = products.shape
    given = own[:-1]
    found = pl.pallas_call(
        partial(_kernel, columns=network.fc1.shape[3]),
        grid=(groups, pairs // block.pairs),
        in_specs=[
            pl.BlockSpec((1, rows, width, block.pairs), lambda group, tile: (group, 0, 0, tile)),
            pl.BlockSpec((1, FACTORS, block.pairs), lambda group, tile: (group, 0, tile)),
            *(pl.BlockSpec(one.shape, partial(_origin, one.ndim)) for one in given),
        ],
        out_specs=pl.BlockSpec((1, 1, block.pairs), lambda group, tile: (group, 0, tile)),
        out_shape=jax.ShapeDtypeStruct((groups, 1, pairs), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=groups * pairs * operations(own),
            transcendentals=0,
            bytes_accessed=products.nbytes + factors.nbytes + sum(one.nbytes for one in given) + 4 * groups * pairs,
        ),
        interpret=interpret,
        name="dense_map_scores_in_lanes",
        compiler_params=None if interpret else _compiler(),
    )(products, factors, *given)
    return found[:, 0] + own.last_bias


def _origin(axes: int, *_: Array) -> tuple[int, ...]:
    return (0,) * axes


def _compiler() -> Any:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.CompilerParams(vmem_limit_bytes=100 * 2**20)


def _kernel(*given: Any, columns: int) -> None:
    """Scores of the maps of one block, two rows at a time."""
    products, factors, first, first_bias, second, second_bias, wide, wide_bias, last, out = given
    rows, pairs, dtype = products.shape[1] - 1, products.shape[3], products.dtype
    blocks, size = len(second), second.shape[2] // 4
    precision = "highest" if dtype == jnp.float32 else None
    whole, by_row, by_column, added = (factors[0, kind : kind + 1] for kind in range(FACTORS))
    everywhere = products[0, rows].astype(jnp.float32) * by_column + added

    def product(weights: Array, x: Array) -> Array:
        return jnp.dot(weights, x, precision=precision, preferred_element_type=jnp.float32)

    def map_row(row: Array) -> Array:
        """A row of the standardised map; zeros beyond the map."""
        x = products[0, jnp.minimum(row, rows - 1)].astype(jnp.float32)
        x = x * whole + x[columns : columns + 1] * by_row + everywhere
        return jnp.where(row < rows, x, 0).astype(dtype)

    def hidden_row(row: Array, near: tuple[Array, Array, Array]) -> Array:
        """A row of the first hidden map; zeros beyond the map."""
        total = product(first[...], jnp.concatenate(near)) + first_bias[...]
        return jnp.where(row < rows, jnp.maximum(total, 0), 0).astype(dtype)

    def step(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        row = 2 * index
        above, here, x, following, hidden = carry
        later = [map_row(row + after) for after in (2, 3)]
        below = [
            hidden_row(row + 1, (x, following, later[0])),
            hidden_row(row + 2, (following, later[0], later[1])),
        ]
        found = []
        for place in range(blocks):
            part = slice(place * size, (place + 1) * size)
            near = jnp.concatenate([one[part] for one in (above, here, *below)])
            found.append(jnp.maximum(product(second[place], near) + second_bias[...], 0).astype(dtype))
        hidden = hidden + product(wide[index], jnp.concatenate(found))
        return (*below, *later, hidden)

    nothing = jnp.zeros(products.shape[2:], dtype)
    x, following = (map_row(jnp.int32(row)) for row in (0, 1))
    here = hidden_row(jnp.int32(0), (nothing, x, following))
    hidden = jnp.zeros((wide.shape[1], pairs), jnp.float32) + wide_bias[...]
    hidden = jax.lax.fori_loop(0, len(wide), step, (jnp.zeros_like(here), here, x, following, hidden))[4]
    out[0] = (jnp.maximum(hidden, 0) * last[...]).sum(axis=0, keepdims=True)


def _forward(
    network: CNN, own: Weights, products: Array, factors: Array, block: Block, interpret: bool
) -> tuple[Array, tuple]:
    return _fused_scores(network, own, products, factors, block, interpret), (network, own, products, factors)


def _backward(_: Block, __: bool, kept: tuple[CNN, Weights, Array, Array], gradient: Array) -> tuple:
    network, own, products, factors = kept

    def plain(network: CNN, products: Array, factors: Array) -> Array:
        maps = standardised(network, products, factors)
        return banded.scores(network, maps.reshape(-1, *maps.shape[2:])).reshape(maps.shape[:2])

    by_network, by_products, by_factors = jax.vjp(plain, network, products, factors)[1](gradient)
    return by_network, jax.tree.map(jnp.zeros_like, own), by_products, by_factors


_fused_scores.defvjp(_forward, _backward)
