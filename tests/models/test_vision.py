"""Towers of every kind: settings, tensors, hidden states are Hugging Face's; the block's further parts."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families.base import randomized
from flax import nnx
from key_tables import abstract_of, assert_table_fits, module_of
from transformers.models.internvl.modeling_internvl import InternVLVisionLayer

from jaxid.checkpoints.tensors import flatten, unflatten
from jaxid.errors import CheckpointError, InputError
from jaxid.kernels import rope
from jaxid.nn.transformer import Block, BlockConfig, read_all, run_blocks
from jaxid.nn.vision import KINDS, VisionConfig, VisionTower, patches, vision_config, vision_keys

# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "patch_size": 14, "image_size": 896},
        {"num_attention_heads": 16, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_channels": 1},
    ],
    ids=["default", "large", "other"],
)
def test_tower_settings_mean_what_they_mean_in_hugging_face(kind: str, fields: dict[str, Any]) -> None:
    theirs = transformers.AutoConfig.for_model(kind, **fields)
    clip = kind == "clip_vision_model"
    own: dict[str, Any] = {"class_token": clip, "patch_bias": not clip, "pre_norm": clip}
    shared = [field.name for field in dataclasses.fields(VisionConfig) if hasattr(theirs, field.name)]
    assert {"hidden_act", "patch_size", "layer_norm_eps", "num_channels"} <= set(shared)
    expected = VisionConfig(**{name: getattr(theirs, name) for name in shared}, **own)
    assert vision_config({"model_type": kind, **fields}, "neither") == expected
    assert vision_config(fields, kind) == expected
    assert vision_config({**dict.fromkeys(shared), **fields}, kind) == expected  # null is as good as nothing
    assert vision_config(json.loads(theirs.to_json_string(use_diff=False)), "neither") == expected


def test_no_kind_is_left_out() -> None:
    assert set(KINDS) == {"clip_vision_model", "siglip_vision_model"}


@pytest.mark.parametrize(
    ("kind", "fields", "named"),
    [
        ("dinov2", {}, "'dinov2' is not one of clip_vision_model, siglip_vision_model"),
        ("clip_vision_model", {"use_head": True}, "vision_config.*use_head=True"),
        ("siglip_vision_model", {"num_registers": 4}, "vision_config.*num_registers=4"),
        ("siglip_vision_model", {"hidden_act": "swish9"}, "vision_config.*hidden_act='swish9'"),
    ],
)
def test_towers_that_are_not_implemented_are_refused_by_name(kind: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        vision_config({"model_type": kind, **fields}, "clip_vision_model")


# --- tensors and hidden states --------------------------------------------------------------------------------------

SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8}


@functools.cache
def reference(kind: str, image_size: int) -> Any:
    """A tiny random PyTorch tower of that kind."""
    config: Any = transformers.AutoConfig.for_model(kind, **SMALL, image_size=image_size)
    config._attn_implementation = "eager"
    return randomized(transformers.AutoModel.from_config(config), kind)


def tensors_of(model: Any) -> dict[str, np.ndarray]:
    """By their names in the key table, without the head that pools patches for retrieval."""
    named = {name.removeprefix("vision_model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in named.items() if not name.startswith("head.")}


@functools.cache
def ours(kind: str, image_size: int) -> VisionTower:
    """The same tower here."""
    theirs = reference(kind, image_size)
    config = vision_config(json.loads(theirs.config.to_json_string()), "neither")
    return module_of(lambda: VisionTower(config, rngs=nnx.Rngs(0)), vision_keys(config), tensors_of(theirs))


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_hugging_faces(kind: str) -> None:
    theirs, config = reference(kind, 32), ours(kind, 32).config
    assert any(".head." in f".{name}" for name in theirs.state_dict()) == (kind == "siglip_vision_model")
    abstract = abstract_of(lambda: VisionTower(config, rngs=nnx.Rngs(0)))
    shapes = {name: tensor.shape for name, tensor in tensors_of(theirs).items()}
    assert_table_fits(vision_keys(config), abstract, shapes)
    assert {key.target for key in vision_keys(config)} == set(abstract)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [32, 30], ids=["whole patches", "a rim"])
def test_hidden_states_are_hugging_faces(kind: str, side: int) -> None:
    tower = ours(kind, side)
    pixels = np.random.default_rng(1).standard_normal((2, 3, side, side), np.float32)
    with torch.no_grad():
        output = reference(kind, side)(torch.tensor(pixels), output_hidden_states=True)
    states = jax.jit(lambda pixels: tower(pixels))(jnp.asarray(pixels))
    tokens = (side // 8) ** 2 + (kind == "clip_vision_model")
    assert states.shape == (4, 2, tokens, 24) and tower.config.num_patches == (side // 8) ** 2
    for layer, wanted in enumerate(output.hidden_states):
        np.testing.assert_allclose(states[layer], wanted.numpy(), atol=1e-5)
    if kind == "siglip_vision_model":  # some families read its output after the last norm
        np.testing.assert_allclose(tower.post_norm(states[-1]), output.last_hidden_state.numpy(), atol=1e-5)


def test_some_of_the_blocks_only() -> None:
    tower = ours("clip_vision_model", 32)
    pixels = jnp.asarray(np.random.default_rng(2).standard_normal((1, 3, 32, 32), np.float32))
    states = tower(pixels)
    for wanted in ([0], [1], [3, 1], [-1, 0, 2, 2]):
        found = tower(pixels, wanted)
        assert found.shape[0] == len(wanted)
        np.testing.assert_allclose(found, states[np.array(wanted)], atol=1e-5)
    np.testing.assert_allclose(run_blocks(tower.layers, states[0], [1, 2]), states[1:3], atol=1e-5)


def test_blocks_after_the_last_wanted_state_do_not_run() -> None:
    tower = ours("clip_vision_model", 32)
    pixels = jnp.zeros((1, 3, 32, 32))
    spoilt = jax.tree.map(lambda leaf: leaf.at[2:].set(jnp.nan), nnx.state(tower.layers))
    nnx.update(tower.layers, spoilt)
    assert np.isfinite(tower(pixels, [0, 2])).all() and np.isnan(tower(pixels, [0, 3])[1]).all()


@pytest.mark.parametrize("shape", [(32, 24), (24, 32), (40, 40), (8, 8)])
def test_pictures_of_another_size_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError, match=f"have {shape[0]} x {shape[1]} pixels, the tower takes 32 x 32"):
        ours("clip_vision_model", 32)(jnp.zeros((1, 3, *shape)))


def test_patches_stand_row_by_row() -> None:
    """Each as (row, column, channel); pixels outside whole patches are dropped."""
    pixels = jnp.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7).astype(jnp.float32)
    found = patches(pixels, 2)
    assert found.shape == (2, 6, 12)
    for number, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        own = jnp.moveaxis(pixels[:, :, row : row + 2, column : column + 2], 1, -1)
        np.testing.assert_array_equal(found[:, number], own.reshape(2, 12))


# --- a block's further parts ----------------------------------------------------------------------------------------

WIDTH, HEADS = 24, 3
X = np.random.default_rng(3).standard_normal((2, 5, WIDTH)).astype(np.float32)


def block(**fields: Any) -> Block:
    """A block whose parameters are all drawn."""
    config = BlockConfig(hidden_size=WIDTH, intermediate_size=40, num_attention_heads=HEADS, **fields)
    definition, state = nnx.split(Block(config, rngs=nnx.Rngs(1)))
    leaves = flatten(nnx.to_pure_dict(state))
    rng = np.random.default_rng(4)
    drawn = {
        name: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32) for name, leaf in leaves.items()
    }
    return nnx.merge(definition, nnx.State(unflatten(drawn)))


def parts(found: Block) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in flatten(nnx.to_pure_dict(nnx.state(found))).items()}


def normed(x: np.ndarray, own: dict[str, np.ndarray], name: str, epsilon: float, rms: bool) -> np.ndarray:
    x = x if rms else x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * own[f"{name}.scale"]
    return x if rms else x + own[f"{name}.bias"]


def by_hand(config: BlockConfig, own: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The block in float64, formula by formula."""
    epsilon, rms = config.layer_norm_eps, config.rms_norm

    def added(value: np.ndarray, name: str) -> np.ndarray:
        if config.tanh_gates:
            return np.tanh(own[f"{name}_scale"]) * value
        return own[f"{name}_scale"] * value if config.layer_scale else value

    before = normed(x, own, "attention_norm", epsilon, rms)
    heads = {}
    for name in ("query", "key", "value"):
        flat = before @ own[f"attention.{name}"]
        if config.attention_bias:
            flat = flat + own[f"attention.{name}_bias"]
        if config.query_key_norm and name != "value":  # over all heads together
            flat = normed(flat, own, f"attention.{name}_norm", 1e-6, True)
        heads[name] = flat.reshape(*x.shape[:2], HEADS, -1)
    scores = np.einsum("nihe,njhe->nhij", heads["query"], heads["key"]) / np.sqrt(WIDTH // HEADS)
    weights = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    mixed = np.einsum("nhij,njhe->nihe", weights, heads["value"]).reshape(x.shape)
    mixed = mixed @ own["attention.out"]
    x = x + added(mixed + own["attention.out_bias"] if config.attention_out_bias else mixed, "attention")
    before = normed(x, own, "mlp_norm", epsilon, rms)
    up = before @ own["up.kernel"] + own["up.bias"]
    gate = before @ own["gate.kernel"] + own["gate.bias"] if config.gated_mlp else up
    gate = gate / (1 + np.exp(-1.702 * gate))  # quick_gelu
    return x + added((gate * up if config.gated_mlp else gate) @ own["down.kernel"] + own["down.bias"], "mlp")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": False, "attention_out_bias": False},
        {"attention_bias": False, "rms_norm": True, "gated_mlp": True},
        {"query_key_norm": True, "layer_scale": True, "layer_norm_eps": 1e-3},
        {"tanh_gates": True, "attention_out_bias": False},
    ],
    ids=lambda fields: " ".join(fields) or "plain",
)
def test_a_block_by_hand(fields: dict[str, Any]) -> None:
    found = block(**fields)
    own = parts(found)
    assert ("attention.query_bias" in own) == fields.get("attention_bias", True)
    assert ("attention_norm.bias" in own) != fields.get("rms_norm", False)
    scales = {name: value.shape for name, value in own.items() if name.endswith("_scale")}
    shape = (WIDTH,) if "layer_scale" in fields else (1,)
    scaled = "layer_scale" in fields or "tanh_gates" in fields
    assert scales == ({"attention_scale": shape, "mlp_scale": shape} if scaled else {})
    np.testing.assert_allclose(found(jnp.asarray(X)), by_hand(found.config, own, X.astype(np.float64)), atol=2e-5)


def test_a_block_with_scales_and_norms_is_interns() -> None:
    config: Any = transformers.AutoConfig.for_model(
        "internvl_vision",
        hidden_size=WIDTH,
        intermediate_size=40,
        num_attention_heads=HEADS,
        use_qk_norm=True,
        attention_bias=True,
        hidden_act="quick_gelu",
        norm_type="layer_norm",
        layer_norm_eps=1e-2,  # which is not that of queries and keys
    )
    config._attn_implementation = "eager"
    theirs = randomized(InternVLVisionLayer(config), "intern")
    found = block(query_key_norm=True, layer_scale=True, layer_norm_eps=1e-2)
    own = {name: torch.tensor(value, dtype=torch.float32) for name, value in parts(found).items()}
    names = {
        "layernorm_before": "attention_norm",
        "layernorm_after": "mlp_norm",
        "attention.q_norm": "attention.query_norm",
        "attention.k_norm": "attention.key_norm",
    }
    state = {f"{name}.weight": own[f"{ours}.scale"] for name, ours in names.items()}
    state |= {f"{name}.bias": own[f"{ours}.bias"] for name, ours in list(names.items())[:2]}
    for name in ("query", "key", "value"):
        state[f"attention.{name[0]}_proj.weight"] = own[f"attention.{name}"].T
        state[f"attention.{name[0]}_proj.bias"] = own[f"attention.{name}_bias"]
    state["attention.projection_layer.weight"] = own["attention.out"].T
    state["attention.projection_layer.bias"] = own["attention.out_bias"]
    for name, ours in (("fc1", "up"), ("fc2", "down")):
        state[f"mlp.{name}.weight"], state[f"mlp.{name}.bias"] = own[f"{ours}.kernel"].T, own[f"{ours}.bias"]
    state["lambda_1"], state["lambda_2"] = own["attention_scale"], own["mlp_scale"]
    theirs.load_state_dict(state, strict=True)
    with torch.no_grad():
        wanted = theirs(torch.tensor(X))
    wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    np.testing.assert_allclose(found(jnp.asarray(X)), wanted.numpy(), atol=2e-5)


def test_who_reads_whom_and_turned_heads() -> None:
    """`read` and the rotation are arguments: queries and keys are rotated, values are not."""
    found, x = block(), jnp.asarray(X)
    seen: list[Any] = []

    def read(query: Any, key: Any, value: Any) -> Any:
        seen.append((query, key, value))
        return read_all(query, key, value)

    plain = found(x, read)
    np.testing.assert_allclose(plain, found(x), atol=1e-6)
    places = jnp.asarray(np.random.default_rng(5).integers(0, 20, (2, 5, 2)))
    rotation = rope.axial_rotations(places, rope.inverse_frequencies(WIDTH // HEADS // 2, 100.0))
    turned = found(x, read, rotation)
    assert float(jnp.abs(turned - plain).max()) > 1e-3
    for still, moved in zip(seen[0][:2], seen[1][:2], strict=True):
        np.testing.assert_allclose(rope.rotate(still, *rotation), moved, atol=1e-5)
    np.testing.assert_array_equal(seen[0][2], seen[1][2])
    np.testing.assert_allclose(found(x, read_all, (jnp.ones((2, 5, 4)), jnp.zeros((2, 5, 4)))), plain, atol=1e-6)
    own_only = found(x, lambda query, key, value: value)
    other = found(x.at[:, 0].add(1.0), lambda query, key, value: value)
    np.testing.assert_array_equal(own_only[:, 1:], other[:, 1:])
