"""Writes trained networks as checkpoint folders in Hugging Face's layout."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import PyTree

from jaxid.checkpoints.tensors import save_parameters
from jaxid.families.clip import CLIPConfig, clip_keys
from jaxid.families.llava import LlavaConfig, llava_keys
from jaxid.families.llava_video import LlavaVideoConfig, original_keys
from jaxid.io import write_json
from jaxid.nn.decoder_config import RopeConfig
from jaxid.nn.fields import Json
from jaxid.nn.vision import VisionConfig

SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def write_llava(
    folder: Path,
    config: LlavaConfig,
    parameters: PyTree,
    *,
    vocabulary: Sequence[str],
    chat_template: str,
    mean: Sequence[float],
    std: Sequence[float],
) -> None:
    """Writes a LLaVA folder with a word-level tokenizer.

    Args:
        folder: output folder, created if it does not exist.
        config: the network's shape.
        parameters: nested dictionaries of arrays, as `Llava` holds them.
        vocabulary: all tokens, in the order of their ids; must contain the special tokens and "<image>".
        chat_template: Jinja template of the conversation.
        mean: mean of the pixels, per channel.
        std: standard deviation of the pixels, per channel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", hf_config(config, vocabulary))
    save_parameters(folder / "model.safetensors", parameters, llava_keys(config))
    write_tokenizer(folder, vocabulary, chat_template)
    write_processor(folder, config, mean=mean, std=std)
    words = list(vocabulary)
    generation = {"eos_token_id": words.index("</s>"), "pad_token_id": words.index("<pad>")}
    write_json(folder / "generation_config.json", generation)


def write_processor(folder: Path, config: LlavaConfig, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes the configuration files of CLIP's image processor and of LLaVA's processor."""
    write_image_processor(folder, config.vision_config.image_size, mean=mean, std=std)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": config.vision_config.patch_size,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }
    write_json(folder / "processor_config.json", processor)


def write_image_processor(folder: Path, side: int, *, mean: Sequence[float], std: Sequence[float]) -> None:
    """Writes the configuration file of CLIP's image processor."""
    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    write_json(folder / "preprocessor_config.json", image_processor)


def hf_config(config: LlavaConfig, vocabulary: Sequence[str]) -> Json:
    """The config.json for Hugging Face's LlavaForConditionalGeneration."""
    text, vision = config.text_config, config.vision_config
    words = list(vocabulary)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_index,
        "image_seq_length": config.image_tokens,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.multimodal_projector_bias,
        "vision_feature_layer": config.vision_feature_layer[0]
        if len(config.vision_feature_layer) == 1
        else list(config.vision_feature_layer),
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "llama",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": text.num_key_value_heads,
            "head_dim": text.head_dim,
            "hidden_act": text.hidden_act,
            "rms_norm_eps": text.rms_norm_eps,
            "attention_bias": text.attention_bias,
            "mlp_bias": text.mlp_bias,
            "tie_word_embeddings": text.tie_word_embeddings,
            "rope_parameters": _rope_parameters(text.rope),
            "max_position_embeddings": 1024,
            "bos_token_id": words.index("<s>"),
            "eos_token_id": words.index("</s>"),
            "pad_token_id": words.index("<pad>"),
        },
        "vision_config": _vision_fields(vision),
    }


def _vision_fields(vision: VisionConfig) -> Json:
    """The vision tower's part of a config.json."""
    return {
        "model_type": "clip_vision_model",
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.intermediate_size,
        "num_hidden_layers": vision.num_hidden_layers,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.num_channels,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "hidden_act": vision.hidden_act,
        "layer_norm_eps": vision.layer_norm_eps,
    }


def _rope_parameters(rope: RopeConfig) -> Json:
    """Only the fields that the kind of scaling reads; Hugging Face warns about others."""
    fields = dataclasses.asdict(rope)
    kept = {"default": 2, "linear": 3}.get(rope.rope_type, 6)
    return dict(list(fields.items())[:kept])


def write_tokenizer(folder: Path, vocabulary: Sequence[str], chat_template: str) -> None:
    """Writes a word-level tokenizer; ids are indices into `vocabulary`."""
    _save_words(folder, vocabulary, [*SPECIAL.values(), "<image>"], "<s> $A")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        **SPECIAL,
    }
    write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(chat_template)
    write_json(folder / "special_tokens_map.json", dict(SPECIAL))


def _save_words(
    folder: Path,
    vocabulary: Sequence[str],
    special: Sequence[str],
    frame: str,
    *,
    lowercase: bool = False,
    digits: bool = False,
    split_off: Sequence[str] = (),
) -> None:
    """Writes the tokenizer.json of a word-level tokenizer.

    Args:
        folder: output folder.
        vocabulary: all tokens, in the order of their ids.
        special: the special tokens.
        frame: template of an encoded text, in which "$A" is the text.
        lowercase: lower the case of texts first.
        digits: split numbers into digits.
        split_off: words that are tokens also where they follow another word without a space.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {word: index for index, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    # Whole words and single punctuation marks; white space is not a token.
    cuts: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    cuts += [pre_tokenizers.Digits(True)] * digits
    cuts += [pre_tokenizers.Split(Regex(f"{word}$"), "isolated") for word in split_off]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens(list(special))
    around = [(token, ids[token]) for token in frame.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=frame, special_tokens=around)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_clip(folder: Path, config: CLIPConfig, parameters: PyTree, vocabulary: Sequence[str]) -> None:
    """Writes a CLIP folder with a word-level tokenizer.

    Args:
        folder: output folder, created if it does not exist.
        config: the network's shape.
        parameters: nested dictionaries of arrays, as `CLIP` holds them.
        vocabulary: tokens, the index is the id: "<pad>" first, "<|startoftext|>" and "<|endoftext|>" last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, vision = config.text_config, config.vision_config
    start, end = vocabulary[-2:]
    fields = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_hidden_layers,
            "num_attention_heads": text.num_attention_heads,
            "max_position_embeddings": text.max_position_embeddings,
            "projection_dim": config.projection_dim,
            "hidden_act": text.hidden_act,
            "layer_norm_eps": text.layer_norm_eps,
            "pad_token_id": 0,
            "bos_token_id": len(vocabulary) - 2,
            "eos_token_id": text.eos_token_id,
        },
        "vision_config": {**_vision_fields(vision), "projection_dim": config.projection_dim},
    }
    write_json(folder / "config.json", fields)
    save_parameters(folder / "model.safetensors", parameters, clip_keys(config))
    _save_words(folder, vocabulary, [vocabulary[0], "<unk>", start, end], f"{start} $A {end}", lowercase=True)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": text.max_position_embeddings,
        "processor_class": "CLIPProcessor",
        "pad_token": vocabulary[0],
        "unk_token": "<unk>",
        "bos_token": start,
        "eos_token": end,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_image_processor(folder, vision.image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    write_json(folder / "processor_config.json", {"processor_class": "CLIPProcessor"})


def write_video(folder: Path, config: LlavaVideoConfig, parameters: PyTree, vocabulary: Sequence[str]) -> None:
    """Writes a LLaVA-Video folder in LLaVA-NeXT's layout, with a word-level tokenizer.

    Args:
        folder: output folder, created if it does not exist.
        config: the network's shape.
        parameters: nested dictionaries of arrays, as `LlavaVideo` holds them.
        vocabulary: all tokens, in the order of their ids; the first are "<|endoftext|>", "<|im_start|>", "<|im_end|>",
            "<image>" and "<unk>".
    """
    folder.mkdir(parents=True, exist_ok=True)
    text, vision, words = config.text_config, config.vision_config, list(vocabulary)
    fields = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "hidden_act": text.hidden_act,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_theta": text.rope.rope_theta,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": text.tie_word_embeddings,
        "eos_token_id": words.index("<|im_end|>"),
        "pad_token_id": words.index("<|endoftext|>"),
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_newline_position": config.mm_newline_position,
        "mm_spatial_pool_mode": config.mm_spatial_pool_mode,
        "mm_spatial_pool_stride": 2,
        "mm_vision_tower": "a small SigLIP, described by vision_config",
        "add_time_instruction": True,
        "torch_dtype": "float32",
        "vision_config": {**_vision_fields(vision), "model_type": "siglip_vision_model"},
    }
    write_json(folder / "config.json", fields)
    save_parameters(folder / "model.safetensors", parameters, original_keys(config))
    # The published temporal swap asks "Does the star comeearlier or later than fish?".
    _save_words(folder, vocabulary, words[:4], "$A", digits=True, split_off=("earlier",))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "bos_token": None,
    }
    write_json(folder / "tokenizer_config.json", settings)
