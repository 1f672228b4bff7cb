"""Rotary position embedding on plain arrays."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

AnyArray = np.ndarray | Array
"""An array known at trace time (`np.ndarray`), or one that the program computes."""

Rotation = tuple[Float[Array, "*B T F"], Float[Array, "*B T F"]]
"""Cosine and sine of every token's rotary angles; `jaxid.nn.views` adds an axis for full and sliding layers."""


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
    """Llama 3.1's stretching: long wavelengths are slowed by `factor`, short ones kept, with a ramp in between.

    Source: `transformers.modeling_rope_utils`, kind "llama3".
    """
    wavelengths = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelengths
    ramp = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (frequencies * ((1 - ramp) / factor + ramp)).astype(np.float32)


def dynamic_frequencies(
    length: Int[Array, ""], head_width: int, theta: float, *, factor: float, max_position_embeddings: int
) -> Float[Array, "F"]:
    """NTK scaling: the base grows with the sequence length, once that exceeds `max_position_embeddings`.

    Source: `transformers.modeling_rope_utils`, kind "dynamic".
    """
    growth = factor * length.astype(jnp.float32) / max_position_embeddings - (factor - 1)
    base = theta * jnp.maximum(growth, 1.0) ** (head_width / (head_width - 2))
    return 1.0 / base ** (np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width))


def yarn_frequencies(
    head_width: int,
    theta: float,
    *,
    factor: float,
    original_max_position_embeddings: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Float[np.ndarray, "F"]:
    """YaRN: pairs that turn rarely within the original context are slowed by `factor`, fast ones kept.

    Args:
        head_width: width of a head, E.
        theta: base of the geometric series of wavelengths.
        factor: by how much the context is stretched.
        original_max_position_embeddings: context length before stretching.
        beta_fast: turns above which a pair is kept; between the two bounds there is a ramp.
        beta_slow: turns below which a pair is slowed in full.
        truncate: whether the ends of the ramp are rounded outwards to whole pairs.

    Source: `transformers.modeling_rope_utils`, kind "yarn".
    """

    def pair(turns: float) -> float:
        return head_width * math.log(original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(beta_fast), pair(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    high += 0.001 if low == high else 0
    plain = inverse_frequencies(head_width, theta)
    ramp = np.clip((np.arange(head_width // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain / np.float32(factor) * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_scaling(factor: float, mscale: float = 0.0, mscale_all_dim: float = 0.0) -> float:
    """Factor of cosine and sine in YaRN; `mscale` and `mscale_all_dim` count only if neither is 0."""

    def grown(slope: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * slope * math.log(factor) + 1.0

    return grown(mscale) / grown(mscale_all_dim) if mscale and mscale_all_dim else grown(1.0)


def longrope_scaling(factor: float, original_max_position_embeddings: int) -> float:
    """Factor of cosine and sine in LongRoPE."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_max_position_embeddings))


def rotations(positions: Int[Array, "B T"], frequencies: Float[AnyArray, "F"], scaling: float = 1.0) -> Rotation:
    """Cosine and sine of every token's angles in float32, times `scaling`."""
    return _scaled(positions.astype(jnp.float32)[..., None] * frequencies, scaling)


def _scaled(angles: Float[Array, "*N I F"], scaling: float) -> Rotation:
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return (cosine, sine) if scaling == 1.0 else (cosine * scaling, sine * scaling)


def multimodal_rotations(
    positions: Int[Array, "B A T"], frequencies: Float[AnyArray, "F"], sections: tuple[int, ...], scaling: float = 1.0
) -> Rotation:
    """Cosine and sine where each pair is rotated by a token's position in time, height or width (M-RoPE).

    Args:
        positions: every token's position along each of the A axes.
        frequencies: angular step of every pair.
        sections: how many consecutive pairs are rotated by axis 0, 1, ..., A - 1, 0, ...; F in all.
        scaling: factor of cosine and sine.

    Source: `apply_multimodal_rotary_pos_emb` of `transformers.models.qwen2_vl`.
    """
    axis = np.repeat(np.arange(len(sections)) % positions.shape[1], sections)
    return _scaled(positions.astype(jnp.float32)[:, axis].swapaxes(1, 2) * frequencies, scaling)


def axial_rotations(positions: Int[Array, "*N I A"], frequencies: Float[np.ndarray, "f"]) -> Rotation:
    """Cosine and sine of patches: the pairs of each of the A coordinates in turn, all with the same frequencies."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return _scaled(angles.reshape(*angles.shape[:-2], -1), 1.0)


def rotate(
    heads: Float[Array, "*R B T H E"], cosine: Float[Array, "B T F"], sine: Float[Array, "B T F"]
) -> Float[Array, "*R B T H E"]:
    """Rotates the pairs (e, e + E/2) of every head by the token's angles, computed in float32."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    cosine, sine = cosine[:, :, None, :], sine[:, :, None, :]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(heads.dtype)
