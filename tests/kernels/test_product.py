"""Products with one matrix of a stack: the kernel's numbers, its gradients, devices, mapped axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxid.kernels import product
from jaxid.kernels.product import everywhere, stacked_product
from jaxid.kernels.stacks import LayerSlice
from jaxid.nn.layers import Learning, stacked
from jaxid.nn.transformer import Block, BlockConfig, run_blocks

RNG = np.random.default_rng(0)


def arrays(tokens: int, inputs: int, outputs: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    x, stack = RNG.standard_normal((tokens, inputs)), RNG.standard_normal((3, inputs, outputs)) * inputs**-0.5
    return jnp.asarray(x, dtype), jnp.asarray(stack, dtype)


def exact(x: jax.Array, matrix: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)


@pytest.mark.parametrize("tokens", [1, 24, 70, 200])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 128), (100, 72), (1100, 40)])
def test_the_kernel(tokens: int, inputs: int, outputs: int) -> None:
    """Whole blocks, blocks that axes do not fill, and inner axes that are split."""
    x, stack = arrays(tokens, inputs, outputs)
    for layer in (0, 2):
        index = jnp.asarray(layer)
        found = stacked_product(x, stack, index, interpret=True)
        assert found.dtype == jnp.bfloat16
        # One rounding of the result: half a unit in the last of 8 bits.
        np.testing.assert_allclose(np.asarray(found, np.float64), exact(x, stack[layer]), rtol=2**-8, atol=1e-5)
        whole = stacked_product(x, stack, index, dtype=jnp.float32, interpret=True)
        np.testing.assert_allclose(whole, exact(x, stack[layer]), atol=2e-5)
        back = stacked_product(whole.astype(jnp.bfloat16), stack, index, transposed=True, interpret=True)
        wanted = exact(whole.astype(jnp.bfloat16), stack[layer].T)
        np.testing.assert_allclose(np.asarray(back, np.float64), wanted, rtol=2**-8, atol=1e-5)


def test_few_tokens_split_the_inner_axis() -> None:
    assert product._tiles(8, 4096, 4096).splits > 1 == product._tiles(4096, 4096, 4096).splits


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel on this platform, for small matrices too."""
    monkeypatch.setattr(product, "_SMALLEST", 16)
    monkeypatch.setattr(
        product,
        "_by_platform",
        lambda x, stack, index, value, *, transposed, by_rows=False: everywhere(transposed, True)(x, stack, index),
    )


def layers(x: jax.Array, stack: jax.Array, *, lazily: bool) -> jax.Array:
    """A product with every matrix of a stack of square ones in turn."""

    def step(x: jax.Array, own: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, value = own
        return jnp.tanh(product.product(x, LayerSlice(stack, index, value)) if lazily else x @ value), None

    return jax.lax.scan(step, x, (jnp.arange(stack.shape[0]), stack))[0]


def test_gradients_of_inputs_and_of_the_stack(interpreted: None) -> None:
    x, stack = arrays(24, 32, 32)

    def loss(x: jax.Array, stack: jax.Array, lazily: bool) -> jax.Array:
        return (layers(x, stack, lazily=lazily).astype(jnp.float32) ** 2).sum()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for found, wanted in zip(slopes(x, stack, True), slopes(x, stack, False), strict=True):
        scale = np.abs(np.asarray(wanted, np.float32)).max()
        np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), atol=0.02 * scale)
        assert scale > 0.1


def test_mapped_axes(interpreted: None) -> None:
    """Of the inputs, of the layer, of the stack."""
    x, stack = arrays(4 * 6, 32, 32)
    x, indices = x.reshape(4, 6, 32), jnp.asarray([2, 0, 1, 1])
    stacks = jnp.stack([stack, stack[::-1]])
    run = everywhere(False, True)
    wanted = np.stack([exact(one, stack[1]) for one in x])
    found = jax.vmap(run, (0, None, None))(x, stack, jnp.asarray(1))
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-7, atol=1e-5)
    wanted = np.stack([exact(one, stack[index]) for one, index in zip(x, indices, strict=True)])
    found = jax.vmap(run, (0, None, 0))(x, stack, indices)
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-7, atol=1e-5)
    found = jax.vmap(run, (None, 0, None))(x[0], stacks, jnp.asarray(2))
    wanted = np.stack([exact(x[0], stack[index]) for index in (2, 0)])
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-7, atol=1e-5)


@pytest.mark.parametrize("axes", [(None, None), ("model", None), (None, "model"), (("data", "model"), None)])
@pytest.mark.parametrize("transposed", [False, True])
def test_divided_among_devices(axes: tuple[Any, Any], transposed: bool) -> None:
    """The matrix by its rows or columns, the tokens by the batch; nothing gathers the matrix."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, stack = arrays(24, 64, 64)
    placed = jax.device_put(stack, jax.NamedSharding(mesh, jax.P(None, *axes)))
    by_token = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(everywhere(transposed, True)).lower(by_token, placed, jnp.asarray(1)).compile()
    found = run(by_token, placed, jnp.asarray(1))
    matrix = stack[1].T if transposed else stack[1]
    np.testing.assert_allclose(np.asarray(found, np.float64), exact(x, matrix), rtol=2**-7, atol=1e-4)
    if axes != (("data", "model"), None):
        assert "all-gather" not in str(run.as_text())


@pytest.mark.parametrize(
    ("learning", "states"),
    [(None, None), (None, [1, 2]), (Learning(frozen=1), None), (Learning(frozen=2, recompute="cheap"), [1, 3])],
)
def test_blocks_read_their_stacks_through_it(
    learning: Learning | None, states: list[int] | None, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every matrix of every block, none of which is then sliced out; in training too, from any first layer."""
    config = BlockConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    blocks = stacked(lambda rngs: Block(config, rngs=rngs), 3, nnx.Rngs(0))
    blocks.learning = learning
    definition, state = nnx.split(blocks)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    x = jnp.asarray(RNG.standard_normal((2, 5, 32)), jnp.bfloat16)

    def loss(state: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = run_blocks(nnx.merge(definition, state), x, states)
        return found.astype(jnp.float32).var(), found

    run = jax.jit(jax.grad(loss, has_aux=True))
    slopes, found = run(state, x)
    text = run.lower(state, x).as_text()
    monkeypatch.setattr(product, "_SMALLEST", 1000)
    jax.clear_caches()
    wanted_slopes, wanted = run(state, x)
    assert run.lower(state, x).as_text() != text
    for ours, plain in zip(jax.tree.leaves((slopes, found)), jax.tree.leaves((wanted_slopes, wanted)), strict=True):
        ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(ours, plain, atol=0.03 * np.abs(plain).max())
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(slopes))
