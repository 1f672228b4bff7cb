"""The arrays that a forward pass reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Bool, Float, Int

AnyArray = Any
"""On a device (`jax.Array`) or still on the host (`np.ndarray`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """A batch of prompts as arrays, padded on the right.

    Attributes:
        token_ids: Int[B, T].
        positions: of every token in its prompt, Int[B, T].
        valid: false at padding, Bool[B, T].
        last: position of the last real token, where the answer is read, Int[B].
        pixels: pictures after the image processor, in the family's layout, N first: pictures Float[N, C, Y, X], or
            tiles or patches of them; None without pictures.
        image_rows: which row of the pictures' flattened tokens is at each position, or -1, Int[B, T].
        rope_positions: what rotary embedding rotates by, where it is not the position, Int[B, A, T] for A axes.
        extras: further arrays that a family's network reads beside the pixels, by name.
    """

    token_ids: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]
    last: Int[AnyArray, "B"]
    pixels: Float[AnyArray, "N ..."] | None
    image_rows: Int[AnyArray, "B T"]
    rope_positions: Int[AnyArray, "B A T"] | None = None
    extras: Mapping[str, AnyArray] = dataclasses.field(default_factory=dict)
