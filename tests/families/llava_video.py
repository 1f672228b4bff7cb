"""Tiny LLaVA-Video models in LLaVA-NeXT's layout, and LLaVA-OneVision ones in Hugging Face's."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llava_next_video
import numpy as np
import torch
from full_size import CONFIGS
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from families.base import DECODER_PARTS, Case, randomized
from jaxid.io import write_json
from jaxid.prompts.processor import Prompts

WORDS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    "<|im_start|>user <image>\nIs the star to the left or right of the fish? yes no before after<|im_end|>",
    "Where is the fish? The video lasts for 2.00 seconds, and 8 frames are uniformly sampled from it.",
    *("left", "right", "yes", "no", "above", "below", "before", "after"),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES = ((48, 40), (30, 70))
"""Height and width of the pictures that all families are shown."""

ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Spoken to without pictures, as the tokenizer of Qwen2 brings it.
TEXT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_tokenizer(folder: Path, added: tuple[str, ...], template: str) -> None:
    """A small byte-level tokenizer of Qwen2's kind: no token begins a text, none is unknown."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(WORDS * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (*SPECIAL, *added)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(template)


IDS = 383
"""Number of the tokenizer's tokens before those for pictures; a test checks it."""

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
}
TOWER = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2}
PINPOINTS = [[30, 60], [30, 90], [60, 30], [60, 60]]


# --- Hugging Face's layout ------------------------------------------------------------------------------------------


def onevision(
    name: str, *, text: Mapping[str, Any] = {}, vision: Mapping[str, Any] = {}, clips: bool = False, **top: Any
) -> Case:
    """A LLaVA-OneVision case."""
    picture = {"image_size": 30, "patch_size": 6, "vision_use_head": False}
    config: Any = LlavaOnevisionConfig(
        text_config=Qwen2Config(**{"vocab_size": IDS + 2, **TEXT, **text}),
        vision_config=SiglipVisionConfig(**{**TOWER, **picture, **vision}),
        **{"image_token_index": IDS, "video_token_index": IDS + 1, "image_grid_pinpoints": PINPOINTS, **top},
    )
    side = config.vision_config.image_size

    def describe(folder: Path) -> None:
        write_tokenizer(folder, ("<image>", "<video>"), ONEVISION_TEMPLATE)
        image = {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_pad": True,
            "size": {"height": side, "width": side},
            "resample": 3,
            "rescale_factor": 1 / 255,
            "image_grid_pinpoints": config.image_grid_pinpoints,
            "image_mean": [0.5, 0.45, 0.4],
            "image_std": [0.5, 0.5, 0.45],
        }
        kept = {
            key: value for key, value in image.items() if not key.startswith(("image_grid", "image_proc", "do_pad"))
        }
        video = {**kept, "video_processor_type": "LlavaOnevisionVideoProcessor", "image_mean": [0.5, 0.5, 0.5]}
        write_json(folder / "preprocessor_config.json", image)
        write_json(folder / "video_preprocessor_config.json", video)
        write_json(
            folder / "processor_config.json",
            {
                "processor_class": "LlavaOnevisionProcessor",
                "num_image_tokens": (side // config.vision_config.patch_size) ** 2,
                "vision_feature_select_strategy": "full",
                "vision_aspect_ratio": config.vision_aspect_ratio,
            },
        )

    def arguments(batch: Prompts) -> dict[str, Any]:
        found: dict[str, Any] = {
            "input_ids": torch.tensor(np.asarray(batch.inputs.token_ids)).long(),
            "attention_mask": torch.tensor(np.asarray(batch.inputs.valid)).long(),
        }
        if batch.inputs.pixels is None:
            return found
        pixels = torch.tensor(np.asarray(batch.inputs.pixels))
        if "frames" in batch.inputs.extras:
            videos = sum(text.count("<video>") > 0 for text in batch.texts)
            clips_in_each = 2 if any(text.count("<video>") > tokens_of_clip(config, 3) for text in batch.texts) else 1
            return found | {"pixel_values_videos": pixels.unflatten(0, (videos * clips_in_each, -1))}
        sizes, numbers = pictures_of(batch, config)
        return found | {
            "pixel_values": pixels[: squares_of(sizes, numbers, config)],
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(numbers),
        }

    return Case(
        name=name,
        build=lambda: randomized(LlavaOnevisionForConditionalGeneration(config), name),
        describe=describe,
        parts={
            "tower_blocks": "model.vision_tower.encoder.layers",
            "projector": "model.multi_modal_projector",
            **DECODER_PARTS,
        },
        arguments=arguments,
        picture_side=picture_side,
        alike=alike,
        clips=clips,
    )


def tokens_of_clip(config: Any, frames: int) -> int:
    """As HF's processor counts them."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    return frames * (-(-side // 2)) ** 2 + 1


def tokens_of_picture(config: Any, size: tuple[int, int]) -> int:
    """As HF's processor counts them."""
    processor = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
    side = config.vision_config.image_size
    processor.num_image_tokens = (side // config.vision_config.patch_size) ** 2
    processor.vision_aspect_ratio = config.vision_aspect_ratio
    processor.image_processor = type("ImageProcessor", (), {"image_grid_pinpoints": config.image_grid_pinpoints})
    return processor._get_number_of_features(*size, side, side)


def pictures_of(batch: Prompts, config: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """Sizes of the pictures and their number in every prompt, told by the prompts' image tokens."""
    sizes, numbers = [], []
    for text in batch.texts:
        count = text.count("<image>")
        alone = [size for size in SIZES if tokens_of_picture(config, size) == count]
        sizes += alone or SIZES  # of two in one prompt, the sizes do not matter
        numbers.append(len(alone) or 2)
    return sizes, numbers


def squares_of(sizes: list[tuple[int, int]], numbers: list[int], config: Any) -> int:
    """How many squares the pictures are cut into."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    alone = [number == 1 for number in numbers for _ in range(number)]
    side, pinpoints = config.vision_config.image_size, config.image_grid_pinpoints
    cut = [image_size_to_num_patches(size, pinpoints, side) for size in sizes]
    return sum(count if one else 1 for count, one in zip(cut, alone, strict=True))


def picture_side(network: Any, inputs: Any) -> dict[str, Any]:
    """The tower's hidden states, and what the projector makes of them before any pooling."""
    return {"tower": network.tower(inputs.pixels), "projector": network.image_features(inputs.pixels)}


def alike(name: str, ours: np.ndarray, theirs: np.ndarray, batch: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Without the empty squares that pad the batch."""
    del name, batch
    return ours[: len(theirs)], theirs


# --- LLaVA-NeXT's layout --------------------------------------------------------------------------------------------


def original(name: str, *, vision: Mapping[str, Any] = {}, **top: Any) -> Case:
    """A LLaVA-Video case; fields as in the published config.json, but for sizes and what describes the tower."""
    tower = {**TOWER, "image_size": 30, "patch_size": 6, **vision}
    fields = {
        **CONFIGS["llava-video"],
        "architectures": ["LlavaQwenForCausalLM"],
        "vocab_size": IDS,
        **TEXT,
        "vision_config": tower,
        "eos_token_id": IDS - 1,
        "mm_hidden_size": tower["hidden_size"],
        "mm_spatial_pool_stride": None,
        **top,
    }

    return Case(
        name=name,
        build=lambda: randomized(llava_next_video.LlavaNextVideo(fields), name),
        describe=lambda folder: write_tokenizer(folder, (), TEXT_TEMPLATE),
        parts={
            "tower_blocks": "model.vision_tower.vision_tower.encoder.layers",
            "projector": "model.mm_projector",
            "blocks": "model.layers",
            "norm": "model.norm",
        },
        arguments=original_arguments,
        reference=llava_next_video.load,
        picture_side=picture_side,
        alike=alike,
        clips=True,
    )


def original_arguments(batch: Prompts) -> dict[str, Any]:
    """Prompts as LLaVA-NeXT writes them, one number for a whole clip; clips of equal numbers of frames."""
    rows, count = [], 0
    for ids, valid in zip(np.asarray(batch.inputs.token_ids), np.asarray(batch.inputs.valid), strict=True):
        runs = [(one, list(group)) for one, group in itertools.groupby(ids[valid].tolist())]
        rows.append([token for one, run in runs for token in ([llava_next_video.CLIP] if one == IDS else run)])
        count += rows[-1].count(llava_next_video.CLIP)
    pixels = torch.tensor(np.asarray(batch.inputs.pixels)) if count else None
    clips = [] if pixels is None else list(pixels.unflatten(0, (count, -1)))
    return {"input_ids": rows, "clips": clips, "length": batch.inputs.token_ids.shape[1]}


EVERY = (
    onevision("onevision-pictures-shrunk", vision_aspect_ratio="anyres_max_2"),
    onevision(
        "onevision-clips-tied-layers",
        text={
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
        },
        vision={"image_size": 32, "patch_size": 8, "vision_use_head": True},
        image_grid_pinpoints=[[32, 64], [64, 64]],
        vision_feature_layer=[-3, -1],
        multimodal_projector_bias=False,
        projector_hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        clips=True,
    ),
    original("video-grid"),
    original(
        "video-frame-pairs-tied",
        vision={"image_size": 32, "num_attention_heads": 3},  # the patch does not divide the picture
        mm_newline_position="frame",
        mm_spatial_pool_mode="average",
        mm_spatial_pool_stride=2,
        tie_word_embeddings=True,
        num_attention_heads=4,
        num_key_value_heads=4,
    ),
)
