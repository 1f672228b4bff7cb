"""Rotary embedding against Hugging Face's, for every kind of scaling, and its defining property."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

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
