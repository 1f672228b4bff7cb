"""A model of LLaVA-Video's geometry with random weights: as many clip tokens and layers, but narrower.

Eight frames of 27 x 27 patches, pooled to 14 x 14, with a newline after every row make 1,680 tokens. The decoder has
the 28 layers of the published 7B model, so that a sweep over its layers has as many edits, and the same biases and
grouped queries. The tower is small.
"""

import json
from pathlib import Path

from geometry import parameters

from jaxid.families.llava_video import LlavaVideo, LlavaVideoConfig
from jaxid.io import write_json
from jaxid.nn.decoder_config import DecoderConfig, RopeConfig
from jaxid.nn.vision import KINDS, VisionConfig
from jaxid.zoo import tiny_video
from jaxid.zoo.export import write_video

FRAMES = 8

CONFIG = LlavaVideoConfig(
    text_config=DecoderConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=28,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        rope=RopeConfig(rope_theta=1000000.0),
    ),
    vision_config=VisionConfig(
        **{
            **KINDS["siglip_vision_model"],
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 384,
            "patch_size": 14,
        }
    ),
    mm_newline_position="grid",
)
"""About 95 million parameters."""


def write(folder: Path, config: LlavaVideoConfig = CONFIG, *, seed: int = 0) -> Path:
    """Writes the checkpoint in LLaVA-NeXT's layout, into a new folder.

    Args:
        folder: output folder.
        config: the model's shape; its vocabulary needs room for about 1,000 bytes and words.
        seed: seed of the weights.

    Returns:
        The folder.
    """
    write_video(folder, config, parameters(LlavaVideo, config, seed), tiny_video.VOCABULARY)
    _write_tokenizer(folder, config.text_config.vocab_size)
    return folder


def _write_tokenizer(folder: Path, most: int) -> None:
    """A byte-level tokenizer like Qwen2's, in which every word, digit and mark of the prompts is a single token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=most,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(tiny_video.SPECIAL),
        show_progress=False,
    )
    words = [word for word in tiny_video.VOCABULARY if word.isalpha()]
    tokenizer.train_from_iterator([*words, *(f" {word}" for word in words)] * 2, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = folder / "tokenizer_config.json"
    write_json(settings, json.loads(settings.read_text()) | {"model_max_length": 32768})
