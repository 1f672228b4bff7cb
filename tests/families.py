"""Tiny random models of every family in one list: each test of a contract that holds for all families runs over it."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import jaxid.models.llava
from jaxid.zoo.export import write_processor, write_tokenizer
from jaxid.zoo.tiny_llava import CHAT_TEMPLATE

VOCABULARY = tuple(
    """<unk> <s> </s> <pad> <image> USER ASSISTANT : ? . , " Is the star to left or right of fish Where is picture
    cat above below and yes no A""".split()
)
"""Tokens of the tiny models' word-level tokenizer; the index is the id."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
        name: how test reports call it.
        build: makes the random Hugging Face model.
        describe: writes what a checkpoint folder holds besides weights and config.
        parts: where the Hugging Face model keeps the tower's blocks, the projector, the decoder's blocks and the
            final norm.
    """

    name: str
    build: Callable[[], Any]
    describe: Callable[[Path], None]
    parts: Mapping[str, str]


def randomized(model: Any, seed: str) -> Any:
    """The model with every parameter drawn anew, so that no norm is 1, no bias 0 and no two tensors are alike."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            scale_of_norm = parameter.ndim == 1 and name.endswith("weight")
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread * noise + float(scale_of_norm))
    return model.eval()


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
        ours = jaxid.models.llava.LlavaConfig.from_hf(fields)
        write_tokenizer(folder, VOCABULARY, CHAT_TEMPLATE)
        write_processor(folder, ours, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))

    return Case(
        name=name,
        build=lambda: randomized(LlavaForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_tower.encoder.layers",
            "projector": "model.multi_modal_projector",
            "blocks": "model.language_model.layers",
            "norm": "model.language_model.norm",
        },
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

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
"""All tiny models. A new family adds its cases here."""
