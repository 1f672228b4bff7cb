"""What the CLIP-like networks share: a picture tower and a text encoder that meet in one space."""

import abc
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxid.nn.text import TextEncoder


class Encoded(NamedTuple):
    """Pictures or captions in the joint space, before normalisation.

    Attributes:
        tokens: every token projected: the class token, if there is one, and the patches; or the caption's tokens.
        pooled: what the model compares pictures and captions by.
    """

    tokens: Float[Array, "N S E"]
    pooled: Float[Array, "N E"]


class DualEncoder(nnx.Module):
    """Two towers; a family says what their tokens become in the joint space."""

    tower: Any
    text_encoder: TextEncoder
    config: Any

    @abc.abstractmethod
    def image(self, pixels: Float[Array, "N C Y X"]) -> Encoded:
        """Pictures in the joint space."""

    @abc.abstractmethod
    def text(self, token_ids: Int[Array, "N T"], valid: Bool[Array, "N T"]) -> Encoded:
        """Captions in the joint space; padding stands at the end."""


def part(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One tower's part of a config.json; `{name}_dict`, where early files have it, overrides it."""
    return {**(fields.get(name) or {}), **(fields.get(f"{name}_dict") or {})}
