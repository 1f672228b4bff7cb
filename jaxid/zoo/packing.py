"""Training rows in which many short texts share one picture or clip and cannot attend to each other."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Arrangement of the tokens of one training row: a shared prefix, then one slot for each text."""

    token_ids: Int[np.ndarray, "T"]  # the prefix, then zeros in the slots
    positions: Int[np.ndarray, "T"]  # every slot continues from the end of the prefix
    mask: Bool[np.ndarray, "T T"]  # causal within prefix + slot
    image_start: int  # where the picture's tokens begin
    image_tokens: int  # number of the picture's tokens
    text_start: int  # where the slots begin


def packed(
    before: Sequence[int], image_tokens: int, after: Sequence[int], slots: Sequence[int], *, image_token: int
) -> Layout:
    """Makes the layout of a row.

    Args:
        before: tokens before the picture.
        image_tokens: number of tokens of the picture.
        after: tokens between the picture and the slots.
        slots: length of each slot.
        image_token: id of the placeholder token of pictures.
    """
    prefix = [*before, *[image_token] * image_tokens, *after]
    start, total = len(prefix), len(prefix) + sum(slots)
    token_ids = np.zeros(total, np.int32)
    token_ids[:start] = prefix
    group = np.zeros(total, np.int32)
    positions = np.arange(total, dtype=np.int32)
    first = start
    for index, length in enumerate(slots):
        group[first : first + length] = index + 1
        positions[first : first + length] = start + np.arange(length)
        first += length
    visible = (group[None] == group[:, None]) | (group[None] == 0)
    return Layout(
        token_ids=token_ids,
        positions=positions,
        mask=visible & (positions[None] <= positions[:, None]),
        image_start=len(before),
        image_tokens=image_tokens,
        text_start=start,
    )
