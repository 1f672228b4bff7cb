"""Costs read from jaxprs: programs whose operations, bytes and memory are known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from jaxid.costs import Cost, cost_of
from jaxid.devices import DEVICES

N, D, F, L = 64, 32, 128, 5
X, W, BACK = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((N, D), (L, D, F), (L, F, D)))
PRODUCT = 2 * N * D * F


def cost(function: Callable[..., Any], *arguments: Any, device: str = "h100", trips: int = 1) -> Cost:
    return cost_of(jax.jit(function).trace(*arguments).jaxpr, DEVICES[device], trips=trips)


def size(*shape: int) -> int:
    count = 4
    for length in shape:
        count *= length
    return count


def test_a_product() -> None:
    found = cost(lambda x, w: jnp.tanh(x @ w[0]).sum(), X, W)
    assert found.flops == PRODUCT
    assert found.moved == size(N, D) + size(D, F) + size(N, F)
    assert found.temporary == size(N, F)  # the sum and what is elementwise are computed as it is written


def test_loops_count_as_often_as_they_run() -> None:
    def mlp(x: Array, weights: tuple[Array, Array]) -> tuple[Array, None]:
        return x + jnp.maximum(x @ weights[0], 0) @ weights[1], None

    found = cost(lambda x, w, back: jax.lax.scan(mlp, x, (w, back))[0], X, W, BACK)
    assert found.flops == L * 2 * PRODUCT
    assert found.moved == L * 2 * (size(N, D) + size(D, F) + size(N, F))
    # The hidden layer, and the product that is added to the stream; the stream itself is the result.
    assert size(N, F) <= found.temporary <= size(N, F) + 2 * size(N, D)
    again = cost(lambda x, w, back: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: mlp(x, (w[0], back[0]))[0], x),
                 X, W, BACK, trips=7)  # fmt: skip
    assert again.flops == 7 * 2 * PRODUCT


def test_the_costliest_branch_counts_and_what_passes_it_is_copied() -> None:
    def function(x: Array, w: Array, chosen: Array) -> Array:
        return jax.lax.cond(chosen, lambda x: x @ w[0] @ w[0].T, lambda x: x, x)

    found = cost(function, X, W, jax.ShapeDtypeStruct((), jnp.bool_))
    assert found.flops == 2 * PRODUCT and found.temporary == pytest.approx(size(N, F) + size(N, D), abs=8)


def test_branches_by_platform() -> None:
    def plain(x: Array) -> Array:
        return jnp.exp(x @ x.T) @ x

    def kernel(x: Array) -> Array:  # of which nothing can be seen
        return jax.lax.sort(x)

    def function(x: Array) -> Array:
        return jax.lax.platform_dependent(x, cpu=plain, cuda=kernel, default=plain)

    on_cpu, on_gpu, on_tpu = (cost(function, X, device=device) for device in ("cpu", "h100", "v5e"))
    assert on_cpu.flops == on_gpu.flops == on_tpu.flops == 2 * 2 * N * N * D
    assert on_cpu.moved == on_gpu.moved
    assert on_cpu.temporary == on_tpu.temporary == pytest.approx(size(N, N), abs=8)  # beside a branch's number
    assert on_gpu.temporary <= 8


def test_the_scores_of_attention_are_not_moved() -> None:
    heads, tokens, width = 4, 256, 16
    q = jax.ShapeDtypeStruct((heads, tokens, width), jnp.float32)

    def attend(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.softmax(jnp.einsum("hse,hte->hst", q, k), axis=-1) @ v

    found = cost(attend, q, q, q)
    assert found.flops == 2 * 2 * heads * tokens * tokens * width
    assert found.moved == 4 * size(heads, tokens, width)
    scores = size(heads, tokens, tokens)
    assert scores <= found.temporary <= 2.1 * scores


def test_a_convolution() -> None:
    images, kernel = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((3, 8, 20, 20), (16, 8, 5, 5)))
    found = cost(lambda x, k: jax.lax.conv_general_dilated(x, k, (1, 1), "VALID"), images, kernel)
    assert found.flops == 2 * (3 * 16 * 16 * 16) * (8 * 5 * 5)


def test_what_nobody_reads_costs_nothing() -> None:
    def layer(x: Array, w: Array) -> tuple[Array, Array]:
        return x, x @ w

    first = cost(lambda x, w: jax.lax.scan(layer, x, w)[0], X, W)
    assert (first.flops, first.temporary) == (0, 0)


def test_what_is_updated_in_place_is_there_once() -> None:
    def fill(x: Array, w: Array) -> Array:
        def layer(stack: Array, index: Array) -> tuple[Array, None]:
            return jax.lax.dynamic_update_index_in_dim(stack, x @ w[index], index, 0), None

        stack = jax.lax.scan(layer, jnp.zeros((L, N, F)), jnp.arange(L - 1))[0]
        return layer(stack, jnp.asarray(L - 1))[0]

    found = cost(fill, X, W)
    assert found.flops == L * PRODUCT and size(N, F) <= found.temporary < size(L, N, F)


@pytest.mark.optimized
@pytest.mark.parametrize("tokens", [256, 1024])
def test_xla_needs_as_much_memory(tokens: int) -> None:
    """A block's MLP, several of them, on this CPU: within a quarter."""
    x = jax.ShapeDtypeStruct((tokens, 64), jnp.float32)
    up, down = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 64, 256), (6, 256, 64)))

    def stack(x: Array, up: Array, down: Array) -> Array:
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, (up, down))[0]

    traced = jax.jit(stack).trace(x, up, down)
    estimated = cost_of(traced.jaxpr, DEVICES["cpu"]).temporary
    memory = traced.lower().compile().memory_analysis()
    assert memory is not None
    assert 0.75 < estimated / memory.temp_size_in_bytes < 1.25
