"""The arrays that a forward pass reads."""

import dataclasses

import jax
from jaxtyping import Array, Bool, Float, Int


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

    token_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    last: Int[Array, "B"]
    pixels: Float[Array, "N C Y X"] | None
    image_slots: Int[Array, "B T"]
