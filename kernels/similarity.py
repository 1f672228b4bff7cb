"""Dense similarity maps of pictures and captions ([DCSM] arXiv 2503.08723, section 4).

A map S = P Q^T holds the cosine of every picture token P and every caption token Q. The columns of functional words are
replaced by fixed vectors. One matrix product does both: a functional word's token is zero except for a one in an
additional coordinate, where the picture tokens hold that word's vector.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GROUPS = ("pair", "row", "call")
"""What maps are standardised over: each map by itself, a picture's maps with all captions, or all maps of a call."""

_RIGHT_ANGLE = 1e-4
"""Mean squared cosine below which second moments are too imprecise; between random vectors it is 1 / E."""


_NUMBERS_TOGETHER = 2**26
"""Numbers that GPUs and TPUs compute at once for the moments."""


class Moments(NamedTuple):
    """What the maps of a group are standardised with, for each of its pairs or broadcast over them."""

    mean: Float[Array, "#N #M"]
    deviation: Float[Array, "#N #M"]  # unbiased; zero where float32 cannot tell the numbers apart
    offset: Float[Array, "#N #M"]  # difference of each map's own mean from the group's


def unit(x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    """Vectors scaled to length one along the last axis; a zero vector stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def functional_vectors(key: Array, words: int, image_tokens: int) -> Float[Array, "W I"]:
    """One fixed vector v per functional word: standard normal, scaled to length one, then mapped to (v + 1) / 3."""
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
        words: index of the functional word at each token, or -1.
        vectors: the vector of every functional word.

    Returns:
        Both in float32 with W additional coordinates, F = E + W.
    """
    images, texts, vectors = (side.astype(jnp.float32) for side in (images, texts, vectors))
    marks = jax.nn.one_hot(words, len(vectors), dtype=texts.dtype)
    kept = jnp.where((words < 0)[..., None], texts, 0)
    rows = jnp.broadcast_to(vectors.T, (*images.shape[:-1], len(vectors)))
    return jnp.concatenate([images, rows], axis=-1), jnp.concatenate([kept, marks], axis=-1)


def similarity_maps(images: Float[Array, "N I E"], texts: Float[Array, "M T E"]) -> Float[Array, "N M I T"]:
    """The map of every picture with every caption, for small numbers of both."""
    return jnp.einsum("nie,mte->nmit", images, texts)


def centred(x: Float[Array, "*B"], axis: int | tuple[int, ...]) -> tuple[Float[Array, "*M"], Float[Array, "*B"]]:
    """The mean along axes, which are kept, and the differences from it.

    The mean of the differences is subtracted again, since the rounding error of a large mean would remain in them.
    """
    mean = x.mean(axis=axis, keepdims=True)
    rest = x - mean
    again = rest.mean(axis=axis, keepdims=True)
    return mean + again, rest - again


def _unless(rounded: Bool[Array, ""], moments: Callable[[], Any], products: Callable[[], Any]) -> Any:
    """What follows from second moments, or from the products themselves where that is too imprecise."""
    return jax.lax.cond(rounded, products, moments)


def moments(images: Float[Array, "N I E"], texts: Float[Array, "M T E"], group: str = "call") -> Moments:
    """Mean and unbiased standard deviation of maps, computing those of one picture at a time, or of a few.

    With p = a + d and q = b + e, where a and b are the mean tokens of a picture and of a caption, a map's entries are
    p q = a b + d b + a e + d e. The four terms are orthogonal over the map, so the squares of the last three and of
    a b minus the group's mean add up to the variance, and no large numbers are subtracted from each other. The squares
    of d e follow from the captions' second moments [E, E]. The products themselves are computed instead if the captions
    have fewer tokens in all than a token has coordinates, or if d and e are so close to orthogonal that the moments are
    too imprecise.

    Args:
        images: tokens of pictures.
        texts: tokens of captions.
        group: one of `GROUPS`.
    """
    (captions, text_tokens, width), image_tokens = texts.shape, images.shape[1]
    text_means, text_rest = centred(texts, 1)
    text_means, flat = text_means[:, 0], text_rest.reshape(-1, width)
    spread = jnp.square(flat).sum()

    def of_picture(
        mean: Float[Array, "1 E"], rest: Float[Array, "I E"], second: Float[Array, "E E"] | None = None
    ) -> tuple[Float[Array, "E"], Float[Array, "m"], Float[Array, ""], Bool[Array, ""]]:
        squares = text_tokens * jnp.square(rest @ text_means.T).sum(axis=0)
        squares += image_tokens * jnp.square(text_rest @ mean[0]).sum(axis=1)
        size, rounded = jnp.square(rest).sum(), jnp.array(False)
        if group == "pair":
            squares += jnp.square(jnp.einsum("ie,mte->mit", rest, text_rest)).sum((1, 2))
        elif second is None:
            squares = (squares.sum() + jnp.square(rest @ flat.T).sum())[None]
        else:
            both = ((rest @ second) * rest).sum()
            squares, rounded = (squares.sum() + both)[None], both < _RIGHT_ANGLE * size * spread
        return mean[0], squares, size + image_tokens * jnp.square(mean).sum(), rounded

    def some(images: Float[Array, "N I E"], *second: Float[Array, "E E"], together: int | None = None) -> Any:
        return jax.lax.map(lambda picture: of_picture(*centred(picture, 0), *second), images, batch_size=together)

    def precise(images: Float[Array, "N I E"], *second: Float[Array, "E E"], together: Any = lambda *_: None) -> Any:
        found = some(images, *second, together=together(*second))
        if second:
            found = _unless(found[-1].any(), lambda: found, lambda: some(images, together=together()))
        return (found[0], *(value.sum(0, keepdims=True) for value in found[1:3])) if group == "call" else found[:3]

    def few(*second: Float[Array, "E E"]) -> int:
        """How many pictures GPUs and TPUs compute at once."""
        numbers = image_tokens * text_tokens * captions  # of a picture's maps, or its products
        if second:
            numbers = image_tokens * (captions + width) + captions * text_tokens
        return max(1, _NUMBERS_TOGETHER // numbers)

    def of_call(images: Float[Array, "N I E"], second: Float[Array, "E E"]) -> tuple[Array, Array, Array]:
        """By second moments of all pictures, for which GPUs and TPUs read the tokens once."""
        means, rest = centred(images, 1)
        own = rest.reshape(-1, width).T @ rest.reshape(-1, width)
        others, size = (second, text_tokens * (text_means.T @ text_means)), jnp.trace(own)
        terms = jnp.stack([(own * other).sum() for other in others])
        rounded = terms < _RIGHT_ANGLE * size * jnp.stack([jnp.trace(other) for other in others])
        squares = _unless(
            rounded.any(),
            lambda: terms.sum() + image_tokens * jnp.square(text_rest @ means[:, 0].T).sum(),
            lambda: jax.lax.map(lambda one: of_picture(*one)[1], (means, rest), batch_size=few()).sum(),
        )
        lengths = size + image_tokens * jnp.square(means).sum()
        return means[:, 0], squares[None, None], lengths[None]

    by_moments = group != "pair" and captions * text_tokens > width
    image_means, squares, lengths = jax.lax.platform_dependent(
        images,
        *((flat.T @ flat,) if by_moments else ()),
        cpu=precise,
        default=of_call if by_moments and group == "call" else partial(precise, together=few),
    )
    count, limit = image_tokens * text_tokens, lengths[:, None] * jnp.square(texts).sum(axis=(1, 2))
    if group == "pair":
        return Moments(image_means @ text_means.T, _deviation(squares, limit, count), jnp.zeros((1, 1)))
    (image_mean, image_rest), (text_mean, text_rest) = centred(image_means, 0), centred(text_means, 0)
    offset, mean = image_means @ text_rest.T, image_means @ text_mean.T
    if group == "call":
        offset, mean = offset + image_rest @ text_mean.T, image_mean @ text_mean.T
    axes = 1 if group == "row" else (0, 1)
    squares = squares.sum(axes, keepdims=True) + count * jnp.square(offset).sum(axes, keepdims=True)
    count *= captions * (1 if group == "row" else len(images))
    return Moments(mean, _deviation(squares, limit.sum(axes, keepdims=True), count), offset)


def standardise(maps: Float[Array, "N M I T"], group: str = "call") -> Float[Array, "N M I T"]:
    """Maps minus their group's mean, divided by its unbiased standard deviation; the plain form of `moments`.

    Constant maps become NaN.
    """
    axes = {"pair": (2, 3), "row": (1, 2, 3), "call": (0, 1, 2, 3)}[group]
    _, rest = centred(maps, axes)
    count = maps.size // (1 if group == "call" else maps.shape[0] * (maps.shape[1] if group == "pair" else 1))
    squares, limit = (jnp.square(x).sum(axis=axes, keepdims=True) for x in (rest, maps))
    return rest / _deviation(squares, limit, count)


def _deviation(squares: Float[Array, "*B"], limit: Float[Array, "*B"], count: int) -> Float[Array, "*B"]:
    """Standard deviation from the squares about the mean; zero if these are rounding error, given the plain squares."""
    least = jnp.finfo(jnp.float32).eps ** 2 * limit
    return jnp.sqrt(jnp.where(squares > least, squares, 0) / (count - 1))
