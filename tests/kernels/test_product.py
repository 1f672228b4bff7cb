"""Products with one matrix of a stack: the kernel's numbers, its gradients, devices, mapped axes."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxid.kernels import product
from jaxid.kernels.product import everywhere, gated_product, stacked_product
from jaxid.kernels.stacks import LayerSlice
from jaxid.nn.decoder import GatedMLP
from jaxid.nn.decoder_config import DecoderConfig
from jaxid.nn.layers import ACTIVATIONS, Learning, parameters_of, stacked
from jaxid.nn.transformer import Block, BlockConfig, run_blocks

RNG = np.random.default_rng(0)


def arrays(tokens: int, inputs: int, outputs: int, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, jax.Array]:
    x, stack = RNG.standard_normal((tokens, inputs)), RNG.standard_normal((3, inputs, outputs)) * inputs**-0.5
    return jnp.asarray(x, dtype), jnp.asarray(stack, dtype)


def exact(x: jax.Array, matrix: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(matrix, np.float64)


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [(1, 1100, 40), (24, 100, 72), (70, 1100, 40), (200, 64, 128), (200, 100, 72)]
)
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


@pytest.mark.parametrize(
    ("name", "tokens", "inputs", "outputs"),
    [
        ("silu", 1, 1100, 40),
        ("gelu_pytorch_tanh", 70, 1100, 40),
        ("silu", 200, 64, 128),
        ("gelu_pytorch_tanh", 200, 100, 72),
    ],
)
def test_the_kernel_of_two_products(name: str, tokens: int, inputs: int, outputs: int) -> None:
    """Only the result is rounded."""
    x, gates = arrays(tokens, inputs, outputs)
    ups, index = arrays(tokens, inputs, outputs)[1], jnp.asarray(2)
    found = gated_kernel(ACTIVATIONS[name])(x, gates, ups, index)
    assert found.dtype == jnp.bfloat16
    gate, up = (jnp.asarray(exact(x, stack[2]), jnp.float32) for stack in (gates, ups))
    wanted = np.asarray(ACTIVATIONS[name](gate) * up)
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2**-8, atol=1e-5)


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
    monkeypatch.setattr(
        product,
        "_gated_by_platform",
        lambda activation, x, gates, ups, index, gate, up: gated_kernel(activation)(
            x.reshape(-1, x.shape[-1]), gates, ups, index
        ).reshape(*x.shape[:-1], -1),
    )


def gated_kernel(activation: Any) -> Any:
    return everywhere(False, True, product._gating(activation))


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


def gated_layers(x: jax.Array, gates: jax.Array, ups: jax.Array) -> jax.Array:
    """Two products with every pair of square matrices in turn."""

    def step(x: jax.Array, own: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, gate, up = own
        matrices = LayerSlice(gates, index, gate), LayerSlice(ups, index, up)
        return gated_product(x, *matrices, jax.nn.silu), None

    return jax.lax.scan(step, x, (jnp.arange(gates.shape[0]), gates, ups))[0]


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_two_products(recompute: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of products that are made apart, also where a policy says what the backward pass keeps."""
    x, gates = arrays(24, 32, 32)
    ups = arrays(24, 32, 32)[1]
    policy = jax.checkpoint_policies.save_only_these_names(product.PRODUCT)

    def loss(x: jax.Array, gates: jax.Array, ups: jax.Array) -> jax.Array:
        run = jax.checkpoint(gated_layers, policy=policy) if recompute else gated_layers
        return (run(4 * x, gates, ups).astype(jnp.float32) ** 2).sum()

    slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, gates, ups)
    monkeypatch.setattr(product, "_SMALLEST", 1000)
    jax.clear_caches()
    wanted_slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, gates, ups)
    for found, wanted in zip(slopes, wanted_slopes, strict=True):
        found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(found, wanted, atol=0.02 * np.abs(wanted).max())
        assert np.abs(wanted).max() > 0.01


def test_two_products_are_not_made_again_for_a_gradient() -> None:
    """A policy that keeps products finds them: two in the forward pass, four in the backward pass."""
    x, gates = (jnp.zeros(shape, jnp.bfloat16) for shape in ((8, 256), (2, 256, 256)))
    policy = jax.checkpoint_policies.save_only_these_names(product.PRODUCT)

    @partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def run(x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
        matrix = LayerSlice(gates, index, gates[index])
        return jnp.sin(gated_product(x, matrix, matrix, jax.nn.silu)).sum()

    text = jax.jit(jax.value_and_grad(run, (0, 1))).lower(x, gates, 1).as_text()
    assert text.count("dot_general") == 6


def test_two_products_under_vmap_and_on_devices(interpreted: None) -> None:
    """Rows that `jax.vmap` made, rows with stacks of their own, and matrices that devices divide by their columns."""
    x, gates = arrays(4 * 6, 64, 64)
    ups, index = arrays(4 * 6, 64, 64)[1], jnp.asarray(1)
    run, x = gated_kernel(jax.nn.silu), x.reshape(4, 6, 64)

    def wanted(x: jax.Array, layer: int = 1) -> np.ndarray:
        gate, up = (jnp.asarray(exact(x, stack[layer]), jnp.float32) for stack in (gates, ups))
        return np.asarray(jax.nn.silu(gate) * up)

    found = jax.vmap(run, (0, None, None, None))(x, gates, ups, index)
    np.testing.assert_allclose(np.asarray(found, np.float32), wanted(x), rtol=2**-7, atol=1e-5)
    indices = jnp.asarray([2, 0, 1, 1])
    found = jax.vmap(run, (0, None, None, 0))(x, gates, ups, indices)
    each = np.stack([wanted(one, int(layer)) for one, layer in zip(x, indices, strict=True)])
    np.testing.assert_allclose(np.asarray(found, np.float32), each, atol=0.02 * np.abs(each).max())

    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for axes, gathered in (((None, "model"), False), (("model", None), True)):
        stacks = [jax.device_put(one, jax.NamedSharding(mesh, jax.P(None, *axes))) for one in (gates, ups)]
        rows = jax.device_put(x.reshape(24, 64), jax.NamedSharding(mesh, jax.P("data")))
        divided = jax.jit(run).lower(rows, *stacks, index).compile()
        found = np.asarray(divided(rows, *stacks, index), np.float32)
        np.testing.assert_allclose(found, wanted(x).reshape(24, 64), rtol=2**-7, atol=1e-4)
        assert ("all-gather" in str(divided.as_text())) == gathered


@pytest.mark.parametrize("axes", [(None, None), ("model", None), (None, "model"), (("data", "model"), None)])
@pytest.mark.parametrize("transposed", [False, True])
def test_divided_among_devices(axes: tuple[Any, Any], transposed: bool) -> None:
    """The matrix by its rows or columns, the tokens by the batch; nothing gathers the matrix.

    Sums over devices round every part once, and their sum.
    """
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, stack = arrays(24, 64, 64)
    placed = jax.device_put(stack, jax.NamedSharding(mesh, jax.P(None, *axes)))
    by_token = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    run = jax.jit(everywhere(transposed, True)).lower(by_token, placed, jnp.asarray(1)).compile()
    found = run(by_token, placed, jnp.asarray(1))
    matrix = stack[1].T if transposed else stack[1]
    count = {None: 1, "model": 2, ("data", "model"): 4}[axes[1 if transposed else 0]]
    parts = np.stack([exact(*pair) for pair in zip(jnp.split(x, count, 1), jnp.split(matrix, count), strict=True)])
    error = np.abs(np.asarray(found, np.float64) - parts.sum(axis=0))
    assert (error <= 2**-7 * np.abs(parts).sum(axis=0) + 1e-4).all()
    if axes != (("data", "model"), None):
        assert "all-gather" not in str(run.as_text())


@pytest.mark.parametrize(
    ("learning", "states"),
    [(None, [1, 2]), (Learning(frozen=1), None), (Learning(frozen=2, recompute="cheap"), [1, 3])],
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
    through = run.lower(state, x)
    slopes, found = through.compile()(state, x)
    monkeypatch.setattr(product, "_SMALLEST", 1000)
    jax.clear_caches()
    sliced = run.lower(state, x)
    assert sliced.as_text() != through.as_text()
    wanted_slopes, wanted = sliced.compile()(state, x)
    for ours, plain in zip(jax.tree.leaves((slopes, found)), jax.tree.leaves((wanted_slopes, wanted)), strict=True):
        ours, plain = np.asarray(ours, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(ours, plain, atol=0.03 * np.abs(plain).max())
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(slopes))


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu"])
def test_decoders_gate_through_it(name: str, interpreted: None) -> None:
    """Both first products of an MLP at once, for activations that the kernel can compute."""
    config = DecoderConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, hidden_act=name)
    definition, state = nnx.split(stacked(lambda rngs: GatedMLP(config, rngs=rngs), 2, nnx.Rngs(0)))
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state)
    x = jnp.asarray(RNG.standard_normal((2, 5, 32)), jnp.bfloat16)

    def run(x: jax.Array, state: Any) -> jax.Array:
        return nnx.merge(definition, parameters_of(state, 1))(x)

    kernels = str(jax.make_jaxpr(run)(x, state)).count("pallas_call")
    assert kernels == (3 if name == "gelu" else 2)
    gate, up, down = (getattr(state, part).kernel[...][1] for part in ("gate", "up", "down"))
    inner = ACTIVATIONS[name](jnp.asarray(exact(x, gate), jnp.float32)) * exact(x, up)
    wanted = exact(jnp.asarray(inner), down)
    np.testing.assert_allclose(np.asarray(run(x, state), np.float32), wanted, atol=0.02 * np.abs(wanted).max())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("implementation", ["kernel", None])
def test_logits_of_a_vocabulary_of_any_size(implementation: str | None, transposed: bool) -> None:
    """In float32, from a matrix whose rows are no multiple of 16 bytes; also in mapped rows."""
    x, matrix = arrays(60, 256, 301)
    given = matrix[1].T if transposed else matrix[1]
    run = partial(product.logits, transposed=transposed, implementation=implementation)
    for found in (run(x, given), jax.vmap(run, (0, None))(x.reshape(3, 20, -1), given).reshape(60, -1)):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact(x, matrix[1]), atol=2e-5)
