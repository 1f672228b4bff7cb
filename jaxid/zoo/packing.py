"""Training rows in which many short texts share one picture or clip and cannot attend to each other."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from jaxid.kernels.masks import Reads


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Arrangement of the tokens of one training row: a shared prefix, then one slot for each text."""

    token_ids: Int[np.ndarray, "T"]  # the prefix, then zeros in the slots
    positions: Int[np.ndarray, "T"]  # every slot continues from the end of the prefix, or begins anew
    slots: Int[np.ndarray, "T"]  # the slot of every token, counted from 1; 0 for the prefix
    image_start: int  # where the picture's tokens begin
    image_tokens: int  # number of the picture's tokens
    text_start: int  # where the slots begin
    starts: Int[np.ndarray, "T"]  # index of the first token of every token's slot, or of the prefix
    alone: Bool[np.ndarray, "T"]  # tokens of slots that do not read the prefix

    def reads(self) -> Reads:
        """Which tokens each token reads: earlier ones of its own slot, and of the prefix unless its slot is alone."""
        index = np.arange(len(self.slots))
        prefix = self.slots == 0
        # The prefix comes after the slots here, so that a range holds the tokens of one slot, or of the prefix. Tokens
        # of slots read all of the prefix, as their span.
        places = np.where(prefix, len(index) + index, index)
        before = np.where(prefix, len(index), self.starts) - 1
        arrays = (places, places, before, np.where(prefix | self.alone, -1, 0), np.where(prefix, 0, -1))
        return Reads(*(jnp.asarray(array, jnp.int32)[None] for array in arrays))


def packed(
    before: Sequence[int],
    image_tokens: int,
    after: Sequence[int],
    slots: Sequence[int],
    *,
    image_token: int,
    alone: Sequence[int] = (),
) -> Layout:
    """Makes the layout of a row.

    Args:
        before: tokens before the picture.
        image_tokens: number of tokens of the picture.
        after: tokens between the picture and the slots.
        slots: length of each slot.
        image_token: id of the placeholder token of pictures.
        alone: indices of slots that hold whole prompts without a picture: they do not read the prefix, and their
            positions begin at 0.
    """
    prefix = [*before, *[image_token] * image_tokens, *after]
    start, total = len(prefix), len(prefix) + sum(slots)
    token_ids = np.zeros(total, np.int32)
    token_ids[:start] = prefix
    of = np.zeros(total, np.int32)
    positions = np.arange(total, dtype=np.int32)
    starts = np.zeros(total, np.int32)
    first = start
    for index, length in enumerate(slots):
        own = slice(first, first + length)
        of[own], starts[own] = index + 1, first
        positions[own] = np.arange(length) + (0 if index in alone else start)
        first += length
    return Layout(
        token_ids=token_ids,
        positions=positions,
        slots=of,
        image_start=len(before),
        image_tokens=image_tokens,
        text_start=start,
        starts=starts,
        alone=np.isin(of - 1, list(alone)),
    )
