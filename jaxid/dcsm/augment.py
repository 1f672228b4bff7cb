"""The published augmentations of training pictures: slight perspective, slight rotation, salt-and-pepper noise."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DISTORTION = 0.05
"""Corners move inwards by up to half this fraction of each side."""

PERSPECTIVE_SHARE = 0.2
"""Fraction of the pictures that get a perspective distortion."""

DEGREES = 4.0
"""Pictures are rotated by up to this much either way."""

NOISE = 0.02
"""Fraction of the pixels that become black or white."""

_HIGHEST = jax.lax.Precision.HIGHEST  # otherwise accelerators round coordinates by whole pixels


def augment(key: Array, pictures: Float[Array, "N Y X C"]) -> Float[Array, "N Y X C"]:
    """Distorts, rotates and sprinkles pictures with values in 0..1; parts from outside a picture are black."""
    keys = jax.random.split(key, len(pictures))
    return jax.vmap(_augment_one)(keys, pictures)


def _augment_one(key: Array, picture: Float[Array, "Y X C"]) -> Float[Array, "Y X C"]:
    tilt, corners, turn, noise, value = jax.random.split(key, 5)
    height, width = picture.shape[:2]
    square = jnp.array([[0.0, 0.0], [width - 1, 0.0], [width - 1, height - 1], [0.0, height - 1]])
    inwards = jnp.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    reach = DISTORTION / 2 * jnp.array([width, height], jnp.float32)
    moved = square + inwards * reach * jax.random.uniform(corners, (4, 2))
    moved = jnp.where(jax.random.uniform(tilt) < PERSPECTIVE_SHARE, moved, square)
    angle = jnp.deg2rad(jax.random.uniform(turn, minval=-DEGREES, maxval=DEGREES))
    # The rotation comes last, so its inverse comes first.
    back = jnp.matmul(homography(moved, square), rotation(-angle, height, width), precision=_HIGHEST)
    picture = warp(picture, back)
    pepper = jax.random.uniform(noise, (height, width, 1))
    white = jax.random.bernoulli(value, 0.5, (height, width, 1)).astype(picture.dtype)
    return jnp.where(pepper < NOISE, white, picture)


def homography(start: Float[Array, "4 2"], end: Float[Array, "4 2"]) -> Float[Array, "3 3"]:
    """The projective map that takes four points (x, y) to four others, as a matrix."""
    x, y = start.T
    u, v = end.T
    zero, one = jnp.zeros(4), jnp.ones(4)
    rows = jnp.concatenate(
        [
            jnp.stack([x, y, one, zero, zero, zero, -u * x, -u * y], axis=1),
            jnp.stack([zero, zero, zero, x, y, one, -v * x, -v * y], axis=1),
        ]
    )
    solved = jnp.linalg.solve(rows, jnp.concatenate([u, v]))
    return jnp.append(solved, 1.0).reshape(3, 3)


def rotation(angle: Array, height: int, width: int) -> Float[Array, "3 3"]:
    """A rotation about the picture's centre by an angle in radians, clockwise as seen."""
    x, y = (width - 1) / 2, (height - 1) / 2
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0.0, 0.0, 1.0]])


def warp(picture: Float[Array, "Y X C"], source: Float[Array, "3 3"]) -> Float[Array, "Y X C"]:
    """Resamples a picture bilinearly; points outside it are black.

    Args:
        picture: the picture.
        source: maps a point (x, y, 1) of the result to the point of the picture it is read from, up to a factor.
    """
    height, width = picture.shape[:2]
    y, x = jnp.meshgrid(jnp.arange(height, dtype=jnp.float32), jnp.arange(width, dtype=jnp.float32), indexing="ij")
    across, down, depth = jnp.einsum("ij,jyx->iyx", source, jnp.stack([x, y, jnp.ones_like(x)]), precision=_HIGHEST)

    def one(channel: Float[Array, "Y X"]) -> Float[Array, "Y X"]:
        return jax.scipy.ndimage.map_coordinates(channel, [down / depth, across / depth], order=1, mode="constant")

    return jax.vmap(one, in_axes=-1, out_axes=-1)(picture)
