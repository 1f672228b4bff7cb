"""Attention over some of the keys, which can be merged to attention over all of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Part(NamedTuple):
    """Attention over some of the keys, and the weight of these keys, so that parts can be merged.

    Attributes:
        mixed: what the queries read of these keys; 0 for a query that may read none of them.
        lse: the log-sum-exp of their scores; the lowest float32 for such a query.
    """

    mixed: Float[Array, "*batch E"]
    lse: Float[Array, "*batch"]


def merge(*parts: Part) -> Float[Array, "*batch E"]:
    """Attention over all keys, in float32, from attention over disjoint sets of them."""
    largest = jax.lax.stop_gradient(jnp.stack([part.lse for part in parts]).max(axis=0))
    weights = [jnp.exp(part.lse - largest) for part in parts]
    mixed = [part.mixed.astype(jnp.float32) * weight[..., None] for part, weight in zip(parts, weights, strict=True)]
    return functools.reduce(jnp.add, mixed) / functools.reduce(jnp.add, weights)[..., None]


def joined(parts: Part, axis: int) -> Part:
    """The part of all keys, from parts of disjoint sets of them along an axis."""
    largest = parts.lse.max(axis=axis, keepdims=True)
    weights = jnp.exp(parts.lse - largest)
    total = weights.sum(axis=axis)
    mixed = (parts.mixed.astype(jnp.float32) * weights[..., None]).sum(axis=axis) / total[..., None]
    return Part(mixed, jnp.squeeze(largest, axis) + jnp.log(total))
