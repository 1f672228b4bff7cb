"""OpenCLIP's CLIP and CoCa agree with golden outputs of `open_clip`; golden/NOTES.md says what every array is."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from key_tables import assert_table_fits
from safetensors.numpy import load_file

from jaxid.checkpoints.loading import abstract_parameters, load_network
from jaxid.checkpoints.openclip import open_weights
from jaxid.errors import CheckpointError
from jaxid.families.base import Encoder
from jaxid.families.openclip import ARCHITECTURES, kind_of
from jaxid.families.registry import ENCODERS
from jaxid.kernels.similarity import unit
from jaxid.nn.text import TextConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def model_cfg(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "open_clip_config.json").read_text())["model_cfg"]


@pytest.fixture(scope="module", params=["clip", "coca"])
def model(request: pytest.FixtureRequest) -> tuple[Any, dict[str, np.ndarray]]:
    """The network, and what `open_clip` computes."""
    kind = ENCODERS[kind_of(model_cfg(request.param))]
    weights = open_weights(GOLDEN / request.param / "weights.safetensors")
    loaded = load_network(kind, kind.config(model_cfg(request.param)), weights, "float32")
    with np.load(GOLDEN / request.param / "outputs.npz") as outputs:
        return Encoder(**loaded, processor=None, name=request.param).network(), dict(outputs)


def assert_close(ours: Any, theirs: np.ndarray) -> None:
    assert ours.shape == theirs.shape
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_pictures(model: tuple[Any, dict[str, np.ndarray]]) -> None:
    network, golden = model
    states, found = jax.jit(lambda x: (network.tower(x), network.image(x)))(golden["pixels"])
    assert_close(states, golden["image_hidden"])
    assert_close(found.pooled, golden["image_pooled"])
    if "image_queries_normed" in golden:
        assert_close(jax.jit(network.pooler)(states[-1]), golden["image_queries_normed"])
        assert_close(found.tokens, alone(golden["image_hidden"][-1]))
    else:
        assert_close(found.tokens, golden["image_tokens_normed_projected"])


def alone(states: np.ndarray) -> np.ndarray:
    """CoCa's tokens from the file's own tensors: attention to one token is that token's value, whoever asks."""
    tensors = load_file(GOLDEN / "coca" / "weights.safetensors")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)
        return x * tensors[f"visual.{name}.weight"] + tensors[f"visual.{name}.bias"]

    own = "visual.attn_pool.attn"
    value_bias = np.split(tensors[f"{own}.in_proj_bias"], 3)[2]
    values = norm(states, "attn_pool.ln_k") @ tensors[f"{own}.v_proj_weight"].T + value_bias
    read = values @ tensors[f"{own}.out_proj.weight"].T + tensors[f"{own}.out_proj.bias"]
    return norm(read, "ln_post") @ tensors["visual.proj"]


def test_captions(model: tuple[Any, dict[str, np.ndarray]]) -> None:
    network, golden = model
    ids = jnp.asarray(golden["token_ids"])
    run = jax.jit(lambda ids, valid: (network.text_encoder(ids, valid), network.text(ids, valid)))
    states, found = run(ids, ids != 0)
    assert_close(states, golden["text_hidden"])
    assert_close(found.pooled, golden["text_pooled"])
    # CoCa's class token comes after the caption's own tokens.
    assert_close(found.tokens, golden["text_tokens_normed_projected"][:, : ids.shape[1]])
    if "text_mask" in golden:
        np.testing.assert_array_equal(network.text_encoder.reads(ids != 0).mask(), golden["text_mask"])


def test_pairs_are_scored_as_published(model: tuple[Any, dict[str, np.ndarray]]) -> None:
    network, golden = model
    pixels, ids = jnp.asarray(golden["pixels"]), jnp.asarray(golden["token_ids"])
    image, text = jax.jit(lambda x, ids: (unit(network.image(x).pooled), unit(network.text(ids, ids != 0).pooled)))(
        pixels, ids
    )
    assert_close(image, golden["image_pooled_unit"])
    assert_close(text, golden["text_pooled_unit"])
    assert_close(network.logit_scale[...], golden["logit_scale"])
    if "image_logits" in golden:
        assert_close(jnp.exp(network.logit_scale[...]) * image @ text.T, golden["image_logits"])


def test_words_with_the_id_of_padding(model: tuple[Any, dict[str, np.ndarray]]) -> None:
    """An id 0 within a caption: CoCa takes it for padding, as it was trained; CLIP reads it like any other."""
    network, golden = model
    ids = jnp.asarray(golden["token_ids"]).at[:, 1].set(0)
    run = jax.jit(network.text)
    real, by_id = run(ids, jnp.asarray(golden["token_ids"]) != 0), run(ids, ids != 0)
    np.testing.assert_array_equal(real.pooled, by_id.pooled)
    np.testing.assert_array_equal(real.tokens, by_id.tokens)


def test_a_shorter_window_changes_nothing_for_clip(model: tuple[Any, dict[str, np.ndarray]]) -> None:
    network, golden = model
    config: TextConfig = network.config.text_config
    if config.whole_window:  # CoCa's class token reads padding
        assert config.context == golden["token_ids"].shape[1] == config.max_position_embeddings - 1
        return
    ids = jnp.asarray(golden["token_ids"])[:3]  # up to 30 tokens
    run = jax.jit(network.text)
    short, whole = run(ids[:, :30], ids[:, :30] != 0), run(ids, ids != 0)
    assert_close(short.pooled, np.asarray(whole.pooled))
    assert_close(short.tokens, np.asarray(whole.tokens[:, :30]))


@pytest.mark.parametrize(("name", "architecture"), [("clip_b32", "ViT-B-32-quickgelu"), ("coca_b32", "coca_ViT-B-32")])
def test_full_size_has_the_published_tensors(name: str, architecture: str) -> None:
    fields, shapes = model_cfg(name), json.loads((GOLDEN / name / "shapes.json").read_text())
    kind = ENCODERS[kind_of(fields)]
    config = kind.config(fields)
    assert config == kind.config(dict(ARCHITECTURES[architecture]))
    abstract = abstract_parameters(kind, config)[1]
    captioner = {tensor for tensor in shapes if tensor.startswith("text_decoder.")}
    assert bool(captioner) == (kind_of(fields) == "open_clip_coca") == bool(kind.unused)
    tensors = {tensor: tuple(shape) for tensor, shape in shapes.items() if tensor not in captioner}
    assert_table_fits(kind.keys(config), abstract, tensors)
    assert {key.target for key in kind.keys(config)} == set(abstract)


def test_architectures_differ_where_their_names_do() -> None:
    configs = {name: ENCODERS[kind_of(fields)].config(dict(fields)) for name, fields in ARCHITECTURES.items()}
    assert len(set(configs.values())) == len(configs)
    for name, config in configs.items():
        quick = name.endswith("-quickgelu")
        for part in (config.vision_config, config.text_config):
            assert part.hidden_act == ("quick_gelu" if quick else "gelu")
        assert config.vision_config.patch_size == int(name.removesuffix("-quickgelu").split("-")[2])


@pytest.mark.parametrize(
    ("name", "part", "fields", "named"),
    [
        ("clip", None, {"fold_the_picture": 3}, "fold_the_picture"),
        ("clip", "vision_cfg", {"ls_init_value": 0.1}, "ls_init_value=0.1"),
        ("clip", "text_cfg", {"hf_model_name": "roberta"}, "hf_model_name='roberta'"),
        ("clip", "vision_cfg", {"attentional_pool": True}, "attentional_pool"),
        ("clip", "text_cfg", {"embed_cls": True}, "embed_cls"),
        ("clip", None, {"custom_text": True}, "custom_text"),
        ("coca", None, {"fold_the_picture": 3}, "fold_the_picture"),
        ("coca", "text_cfg", {"correct_cls_mask": True}, "correct_cls_mask=True"),
        ("coca", "text_cfg", {"embed_cls": False}, "embed_cls"),
        ("coca", "vision_cfg", {"attentional_pool": "cascade"}, "attentional_pool"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(
    name: str, part: str | None, fields: dict[str, Any], named: str
) -> None:
    whole = model_cfg(name)
    kind = ENCODERS[kind_of(whole)]
    kind.config(whole)
    (whole[part] if part else whole).update(fields)
    with pytest.raises(CheckpointError, match=named):
        kind.config(whole)
