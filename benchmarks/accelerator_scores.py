"""Which arrays hold attention's scores: those with an axis of queries and an axis of keys."""

from collections.abc import Sequence

import accelerator_programs as programs

from jaxid.families.mllama import MllamaConfig
from jaxid.families.qwen_vl import QwenVLConfig


def axes_of_keys(alias: str, work: str, chips: int = 1) -> tuple[Sequence[int], Sequence[int]]:
    """Lengths of key axes in a work, and of axes that are neither of queries nor of keys, for finding scores.

    Args:
        alias: the model.
        work: the work, or the name of one of its programs.
        chips: number of chips that share the widths and heads.
    """
    if alias == programs.ENCODER:
        config, _, leaves = programs.encoder_geometry()
        keys = [config.vision_config.num_patches + 1]
        return keys, sorted({length for leaf in leaves.values() for length in leaf.shape} - {*keys})
    own = programs.geometry(alias)
    vision, keys, pictures = own.config.vision_config, [own.tokens], own.pictures[0]
    if isinstance(own.config, MllamaConfig):  # tokens of tiles may be padded
        padded, tiles = -(-vision.tile_tokens // 8) * 8, vision.max_num_tiles
        keys += [padded, vision.tile_tokens, tiles * padded, tiles * vision.tile_tokens]
        pictures *= tiles
    elif work in ("trace", "extract", "finetune"):
        qwen = isinstance(own.config, QwenVLConfig)
        keys.append(own.pictures[1] if qwen else vision.num_patches + vision.class_token)
    widths = {length for leaf in own.leaves.values() for length in leaf.shape}
    heads = {pictures * vision.num_attention_heads, programs.PROMPTS * own.text.num_attention_heads}
    joined = {count * length for count in (programs.PROMPTS, programs.TRAINED, pictures) for length in keys}
    whole = widths | heads | joined
    return keys, sorted((whole | {length // chips for length in widths | heads}) - {*keys})
