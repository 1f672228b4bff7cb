"""Tiny Gemma 3 models, their sliding windows shorter than the prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from families.base import DECODER_PARTS, Case, randomized, tensors, write_words
from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

SPECIAL = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")
SPECIAL += ("<image_soft_token>",)
IDS = {token: number + 1 for number, token in enumerate(SPECIAL)}
TEMPLATE = (
    "<bos>{% for message in messages %}<start_of_turn>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEXT = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 6,
    "sliding_window_pattern": 2,
    "max_position_embeddings": 256,
    "rope_theta": 900.0,
    "rope_local_base_freq": 50.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "pad_token_id": IDS["<pad>"],
    "eos_token_id": IDS["<eos>"],
    "bos_token_id": IDS["<bos>"],
}
TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 4,
    "vision_use_head": False,
}


def arguments(batch: Prompts) -> dict[str, Any]:
    """The prompts, and which of their tokens are pictures'."""
    found = tensors(batch)
    return found | {"token_type_ids": (found["input_ids"] == IDS["<image_soft_token>"]).long()}


def gemma3(name: str, *, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, **top: Any) -> Case:
    """A Gemma 3 case."""
    config: Any = Gemma3Config(
        text_config=Gemma3TextConfig(**{**TEXT, **text}),
        vision_config=SiglipVisionConfig(**{**TOWER, **vision}),
        **{
            "mm_tokens_per_image": 16,
            "image_token_index": IDS["<image_soft_token>"],
            "boi_token_index": IDS["<start_of_image>"],
            "eoi_token_index": IDS["<end_of_image>"],
            **top,
        },
    )

    def describe(folder: Path) -> None:
        tokens = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
        write_words(folder, SPECIAL, TEMPLATE, first="<bos>", extra_special_tokens=tokens)
        side = config.vision_config.image_size
        image_processor = {
            "image_processor_type": "Gemma3ImageProcessor",
            "do_pan_and_scan": None,
            "size": {"height": side, "width": side},
            "image_mean": [0.5, 0.45, 0.4],
            "image_std": [0.5, 0.5, 0.45],
        }
        write_json(folder / "preprocessor_config.json", image_processor)

    return Case(
        name=name,
        build=lambda: randomized(Gemma3ForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_tower.encoder.layers",
            "projector": "model.multi_modal_projector",
            **DECODER_PARTS,
        },
        sites={
            "attn_out": "post_attention_layernorm",
            "resid_mid": "pre_feedforward_layernorm",
            "mlp_out": "post_feedforward_layernorm",
        },
        arguments=arguments,
    )


EVERY = (
    gemma3("gemma3"),
    gemma3(
        "gemma3-untied-odd-every-third-full",
        text={"tie_word_embeddings": False, "num_key_value_heads": 1, "sliding_window_pattern": 3, "sliding_window": 9},
        vision={"image_size": 30, "num_attention_heads": 3},
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    ),
)
