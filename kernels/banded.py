"""The CNN scorer as products of matrices, for GPUs.

The channels of a map's row are kept side by side: a row of a hidden map is T columns x C channels wide. A 3 x 3
convolution is then three products, one for each neighbouring row, with a matrix that is zero outside a band of three
columns. In blocks of s columns, the blocks of the first hidden map begin half a block before those of the second, so
that a block's band touches two of them: the second convolution is six small matrices that serve the whole map. The
first wide layer is one more product for every row and block.

`scores` is the plain form, which XLA differentiates. `fused_scores` is one Pallas kernel that goes down the rows of
many maps at once and keeps the hidden maps of three rows in registers: of a map, only its own numbers are read from
memory, and one score is written. Its products have factors of float16, with as many digits as XLA keeps of float32
factors on GPUs by default, 10 bits (TF32). TPUs have a kernel of their own (`lanes`).
Source: [DCSM] arXiv 2503.08723, section 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from jaxid.kernels.networks import CNN


class Block(NamedTuple):
    """How the kernel cuts its work.

    Attributes:
        columns: columns of a map in a block.
        window: columns that a block's first convolution reads, a power of two; 0 for all of them.
        pairs: maps that run together.
        dtype: of the factors of all products.
        most: columns of the widest map for which the kernel is used: what it keeps of a row fits on the chip.
    """

    columns: int
    window: int
    pairs: int
    dtype: str
    most: int = 36


BLOCK = Block(columns=4, window=16, pairs=128, dtype="float16")
"""GPUs multiply matrices of 16 x 16, four columns of four channels."""


class Bands(NamedTuple):
    """Weights as the kernel reads them: s columns in a block, K = s * C, and w columns in a window.

    The first hidden map has m blocks, the second n, each of which reads r of them, from its own index on.
    """

    first: Float[Array, "m 3 w K"]
    first_bias: Float[Array, "m K"]  # zero beyond the map
    second: Float[Array, "3 r K K"]
    second_bias: Float[Array, "K"]
    wide: Float[Array, "I n K H"]  # zero beyond the map
    wide_bias: Float[Array, "H"]
    last: Float[Array, "H"]
    last_bias: Float[Array, ""]


def padded_columns(columns: int, block: Block) -> int:
    """Columns of the maps that the kernel reads: whole blocks, and at least a window."""
    return -(-max(columns, block.window) // block.columns) * block.columns


def window_starts(width: int, block: Block) -> list[int]:
    """First column that each block of the first hidden map reads, a multiple of a block's columns."""
    blocks = width // block.columns
    most = width - (block.window or width)
    return [min(max(0, index - 1) * block.columns, most) for index in range(blocks + (blocks > 1))]


def bands(network: CNN, block: Block) -> Bands:
    """Arranges a CNN's weights."""
    channels, (rows, columns) = len(network.conv1), network.fc1.shape[2:]
    width = padded_columns(columns, block)
    blocks, size = width // block.columns, block.columns * channels
    shift = block.columns // 2 if blocks > 1 else 0
    own = np.arange(block.columns)
    first, bias = [], []
    for index, start in enumerate(window_starts(width, block)):
        made = own + index * block.columns - shift
        read, inside = start + np.arange(block.window or width), (made >= 0) & (made < columns)
        own_band = jnp.where(inside[:, None], band(network.conv1[:, None], read, made), 0)
        first.append(own_band.reshape(3, len(read), size))
        bias.append(jnp.where(inside[:, None], network.conv1_bias, 0).reshape(size))
    second = [
        band(network.conv2, own + place * block.columns - shift, own).reshape(3, size, size)
        for place in range(2 if shift else 1)
    ]
    wide = jnp.pad(jnp.transpose(network.fc1, (2, 3, 1, 0)), ((0, 0), (0, width - columns), (0, 0), (0, 0)))
    return Bands(
        first=jnp.stack(first).astype(block.dtype),
        first_bias=jnp.stack(bias).astype(jnp.float32),
        second=jnp.stack(second, axis=1).astype(block.dtype),
        second_bias=jnp.tile(network.conv2_bias, block.columns).astype(jnp.float32),
        wide=wide.reshape(rows, blocks, size, -1).astype(block.dtype),
        wide_bias=network.fc1_bias.astype(jnp.float32),
        last=network.fc2.astype(jnp.float32),
        last_bias=network.fc2_bias.astype(jnp.float32),
    )


def operations(own: Bands) -> int:
    """Floating-point operations of the kernel's products, per map."""
    rows, blocks, size, hidden = own.wide.shape
    return 2 * rows * (own.first.size + blocks * own.second.size + blocks * size * hidden)


def band(kernel: Float[Array, "C K 3 3"], read: np.ndarray, own: np.ndarray) -> Float[Array, "3 w K s C"]:
    """A 3 x 3 convolution along the columns, as matrices from the columns `read` to `own`; one for each row."""
    across = read[:, None] - own + 1
    taps = jnp.transpose(kernel[..., np.clip(across, 0, 2)], (2, 3, 1, 4, 0))
    return jnp.where(((across >= 0) & (across <= 2))[:, None, :, None], taps, 0)


# --- the plain form ------------------------------------------------------------------------------------------------


def _rectified(x: Float[Array, "B I J"], band: Float[Array, "3 J K"], bias: Float[Array, "K"]) -> Float[Array, "B I K"]:
    """A convolution along the rows, and a rectifier."""
    found = jax.lax.conv_general_dilated(x, band, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
    return jax.nn.relu(found + bias)


def scores(
    network: CNN, maps: Float[Array, "B I T"], dropped: Callable[[Array, int], Array] = lambda x, _: x
) -> Float[Array, "B"]:
    """Scores of standardised maps, by XLA's own convolutions and products in float32.

    Args:
        network: the scorer.
        maps: the maps.
        dropped: the output of a hidden layer, given by its index, after dropout.
    """
    own = bands(network, Block(maps.shape[2], 0, 0, dtype="float32"))
    x = dropped(_rectified(maps, own.first[0], own.first_bias[0]), 0)
    x = dropped(_rectified(x, own.second[:, 0], own.second_bias), 1)
    hidden = x.reshape(len(x), -1) @ own.wide.reshape(-1, own.wide.shape[-1]) + own.wide_bias
    return dropped(jax.nn.relu(hidden), 2) @ own.last + own.last_bias


# --- the kernel ----------------------------------------------------------------------------------------------------


def fused_scores(
    network: CNN, own: Bands, maps: Float[Array, "I P T"], block: Block, *, interpret: bool = False
) -> Float[Array, "P"]:
    """Scores of standardised maps by one Pallas kernel; its backward pass is that of `scores`.

    Args:
        network: the scorer, which the backward pass needs.
        own: its weights, as `bands` returns them.
        maps: maps of P pairs in the block's dtype; T is `padded_columns`, with zeros beyond the map, and P a multiple
            of the block's pairs.
        block: how the kernel cuts its work.
        interpret: run the kernel's operations one by one, on any platform.
    """
    return _fused_scores(network, jax.lax.stop_gradient(own), maps, block, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _fused_scores(network: CNN, own: Bands, maps: Array, block: Block, interpret: bool) -> Array:
    rows, pairs, width = maps.shape
    biases = [own.first_bias, own.second_bias[None], own.wide_bias[None], own.last[None]]
    given = [own.first, own.second, own.wide, *(bias[:, None] for bias in biases)]
    found = pl.pallas_call(
        partial(_kernel, block=block),
        grid=(pairs // block.pairs,),
        in_specs=[
            pl.BlockSpec((rows, block.pairs, width), lambda tile: (0, tile, 0)),
            *(pl.BlockSpec(one.shape, partial(_origin, one.ndim)) for one in given),
        ],
        out_specs=pl.BlockSpec((1, block.pairs), lambda tile: (0, tile)),
        out_shape=jax.ShapeDtypeStruct((1, pairs), jnp.float32),
        cost_estimate=pl.CostEstimate(
            flops=pairs * operations(own),
            transcendentals=0,
            bytes_accessed=maps.nbytes + sum(one.nbytes for one in given) + 4 * pairs,
        ),
        interpret=interpret,
        name="dense_map_scores",
        compiler_params=None if interpret else _compiler(),
    )(maps, *given)
    return found[0] + own.last_bias


def _origin(axes: int, *_: Array) -> tuple[int, ...]:
    return (0,) * axes


def _compiler() -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=8, num_stages=1)


def _kernel(*given: Any, block: Block) -> None:
    """Scores of the maps of one block, row by row."""
    maps, first, second, wide, first_bias, second_bias, wide_bias, last, out = given
    rows, blocks, size, hidden_size = wide.shape
    window = first.shape[2]
    precision = "highest" if maps.dtype == jnp.float32 else None
    begin = window_starts(maps.shape[2], block)

    def product(x: Array, weights: Array) -> Array:
        return jnp.dot(x, weights, precision=precision, preferred_element_type=jnp.float32)

    def zeros(length: int, dtype: Any) -> Array:
        return jnp.zeros((block.pairs, length), dtype)

    nothing = jnp.zeros((), maps.dtype)

    def hidden_row(row: Array) -> tuple[Array, ...]:
        """A row of the first hidden map; zeros beyond the map."""
        near = [(jnp.clip(row + down, 0, rows - 1), (row + down >= 0) & (row + down < rows)) for down in (-1, 0, 1)]
        found = []
        for index, start in enumerate(begin):
            total = zeros(size, jnp.float32) + first_bias[index]
            for down, (source, inside) in enumerate(near):
                x = maps[source, :, pl.ds(start, window)]
                total = total + product(jnp.where(inside, x, nothing), first[index, down])
            found.append(jnp.where(row < rows, jnp.maximum(total, 0), 0).astype(maps.dtype))
        return tuple(found)

    def step(
        row: Array, carry: tuple[tuple[Array, ...], tuple[Array, ...], Array]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...], Array]:
        above, here, hidden = carry
        below = hidden_row(row + 1)
        for index in range(blocks):
            total = zeros(size, jnp.float32) + second_bias[0]
            for down, x in enumerate((above, here, below)):
                for place in range(second.shape[1]):
                    total = total + product(x[index + place], second[down, place])
            hidden = hidden + product(jnp.maximum(total, 0).astype(maps.dtype), wide[row, index])
        return here, below, hidden

    above = (zeros(size, maps.dtype),) * len(begin)
    hidden = zeros(hidden_size, jnp.float32) + wide_bias[0]
    hidden = jax.lax.fori_loop(0, rows, step, (above, hidden_row(jnp.int32(0)), hidden))[2]
    out[...] = (jnp.maximum(hidden, 0) * last[0]).sum(axis=1)[None]


def _fused_forward(network: CNN, own: Bands, maps: Array, block: Block, interpret: bool) -> tuple[Array, tuple]:
    return _fused_scores(network, own, maps, block, interpret), (network, own, maps)


def _fused_backward(block: Block, interpret: bool, kept: tuple[CNN, Bands, Array], gradient: Array) -> tuple:
    network, own, maps = kept

    def plain(network: CNN, maps: Array) -> Array:
        flat = jnp.moveaxis(maps, 1, 0)[..., : network.fc1.shape[3]]
        return scores(network, flat.astype(jnp.float32))

    by_network, by_maps = jax.vjp(plain, network, maps)[1](gradient)
    return by_network, jax.tree.map(jnp.zeros_like, own), by_maps


_fused_scores.defvjp(_fused_forward, _fused_backward)
