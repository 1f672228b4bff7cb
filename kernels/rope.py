"""Rotary position embedding on plain arrays."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def inverse_frequencies(head_width: int, theta: float) -> Float[np.ndarray, "F"]:
    """Angular step per position of each of the head_width / 2 rotated pairs."""
    exponents = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    return (1.0 / np.float32(theta) ** exponents).astype(np.float32)


def llama3_frequencies(
    frequencies: Float[np.ndarray, "F"],
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Float[np.ndarray, "F"]:
    """Llama 3.1's stretching: long wavelengths slowed by `factor`, short ones kept, a ramp between.

    Source: `transformers.modeling_rope_utils`, kind "llama3".
    """
    wavelengths = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelengths
    ramp = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (frequencies * ((1 - ramp) / factor + ramp)).astype(np.float32)


def rotations(
    positions: Int[Array, "B T"], frequencies: Float[np.ndarray, "F"]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Cosine and sine of every token's angles, float32."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def multimodal_rotations(
    positions: Int[Array, "B A T"], frequencies: Float[np.ndarray, "F"], sections: tuple[int, ...]
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Cosine and sine where every pair turns by one of a token's positions in time, height and width (M-RoPE).

    Args:
        positions: of every token along the A axes, Int[B, A, T].
        frequencies: angular step of every pair, Float[F].
        sections: how many neighbouring pairs turn by axis 0, 1, ..., A - 1, 0, ...; F in all.

    Source: `apply_multimodal_rotary_pos_emb` of `transformers.models.qwen2_vl`.
    """
    axis = np.repeat(np.arange(len(sections)) % positions.shape[1], sections)
    angles = positions.astype(jnp.float32)[:, axis].swapaxes(1, 2) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def axial_rotations(
    positions: Int[Array, "*N I A"], frequencies: Float[np.ndarray, "f"]
) -> tuple[Float[Array, "*N I F"], Float[Array, "*N I F"]]:
    """Cosine and sine of patches, the same frequencies for each of their A coordinates, one after the other."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    angles = angles.reshape(*angles.shape[:-2], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    heads: Float[Array, "B T H E"], cosine: Float[Array, "B T F"], sine: Float[Array, "B T F"]
) -> Float[Array, "B T H E"]:
    """Turn the pairs (e, e + E/2) of every head by the token's angles; computed in float32."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(heads.dtype)
