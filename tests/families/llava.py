"""Tiny LLaVA models."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

import jaxid.families.llava
from families.base import DECODER_PARTS, LLAMA3, VOCABULARY, Case, randomized
from jaxid.io import write_json
from jaxid.zoo.export import write_processor, write_tokenizer
from jaxid.zoo.tiny_llava import CHAT_TEMPLATE


def llava_config(*, text: Mapping[str, Any], vision: Mapping[str, Any], **top: Any) -> LlavaConfig:
    """A tiny LlavaConfig; the arguments go over small defaults."""
    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 3}
    tower = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
    picture = {"image_size": 32, "patch_size": 8}
    return LlavaConfig(
        text_config=LlamaConfig(**{**sizes, **heads, **text}),
        vision_config=CLIPVisionConfig(**{**tower, **picture, **vision}),
        **{"image_token_index": VOCABULARY.index("<image>"), "image_seq_length": 16, **top},
    )


def llava(name: str, *, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, **top: Any) -> Case:
    """A LLaVA case."""
    config = llava_config(text=text, vision=vision, **top)

    def describe(folder: Path) -> None:
        fields = config.to_dict()
        ours = jaxid.families.llava.LlavaConfig.from_hf(fields)
        write_tokenizer(folder, VOCABULARY, CHAT_TEMPLATE)
        write_processor(folder, ours, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))

    return Case(
        name=name,
        build=lambda: randomized(LlavaForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_tower.encoder.layers",
            "projector": "model.multi_modal_projector",
            **DECODER_PARTS,
        },
    )


CASES = (
    llava("llava-plain"),
    llava(
        "llava-grouped-tied-linear-full-odd",
        text={
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0},
        },
        vision={"image_size": 30, "num_attention_heads": 3},  # the patch does not divide the picture
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    llava(
        "llava-biases-llama3-list",
        text={
            "num_key_value_heads": 1,
            "head_dim": 12,
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "rope_parameters": LLAMA3,
        },
        vision={"hidden_act": "gelu", "layer_norm_eps": 1e-3},
        vision_feature_layer=[-3, -1],
        multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh",
    ),
)
"""The models on which everything is tested in depth."""


def siglip(name: str, *, image_size: int, layers: int | list[int], strategy: Any) -> Case:
    """A case of LLaVA's variants: a SigLIP tower and a Qwen2 decoder."""
    tower = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
        pad_token_id=3,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=tower,
        image_token_index=VOCABULARY.index("<image>"),
        vision_feature_layer=layers,
        vision_feature_select_strategy=strategy,
    )

    def describe(folder: Path) -> None:
        write_tokenizer(folder, VOCABULARY, CHAT_TEMPLATE)
        image_processor = {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": image_size, "width": image_size},
            "image_mean": [0.5, 0.45, 0.4],
            "image_std": [0.5, 0.5, 0.45],
        }
        write_json(folder / "preprocessor_config.json", image_processor)

    return Case(
        name=name,
        build=lambda: randomized(LlavaForConditionalGeneration(config), name),
        describe=describe,
        parts=CASES[0].parts,
    )


EVERY = (
    *CASES,
    siglip("llava-siglip-qwen2", image_size=32, layers=-1, strategy="full"),
    siglip("llava-siglip-qwen2-list-first-dropped", image_size=36, layers=[-2, 1], strategy="default"),
)
"""These, and the family's further variants."""
