"""The arrays that a forward pass reads."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Bool, Float, Int

AnyArray = Any
"""On a device (`jax.Array`) or still on the host (`np.ndarray`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch of prompts as arrays; padding stands on the right.

    Attributes:
        token_ids: Int[B, T].
        positions: place of every token in its prompt, Int[B, T].
        valid: false at padding, Bool[B, T].
        last: position of the last real token, where the answer is read, Int[B].
        pixels: pictures after the image processor, Float[N, C, Y, X]; None without pictures.
        image_slots: which row of the pictures' flattened tokens stands at each position, or -1, Int[B, T].
    """

    token_ids: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]
    last: Int[AnyArray, "B"]
    pixels: Float[AnyArray, "N C Y X"] | None
    image_slots: Int[AnyArray, "B T"]
