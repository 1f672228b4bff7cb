"""Attention on plain arrays: grouped queries, float32 softmax, and parts of the keys that can be merged.

There are three implementations of the same sums. On GPU and TPU a kernel walks over blocks of keys, and no scores
reach memory (`jaxid.kernels.flash`). On CPU, long sequences are processed one head and one block of queries at a time,
so that the scores stay in cache. Short sequences, and what the kernel does not take, are batched products. `chosen`
tells which one a problem gets. In all of them the backward pass of long sequences computes the scores again, so that no
[.., S, T] is kept for it.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxid.kernels import flash
from jaxid.kernels.blocks import LOWEST, Target
from jaxid.kernels.flash import Stacks
from jaxid.kernels.masks import Reads
from jaxid.kernels.parts import Part, merge
from jaxid.kernels.stacks import LayerSlice

_HEADWISE_FROM = 64 * 64
"""Number of scores per head from which processing one head at a time pays on CPU."""

_KERNEL_FROM = 64 * 64
"""Number of scores per head from which the kernel is used on GPU and TPU."""

_STACKED_FROM = 32
"""Number of keys of a stack from which the kernel is used on GPU, where products would copy them."""

_QUERY_BLOCK = 192
"""Queries in a block on CPU; the keys after a block are skipped where attention is causal."""


Implementation = Literal["batched", "headwise", "cuda", "tpu", "cuda-interpreted", "tpu-interpreted"]
"""Batched products, one head at a time, or the kernel; interpreted kernels run anywhere, slowly."""


def chosen(
    platform: str, query: Sequence[int], key: Sequence[int], dtype: Any = jnp.bfloat16, *, stacked: bool = False
) -> Literal["batched", "headwise", "cuda", "tpu"]:
    """Which implementation a platform gets.

    Args:
        platform: such as "cpu", "cuda" or "tpu".
        query: the shape of the queries, [B, H, S, E].
        key: the shape of the keys, [B, K, T, E].
        dtype: of both.
        stacked: whether keys and values lie in a stack.

    Returns:
        "cuda" or "tpu" for the kernel of that platform, "headwise" for one head at a time, "batched" for products.
    """
    scores = query[2] * key[2]
    if platform == "cpu":
        return "headwise" if scores >= _HEADWISE_FROM else "batched"
    enough = scores >= _KERNEL_FROM or (stacked and platform == "cuda" and key[2] >= _STACKED_FROM)
    if platform in ("cuda", "tpu") and enough and flash.takes(Target(platform), query, key, dtype):
        return platform
    return "batched"


def _weighted(
    pattern: str,
    scores: Float[Array, "*rows T"],
    value: Float[Array, "..."],
    mask: Bool[Array, "..."] | None,
    dtype: Any = jnp.float32,
) -> Part:
    """The part of values with given scores; `pattern` is the einsum pattern of their product."""
    if mask is not None:
        scores = jnp.where(mask, scores, LOWEST)
    # The result does not depend on the shift, so neither does the gradient.
    largest = jax.lax.stop_gradient(scores.max(axis=-1))
    weights = jnp.exp(scores - largest[..., None])
    total = weights.sum(axis=-1)
    mixed = jnp.einsum(pattern, weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed, lse = mixed / total[..., None], largest + jnp.log(total)
    if mask is not None:
        reads = largest > LOWEST / 2
        mixed, lse = jnp.where(reads[..., None], mixed, 0.0), jnp.where(reads, lse, LOWEST)
    return Part(mixed.astype(dtype), lse)


def _batched(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B K T E"],
    value: Float[Array, "B K T E"],
    mask: Bool[Array, "#B #S T"] | None,
    dtype: Any,
) -> Part:
    """All heads in one product."""
    batch, heads, length, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, length, width)
    scores = jnp.einsum("bkgse,bkte->bkgst", grouped, key, preferred_element_type=jnp.float32) * width**-0.5
    part = _weighted("bkgst,bkte->bkgse", scores, value, None if mask is None else mask[:, None, None], dtype)
    return Part(part.mixed.reshape(query.shape), part.lse.reshape(batch, heads, length))


def _headwise(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B K T E"],
    value: Float[Array, "B K T E"],
    mask: Bool[Array, "#B #S T"] | None,
    dtype: Any,
    causal: bool,
) -> Part:
    """One key head and one block of queries at a time."""
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(arguments: tuple[Array, Array, Array, Array]) -> Part:
        query, key, value, row = arguments
        allowed = None if mask is None else mask[row if mask.shape[0] > 1 else 0]
        done = []
        for start in range(0, length, _QUERY_BLOCK):
            block = slice(start, min(length, start + _QUERY_BLOCK))
            seen = slice(0, max(1, keys - length + block.stop) if causal else keys)
            rows = block if allowed is not None and allowed.shape[0] > 1 else slice(None)
            scores = jnp.einsum("sge,te->sgt", query[block], key[seen], preferred_element_type=jnp.float32)
            some = None if allowed is None else allowed[rows, None, seen]
            done.append(_weighted("sgt,te->sge", scores * width**-0.5, value[seen], some, dtype))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *done)

    grouped = jnp.swapaxes(query.reshape(batch * kv_heads, heads // kv_heads, length, width), 1, 2)
    flat = [array.reshape(batch * kv_heads, keys, width) for array in (key, value)]
    part = jax.lax.map(one, (grouped, *flat, jnp.arange(batch * kv_heads) // kv_heads))
    mixed, lse = (jnp.swapaxes(leaf, 1, 2) for leaf in part)
    return Part(mixed.reshape(query.shape), lse.reshape(batch, heads, length))


class _Problem(NamedTuple):
    """How attention is computed: by which implementation, or by the one of the platform if None."""

    causal: bool
    dtype: Any
    implementation: Implementation | None


def _plainly(name: str, problem: _Problem, query: Array, key: Array, value: Array, reads: Reads | Array | None) -> Part:
    mask = reads.mask() if isinstance(reads, Reads) else reads
    if name == "headwise":
        return _headwise(query, key, value, mask, problem.dtype, problem.causal)
    return _batched(query, key, value, mask, problem.dtype)


def _branches(problem: _Problem, query: Array, key: Array, reads: Any, stacks: Stacks | None) -> dict[str, str]:
    """The implementation of every platform; `default` is that of those without a name."""
    if problem.implementation is not None:
        return {"default": problem.implementation}
    names = {
        platform: chosen(platform, query.shape, key.shape, query.dtype, stacked=stacks is not None)
        for platform in ("cpu", "cuda", "tpu")
    }
    if reads is not None and not isinstance(reads, Reads):
        names = {platform: name if name == "headwise" else "batched" for platform, name in names.items()}
    return {"default": "batched"} if set(names.values()) == {"batched"} else {**names, "default": "batched"}


def _target(name: str) -> Target | None:
    platform, _, interpreted = name.partition("-")
    return Target(platform, bool(interpreted)) if platform in ("cuda", "tpu") else None  # pyright: ignore[reportArgumentType]


def _select(branches: dict[str, Any], *arguments: Any) -> Any:
    if len(branches) == 1:
        return branches["default"](*arguments)
    return jax.lax.platform_dependent(*arguments, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(problem: _Problem, query: Array, key: Array, value: Array, reads: Any, stacks: Stacks | None) -> Any:
    """The part of all keys, by the implementation that each platform has for it."""

    def branch(name: str) -> Any:
        target = _target(name)
        if target is None:
            return lambda *arguments: _plainly(name, problem, *arguments[:4])

        def kernel(query: Array, key: Array, value: Array, reads: Any, stacks: Stacks | None) -> Part:
            return Part(*flash.forward(query, key, value, reads, target, problem.dtype, stacks))

        return kernel

    names = _branches(problem, query, key, reads, stacks)
    return _select({platform: branch(name) for platform, name in names.items()}, query, key, value, reads, stacks)


def _attention_forward(
    problem: _Problem, query: Array, key: Array, value: Array, reads: Any, stacks: Stacks | None
) -> tuple[Any, Any]:
    part = _attention(problem, query, key, value, reads, stacks)
    return part, (query, key, value, reads, stacks, part)


def _attention_backward(problem: _Problem, residuals: Any, slope: Part) -> tuple[Array, Array, Array, None, None]:
    query, key, value, reads, stacks, part = residuals

    def branch(name: str) -> Any:
        target = _target(name)
        if target is not None:
            return lambda query, key, value, reads, part, slope: flash.backward(
                query, key, value, reads, target, part.mixed, part.lse, slope.mixed, slope.lse
            )

        def plain(query: Array, key: Array, value: Array, reads: Any, part: Part, slope: Part) -> Any:
            del part
            run = functools.partial(_plainly, name, problem, reads=reads)
            return jax.vjp(run, query, key, value)[1](slope)

        return plain

    names = _branches(problem, query, key, reads, stacks)
    branches = {platform: branch(name) for platform, name in names.items()}
    return *_select(branches, query, key, value, reads, part, slope), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def part(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B K T E"] | LayerSlice,
    value: Float[Array, "B K T E"] | LayerSlice,
    reads: Reads | Bool[Array, "#B #S T"] | None = None,
    *,
    causal: bool = False,
    dtype: Any = None,
    implementation: Implementation | None = None,
) -> Part:
    """Softmax attention in which H / K query heads share each key head, with the log-sum-exps of the scores.

    Args:
        query: the queries, not yet scaled.
        key: the keys; the first T of a layer are read where they lie in a stack [L, B, K, N, E].
        value: the values, in the same form.
        reads: which keys each query may read; None for all of them. Arrays of booleans are not for the kernel.
        causal: promises that no query reads a later key, where query S - 1 and key T - 1 are the same token. On CPU
            later keys are then skipped; the kernel skips what it need not read in any case.
        dtype: of what is read; that of the values if None.
        implementation: that of the platform if None.

    Returns:
        The part, with axes [B, H, S]; scores and softmax are computed in float32.
    """
    problem = _Problem(causal, jnp.dtype(value.dtype if dtype is None else dtype), implementation)
    stacks, least = None, min(_HEADWISE_FROM, _KERNEL_FROM)
    if isinstance(key, LayerSlice) and isinstance(value, LayerSlice):
        layers = jax.lax.stop_gradient(key.stack), jax.lax.stop_gradient(value.stack)
        stacks = Stacks(*layers, jnp.asarray(key.index, jnp.int32))
        least = least if key.shape[2] < _STACKED_FROM else 0
    key, value = (array.value if isinstance(array, LayerSlice) else array for array in (key, value))
    if implementation is None and query.shape[2] * key.shape[2] < least:
        return _plainly("batched", problem, query, key, value, reads)
    return _attention(problem, query, key, value, reads, stacks)


def attend(
    query: Float[Array, "B S H E"],
    key: Float[Array, "B T K E"],
    value: Float[Array, "B T K E"],
    reads: Reads | Bool[Array, "#B #S T"] | None = None,
    *,
    causal: bool = False,
) -> Float[Array, "B S H E"]:
    """Softmax attention in which H / K query heads share each key-value head.

    Args:
        query: the queries, not yet scaled.
        key: the keys.
        value: the values.
        reads: which keys each query may read; None for all of them.
        causal: as in `part`.

    Returns:
        What the queries read, in the dtype of `value`; scores and softmax are computed in float32.
    """
    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    return jnp.swapaxes(part(query, key, value, reads, causal=causal).mixed, 1, 2)


def _side_by_side(query: Float[Array, "R B S H E"]) -> Float[Array, "B H C E"]:
    """The queries of each prompt and head, one row after another."""
    rows, batch, length, heads, width = query.shape
    return jnp.transpose(query, (1, 3, 0, 2, 4)).reshape(batch, heads, rows * length, width)


def _row_by_row(leaf: Float[Array, "B H C *rest"], rows: int) -> Float[Array, "R B S H *rest"]:
    """The inverse, for what belongs to the queries."""
    leaf = leaf.reshape(*leaf.shape[:2], rows, -1, *leaf.shape[3:])
    return jnp.moveaxis(leaf, (2, 0, 3, 1), (0, 1, 2, 3))


def prefix_part(
    query: Float[Array, "R B S H E"],
    key: Float[Array, "B K P E"] | LayerSlice,
    value: Float[Array, "B K P E"] | LayerSlice,
    reads: Reads | Bool[Array, "B #S P"] | None,
    *,
    implementation: Implementation | None = None,
) -> Part:
    """Attention of R rows of queries to the keys and values of one prefix, which is read once for all rows.

    Args:
        query: the queries of all rows, not yet scaled.
        key: the keys of the prefix, heads first; those of a layer may lie in a stack, as in `part`.
        value: the values of the prefix, in the same form.
        reads: which keys each of the S queries may read, the same for all rows.
        implementation: that of the platform if None.

    Returns:
        The part, with axes [R, B, S, H].
    """
    rows = query.shape[0]
    if isinstance(reads, Reads):
        reads = reads.tile(rows)
    elif reads is not None and reads.shape[1] > 1:
        reads = jnp.tile(reads, (1, rows, 1))
    found = part(_side_by_side(query), key, value, reads, dtype=jnp.float32, implementation=implementation)
    return Part(_row_by_row(found.mixed, rows), _row_by_row(found.lse, rows))


def suffix_part(
    query: Float[Array, "R B S H E"],
    key: Float[Array, "R B K T E"],
    value: Float[Array, "R B K T E"],
    mask: Bool[Array, "#R #B S T"],
) -> Part:
    """Attention of every row's queries to the row's own keys and values, with axes [R, B, S, H]."""
    rows, batch, length, heads, width = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(rows, batch, length, kv_heads, heads // kv_heads, width)
    scores = jnp.einsum("rbskge,rbkte->rbskgt", grouped, key, preferred_element_type=jnp.float32) * width**-0.5
    found = _weighted("rbskgt,rbkte->rbskge", scores, value, mask[:, :, :, None, None])
    return jax.tree.map(lambda leaf: leaf.reshape(rows, batch, length, heads, *leaf.shape[5:]), found)


def _stacked_suffix_part(
    query: Float[Array, "R B S H E"], key: LayerSlice, value: LayerSlice, reads: Reads, implementation: Any
) -> Part:
    """`suffix_part` for keys and values of stacks [L, R, B, K, T, E], of which every row reads a layer of its own."""
    rows = query.shape[0]
    stacks = [array.stack.reshape(-1, *array.stack.shape[2:]) for array in (key, value)]

    def of_row(query: Array, index: Array, key: Array, value: Array) -> Part:
        own = [LayerSlice(stack, index, array) for stack, array in zip(stacks, (key, value), strict=True)]
        query = jnp.swapaxes(query, 1, 2)
        return part(query, own[0], own[1], reads, dtype=jnp.float32, implementation=implementation)

    found = jax.vmap(of_row)(query, key.index * rows + jnp.arange(rows), key.value, value.value)
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 2, 3), found)


def shared_prefix_attention(
    prefix_key: Float[Array, "B K P E"] | LayerSlice,
    prefix_value: Float[Array, "B K P E"] | LayerSlice,
    prefix_reads: Reads,
    query: Float[Array, "R B S H E"],
    key: Float[Array, "R B K T E"] | LayerSlice,
    value: Float[Array, "R B K T E"] | LayerSlice,
    reads: Reads,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "R B S H E"]:
    """Attention of R rows that share a prompt's prefix, each continuing with tokens of its own.

    The prefix is never copied per row, and the two softmax parts are merged by their log-sum-exps. On GPU and TPU, the
    queries of all rows are laid side by side for both parts if the kernel takes them.

    Args:
        prefix_key: the keys of the prefix, heads first; those of a layer may lie in a stack, as in `part`.
        prefix_value: the values of the prefix, in the same form.
        prefix_reads: which keys of the prefix each of the S queries may read, the same for all rows.
        query: the queries of all rows, not yet scaled.
        key: every row's own keys, heads first; those of a layer may lie in a stack [L, R, B, K, N, E].
        value: every row's own values, in the same form.
        reads: which of its row's own keys each of the S queries may read, the same for all rows; by positions alone,
            and the first key is a token, the earliest.
        implementation: that of the platform if None.

    Returns:
        What the queries read, in the dtype of `value`; scores and softmax are computed in float32.
    """
    rows, batch, length, heads, width = query.shape
    kv_heads, keys = key.shape[2:4]

    def apart(query: Array, key: Any, value: Any, prefix_key: Any, prefix_value: Any) -> Array:
        if isinstance(key, LayerSlice):
            own = _stacked_suffix_part(query, key, value, reads, implementation)
        else:
            own = suffix_part(query, key, value, reads.mask()[None])
        if prefix_key.shape[2] == 0:
            return merge(own).astype(value.dtype)
        return merge(prefix_part(query, prefix_key, prefix_value, prefix_reads), own).astype(value.dtype)

    def together(query: Array, key: Array, value: Array, prefix_key: Any, prefix_value: Any) -> Array:
        query = _side_by_side(query)
        own = [jnp.moveaxis(array, 0, 2).reshape(batch, kv_heads, rows * keys, width) for array in (key, value)]
        options: Any = {"dtype": jnp.float32, "implementation": implementation}
        parts = [part(query, own[0], own[1], reads.by_row(rows), **options)]
        if prefix_key.shape[2]:
            parts.append(part(query, prefix_key, prefix_value, prefix_reads.tile(rows), **options))
        return _row_by_row(merge(*parts).astype(value.dtype), rows)

    arrays: tuple[Any, ...] = (query, key, value, prefix_key, prefix_value)
    if isinstance(key, LayerSlice):  # a step of decoding would copy its caches
        return apart(*arrays)
    if implementation is not None:
        return together(*arrays)
    shapes = (batch, heads, rows * length, width), (batch, kv_heads, rows * keys, width)
    kernels = [platform for platform in ("cuda", "tpu") if chosen(platform, *shapes, query.dtype) == platform]
    if length == 1 or not kernels:  # a kernel's block of queries would hold those of many rows
        return apart(*arrays)
    return jax.lax.platform_dependent(*arrays, default=apart, **dict.fromkeys(kernels, together))
