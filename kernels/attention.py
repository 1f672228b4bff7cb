"""Attention on plain arrays: grouped queries, explicit masks, float32 softmax."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_mask(
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B T"],
    key_valid: Bool[Array, "B T"],
) -> Bool[Array, "B S T"]:
    """Which keys each query may read: those at or before its own position that hold a token.

    A worked example, three tokens and one of padding (positions 0 1 2 3, valid 1 1 1 0)::

        query 0 reads 1 0 0 0
        query 1 reads 1 1 0 0
        query 2 reads 1 1 1 0

    Args:
        query_positions: place in the prompt of every query, Int[B, S].
        key_positions: place in the prompt of every key, Int[B, T].
        key_valid: false where a key is padding, Bool[B, T].

    Returns:
        Bool[B, S, T], true where attention is allowed.
    """
    earlier = key_positions[:, None, :] <= query_positions[:, :, None]
    return earlier & key_valid[:, None, :]


def attend(
    query: Float[Array, "B S H E"],
    key: Float[Array, "B T K E"],
    value: Float[Array, "B T K E"],
    mask: Bool[Array, "#B S T"] | None = None,
) -> Float[Array, "B S H E"]:
    """Softmax attention in which H / K query heads share each key-value head.

    Args:
        query: Float[B, S, H, E], not yet scaled.
        key: Float[B, T, K, E].
        value: Float[B, T, K, E].
        mask: Bool[B, S, T], true where attention is allowed; None allows everything.

    Returns:
        Float[B, S, H, E], in the dtype of `value`; scores and softmax are computed in float32.
    """
    batch, length, heads, head_width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, head_width)
    scores = jnp.einsum("bskge,btke->bkgst", grouped, key, preferred_element_type=jnp.float32)
    scores = scores * head_width**-0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgst,btke->bskge", weights, value)
    return mixed.reshape(batch, length, heads, head_width)
