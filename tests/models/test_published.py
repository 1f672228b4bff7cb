"""Published config.json files: Hugging Face's classes know their fields and count as many parameters as published."""

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from full_size import CONFIGS
from key_tables import assert_table_fits
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig

from jaxid.checkpoints.loading import abstract_parameters
from jaxid.checkpoints.tensors import unflatten
from jaxid.families.mllama import MllamaConfig
from jaxid.families.qwen_vl import QwenVLConfig
from jaxid.families.registry import ALIASES, FAMILIES, family
from jaxid.nn.inputs import Inputs
from jaxid.nn.sites import Capture, clean

PARAMETERS = {
    # Found as published or as counted from the checkpoint's own tensors.
    "llava-7b": 7_063_427_072,
    "qwen2-2b": 2_208_985_600,
    "qwen-3b": 3_754_622_976,
    "qwen-7b": 8_292_166_656,
    "llama-11b": 10_670_220_835,
    "internvl-1b": 938_193_024,
    "internvl-2b": 2_088_957_440,
    "gemma-4b": 4_300_079_472,
    "gemma-12b": 12_187_325_040,
    # Found for a checkpoint that was tuned from it, Lingshu-I-8B.
    "internvl-8b": 7_944_373_760,
    # Computed here only.
    "llava-13b": 13_351_494_656,
    "llava-cot": 10_670_220_835,
    "internvl-14b": 15_117_256_704,
    "llava-video": 8_030_348_832,
}
"""Numbers in a checkpoint, tied tensors counted once."""

THEIRS = sorted(set(CONFIGS) - {"llava-video"})  # Hugging Face has no class for LLaVA-NeXT's own layout

TRACED = ("gemma-4b", "internvl-1b", "internvl-8b", "llama-11b", "llava-7b", "qwen-3b", "qwen2-2b")
"""One of each network: the others are as deep or wide in other numbers only."""

UNDECLARED = {
    "rope_scaling",  # older spellings, which the classes bring to `rope_parameters`
    "rope_theta",
    "in_chans",  # always 3, as `in_channels` is by default
    "spatial_patch_size",  # always `patch_size`
    "vision_token_id",
    "ignore_index",  # of the loss
    "vocab_size",  # of a tower, or repeated outside `text_config`
}
"""Fields of the files that today's classes keep as they keep any name."""


def hf_config(alias: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**copy.deepcopy(CONFIGS[alias]))


def undeclared(fields: dict[str, Any], *sections: Any) -> Iterator[str]:
    """Names that none of the sections' classes declares."""
    known = {"model_type"}
    for section in sections:
        known |= {field.name for field in dataclasses.fields(section)} | set(section.attribute_map)
    yield from (name for name in fields if name not in known)


def test_every_published_model_has_its_config_and_its_number() -> None:
    assert set(CONFIGS) == set(PARAMETERS) <= set(ALIASES)


@pytest.mark.parametrize("alias", CONFIGS)
def test_config_is_parsed_json(alias: str) -> None:
    assert json.loads(json.dumps(CONFIGS[alias])) == CONFIGS[alias]


def test_fields_are_spelled_as_hugging_face_spells_them() -> None:
    strange = set()
    for alias in THEIRS:
        fields, config = CONFIGS[alias], hf_config(alias)
        text, vision = config.get_text_config(), config.vision_config
        flat = () if "text_config" in fields else (text,)
        strange |= {*undeclared(fields, config, *flat), *undeclared(fields["vision_config"], vision)}
        strange |= set(undeclared(fields.get("text_config", {}), text))
    assert strange == UNDECLARED


def on_meta(alias: str) -> torch.nn.Module:
    config = hf_config(alias)
    if config.model_type == "internvl":
        # The class presumes tied embeddings where the file is silent, and gives that up when it loads both tensors.
        config.tie_word_embeddings = False
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("alias", THEIRS)
def test_full_size_is_hugging_faces(alias: str) -> None:
    """Numbers, names and shapes of all tensors, in both directions."""
    model, kind = on_meta(alias), family(CONFIGS[alias]["model_type"], alias)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[alias]
    config = kind.config(copy.deepcopy(CONFIGS[alias]))
    _, leaves = abstract_parameters(kind, config)
    assert sum(leaf.size for leaf in leaves.values()) == PARAMETERS[alias]
    tensors = {}
    for name, tensor in model.state_dict().items():
        for pattern, replacement in kind.renames:
            name = re.sub(pattern, replacement, name)
        if not any(re.search(pattern, name) for pattern in kind.unused):
            tensors[name] = tuple(tensor.shape)
    assert_table_fits(kind.keys(config), leaves, tensors)


def picture_inputs(config: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape of the pixels of one picture, and the arrays beside them."""
    vision = config.vision_config
    if isinstance(config, MllamaConfig):
        shapes = {"aspect_ratio": (1,), "tile_count": (1,), "shown": (1, 1)}
        extras = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
        return (1, 4, 3, vision.image_size, vision.image_size), extras
    if isinstance(config, QwenVLConfig):
        extras = {
            "patch_positions": jax.ShapeDtypeStruct((1, 256, 2), jnp.int32),
            "patch_valid": jax.ShapeDtypeStruct((1, 256), jnp.bool_),
        }
        return (1, 256, vision.patch_numbers), extras
    return (1, 3, vision.image_size, vision.image_size), {}


@pytest.mark.parametrize("alias", TRACED)
def test_full_size_forward_traces(alias: str) -> None:
    """Shapes alone, in bfloat16: a picture and 1,600 tokens go through every block, and nothing turns into float32."""
    kind = family(CONFIGS[alias]["model_type"], alias)
    config = kind.config(copy.deepcopy(CONFIGS[alias]))
    definition, leaves = abstract_parameters(kind, config)
    parameters = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16) for path, leaf in leaves.items()}
    shape, extras = picture_inputs(config)
    tokens = jax.ShapeDtypeStruct((1, 1600), jnp.int32)
    inputs = Inputs(
        token_ids=tokens,
        positions=tokens,
        valid=jax.ShapeDtypeStruct((1, 1600), jnp.bool_),
        last=jax.ShapeDtypeStruct((1,), jnp.int32),
        pixels=jax.ShapeDtypeStruct(shape, jnp.float32),
        image_rows=tokens,
        rope_positions=jax.ShapeDtypeStruct((1, 3, 1600), jnp.int32) if isinstance(config, QwenVLConfig) else None,
        extras=extras,
    )

    def run(parameters: Any, inputs: Inputs) -> Any:
        network = nnx.merge(definition, nnx.State(unflatten(parameters)))
        return network(inputs, clean, Capture(("resid_post",)))

    found = jax.eval_shape(run, parameters, inputs)
    text = config.text_config
    assert found.hidden.shape == (1, 1600, text.hidden_size) and found.hidden.dtype == jnp.bfloat16
    assert found.captured["resid_post"].shape == (text.num_hidden_layers, 1, 1600, text.hidden_size)


def test_llava_video_has_the_published_parameters() -> None:
    family, fields = FAMILIES["llava_qwen"], CONFIGS["llava-video"]
    _, leaves = abstract_parameters(family, family.config(copy.deepcopy(fields)))
    assert sum(leaf.size for leaf in leaves.values()) == PARAMETERS["llava-video"]
