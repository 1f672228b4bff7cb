"""Attention against a naive loop, and against one softmax over all keys."""

from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxid.kernels import attention
from jaxid.kernels import masks as reading
from jaxid.kernels.attention import attend, prefix_part
from jaxid.kernels.parts import Part, merge


def naive(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One query, one head at a time, over the allowed keys alone, in float64."""
    batch, length, heads, width = query.shape
    shared = heads // key.shape[2]
    out = np.zeros(query.shape)
    for b in range(batch):
        for s in range(length):
            allowed = np.flatnonzero(mask[b, s])
            for h in range(heads):
                scores = [float(np.dot(query[b, s, h], key[b, t, h // shared])) / np.sqrt(width) for t in allowed]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                out[b, s, h] = sum(w * value[b, t, h // shared] for w, t in zip(weights, allowed, strict=True))
    return out


def arrays(heads: int, kv_heads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(heads * 10 + kv_heads)
    shapes = [(2, 5, heads, 8), (2, 7, kv_heads, 8), (2, 7, kv_heads, 8)]
    query, key, value = (2 * rng.standard_normal(shape) for shape in shapes)
    return query, key, value


def single(*inputs: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = (jnp.asarray(array, jnp.float32) for array in inputs)
    return query, key, value


@pytest.mark.parametrize(
    ("heads", "kv_heads", "masked"), [(4, 4, True), (4, 2, True), (4, 2, False), (6, 2, True), (3, 1, True)]
)
def test_equals_the_loop(heads: int, kv_heads: int, masked: bool) -> None:
    query, key, value = arrays(heads, kv_heads)
    mask = np.random.default_rng(0).random((2, 5, 7)) < 0.5
    mask[:, :, 3] = True  # every query reads something
    expected = naive(query, key, value, mask if masked else np.ones_like(mask))
    found = attend(*single(query, key, value), jnp.asarray(mask) if masked else None)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_one_mask_for_the_whole_batch() -> None:
    query, key, value = arrays(4, 2)
    mask = np.tril(np.ones((5, 7), bool), 2)
    found = attend(*single(query, key, value), jnp.asarray(mask)[None])
    np.testing.assert_allclose(found, naive(query, key, value, np.stack([mask, mask])), atol=2e-6)


def test_forbidden_keys_have_no_effect_at_all() -> None:
    query, key, value = arrays(4, 2)
    mask = np.ones((2, 5, 7), bool)
    mask[:, :, 4] = False
    far_key, far_value = key.copy(), value.copy()
    far_key[:, 4], far_value[:, 4] = 1e4, -1e6
    before = attend(*single(query, key, value), jnp.asarray(mask))
    after = attend(*single(query, far_key, far_value), jnp.asarray(mask))
    np.testing.assert_array_equal(before, after)


def test_a_query_without_keys_stays_finite_and_so_does_its_gradient() -> None:
    query, key, value = single(*arrays(2, 2))
    mask = jnp.zeros((2, 5, 7), bool)
    total, slope = jax.jit(jax.value_and_grad(lambda q: attend(q, key, value, mask).sum()))(query)
    assert np.isfinite(total) and np.isfinite(slope).all()


def test_large_scores_do_not_overflow() -> None:
    query, key, value = arrays(2, 2)
    found = attend(*single(300 * query, 300 * key, value))
    np.testing.assert_allclose(found, naive(300 * query, 300 * key, value, np.ones((2, 5, 7), bool)), atol=1e-4)


def test_bfloat16_in_and_out_with_float32_scores() -> None:
    query, key, value = arrays(4, 2)
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, value)]
    found = attend(*rounded)
    exact = [np.asarray(array, np.float64) for array in rounded]
    expected = naive(exact[0], exact[1], exact[2], np.ones((2, 5, 7), bool))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.03)


# --- both implementations: all heads at once, and head by head ------------------------------------------------------


@pytest.fixture(params=["together", "head by head"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Chooses the implementation; on CPU their sizes would. Blocks of queries are short, so that there are several."""
    monkeypatch.setattr(attention, "_HEADWISE_FROM", 0 if request.param == "head by head" else 10**9)
    monkeypatch.setattr(attention, "_QUERY_BLOCK", 4)
    yield request.param


def compiled(function: Any) -> Any:
    """As a new function, so that no program of the other implementation is reused."""
    return jax.jit(lambda *arguments: function(*arguments))


causal_attend = partial(attend, causal=True)


def plain(query: Any, key: Any, value: Any, mask: Any, xp: Any = np) -> Any:
    """One softmax; keys and values repeated for the query heads that share them. In float64, or in JAX."""
    query, key, value = (np.asarray(array, np.float64) if xp is np else array for array in (query, key, value))
    shared = query.shape[2] // key.shape[2]
    key, value = (xp.repeat(array, shared, axis=2) for array in (key, value))
    scores = xp.einsum("bshe,bthe->bhst", query, key) / np.asarray(query.shape[-1] ** 0.5, query.dtype)
    scores = xp.where(xp.asarray(mask)[:, None], scores, -np.inf)
    weights = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return xp.einsum("bhst,bthe->bshe", weights / weights.sum(axis=-1, keepdims=True), value)


def drawn(rng: np.random.Generator, *shape: int, spread: float = 1.0) -> jax.Array:
    return jnp.asarray(spread * rng.standard_normal(shape), jnp.float32)


def padded_causal(length: int, keys: int, ends: tuple[int, ...]) -> np.ndarray:
    """Queries are the last tokens; prompts end at `ends`, and padding reads the tokens before it."""
    query, key = np.arange(length)[:, None] + keys - length, np.arange(keys)
    return (key <= query) & (key < np.array(ends)[:, None, None])


SIZES = [(11, 11, 6, 2), (5, 13, 4, 4), (1, 9, 4, 1)]
"""Queries, keys, heads, key-value heads."""


@pytest.mark.parametrize(("length", "keys", "heads", "kv_heads"), SIZES)
def test_causal_padded_and_grouped(path: str, length: int, keys: int, heads: int, kv_heads: int) -> None:
    rng = np.random.default_rng(length + heads)
    query, key, value = drawn(rng, 2, length, heads, 8), *(drawn(rng, 2, keys, kv_heads, 8) for _ in range(2))
    mask = padded_causal(length, keys, (keys, keys - 4))
    found = compiled(causal_attend)(query, key, value, jnp.asarray(mask))
    np.testing.assert_allclose(found, plain(query, key, value, mask), atol=2e-6)


def test_any_mask_one_for_all_and_none(path: str) -> None:
    rng = np.random.default_rng(1)
    query, key, value = drawn(rng, 3, 9, 4, 8), drawn(rng, 3, 7, 2, 8), drawn(rng, 3, 7, 2, 8)
    mask = rng.random((3, 9, 7)) < 0.4
    mask[:, :, 2] = True
    run = compiled(attend)
    for some in (mask, mask[:1]):
        np.testing.assert_allclose(run(query, key, value, jnp.asarray(some)), plain(query, key, value, some), atol=2e-6)
    np.testing.assert_allclose(run(query, key, value), plain(query, key, value, np.ones_like(mask)), atol=2e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_mask_for_all_queries(path: str, batch: int) -> None:
    """Such as that of padding, where nothing is causal: Bool[B or 1, 1, T], more queries than go together."""
    rng = np.random.default_rng(5)
    query, key, value = drawn(rng, 3, 9, 4, 8), drawn(rng, 3, 7, 2, 8), drawn(rng, 3, 7, 2, 8)
    mask = rng.random((batch, 1, 7)) < 0.5
    mask[:, :, 4] = True
    assert not mask.all() and attention._QUERY_BLOCK < 9
    found = compiled(attend)(query, key, value, jnp.asarray(mask))
    whole = np.broadcast_to(mask, (3, 9, 7))
    np.testing.assert_allclose(found, plain(query, key, value, whole), atol=2e-6)
    np.testing.assert_array_equal(found, compiled(attend)(query, key, value, jnp.asarray(whole)))


def test_one_mask_for_all_queries_in_blocks_of_their_real_size() -> None:
    rng = np.random.default_rng(8)
    query, key, value = drawn(rng, 2, 200, 2, 4), drawn(rng, 2, 50, 1, 4), drawn(rng, 2, 50, 1, 4)
    assert attention._QUERY_BLOCK < 200 and attention._HEADWISE_FROM < 200 * 50
    mask = np.arange(50) < np.array([50, 31])[:, None, None]
    found = compiled(attend)(query, key, value, jnp.asarray(mask))
    np.testing.assert_allclose(found, plain(query, key, value, np.broadcast_to(mask, (2, 200, 50))), atol=5e-6)


def weighed(value: jax.Array) -> jax.Array:
    return (value * jnp.sin(jnp.arange(value.size, dtype=jnp.float32)).reshape(value.shape)).sum()


def slopes(function: Any, *arguments: jax.Array) -> tuple[jax.Array, ...]:
    """Gradients of a sum with unequal weights."""
    return jax.jit(jax.grad(lambda *given: weighed(function(*given)), argnums=tuple(range(len(arguments)))))(*arguments)


def test_gradients(path: str) -> None:
    rng = np.random.default_rng(2)
    query, key, value = drawn(rng, 2, 10, 4, 8), drawn(rng, 2, 10, 2, 8), drawn(rng, 2, 10, 2, 8)
    mask = padded_causal(10, 10, (10, 7))
    found = slopes(lambda q, k, v: attend(q, k, v, jnp.asarray(mask), causal=True), query, key, value)
    wanted = slopes(lambda q, k, v: plain(q, k, v, mask, jnp), query, key, value)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


def test_vmap_is_a_loop(path: str) -> None:
    """Also over the mask alone, and over queries that share their keys."""
    rng = np.random.default_rng(3)
    query, key, value = drawn(rng, 3, 2, 6, 4, 8), drawn(rng, 2, 6, 2, 8), drawn(rng, 2, 6, 2, 8)
    masks = jnp.asarray(np.tril(rng.random((3, 2, 6, 6)) < 0.6) | np.eye(6, dtype=bool))

    def one(query: jax.Array, mask: jax.Array) -> jax.Array:
        return attend(query, key, value, mask, causal=True)

    once = jax.jit(one)
    looped = jnp.stack([once(query[row], masks[row]) for row in range(3)])
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(query, masks), looped, atol=1e-6)
    alike = jnp.stack([once(query[0], masks[row]) for row in range(3)])
    np.testing.assert_allclose(jax.jit(jax.vmap(one, in_axes=(None, 0)))(query[0], masks), alike, atol=1e-6)


def test_large_scores_and_bfloat16(path: str) -> None:
    rng = np.random.default_rng(4)
    query, key, value = drawn(rng, 2, 7, 4, 8, spread=30), drawn(rng, 2, 7, 2, 8, spread=30), drawn(rng, 2, 7, 2, 8)
    mask = padded_causal(7, 7, (7, 5))
    found = compiled(causal_attend)(query, key, value, jnp.asarray(mask))
    np.testing.assert_allclose(found, plain(query, key, value, mask), atol=2e-3)
    query, key, value = (jnp.asarray(array / 30, jnp.bfloat16) for array in (query, key, value))
    found = compiled(causal_attend)(query, key, value, jnp.asarray(mask))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), plain(query, key, value, mask), atol=0.002)


@pytest.mark.parametrize("length", [384, 401])
def test_long_sequences_in_blocks_of_their_real_size(length: int) -> None:
    rng = np.random.default_rng(length)
    query, key, value = drawn(rng, 2, length, 2, 4), drawn(rng, 2, length, 1, 4), drawn(rng, 2, length, 1, 4)
    assert length > attention._QUERY_BLOCK and length**2 > attention._HEADWISE_FROM
    mask = padded_causal(length, length, (length, 100))
    found = compiled(causal_attend)(query, key, value, jnp.asarray(mask))
    np.testing.assert_allclose(found, plain(query, key, value, mask), atol=5e-6)


# --- rows that share a prefix ---------------------------------------------------------------------------------------


def suffix_part(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> Part:
    """With heads after tokens, as everything here has them but the prefix."""
    return attention.suffix_part(query, jnp.swapaxes(key, 2, 3), jnp.swapaxes(value, 2, 3), mask)


def shared_prefix_attention(
    prefix_key: jax.Array,
    prefix_value: jax.Array,
    prefix_mask: jax.Array,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """With any masks; `attention.shared_prefix_attention` takes what tokens tell."""
    parts = [suffix_part(query, key, value, mask)]
    if prefix_key.shape[2]:
        parts.append(prefix_part(query, prefix_key, prefix_value, prefix_mask))
    return merge(*parts).astype(value.dtype)


def shared(
    rows: int, batch: int, length: int, own: int, prefix: int, heads: int, kv_heads: int, spread: float = 1.0
) -> Any:
    """Prefix keys and values, queries, own keys and values."""
    rng = np.random.default_rng(prefix + 7 * rows + heads)
    before = [drawn(rng, batch, kv_heads, prefix, 8, spread=size) for size in (spread, 1)]
    after = [drawn(rng, rows, batch, own, kv_heads, 8, spread=size) for size in (spread, 1)]
    return *before, drawn(rng, rows, batch, length, heads, 8), *after


def tiled(
    prefix_key: Any, prefix_value: Any, query: Any, key: Any, value: Any, *, prefix_mask: Any, mask: Any, xp: Any = np
) -> Any:
    """The same attention in one softmax, with a copy of the prefix per row."""
    rows, batch, length = query.shape[:3]
    copies = [
        xp.broadcast_to(xp.moveaxis(array, 1, 2), (rows, batch, array.shape[2], array.shape[1], array.shape[3]))
        for array in (xp.asarray(prefix_key), xp.asarray(prefix_value))
    ]
    whole = [xp.concatenate(pair, axis=2) for pair in zip(copies, (key, value), strict=True)]
    before = np.broadcast_to(prefix_mask, (rows, batch, length, prefix_mask.shape[2]))
    allowed = np.concatenate([before, np.broadcast_to(mask, (rows, batch, *mask.shape[2:]))], axis=-1)
    arrays = [array.reshape(rows * batch, *array.shape[2:]) for array in (query, *whole, allowed)]
    return plain(*arrays, xp=xp).reshape(query.shape)


def masks(batch: int, length: int, own: int, prefix: int) -> dict[str, np.ndarray]:
    """Prefixes of different lengths, none at all for the last prompt; queries are the last of the own tokens."""
    ends = np.linspace(prefix, 0, batch).astype(int)
    causal = np.arange(own) <= np.arange(length)[:, None] + own - length
    return {"prefix_mask": (np.arange(prefix) < ends[:, None])[:, None], "mask": causal[None, None]}


ROWS = [(3, 2, 4, 4, 9, 4, 2), (5, 3, 1, 6, 7, 6, 1), (2, 2, 3, 3, 0, 4, 4)]
"""Rows, prompts, queries, own keys, keys of the prefix, heads, key-value heads."""


@pytest.mark.parametrize("sizes", ROWS)
def test_a_shared_prefix_is_a_prefix_of_ones_own(path: str, sizes: tuple[int, ...]) -> None:
    arrays, allowed = shared(*sizes), masks(*sizes[1:5])
    prefix_mask, mask = (jnp.asarray(allowed[name]) for name in ("prefix_mask", "mask"))
    found = compiled(shared_prefix_attention)(*arrays[:2], prefix_mask, *arrays[2:], mask)
    np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=2e-6)


@pytest.mark.parametrize("sharing", ["rows", "prompts"])
def test_masks_of_rows_and_of_prompts(path: str, sharing: str) -> None:
    rows, batch = 3, 2
    arrays, allowed = shared(rows, batch, 4, 5, 6, 4, 2), masks(batch, 4, 5, 6)
    axes = {"rows": (1, batch), "prompts": (rows, 1)}[sharing]
    mask = np.random.default_rng(0).random((*axes, 4, 5)) < 0.5
    mask[..., 1] = True
    allowed["mask"] = mask
    found = compiled(shared_prefix_attention)(
        *arrays[:2], jnp.asarray(allowed["prefix_mask"]), *arrays[2:], jnp.asarray(mask)
    )
    np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=2e-6)


def sliding_masks(batch: int, length: int, own: int, prefix: int, *, window: int) -> dict[str, np.ndarray]:
    """Prompts of different lengths whose queries, the last of the own tokens, look `window` places back."""
    ends = np.linspace(prefix, prefix // 2, batch).astype(int)[:, None, None]
    queries = ends + own - length + np.arange(length)[:, None]
    before, after = np.arange(prefix), ends + np.arange(own)
    return {
        "prefix_mask": (before < ends) & (before > queries - window),
        "mask": ((after <= queries) & (after > queries - window))[None],
    }


@pytest.mark.parametrize("sizes", ROWS[:2])
def test_every_query_reads_its_own_part_of_the_prefix(path: str, sizes: tuple[int, ...]) -> None:
    arrays, run = shared(*sizes), compiled(shared_prefix_attention)
    for window in (1, 7, 9):
        allowed = sliding_masks(*sizes[1:5], window=window)
        prefix_mask, mask = allowed["prefix_mask"], allowed["mask"]
        assert prefix_mask.shape == (sizes[1], sizes[2], sizes[4])
        # A window of one reaches no prefix at all: that part weighs nothing then.
        assert bool(prefix_mask.any()) == (window > 1) and not prefix_mask.all()
        found = run(*arrays[:2], jnp.asarray(prefix_mask), *arrays[2:], jnp.asarray(mask))
        np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=2e-6)


def test_any_prefix_mask_by_query_is_the_same_for_all_rows(path: str) -> None:
    """Other masks for every prompt and query; rows of equal queries read alike, in whatever company."""
    arrays, allowed = shared(3, 2, 4, 4, 9, 4, 2), masks(2, 4, 4, 9)
    allowed["prefix_mask"] = np.random.default_rng(9).random((2, 4, 9)) < 0.5
    prefix_key, prefix_value, query, key, value = arrays
    prefix_mask, mask = (jnp.asarray(allowed[name]) for name in ("prefix_mask", "mask"))
    run = compiled(shared_prefix_attention)
    found = run(prefix_key, prefix_value, prefix_mask, query, key, value, mask)
    np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=2e-6)
    for row in range(3):
        own = slice(row, row + 1)
        alone = run(prefix_key, prefix_value, prefix_mask, query[own], key[own], value[own], mask)
        np.testing.assert_allclose(found[own], alone, atol=2e-6)
    for some in (prefix_mask[:, :1], prefix_mask[:, 2:3]):  # one mask for all queries, written out
        whole = jnp.broadcast_to(some, prefix_mask.shape)
        np.testing.assert_allclose(
            run(prefix_key, prefix_value, some, query, key, value, mask),
            run(prefix_key, prefix_value, whole, query, key, value, mask),
            atol=1e-6,
        )


def test_a_prefix_alone_with_a_mask_by_query(path: str) -> None:
    """Cross-attention: only the prefix is read, and each token sees its own pictures."""
    prefix_key, prefix_value, query, _, _ = shared(3, 2, 4, 4, 9, 4, 2, 3.0)
    allowed = np.random.default_rng(10).random((2, 4, 9)) < 0.4
    allowed[:, :, 5] = True
    found = merge(compiled(prefix_part)(query, prefix_key, prefix_value, jnp.asarray(allowed)))
    key, value = (np.moveaxis(np.asarray(array), 1, 2) for array in (prefix_key, prefix_value))
    for row in range(3):
        np.testing.assert_allclose(found[row], plain(query[row], key, value, allowed), atol=3e-6)


@pytest.mark.parametrize("spread", [100.0, 1000.0])
def test_parts_of_very_different_weight(path: str, spread: float) -> None:
    """Scores up to thousands: exp overflows unless both parts are shifted to the larger of their maxima."""
    arrays, allowed = shared(4, 3, 2, 3, 8, 4, 2, spread), masks(3, 2, 3, 8)
    arguments = (jnp.asarray(allowed["prefix_mask"]), *arrays[2:], jnp.asarray(allowed["mask"]))
    found, wanted = compiled(shared_prefix_attention)(*arrays[:2], *arguments), tiled(*arrays, **allowed)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, wanted, atol=3e-6 * spread)
    # Both parts win somewhere, or nothing would be shown.
    alone = merge(suffix_part(arrays[2], arrays[3], arrays[4], arguments[-1]))
    same = np.abs(np.asarray(alone - wanted)).max(axis=-1) < 1e-3
    assert 0.2 < same[:, :2].mean() < 0.8 and same[:, 2].all()


def test_parts_are_softmaxes_with_their_weight(path: str) -> None:
    arrays, allowed = shared(3, 2, 4, 4, 9, 4, 2, 3.0), masks(2, 4, 4, 9)
    allowed["prefix_mask"][1, :, :3] = True
    prefix_key, prefix_value, query, key, value = arrays
    nothing = np.zeros((1, 1, 4, 4), bool)
    prefix = compiled(prefix_part)(query, prefix_key, prefix_value, jnp.asarray(allowed["prefix_mask"]))
    own = compiled(suffix_part)(query, key, value, jnp.asarray(allowed["mask"]))
    none_before = np.zeros_like(allowed["prefix_mask"])
    for part, wanted in (
        (prefix, tiled(*arrays, prefix_mask=allowed["prefix_mask"], mask=nothing)),
        (own, tiled(*arrays, prefix_mask=none_before, mask=allowed["mask"])),
    ):
        assert part.mixed.shape == query.shape and part.lse.shape == query.shape[:-1]
        np.testing.assert_allclose(part.mixed, wanted, atol=3e-6)
        np.testing.assert_allclose(merge(part), wanted, atol=3e-6)
    scores = jnp.einsum("rbske,bkpe->rbskp", query[:, :, :, ::2], prefix_key, precision="highest") * 8**-0.5
    scores = jnp.where(jnp.asarray(allowed["prefix_mask"])[:, :, None], scores, -jnp.inf)
    np.testing.assert_allclose(prefix.lse[..., ::2], jax.nn.logsumexp(scores, axis=-1), atol=1e-5)


def test_merging_any_division_of_the_keys() -> None:
    rng = np.random.default_rng(6)
    query, key, value = drawn(rng, 2, 3, 4, 4, 8), *(drawn(rng, 2, 3, 12, 2, 8, spread=20) for _ in range(2))
    run = compiled(suffix_part)
    whole = run(query, key, value, jnp.ones((2, 3, 4, 12), bool))
    owner = rng.integers(0, 3, (2, 3, 4, 12))
    parts = [run(query, key, value, jnp.asarray(owner == number)) for number in range(3)]
    np.testing.assert_allclose(merge(*parts), merge(whole), atol=2e-4)
    np.testing.assert_allclose(merge(*parts[::-1]), merge(*parts), atol=2e-5)
    shifted = [Part(part.mixed, part.lse - 5) for part in parts]
    np.testing.assert_allclose(merge(*shifted), merge(*parts), atol=2e-5)


@cache
def with_slopes(window: int | None) -> tuple[Any, dict[str, np.ndarray], tuple[jax.Array, ...]]:
    """Arrays, masks, and the gradients in one softmax."""
    arrays = shared(3, 2, 4, 4, 9, 4, 2, 2.0)
    allowed = masks(2, 4, 4, 9) if window is None else sliding_masks(2, 4, 4, 9, window=window)
    return arrays, allowed, slopes(lambda *arrays: tiled(*arrays, **allowed, xp=jnp), *arrays)


@pytest.mark.parametrize("window", [None, 5])
def test_gradients_through_a_shared_prefix(path: str, window: int | None) -> None:
    arrays, allowed, wanted = with_slopes(window)
    before, own = (jnp.asarray(allowed[name]) for name in ("prefix_mask", "mask"))
    attend: Any = shared_prefix_attention
    found = slopes(lambda *given: attend(*given[:2], before, *given[2:], own), *arrays)
    for ours, theirs in zip(found, wanted, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
def test_rows_of_real_size_go_head_by_head(window: int | None) -> None:
    sizes = (6, 2, 12, 12, 90, 4, 2)
    arrays = shared(*sizes)
    allowed = masks(2, 12, 12, 90) if window is None else sliding_masks(2, 12, 12, 90, window=window)
    assert attention._HEADWISE_FROM < 6 * 12 * 90
    found = compiled(shared_prefix_attention)(
        *arrays[:2], jnp.asarray(allowed["prefix_mask"]), *arrays[2:], jnp.asarray(allowed["mask"])
    )
    np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=3e-6)


@partial(jax.jit, static_argnums=0)
def told(implementation: Any, before: reading.Reads, own: reading.Reads, arrays: Any) -> Any:
    def total(prefix_key: Any, prefix_value: Any, query: Any, key: Any, value: Any) -> Any:
        given = (prefix_key, prefix_value, before, query, jnp.swapaxes(key, 2, 3), jnp.swapaxes(value, 2, 3), own)
        found = attention.shared_prefix_attention(*given, implementation=implementation)
        return weighed(found), found

    return jax.grad(total, argnums=range(5), has_aux=True)(*arrays)


@pytest.mark.parametrize(("window", "sliding"), [(None, False), (5, True), (5, False)])
@pytest.mark.parametrize("prefix", [9, 0])
def test_masks_that_tokens_tell(window: int | None, sliding: bool, prefix: int) -> None:
    """Rows apart, and side by side as for a kernel: the second prompt has a shorter prefix and ends in padding."""
    arrays = shared(3, 2, 4, 4, prefix, 4, 2, 2.0)
    ends = np.array([prefix, prefix // 2])[:, None]
    positions, valid = jnp.asarray(ends + np.arange(4)), jnp.asarray(np.arange(4) < np.array([4, 3])[:, None])
    before = reading.causal(positions, jnp.arange(prefix)[None], jnp.asarray(np.arange(prefix) < ends))
    own = reading.causal(positions, positions, valid)
    if window is not None:
        before, own = (reads.within(positions, window, jnp.asarray(sliding)) for reads in (before, own))
    allowed = {"prefix_mask": np.asarray(before.mask()), "mask": np.asarray(own.mask())[None]}
    wanted = slopes(lambda *arrays: tiled(*arrays, **allowed, xp=jnp), *arrays)
    for implementation in (None, "batched"):
        gradients, found = told(implementation, before, own, arrays)
        np.testing.assert_allclose(found, tiled(*arrays, **allowed), atol=3e-6)
        for ours, theirs in zip(gradients, wanted, strict=True):
            assert not theirs.size or float(jnp.abs(theirs).max()) > 0.1
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_shared_prefix_in_bfloat16(path: str) -> None:
    arrays, allowed = shared(3, 2, 4, 4, 9, 4, 2), masks(2, 4, 4, 9)
    rounded = [array.astype(jnp.bfloat16) for array in arrays]
    prefix_mask, mask = (jnp.asarray(allowed[name]) for name in ("prefix_mask", "mask"))
    found = compiled(shared_prefix_attention)(*rounded[:2], prefix_mask, *rounded[2:], mask)
    assert found.dtype == jnp.bfloat16
    exact = [array.astype(jnp.float32) for array in rounded]
    np.testing.assert_allclose(found.astype(jnp.float32), tiled(*exact, **allowed), atol=0.02)
