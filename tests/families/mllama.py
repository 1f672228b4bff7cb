"""Tiny Llama 3.2 Vision models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from families.base import DECODER_PARTS, LLAMA3, Case, randomized, tensors, write_words
from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

SPECIAL = ("<|finetune_right_pad_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
SPECIAL += ("<|image|>",)
IMAGE = SPECIAL.index("<|image|>") + 1
TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{% endif %}"
)
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 3],
    "rope_parameters": LLAMA3,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 3,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_global_layers": 2,
    "attention_heads": 2,
    "vision_output_dim": 72,
    "image_size": 12,
    "patch_size": 4,
    "max_num_tiles": 4,
    "intermediate_layers_indices": [0, 2],
}


def arguments(batch: Prompts) -> dict[str, Any]:
    """The prompts as Hugging Face takes them: every prompt with its own pictures."""
    found, inputs = tensors(batch), batch.inputs
    if inputs.pixels is None:
        return found
    shown, tiles, ratios = (inputs.extras[name] for name in ("shown", "tile_count", "aspect_ratio"))
    there = shown >= 0
    counts = [[int(tiles[number]) for number in row if number >= 0] for row in shown]
    lengths = np.asarray(inputs.last) + 1
    tokens = [ids[:length].tolist() for ids, length in zip(np.asarray(inputs.token_ids), lengths, strict=True)]
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids, IMAGE) for ids in tokens], counts, 4, inputs.token_ids.shape[1]
    )
    pixels = np.asarray(inputs.pixels)[np.maximum(shown, 0)] * there[:, :, None, None, None, None]
    numbers = np.where(there, tiles[np.maximum(shown, 0)], 1)
    return found | {
        "pixel_values": torch.tensor(pixels),
        "aspect_ratio_ids": torch.tensor(np.where(there, ratios[np.maximum(shown, 0)], 0)).long(),
        "aspect_ratio_mask": torch.tensor(np.arange(4) < numbers[..., None]).long(),
        "cross_attention_mask": torch.tensor(mask),
    }


def picture_side(network: Any, inputs: Any) -> dict[str, Any]:
    """All blocks of the tower in one row, local ones first, and the projected tokens."""
    extras = inputs.extras
    local, last = network.tower.states(inputs.pixels, extras["aspect_ratio"], extras["tile_count"])
    import jax.numpy as jnp

    return {"tower": jnp.concatenate([local, last[1:]]), "projector": network.features(inputs)}


def alike(name: str, ours: np.ndarray, theirs: np.ndarray, batch: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Their axes of prompts, pictures and tiles as one."""
    del name, batch
    return ours, theirs.reshape(ours.shape)


def mllama(name: str, *, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}) -> Case:
    """A Llama 3.2 Vision case."""
    config: Any = MllamaConfig(
        text_config=MllamaTextConfig(**{**TEXT, **text}),
        vision_config=MllamaVisionConfig(**{**TOWER, **vision}),
        image_token_index=IMAGE,
    )

    def describe(folder: Path) -> None:
        write_words(folder, SPECIAL, TEMPLATE, first="<|begin_of_text|>")
        side = config.vision_config.image_size
        image_processor = {
            "image_processor_type": "MllamaImageProcessor",
            "max_image_tiles": 4,
            "size": {"height": side, "width": side},
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
        }
        write_json(folder / "preprocessor_config.json", image_processor)

    return Case(
        name=name,
        build=lambda: randomized(MllamaForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_model.transformer.layers,model.vision_model.global_transformer.layers",
            "projector": "model.multi_modal_projector",
            **DECODER_PARTS,
        },
        sites={"resid_mid": "post_attention_layernorm"},
        arguments=arguments,
        picture_side=picture_side,
        alike=alike,
    )


EVERY = (
    mllama("mllama"),
    mllama(
        "mllama-last-cross",
        text={"num_key_value_heads": 4, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
        vision={"image_size": 16, "num_global_layers": 1, "intermediate_layers_indices": [1], "vision_output_dim": 48},
    ),
)
