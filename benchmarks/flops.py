"""Floating-point operations of the tasks: matrix products, with two operations per multiply-add."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

Config = Any
"""`LlavaConfig` or `LlavaVideoConfig`; tests count by hand with plain namespaces."""


def tower(config: Config, depth: int) -> float:
    """One picture through the tower's first blocks and the projector."""
    vision, width = config.vision_config, config.text_config.hidden_size
    inner, patches = vision.hidden_size, vision.num_patches
    tokens = patches + 1
    block = 2 * tokens * (4 * inner**2 + 2 * inner * vision.intermediate_size) + 4 * tokens**2 * inner
    patching = 2 * patches * vision.num_channels * vision.patch_size**2 * inner
    projector = 2 * config.image_tokens * (inner * len(config.vision_feature_layer) * width + width**2)
    return depth * block + patching + projector


def block(config: Config, keys: int, queries: int, context: float) -> float:
    """A decoder block that computes keys and values of some tokens and outputs of some.

    Args:
        config: the model's config.
        keys: number of tokens with new keys and values.
        queries: number of tokens whose outputs are computed.
        context: number of tokens that each query attends to, summed over queries.
    """
    text = config.text_config
    width, head = text.hidden_size, text.head_dim
    made = 2 * 2 * keys * width * text.num_key_value_heads * head
    asked = 2 * queries * (2 * width * text.num_attention_heads * head + 3 * width * text.intermediate_size)
    return made + asked + 4 * context * text.num_attention_heads * head


def control(config: Config, tokens: int, kept: int, pictures: int = 1) -> float:
    """A clean pass over a prompt with pictures or frames; the last block computes only the kept tokens."""
    states = config.vision_config.num_hidden_layers + 1
    depth = max(layer if layer >= 0 else states + layer for layer in config.vision_feature_layer)
    layers = config.text_config.num_hidden_layers
    triangle = tokens * (tokens + 1) / 2
    last = block(config, tokens, kept, kept * (tokens - (kept - 1) / 2))
    unembedding = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    return pictures * tower(config, depth) + (layers - 1) * block(config, tokens, tokens, triangle) + last + unembedding


def edit(config: Config, first_block: int, prefix: int, suffix: int) -> float:
    """One edited pass over the suffix, from `first_block` on; the last block computes only the last token."""
    layers = config.text_config.num_hidden_layers
    unembedding = 2 * config.text_config.hidden_size * config.text_config.vocab_size
    if first_block >= layers:
        return unembedding
    context = suffix * prefix + suffix * (suffix + 1) / 2
    whole = (layers - 1 - first_block) * block(config, suffix, suffix, context)
    return whole + block(config, suffix, 1, prefix + suffix) + unembedding


def edits(config: Config, layers: Sequence[int], prefix: int, suffix: int) -> float:
    """Edits after the given layers."""
    return sum(edit(config, layer + 1, prefix, suffix) for layer in layers)


def matrix_peak(size: int = 2048, rounds: int = 9) -> float:
    """Operations per second of a large float32 matrix product, the better of JAX and PyTorch."""
    import jax
    import torch

    values = np.random.default_rng(0).standard_normal((2, size, size), np.float32)
    left, right = jax.device_put(values[0]), jax.device_put(values[1])
    product = jax.jit(lambda left, right: left @ right)
    torch_left, torch_right = torch.from_numpy(values[0]), torch.from_numpy(values[1])
    best = float("inf")
    for call in (lambda: product(left, right).block_until_ready(), lambda: torch_left @ torch_right):
        for _ in range(rounds):
            started = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best
