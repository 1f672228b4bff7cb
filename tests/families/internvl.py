"""Tiny InternVL3 models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

from families.base import DECODER_PARTS, Case, randomized, tensors, write_words
from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

SPECIAL = ("<|endoftext|>", "<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = {"context_image_token": "<IMG_CONTEXT>", "start_image_token": "<img>", "end_image_token": "</img>"}
TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": [16, 16],
    "patch_size": [4, 4],
    "attention_bias": True,
}


def arguments(batch: Prompts) -> dict[str, Any]:
    """The prompts as Hugging Face takes them: tiles in the prompts' order, none beside them."""
    found, inputs = tensors(batch), batch.inputs
    if inputs.pixels is None:
        return found
    slots = np.asarray(inputs.image_rows)
    tiles = slots[slots >= 0].reshape(-1, 4)[:, 0] // 4
    return found | {"pixel_values": torch.tensor(np.asarray(inputs.pixels)[tiles])}


def alike(name: str, ours: np.ndarray, theirs: np.ndarray, batch: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Without padded rows."""
    del name, batch
    return ours[: len(theirs)], theirs


def internvl(
    name: str, *, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, tied: bool = False, **top: Any
) -> Case:
    """An InternVL3 case."""
    config = InternVLConfig(
        text_config=Qwen2Config(**{**TEXT, **text}, tie_word_embeddings=tied),
        vision_config=InternVLVisionConfig(**{**TOWER, **vision}),
        image_token_id=SPECIAL.index("<IMG_CONTEXT>") + 1,
        image_seq_length=4,
        tie_word_embeddings=tied,
        **top,
    )

    def describe(folder: Path) -> None:
        write_words(folder, SPECIAL, TEMPLATE, extra_special_tokens={**TOKENS, "video_token": "<video>"})
        image_processor = {
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "crop_to_patches": False,
            "min_patches": 1,
            "max_patches": 6,
            "size": {"height": 16, "width": 16},
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
        }
        write_json(folder / "preprocessor_config.json", image_processor)

    return Case(
        name=name,
        build=lambda: randomized(InternVLForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_tower.encoder.layer",
            "projector": "model.multi_modal_projector",
            **DECODER_PARTS,
        },
        arguments=arguments,
        alike=alike,
    )


EVERY = (
    internvl("internvl"),
    internvl(
        "internvl-tied-rms-qk-norm-earlier-layer",
        tied=True,
        text={"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        vision={"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "use_mean_pooling": False},
        vision_feature_layer=-2,
    ),
    internvl(
        "internvl-final-norm-large-squares",
        vision={"use_mean_pooling": False, "num_attention_heads": 3, "patch_size": 2},
        downsample_ratio=0.25,
    ),
)
