"""Tiny Qwen2-VL and Qwen2.5-VL models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from families.base import DECODER_PARTS, Case, randomized, tensors, write_words
from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

SPECIAL = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIDE, MERGE = 4, 2
"""Of a patch in pixels, and of the square of patches that becomes a token."""


def order(batch: Prompts) -> np.ndarray:
    """Rows of the merged tokens that the prompts show, pictures and tokens as Hugging Face has them."""
    slots = np.asarray(batch.inputs.image_rows)
    return slots[slots >= 0]


def arguments(batch: Prompts) -> dict[str, Any]:
    """The prompts as Hugging Face takes them: no padding among patches, and a grid for every picture."""
    found, inputs = tensors(batch), batch.inputs
    if inputs.pixels is None:
        return found
    rows, extras = order(batch), inputs.extras
    patches = np.asarray(inputs.pixels)
    together = MERGE * MERGE
    merged = patches.reshape(-1, together, patches.shape[-1])[rows]
    places = extras["patch_positions"].reshape(-1, together, 2)[rows].reshape(-1, 2)
    starts = np.flatnonzero((places == 0).all(axis=1))
    grids = [[1, *(part.max(axis=0) + 1)] for part in np.split(places, starts[1:])]
    kind = (found["input_ids"] == SPECIAL.index("<|image_pad|>") + 1).int()
    return found | {
        "pixel_values": torch.tensor(merged.reshape(-1, patches.shape[-1])),
        "image_grid_thw": torch.tensor(np.array(grids)).long(),
        "mm_token_type_ids": kind,
    }


def picture_side(network: Any, inputs: Any) -> dict[str, Any]:
    return {"tower": network.tower_states(inputs), "projector": network.features(inputs)}


def alike_within(window: int) -> Any:
    """Brings ours and theirs to tokens row by row, picture by picture."""

    def alike(name: str, ours: np.ndarray, theirs: np.ndarray, batch: Prompts) -> tuple[np.ndarray, np.ndarray]:
        together = MERGE * MERGE if name == "tower" else 1
        ours = ours.reshape(-1, together, ours.shape[-1])[order(batch)]
        theirs = theirs.reshape(-1, together, theirs.shape[-1])
        if window:
            from transformers.vision_utils import get_vision_window_index

            grids = arguments(batch)["image_grid_thw"]
            index, _ = get_vision_window_index(grids, MERGE, window * SIDE * MERGE, SIDE)
            back = np.empty_like(theirs)
            back[index.numpy()] = theirs
            theirs = back
        return ours, theirs

    return alike


def qwen(name: str, *, old: bool, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, tied: bool) -> Case:
    """A case of Qwen2-VL (`old`) or Qwen2.5-VL."""
    tower: dict[str, Any] = {
        "depth": 3,
        "num_heads": 2,
        "patch_size": SIDE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    }
    language = {**TEXT, **text}
    width = language["hidden_size"]
    if old:
        tower |= {"embed_dim": 24, "hidden_size": width, "mlp_ratio": 2}
    else:
        tower |= {"hidden_size": 24, "out_hidden_size": width, "intermediate_size": 40, "window_size": 16}
        tower |= {"fullatt_block_indexes": [1]}
    tower |= vision
    window = 0 if old else tower["window_size"] // SIDE // MERGE
    special = {token: number + 1 for number, token in enumerate(SPECIAL)}
    config = (Qwen2VLConfig if old else Qwen2_5_VLConfig)(
        text_config=language,
        vision_config=tower,
        tie_word_embeddings=tied,
        image_token_id=special["<|image_pad|>"],
        video_token_id=special["<|video_pad|>"],
        vision_start_token_id=special["<|vision_start|>"],
        vision_end_token_id=special["<|vision_end|>"],
    )
    network: Any = Qwen2VLForConditionalGeneration if old else Qwen2_5_VLForConditionalGeneration

    def describe(folder: Path) -> None:
        write_words(folder, SPECIAL, TEMPLATE)
        image_processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "min_pixels": 24 * 24,
            "max_pixels": 40 * 40,
            "patch_size": SIDE,
            "temporal_patch_size": 2,
            "merge_size": MERGE,
            "image_mean": [0.48, 0.46, 0.41],
            "image_std": [0.27, 0.26, 0.28],
        }
        write_json(folder / "preprocessor_config.json", image_processor)

    return Case(
        name=name,
        build=lambda: randomized(network(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.visual.blocks",
            "projector": "model.visual.merger",
            **DECODER_PARTS,
        },
        arguments=arguments,
        picture_side=picture_side,
        alike=alike_within(window),
    )


EVERY = (
    qwen("qwen2-vl", old=True, tied=False),
    qwen(
        "qwen2-vl-tied-wide-heads",
        old=True,
        tied=True,
        text={
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
    ),
    qwen("qwen2.5-vl-windows", old=False, tied=True),
    qwen(
        "qwen2.5-vl-two-full",
        old=False,
        tied=False,
        text={"num_key_value_heads": 4},
        vision={"depth": 4, "fullatt_block_indexes": [0, 3], "window_size": 24},
    ),
)
