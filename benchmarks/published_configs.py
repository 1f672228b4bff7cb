"""The config.json files of the published checkpoints, at full size, as parsed JSON.

They contain every field of the files that describes the network, in the files' own spelling. What a file leaves to the
defaults of Hugging Face's config class is also left to them here, so that a reader that does not know a field fails in
the tests. Not included are names, versions, dtypes, attention dropout, scales of initial weights, and the ids of the
tokens that begin, end and pad texts.
"""

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Json:
    """The sizes of a decoder."""
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
    }


# LLaVA-1.5


def _llava(text: Json) -> Json:
    """LLaVA-1.5; by default the sizes of its Vicuna are those of 7B, which are `LlamaConfig`'s defaults."""
    return {
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,  # the tokenizer's 32002, padded
            **text,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": 32064,
    }


# Qwen2-VL and Qwen2.5-VL: flat files


def _qwen_vl(decoder: Json, tower: Json, *, max_window_layers: int, tied: bool, vocabulary: int) -> Json:
    """Shared by Qwen2-VL and Qwen2.5-VL: ids, positions, and the shape of the patches."""
    return {
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "max_window_layers": max_window_layers,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
        **decoder,
        "vision_config": {
            "depth": 32,
            "num_heads": 16,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            **tower,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vocab_size": vocabulary,
    }


def _qwen2_vl(sizes: Json, *, max_window_layers: int, tied: bool, vocabulary: int) -> Json:
    """Qwen2-VL; the tower's own width is `embed_dim`, and its `hidden_size` is the decoder's."""
    tower = {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": sizes["hidden_size"]}
    decoder = {"model_type": "qwen2_vl", "max_position_embeddings": 32768, **sizes}
    return _qwen_vl(decoder, tower, max_window_layers=max_window_layers, tied=tied, vocabulary=vocabulary)


def _qwen2_5_vl(sizes: Json, *, max_window_layers: int, tied: bool, vocabulary: int) -> Json:
    """Qwen2.5-VL; the tower's own width is `hidden_size`, and `out_hidden_size` is the decoder's."""
    tower = {
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": sizes["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    decoder = {"model_type": "qwen2_5_vl", "max_position_embeddings": 128000, **sizes}
    return _qwen_vl(decoder, tower, max_window_layers=max_window_layers, tied=tied, vocabulary=vocabulary)


# Llama 3.2 Vision


def _mllama() -> Json:
    """Llama-3.2-11B-Vision-Instruct, and models trained from it."""
    return {
        "model_type": "mllama",
        "image_token_index": 128256,  # the first of the eight rows that the embedding has beyond `vocab_size`
        "text_config": {
            "model_type": "mllama_text_model",
            "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 40,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "attention_heads": 16,
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "image_size": 560,  # 448 in the checkpoint that was not tuned to instructions
            "intermediate_layers_indices": [3, 7, 15, 23, 30],
            "intermediate_size": 5120,
            "max_num_tiles": 4,
            "norm_eps": 1e-05,
            "num_channels": 3,
            "num_global_layers": 8,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
            "vision_output_dim": 7680,
        },
    }


# InternVL3


def _internvl(text: Json) -> Json:
    """InternVL3 with the 300M tower.

    The file does not say whether the embeddings are tied. `InternVLConfig` of transformers 5 and our loader assume that
    they are until they find both tensors in the checkpoint. They are not tied, which is stated explicitly here.
    """
    return {
        "model_type": "internvl",
        "tie_word_embeddings": False,
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "image_token_id": 151667,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "max_window_layers": 70,
            "rms_norm_eps": 1e-06,
            "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 151674,  # Qwen2.5's tokenizer and nine more tokens, not padded
            **text,
        },
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": 1024,
            "image_size": [448, 448],
            "intermediate_size": 4096,
            "layer_norm_eps": 1e-06,
            "layer_scale_init_value": 0.1,
            "norm_type": "layer_norm",
            "num_attention_heads": 16,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": [14, 14],
            "projection_dropout": 0.0,
            "use_absolute_position_embeddings": True,
            "use_mask_token": False,
            "use_mean_pooling": True,
            "use_qk_norm": False,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


# Gemma 3


def _gemma3(text: Json) -> Json:
    """Gemma 3; defaults are 8 heads over 4 of width 256, 262208 tied embeddings, and one global layer in six."""
    return {
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "image_token_index": 262144,
        "mm_tokens_per_image": 256,
        "text_config": {
            "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            **text,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


# LLaVA-Video: LLaVA-NeXT's own flat layout, in which the tower is given by its name


def _llava_video(sizes: Json) -> Json:
    """LLaVA-Video with Qwen2."""
    sides = range(384, 2305, 384)
    return {
        "model_type": "llava_qwen",
        "add_faster_video": False,
        "add_time_instruction": False,
        "faster_token_stride": 10,
        "force_sample": False,
        **sizes,
        "hidden_act": "silu",
        "image_aspect_ratio": "anyres_max_9",
        "image_crop_resolution": None,
        "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
        "image_split_resolution": None,
        "image_token_index": 151646,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "mm_hidden_size": 1152,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "mm_vision_tower_lr": 2e-06,
        "pos_skipping_range": 4096,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 32768,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
        "use_pos_skipping": False,
        "use_sliding_window": False,
        "vision_tower_pretrained": None,
        "vocab_size": 152064,
    }


CONFIGS: Mapping[str, Json] = {
    "llava-7b": _llava({}),
    "llava-13b": _llava(_sizes(5120, 13824, layers=40, heads=40, kv_heads=40)),
    "qwen2-2b": _qwen2_vl(
        _sizes(1536, 8960, layers=28, heads=12, kv_heads=2), max_window_layers=28, tied=True, vocabulary=151936
    ),
    "qwen-3b": _qwen2_5_vl(
        _sizes(2048, 11008, layers=36, heads=16, kv_heads=2), max_window_layers=70, tied=True, vocabulary=151936
    ),
    "qwen-7b": _qwen2_5_vl(
        _sizes(3584, 18944, layers=28, heads=28, kv_heads=4), max_window_layers=28, tied=False, vocabulary=152064
    ),
    "llama-11b": _mllama(),
    "llava-cot": _mllama(),
    "internvl-1b": _internvl(_sizes(896, 4864, layers=24, heads=14, kv_heads=2)),
    "internvl-2b": _internvl(_sizes(1536, 8960, layers=28, heads=12, kv_heads=2)),
    "internvl-8b": _internvl(_sizes(3584, 18944, layers=28, heads=28, kv_heads=4)),
    "internvl-14b": _internvl(_sizes(5120, 13824, layers=48, heads=40, kv_heads=8)),
    "gemma-4b": _gemma3({"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}),
    "gemma-12b": _gemma3(_sizes(3840, 15360, layers=48, heads=16, kv_heads=8)),
    "llava-video": _llava_video(_sizes(3584, 18944, layers=28, heads=28, kv_heads=4)),
}
"""Parsed config.json files by alias (`jaxid.families.registry.ALIASES`); make a deep copy before changing one."""
