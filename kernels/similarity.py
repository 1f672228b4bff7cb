"""Dense similarity maps of pictures and captions ([DCSM] arXiv 2503.08723, section 4).

A map S = P Q^T holds the cosine of every picture token P and every caption token Q. Columns of functional words are
replaced by fixed vectors. Both at once are one matrix product: a caption's functional column is all zero but for a one
in a further coordinate, where picture tokens hold that word's vector.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

GROUPS = ("pair", "row", "call")
"""What maps are standardised over: each map by itself, a picture's maps with all captions, or all maps of a call."""


class Moments(NamedTuple):
    """Mean and standard deviation of the maps of a group, for every pair of it or broadcast over them."""

    mean: Float[Array, "#N #M"]
    deviation: Float[Array, "#N #M"]  # over count - 1


def unit(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Vectors of length one along the last axis; zero stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def functional_vectors(key: Array, words: int, image_tokens: int) -> Float[Array, "W I"]:
    """One fixed vector for every functional word: standard normal, of length one, then (v + 1) / 3."""
    return (unit(jax.random.normal(key, (words, image_tokens), jnp.float32)) + 1) / 3


def with_functional_rows(
    images: Float[Array, "*N I E"],
    texts: Float[Array, "*M T E"],
    words: Int[Array, "*M T"],
    vectors: Float[Array, "W I"],
) -> tuple[Float[Array, "*N I F"], Float[Array, "*M T F"]]:
    """Tokens whose products hold the functional vectors in the columns of functional words.

    Args:
        images: tokens of pictures, of length one.
        texts: tokens of captions, of length one.
        words: which functional word stands at each token, or -1.
        vectors: of every functional word.

    Returns:
        Both with W further coordinates, F = E + W.
    """
    marks = jax.nn.one_hot(words, len(vectors), dtype=texts.dtype)
    kept = jnp.where((words < 0)[..., None], texts, 0)
    rows = jnp.broadcast_to(vectors.T, (*images.shape[:-1], len(vectors))).astype(images.dtype)
    return jnp.concatenate([images, rows], axis=-1), jnp.concatenate([kept, marks], axis=-1)


def similarity_maps(images: Float[Array, "N I E"], texts: Float[Array, "M T E"]) -> Float[Array, "N M I T"]:
    """The map of every picture with every caption; for small numbers of both."""
    return jnp.einsum("nie,mte->nmit", images, texts)


def moments(images: Float[Array, "N I E"], texts: Float[Array, "M T E"], group: str = "call") -> Moments:
    """Mean and unbiased standard deviation of maps, without making the maps of more than one picture.

    The mean of all products is the product of sums; the mean of their squares needs the captions' second moments
    [E, E], or the products themselves where captions have fewer tokens than tokens have coordinates.

    Args:
        images: tokens of pictures.
        texts: tokens of captions.
        group: see `GROUPS`.
    """
    sums = jnp.einsum("ne,me->nm", images.sum(axis=1), texts.sum(axis=1))
    count = images.shape[1] * texts.shape[1]
    width, tokens = texts.shape[-1], texts.shape[0] * texts.shape[1]
    if group == "pair":
        squares = jax.lax.map(lambda picture: jnp.square(jnp.einsum("ie,mte->mit", picture, texts)).sum((1, 2)), images)
    else:
        flat = texts.reshape(tokens, width)
        if tokens > width:
            second = flat.T @ flat
            squares = jax.lax.map(lambda picture: ((picture @ second) * picture).sum(), images)
        else:
            squares = jax.lax.map(lambda picture: jnp.square(picture @ flat.T).sum(), images)
        sums, squares, count = sums.sum(axis=1, keepdims=True), squares[:, None], count * len(texts)
    if group == "call":
        sums, squares, count = sums.sum(keepdims=True), squares.sum(keepdims=True), count * len(images)
    mean = sums / count
    variance = (squares - sums * mean) / (count - 1)
    return Moments(mean, jnp.sqrt(jnp.maximum(variance, 0)))


def standardise(maps: Float[Array, "N M I T"], group: str = "call") -> Float[Array, "N M I T"]:
    """Maps less their group's mean, over its unbiased standard deviation; the plain form of `moments`."""
    axes = {"pair": (2, 3), "row": (1, 2, 3), "call": (0, 1, 2, 3)}[group]
    centred = maps - maps.mean(axis=axes, keepdims=True)
    count = maps.size // (1 if group == "call" else maps.shape[0] * (maps.shape[1] if group == "pair" else 1))
    return centred / jnp.sqrt(jnp.square(centred).sum(axis=axes, keepdims=True) / (count - 1))
