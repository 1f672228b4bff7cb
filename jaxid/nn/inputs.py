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
        token_ids: ids of the tokens.
        positions: position of every token in its prompt.
        valid: false at padding.
        last: position of the last real token, where the answer is read.
        pixels: output of the image processor in the family's layout: pictures Float[N, C, Y, X], or tiles or patches of
            them, N first; None without pictures.
        image_rows: index of each token among the pictures' flattened tokens, or -1.
        rope_positions: positions along A axes, for families whose rotary embedding does not use `positions`.
        extras: other arrays that the family's network reads, by name.
        apart: whether every prompt has an equal share of the pixels and of the arrays in `extras` to itself, in the
            prompts' order: prompts and pictures can then be divided together.
    """

    token_ids: Int[AnyArray, "B T"]
    positions: Int[AnyArray, "B T"]
    valid: Bool[AnyArray, "B T"]
    last: Int[AnyArray, "B"]
    pixels: Float[AnyArray, "N ..."] | None
    image_rows: Int[AnyArray, "B T"]
    rope_positions: Int[AnyArray, "B A T"] | None = None
    extras: Mapping[str, AnyArray] = dataclasses.field(default_factory=dict)
    apart: bool = dataclasses.field(default=False, metadata={"static": True})
