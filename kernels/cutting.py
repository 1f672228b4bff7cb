"""Cutting pictures, captions and pairs into tiles of one size."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def padded(x: Float[Array, "n *B"], count: int, fill: float = 0.0) -> Float[Array, "m *B"]:
    """The array padded along its first axis to a length of `count`."""
    return jnp.pad(x, [(0, count - len(x))] + [(0, 0)] * (x.ndim - 1), constant_values=fill)


def row_tiles(given: tuple[Array, Array, Array, Array], rows: int, height: int) -> list[Array]:
    """Pictures, captions, offsets and deviations cut into tiles of whole pictures; deviations are padded with ones."""
    return [
        padded(side, rows * height, fill).reshape(rows, height, *side.shape[1:])
        for side, fill in zip(given, (0.0, 0.0, 0.0, 1.0), strict=True)
    ]


def blocks(
    x: Float[Array, "N M"], rows: int, height: int, columns: int, width: int, fill: float = 0.0
) -> Float[Array, "rows columns height width"]:
    """The matrix cut into tiles, padded where they exceed it."""
    gaps = ((0, rows * height - x.shape[0]), (0, columns * width - x.shape[1]))
    padded = jnp.pad(x, gaps, constant_values=fill)
    return jnp.moveaxis(padded.reshape(rows, height, columns, width), 2, 1)
