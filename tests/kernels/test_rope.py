"""Rotary embedding against Hugging Face's, for every kind of scaling and axes, and its defining property."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2_vl
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig

from jaxid.kernels import rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    "default": ({}, lambda plain: plain),
    "linear": ({"factor": 4.0}, lambda plain: plain / np.float32(4.0)),
    "llama3": (LLAMA3, lambda plain: rope.llama3_frequencies(plain, **LLAMA3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equals_hugging_face(kind: str) -> None:
    fields, scaled = KINDS[kind]
    theta, width, rng = 700.0, 24, np.random.default_rng(1)
    config = LlamaConfig(
        hidden_size=96,
        num_attention_heads=4,
        head_dim=width,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **fields},
    )
    theirs = LlamaRotaryEmbedding(config)
    frequencies = scaled(rope.inverse_frequencies(width, theta))
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)

    heads = rng.standard_normal((2, 7, 3, width), dtype=np.float32)
    positions = rng.integers(0, 500, (2, 7))
    cosine, sine = theirs(torch.tensor(heads), torch.tensor(positions))
    turned, _ = apply_rotary_pos_emb(torch.tensor(heads), torch.tensor(heads), cosine, sine, unsqueeze_dim=2)
    ours = rope.rotate(jnp.asarray(heads), *rope.rotations(jnp.asarray(positions), frequencies))
    np.testing.assert_allclose(ours, turned.numpy(), atol=2e-4)  # the angles reach 500 radians in float32
    near = positions < 20
    np.testing.assert_allclose(np.asarray(ours)[near], turned.numpy()[near], atol=5e-6)


def test_llama3_has_all_three_ranges() -> None:
    plain = rope.inverse_frequencies(24, 700.0)
    ratio = plain / rope.llama3_frequencies(plain, **LLAMA3)
    assert ratio[0] == 1 and ratio[-1] == 8
    assert ((ratio > 1.01) & (ratio < 7.9)).any() and (np.diff(ratio) >= 0).all()


def test_scores_depend_on_the_distance_alone() -> None:
    rng = np.random.default_rng(2)
    query, key = (jnp.asarray(rng.standard_normal((1, 1, 1, 16), dtype=np.float32)) for _ in range(2))
    frequencies = rope.inverse_frequencies(16, 100.0)

    def score(at_query: int, at_key: int) -> float:
        turned = [
            rope.rotate(heads, *rope.rotations(jnp.array([[position]]), frequencies))
            for heads, position in ((query, at_query), (key, at_key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-5)


def test_keeps_the_dtype() -> None:
    heads = jnp.ones((1, 2, 1, 4), jnp.bfloat16)
    turned = rope.rotate(heads, *rope.rotations(jnp.array([[0, 3]]), rope.inverse_frequencies(4, 10.0)))
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned[:, 0], heads[:, 0])


# --- several axes ---------------------------------------------------------------------------------------------------


def spread_out(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Places of which no two axes' are alike."""
    return rng.permutation(4 * int(np.prod(shape)))[: int(np.prod(shape))].reshape(shape)


@pytest.mark.parametrize("sections", [(2, 3, 3), (4, 1, 1, 1, 1), (1, 1, 2, 2, 1, 1), (8,)], ids=str)
def test_multimodal_rotations_equal_hugging_face(sections: tuple[int, ...]) -> None:
    theta, width, rng = 300.0, 16, np.random.default_rng(3)
    config: Any = Qwen2VLTextConfig(
        hidden_size=3 * width,
        num_attention_heads=3,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": list(sections)},
    )
    positions = spread_out(rng, 2, 3, 7)
    query, key = (rng.standard_normal((2, 7, heads, width), dtype=np.float32) for heads in (3, 1))
    theirs = qwen2_vl.Qwen2VLRotaryEmbedding(config)
    turned = qwen2_vl.apply_rotary_pos_emb(
        torch.tensor(query),
        torch.tensor(key),
        *theirs(torch.tensor(query), torch.tensor(positions.swapaxes(0, 1))),
        unsqueeze_dim=2,
    )
    frequencies = rope.inverse_frequencies(width, theta)
    cosine, sine = rope.multimodal_rotations(jnp.asarray(positions), frequencies, sections)
    assert cosine.shape == sine.shape == (2, 7, 8)
    for heads, wanted in zip((query, key), turned, strict=True):
        np.testing.assert_allclose(rope.rotate(jnp.asarray(heads), cosine, sine), wanted.numpy(), atol=5e-5)


def test_pairs_turn_by_the_axis_of_their_section() -> None:
    frequencies = rope.inverse_frequencies(12, 50.0)
    positions = jnp.array([[[5, 1], [0, 2], [9, 3]]])
    cosine, sine = rope.multimodal_rotations(positions, frequencies, (1, 2, 1, 1, 1))
    turned_by = np.array([[5, 0, 0, 9, 5, 0], [1, 2, 2, 3, 1, 2]]) * frequencies
    np.testing.assert_allclose(cosine[0], np.cos(turned_by), atol=1e-6)
    np.testing.assert_allclose(sine[0], np.sin(turned_by), atol=1e-6)


def test_text_has_one_place_on_all_axes() -> None:
    """There, M-RoPE is the common rotary embedding."""
    frequencies, places = rope.inverse_frequencies(16, 300.0), jnp.array([[4, 5, 6], [0, 7, 30]])
    positions = jnp.repeat(places[:, None], 3, axis=1)
    for found, wanted in zip(
        rope.multimodal_rotations(positions, frequencies, (2, 3, 3)), rope.rotations(places, frequencies), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_axial_rotations_equal_hugging_face() -> None:
    """Of a picture of 3 x 5 patches, rows and columns; then of two pictures at once."""
    heads, width, rng = 2, 16, np.random.default_rng(4)
    theirs = qwen2_vl.Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=heads * width, num_heads=heads))
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(5), indexing="ij"), axis=-1).reshape(15, 2)
    query, key = (rng.standard_normal((15, heads, width), dtype=np.float32) for _ in range(2))
    cosine, sine = theirs(torch.tensor(query), torch.tensor(grid))
    turned = qwen2_vl.apply_rotary_pos_emb_vision(torch.tensor(query), torch.tensor(key), cosine, sine)

    frequencies = rope.inverse_frequencies(width // 2, 10000.0)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    rotation = rope.axial_rotations(jnp.asarray(grid), frequencies)
    assert rotation[0].shape == (15, width // 2)
    for ours, reference in zip(rotation, (cosine, sine), strict=True):
        np.testing.assert_allclose(ours, reference[:, : width // 2].numpy(), atol=1e-6)
    for patches, wanted in zip((query, key), turned, strict=True):
        ours = rope.rotate(jnp.asarray(patches)[None], *(part[None] for part in rotation))
        np.testing.assert_allclose(ours[0], wanted.numpy(), atol=2e-6)

    pictures = jnp.stack([jnp.asarray(grid), jnp.asarray(grid[::-1])])
    for both, one in zip(rope.axial_rotations(pictures, frequencies), rotation, strict=True):
        np.testing.assert_array_equal(both, jnp.stack([one, one[::-1]]))
