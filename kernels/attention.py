"""Attention on plain arrays: grouped queries, explicit masks, float32 softmax.

There are two implementations of the same sums. Accelerators compute all heads in one batched product. On CPU that
would write the scores of all heads to memory and read them back three times, so long sequences are processed one head
and one block of queries at a time and the scores stay in cache. On either, the backward pass recomputes the scores of
long sequences, so that no [.., S, T] is kept for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_LOWEST = float(jnp.finfo(jnp.float32).min)

_HEADWISE_FROM = 64 * 64
"""Number of scores per head from which processing one head at a time pays on CPU."""

_QUERY_BLOCK = 192
"""Queries in a block on CPU; the keys after a block are skipped where attention is causal."""


def causal_mask(
    query_positions: Int[Array, "B S"],
    key_positions: Int[Array, "B T"],
    key_valid: Bool[Array, "B T"],
) -> Bool[Array, "B S T"]:
    """Which keys each query may read: those at or before its own position that are not padding.

    For example, with three tokens and one of padding (positions 0 1 2 3, valid 1 1 1 0)::

        query 0 reads 1 0 0 0
        query 1 reads 1 1 0 0
        query 2 reads 1 1 1 0

    Args:
        query_positions: position of every query in the prompt.
        key_positions: position of every key in the prompt.
        key_valid: false where a key is padding.

    Returns:
        True where attention is allowed.
    """
    earlier = key_positions[:, None, :] <= query_positions[:, :, None]
    return earlier & key_valid[:, None, :]


def near(query_positions: Int[Array, "B S"], key_positions: Int[Array, "B T"], window: int) -> Bool[Array, "B S T"]:
    """Which keys are less than `window` positions before each query, or after it (sliding-window attention)."""
    return key_positions[:, None, :] > query_positions[:, :, None] - window


def same_span(spans: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Which tokens belong to the same span, such as one picture; -1 belongs to none.

    For example, with spans -1 0 0 1::

        token 0 reads 0 0 0 0
        token 1 reads 0 1 1 0
        token 2 reads 0 1 1 0
        token 3 reads 0 0 0 1
    """
    return (spans[:, :, None] == spans[:, None, :]) & (spans >= 0)[:, None, :]


class Part(NamedTuple):
    """Softmax attention over some of the keys, not yet normalised, so that parts can be merged.

    Attributes:
        mixed: values weighted by exp(score - largest).
        largest: the largest score.
        total: the sum of exp(score - largest).
    """

    mixed: Float[Array, "*batch E"]
    largest: Float[Array, "*batch"]
    total: Float[Array, "*batch"]


def merge(*parts: Part) -> Float[Array, "*batch E"]:
    """Attention over all keys, from attention over disjoint sets of them."""
    largest = jax.lax.stop_gradient(jnp.stack([part.largest for part in parts]).max(axis=0))
    weights = [jnp.exp(part.largest - largest) for part in parts]
    mixed = [part.mixed * weight[..., None] for part, weight in zip(parts, weights, strict=True)]
    total = [part.total * weight for part, weight in zip(parts, weights, strict=True)]
    return functools.reduce(jnp.add, mixed) / functools.reduce(jnp.add, total)[..., None]


def attend(
    query: Float[Array, "B S H E"],
    key: Float[Array, "B T K E"],
    value: Float[Array, "B T K E"],
    mask: Bool[Array, "#B #S T"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B S H E"]:
    """Softmax attention in which H / K query heads share each key-value head.

    Args:
        query: the queries, not yet scaled.
        key: the keys.
        value: the values.
        mask: true where attention is allowed; None allows everything.
        causal: promises that the mask lets no query read a later key, where query S - 1 and key T - 1 are the same
            token. Later keys are then skipped.

    Returns:
        What the queries read, in the dtype of `value`; scores and softmax are computed in float32.
    """
    batch, length, heads, width = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = query.reshape(batch, length, kv_heads, heads // kv_heads, width)

    def together(query: Array, key: Array, value: Array) -> Array:
        scores = jnp.einsum("bskge,btke->bkgst", query, key, preferred_element_type=jnp.float32) * width**-0.5
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, _LOWEST)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bkgst,btke->bskge", weights, value)

    def head_by_head(query: Array, key: Array, value: Array) -> Array:
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def one(arguments: tuple[Array, Array, Array, Array]) -> Array:
            query, key, value, row = arguments
            allowed = None if mask is None else mask[row if mask.shape[0] > 1 else 0]
            done = []
            for start in range(0, length, _QUERY_BLOCK):
                block = slice(start, min(length, start + _QUERY_BLOCK))
                seen = slice(0, max(1, keys - length + block.stop) if causal else keys)
                rows = block if allowed is not None and allowed.shape[0] > 1 else slice(None)
                part = _part(query[block], key[seen], value[seen], None if allowed is None else allowed[rows, seen])
                done.append(part.mixed / part.total[..., None])
            return jnp.concatenate(done).astype(value.dtype)

        mixed = jax.lax.map(
            one,
            (
                jnp.moveaxis(query, 2, 1).reshape(batch * kv_heads, length, -1, width),
                jnp.moveaxis(key, 2, 1).reshape(batch * kv_heads, keys, width),
                jnp.moveaxis(value, 2, 1).reshape(batch * kv_heads, keys, width),
                jnp.arange(batch * kv_heads) // kv_heads,
            ),
        )
        return jnp.moveaxis(mixed.reshape(batch, kv_heads, length, -1, width), 1, 2)

    @jax.checkpoint
    def either(query: Array, key: Array, value: Array) -> Array:
        return jax.lax.platform_dependent(query, key, value, cpu=head_by_head, default=together)

    mixed = (together if length * keys < _HEADWISE_FROM else either)(grouped, key, value)
    return mixed.reshape(batch, length, heads, width)


def _part(
    query: Float[Array, "S G E"],
    key: Float[Array, "T E"],
    value: Float[Array, "T E"],
    mask: Bool[Array, "#S T"] | None = None,
) -> Part:
    """Attention of one key-value head and its queries, in float32; a query may read nothing."""
    scores = jnp.einsum("sge,te->sgt", query, key, preferred_element_type=jnp.float32) * key.shape[-1] ** -0.5
    return _weighted("sgt,te->sge", scores, value, None if mask is None else mask[:, None])


def _weighted(
    pattern: str, scores: Float[Array, "*rows T"], value: Float[Array, "..."], mask: Bool[Array, "..."] | None
) -> Part:
    """The part of values with given scores; `pattern` is the einsum pattern of their product."""
    if mask is not None:
        scores = jnp.where(mask, scores, _LOWEST)
    # The result does not depend on the shift, so neither does the gradient.
    largest = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - largest[..., None])
    mixed = jnp.einsum(pattern, weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return Part(mixed, largest, weights.sum(axis=-1))


def prefix_part(
    query: Float[Array, "R B S H E"],
    key: Float[Array, "B K P E"],
    value: Float[Array, "B K P E"],
    mask: Bool[Array, "B #S P"],
) -> Part:
    """Attention of R rows of queries to the keys and values of one prefix, which is read once for all rows.

    Args:
        query: the queries of all rows, not yet scaled.
        key: the keys of the prefix, heads first.
        value: the values of the prefix, heads first.
        mask: which keys a query may read, the same for all rows.

    Returns:
        The part, with axes [R, B, S, H].
    """
    rows, batch, length, heads, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.reshape(rows, batch, length, kv_heads, heads // kv_heads, width)
    # All rows' queries of one prompt and key-value head side by side: one matrix product with the prefix.
    grouped = jnp.transpose(grouped, (1, 3, 0, 2, 4, 5)).reshape(batch, kv_heads, rows * length, -1, width)

    if mask.shape[1] > 1:  # a row's queries are adjacent
        mask = jnp.tile(mask, (1, rows, 1))

    def together(query: Array, key: Array, value: Array, mask: Array) -> Part:
        return jax.vmap(jax.vmap(_part, in_axes=(0, 0, 0, None)))(query, key, value, mask)

    def head_by_head(query: Array, key: Array, value: Array, mask: Array) -> Part:
        def one(arguments: tuple[Array, Array, Array, Array]) -> Part:
            query, key, value, row = arguments
            return _part(query, key, value, mask[row])

        flat = [array.reshape(batch * kv_heads, *array.shape[2:]) for array in (query, key, value)]
        parts = jax.lax.map(one, (*flat, jnp.arange(batch * kv_heads) // kv_heads))
        return jax.tree.map(lambda leaf: leaf.reshape(batch, kv_heads, *leaf.shape[1:]), parts)

    if rows * length * key.shape[2] < _HEADWISE_FROM:
        part = together(grouped, key, value, mask)
    else:
        part = jax.lax.platform_dependent(grouped, key, value, mask, cpu=head_by_head, default=together)

    def back(leaf: Array) -> Array:
        leaf = leaf.reshape(batch, kv_heads, rows, length, *leaf.shape[3:])
        leaf = jnp.moveaxis(leaf, (2, 0, 3, 1), (0, 1, 2, 3))
        return leaf.reshape(rows, batch, length, heads, *leaf.shape[5:])

    return jax.tree.map(back, part)


def suffix_part(
    query: Float[Array, "R B S H E"],
    key: Float[Array, "R B T K E"],
    value: Float[Array, "R B T K E"],
    mask: Bool[Array, "#R #B S T"],
) -> Part:
    """Attention of every row's queries to the row's own keys and values, with axes [R, B, S, H]."""
    rows, batch, length, heads, width = query.shape
    kv_heads = key.shape[3]
    grouped = query.reshape(rows, batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("rbskge,rbtke->rbskgt", grouped, key, preferred_element_type=jnp.float32) * width**-0.5
    part = _weighted("rbskgt,rbtke->rbskge", scores, value, mask[:, :, :, None, None])
    return jax.tree.map(lambda leaf: leaf.reshape(rows, batch, length, heads, *leaf.shape[5:]), part)


def shared_prefix_attention(
    prefix_key: Float[Array, "B K P E"],
    prefix_value: Float[Array, "B K P E"],
    prefix_mask: Bool[Array, "B #S P"],
    query: Float[Array, "R B S H E"],
    key: Float[Array, "R B T K E"],
    value: Float[Array, "R B T K E"],
    mask: Bool[Array, "#R #B S T"],
) -> Float[Array, "R B S H E"]:
    """Attention of R rows that share a prompt's prefix, each continuing with tokens of its own.

    The prefix is never copied per row: its scores are one product for all rows, and the two softmax parts are merged
    by their log-sum-exps.

    Args:
        prefix_key: the keys of the prefix, heads first.
        prefix_value: the values of the prefix, heads first.
        prefix_mask: which keys of the prefix a query may read, the same for all rows.
        query: the queries of all rows, not yet scaled.
        key: every row's own keys.
        value: every row's own values.
        mask: which of its row's own keys a query may read.

    Returns:
        What the queries read, in the dtype of `value`; scores and softmax are computed in float32.
    """
    own = suffix_part(query, key, value, mask)
    if prefix_key.shape[2] == 0:
        return merge(own).astype(value.dtype)
    return merge(prefix_part(query, prefix_key, prefix_value, prefix_mask), own).astype(value.dtype)
