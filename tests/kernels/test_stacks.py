"""One layer's keys and values, read where they lie in stacks, against those that are sliced out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxid.kernels import flash
from jaxid.kernels.attention import Implementation, chosen, part, prefix_part, shared_prefix_attention
from jaxid.kernels.masks import Reads, causal
from jaxid.kernels.parts import Part
from jaxid.kernels.stacks import LayerSlice

LAYERS, BATCH, KV_HEADS, TOKENS, WIDTH = 3, 2, 2, 210, 16
KEYS = 190
"""Tokens that are read, of all that the stacks hold."""

kernels = pytest.mark.parametrize("kernel", ["cuda-interpreted", "tpu-interpreted"])


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stacks() -> tuple[jax.Array, jax.Array]:
    shape = (LAYERS, BATCH, KV_HEADS, TOKENS, WIDTH)
    return drawn(*shape, seed=1), drawn(*shape, seed=2)


def masked(queries: int) -> Reads:
    positions = jnp.array([[140], [30]]) + 7 * jnp.arange(queries)
    return causal(positions, jnp.arange(KEYS)[None]).within(positions, 60, True)


def of_layer(stack: jax.Array, layer: Any) -> LayerSlice:
    """The slice holds NaN: what reads it instead of the stack is seen."""
    value = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)[:, :, :KEYS]
    return LayerSlice(stack, layer, value * jnp.nan)


read_part = jax.jit(part, static_argnames="implementation")
attend = jax.jit(shared_prefix_attention, static_argnames="implementation")


def plainly(stack: jax.Array, layer: Any) -> jax.Array:
    return stack[layer][:, :, :KEYS]


def close(found: Any, wanted: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@kernels
@pytest.mark.parametrize("reads", [masked(5), None], ids=["window", "all"])
def test_equals_slices(kernel: Implementation, reads: Reads | None) -> None:
    keys, values = stacks()
    query = drawn(BATCH, 4, 5, WIDTH)

    def read(layer: Any, of: Callable[[jax.Array, Any], Any], implementation: Implementation) -> Part:
        return part(query, of(keys, layer), of(values, layer), reads, implementation=implementation)

    layers = jnp.arange(LAYERS)

    @jax.jit
    def ways(layers: jax.Array) -> tuple[Part, Part, Part]:
        def lazily(layer: Any) -> Part:
            return read(layer, of_layer, kernel)

        return jax.lax.map(lazily, layers), jax.vmap(lazily)(layers), lazily(2)

    each = [
        read_part(query, *(plainly(stack, layer) for stack in (keys, values)), reads, implementation="batched")
        for layer in range(LAYERS)
    ]
    wanted = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
    assert float(np.abs(wanted.mixed[0] - wanted.mixed[1]).max()) > 0.1
    for found, expected in zip(ways(layers), (wanted, wanted, each[2]), strict=True):
        close(found, expected)


@kernels
def test_under_vmap_and_for_rows(kernel: Implementation) -> None:
    """Queries and stacks mapped, apart and together."""
    keys, values = stacks()
    more = jnp.stack([keys, keys[::-1], keys + 1])
    query, reads = drawn(3, 2, BATCH, 5, 4, WIDTH), masked(5)

    def read(query: jax.Array, keys: jax.Array, of: Any = of_layer, implementation: Any = kernel) -> Part:
        return prefix_part(query, of(keys, 1), of(values, 1), reads, implementation=implementation)

    for axes, arrays in (((0, None), (query, keys)), ((None, 0), (query[0], more)), ((0, 0), (query, more))):
        wanted = jax.jit(jax.vmap(lambda query, keys: read(query, keys, plainly, "batched"), axes))(*arrays)
        close(jax.jit(jax.vmap(read, axes))(*arrays), wanted)


@kernels
def test_gradients_are_those_of_the_slice(kernel: Implementation) -> None:
    keys, values = stacks()
    query, reads = drawn(2, BATCH, 5, 4, WIDTH), masked(5)
    own = drawn(2, BATCH, KV_HEADS, 5, WIDTH, seed=3), drawn(2, BATCH, KV_HEADS, 5, WIDTH, seed=4)
    after = causal(jnp.arange(5)[None], jnp.arange(5)[None])

    def slopes(implementation: Implementation, lazily: bool) -> Any:
        def loss(query: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            before: list[Any] = [plainly(stack, 1) for stack in (keys, values)]
            if lazily:
                before = [LayerSlice(stack, 1, value) for stack, value in zip((keys, values), before, strict=True)]
            found = shared_prefix_attention(
                before[0], before[1], reads, query, own[0], own[1], after, implementation=implementation
            )
            return (found * jnp.sin(jnp.arange(found.size, dtype=jnp.float32)).reshape(found.shape)).sum()

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(query, keys, values)

    close(slopes(kernel, True), slopes("batched", False))


@kernels
def test_over_devices(kernel: Implementation) -> None:
    """Prompts and heads are divided, layers are not; nothing is gathered."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2)[:2], ("data", "model"))
    keys, values = stacks()
    query, reads = drawn(BATCH, 4, 5, WIDTH), masked(5)

    def read(query: jax.Array, keys: jax.Array, values: jax.Array) -> Part:
        return part(query, of_layer(keys, 2), of_layer(values, 2), reads, implementation=kernel)

    split, stacked = (
        NamedSharding(mesh, PartitionSpec(*spec)) for spec in (("data", "model"), (None, "data", "model"))
    )
    placed = jax.device_put(query, split), jax.device_put(keys, stacked), jax.device_put(values, stacked)
    program = jax.jit(read).lower(*placed).compile()
    assert "all-gather" not in str(program.as_text())
    found = program(*placed)
    assert found.mixed.sharding.is_equivalent_to(split, 4)
    close(found, read_part(query, plainly(keys, 2), plainly(values, 2), reads, implementation="batched"))


def test_few_queries_of_a_stack_are_for_the_kernel_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, products would copy the layer's keys; on TPU, they read them in place."""
    monkeypatch.setattr(flash, "takes", lambda *_: True)
    shapes = (1, 4, 1, 128), (1, 2, 500, 128)
    assert chosen("cuda", *shapes, stacked=True) == "cuda"
    assert chosen("cuda", *shapes) == chosen("tpu", *shapes, stacked=True) == "batched"
    assert chosen("cuda", (1, 4, 1, 128), (1, 2, 20, 128), stacked=True) == "batched"
    assert chosen("cpu", *shapes, stacked=True) == "batched"


@pytest.mark.parametrize("kernel", ["cuda-interpreted", "tpu-interpreted", "batched"])
def test_rows_read_their_own_caches(kernel: Implementation) -> None:
    """A step of decoding: rows share a prefix, and each has a cache in every layer, of which some is filled."""
    rows, slots, layer = 3, 40, 1
    prefix = [plainly(stack, layer) for stack in stacks()]
    caches = (
        drawn(LAYERS, rows, BATCH, KV_HEADS, slots, WIDTH, seed=5),
        drawn(LAYERS, rows, BATCH, KV_HEADS, slots, WIDTH, seed=6),
    )
    query = drawn(rows, BATCH, 1, 4, WIDTH)
    positions = jnp.array([[KEYS], [60]]) + jnp.arange(slots)
    before = causal(positions[:, 30:31], jnp.arange(KEYS)[None], jnp.arange(KEYS) < jnp.array([[KEYS], [60]]))
    after = causal(positions[:, 30:31], positions, jnp.arange(slots) <= jnp.array([[30], [20]]))
    before, after = (reads.within(positions[:, 30:31], 80, True) for reads in (before, after))

    def step(layer: Any) -> jax.Array:
        own = [jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in caches]
        lazy = [
            LayerSlice(cache, layer, value if kernel == "batched" else value * jnp.nan)
            for cache, value in zip(caches, own, strict=True)
        ]
        return shared_prefix_attention(
            prefix[0], prefix[1], before, query, lazy[0], lazy[1], after, implementation=kernel
        )

    own = [cache[layer] for cache in caches]
    wanted = attend(prefix[0], prefix[1], before, query, own[0], own[1], after)
    close(jax.jit(step)(layer), wanted)
