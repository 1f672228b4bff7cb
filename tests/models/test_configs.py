"""Configs: every field is read, none is silently ignored, and the published sizes are those of Hugging Face."""

import ast
import copy
import dataclasses
import functools
import importlib
import inspect
import itertools
import json
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from families import EVERY, LLAMA3, VOCABULARY, Case, llava_config
from flax import nnx
from full_size import CONFIGS as PUBLISHED
from key_tables import assert_table_fits

import jaxid.families
import jaxid.nn
import jaxid.prompts
from jaxid.checkpoints.loading import abstract_parameters
from jaxid.errors import CheckpointError
from jaxid.families.llava import LlavaConfig
from jaxid.families.registry import FAMILIES
from jaxid.nn.decoder_config import FULL, DecoderConfig, RopeConfig, decoder_config
from jaxid.nn.inputs import Inputs
from jaxid.nn.layers import BOOKKEEPING, Config
from jaxid.nn.sites import SITES, Capture, clean
from jaxid.nn.vision import VisionConfig
from jaxid.zoo.export import hf_config

PACKAGES = [Path(str(package.__file__)).parent for package in (jaxid.families, jaxid.nn, jaxid.prompts)]
SOURCES = list(itertools.chain(*(sorted(folder.glob("*.py")) for folder in PACKAGES)))

for found in pkgutil.iter_modules([str(PACKAGES[0])]):  # a family's configs count before it is registered
    importlib.import_module(f"jaxid.families.{found.name}")


def below(base: type[Config]) -> Iterator[type[Config]]:
    """All classes derived from it, at whatever depth."""
    for config in base.__subclasses__():
        yield config
        yield from below(config)


CONFIGS = sorted(set(below(Config)), key=lambda config: config.__name__)

LLAVA_7B = {name: value for name, value in PUBLISHED["llava-7b"].items() if name != "tie_word_embeddings"}
"""The config.json of LLaVA-1.5-7B, whose `text_config` says whether embeddings are tied."""


def attributes_read(source: str) -> set[str]:
    """Names read as attributes; what a class declares or an assignment sets does not count."""
    nodes = ast.walk(ast.parse(source))
    return {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}


def test_every_field_of_every_config_is_read() -> None:
    assert {DecoderConfig, LlavaConfig, RopeConfig, VisionConfig} <= set(CONFIGS)
    read = set().union(*(attributes_read(path.read_text()) for path in SOURCES))
    unread = {
        f"{config.__name__}.{field.name}"
        for config in CONFIGS
        for field in dataclasses.fields(config)
        if field.name not in read
    }
    assert unread == set()


def test_the_search_for_unread_fields_finds_one() -> None:
    declared = "class C:\n    width: int = 3\n\n    def f(self):\n        self.depth = 4\n        return self.height"
    assert attributes_read(declared) == {"height"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_field_has_its_comment_and_configs_are_frozen(config: type[Config]) -> None:
    declared: dict[str, str] = {}
    for owner in reversed(config.__mro__[: config.__mro__.index(Config)]):
        source = Path(inspect.getfile(owner)).read_text()
        classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
        for node in next(found.body for found in classes if found.name == owner.__name__):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                declared[node.target.id] = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
    assert set(declared) >= {field.name for field in dataclasses.fields(config)}
    for field in dataclasses.fields(config):
        assert re.search(r"  # \S", declared[field.name]), declared[field.name]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(object.__new__(config), dataclasses.fields(config)[0].name, None)


def test_nothing_that_a_config_reads_is_bookkeeping() -> None:
    # What decoders and towers need not know, CLIP-like models read.
    read_elsewhere = {"eos_token_id", "max_position_embeddings", "projection_dim"}
    modules = {config: config.__module__.rsplit(".", 1)[-1] for config in CONFIGS}
    dual = {"text", "clip", "siglip", "blip", "flava", "coca"}
    for config in CONFIGS:
        found = {field.name for field in dataclasses.fields(config)} & BOOKKEEPING
        assert found <= (read_elsewhere if modules[config] in dual else set()), config


# --- every family -----------------------------------------------------------------------------------------------

ONE_EACH = list({case.name.split("-")[0]: case for case in reversed(EVERY)}.values())
"""The first tiny model of every family."""


@functools.cache
def written(case: Case) -> dict[str, Any]:
    return json.loads((fixtures.folder(case) / "config.json").read_text())


def read_as_family(fields: dict[str, Any]) -> Any:
    return FAMILIES[fields["model_type"]].config(copy.deepcopy(fields))


@pytest.mark.parametrize("case", ONE_EACH, ids=lambda case: case.name)
def test_families_refuse_fields_that_they_do_not_know(case: Case) -> None:
    fields = written(case)
    config = read_as_family(fields)
    assert hash(config) == hash(read_as_family(fields)) and config == read_as_family(fields)
    parts = [name for name, part in fields.items() if name.endswith("_config") and isinstance(part, dict)]
    assert parts
    for part in (None, *parts):
        strange = copy.deepcopy(fields)
        (strange[part] if part else strange)["fold_the_picture"] = 3
        with pytest.raises(CheckpointError, match="fold_the_picture"):
            read_as_family(strange)


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in transformers.CONFIG_MAPPING])
def test_what_a_file_leaves_out_is_what_hugging_face_takes_for_granted(kind: str) -> None:
    """Files hold what differs from Hugging Face's defaults; they mean the same with everything written out."""
    case = next(case for case in EVERY if written(case)["model_type"] == kind)
    theirs = transformers.AutoConfig.from_pretrained(fixtures.folder(case))
    everything = json.loads(theirs.to_json_string(use_diff=False))
    assert everything != written(case)
    assert read_as_family(written(case)) == read_as_family(everything)


# --- LLaVA ------------------------------------------------------------------------------------------------------


def changed(part: str | None, **fields: Any) -> dict[str, Any]:
    whole = {**LLAVA_7B, "text_config": dict(LLAVA_7B["text_config"]), "vision_config": dict(LLAVA_7B["vision_config"])}
    (whole[part] if part else whole).update(fields)
    return whole


@pytest.mark.parametrize(
    ("part", "fields", "named"),
    [
        (None, {"mm_patch_merge": "flat"}, "mm_patch_merge='flat'"),
        ("text_config", {"clip_qkv": 8}, "text_config.*clip_qkv=8"),
        ("vision_config", {"use_head": True}, "vision_config.*use_head=True"),
        ("text_config", {"model_type": "mistral"}, "text_config.*'mistral'"),
        ("vision_config", {"model_type": "dinov2"}, "vision_config.*'dinov2'"),
        ("text_config", {"hidden_act": "swish9"}, "text_config.*hidden_act='swish9'"),
        (None, {"projector_hidden_act": "swish9"}, "projector_hidden_act='swish9'"),
        ("text_config", {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}}, "'ntk'"),
        ("text_config", {"rope_scaling": {"type": "linear"}}, "'linear' lack factor"),
        ("text_config", {"rope_parameters": {"rope_type": "default", "mrope_section": [8, 8]}}, "mrope_section"),
        (None, {"vision_feature_layer": -26}, "vision_feature_layer"),
        (None, {"vision_feature_layer": [3, 25]}, "vision_feature_layer"),
        (None, {"vision_feature_select_strategy": "cls"}, "'cls'"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(part: str | None, fields: dict[str, Any], named: str) -> None:
    LlavaConfig.from_hf(changed(None))
    with pytest.raises(CheckpointError, match=named):
        LlavaConfig.from_hf(changed(part, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        LLAVA_7B,
        {"model_type": "llava"},
        changed(None, vision_config=None, text_config=None),
        changed(None, vision_config={"image_size": 64}),
        changed("text_config", rope_theta=5e5, num_key_value_heads=8),
        changed("text_config", rope_scaling={"type": "linear", "factor": 2.0}),
        changed("text_config", rope_parameters=LLAMA3),
        changed("text_config", rope_scaling={k: v for k, v in LLAMA3.items() if not k.startswith("orig")}),
        changed("text_config", tie_word_embeddings=True),
        changed(None, tie_word_embeddings=True, vision_feature_layer=[-2, 3]),
        changed("text_config", hidden_size=1024, num_attention_heads=8),
        changed("text_config", sliding_window=4096, layer_types=[FULL] * 32),
        changed("text_config", rope_scaling={"type": "dynamic", "factor": 2.0}),
        changed(None, vision_config={"model_type": "siglip_vision_model", "image_size": 384, "vision_use_head": False}),
        changed(None, text_config={"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True}),
    ],
    ids=lambda fields: str(len(str(fields))),
)
def test_defaults_are_hugging_faces(fields: dict[str, Any]) -> None:
    ours = LlavaConfig.from_hf(fields)
    theirs = transformers.LlavaConfig(**{name: value for name, value in fields.items() if name != "model_type"})
    text: Any = theirs.text_config
    tied = {"tie_word_embeddings": theirs.tie_word_embeddings}
    everything = json.loads(text.to_json_string(use_diff=False))
    assert ours.text_config == dataclasses.replace(decoder_config(everything, "none"), **tied)
    for field in dataclasses.fields(VisionConfig):
        if hasattr(theirs.vision_config, field.name):
            assert getattr(ours.vision_config, field.name) == getattr(theirs.vision_config, field.name), field.name
    layers = theirs.vision_feature_layer
    assert ours.vision_feature_layer == (tuple(layers) if isinstance(layers, list) else (layers,))
    for name in ("image_token_index", "projector_hidden_act", "multimodal_projector_bias"):
        assert getattr(ours, name) == getattr(theirs, name), name
    frequencies = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(text).inv_freq.numpy()
    np.testing.assert_allclose(ours.text_config.rope.frequencies(ours.text_config.head_dim), frequencies, rtol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"},
        {"rope_parameters": LLAMA3, "head_dim": 20, "num_key_value_heads": 2},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ],
    ids=["plain", "flags", "llama3", "linear"],
)
def test_an_exported_config_comes_back_the_same(fields: dict[str, Any]) -> None:
    hf = llava_config(text=fields, vision={"layer_norm_eps": 1e-3}, vision_feature_layer=[-1, 0])
    config = LlavaConfig.from_hf(hf.to_dict())
    assert LlavaConfig.from_hf(hf_config(config, VOCABULARY)) == config


# --- full size ------------------------------------------------------------------------------------------------------


def full_size() -> tuple[LlavaConfig, Any]:
    config = LlavaConfig.from_hf(LLAVA_7B)
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(**{name: value for name, value in LLAVA_7B.items() if name != "model_type"})
        )
    return config, theirs


def test_full_size_parameters_and_keys_are_hugging_faces() -> None:
    config, theirs = full_size()
    family = FAMILIES["llava"]
    _, abstract = abstract_parameters(family, config)
    assert sum(leaf.size for leaf in abstract.values()) == sum(p.numel() for p in theirs.parameters()) == 7_063_427_072

    spelled = {}
    for name, parameter in theirs.state_dict().items():
        for pattern, replacement in family.renames:
            name = re.sub(pattern, replacement, name)
        spelled[name] = tuple(parameter.shape)
    assert_table_fits(family.keys(config), abstract, spelled)


def test_full_size_forward_traces() -> None:
    config, _ = full_size()
    family = FAMILIES["llava"]
    assert config.image_tokens == 576
    batch, tokens = 2, 640
    inputs = Inputs(
        token_ids=jnp.zeros((batch, tokens), jnp.int32),
        positions=jnp.zeros((batch, tokens), jnp.int32),
        valid=jnp.ones((batch, tokens), bool),
        last=jnp.zeros((batch,), jnp.int32),
        pixels=jnp.zeros((batch, 3, 336, 336)),
        image_rows=jnp.zeros((batch, tokens), jnp.int32),
    )
    definition, state = nnx.split(nnx.eval_shape(lambda: family.network(config, rngs=nnx.Rngs(0))))
    output = jax.eval_shape(
        lambda state, inputs: nnx.merge(definition, state)(inputs, clean, Capture(SITES)), state, inputs
    )
    assert output.hidden.shape == (batch, tokens, 4096)
    assert output.captured["embed"].shape == (batch, tokens, 4096)
    assert {output.captured[site].shape for site in SITES[1:]} == {(32, batch, tokens, 4096)}
