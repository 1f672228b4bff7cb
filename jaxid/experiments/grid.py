"""Extraction of spatial IDs from grid scenes ([ID] arXiv 2601.12626, section on extraction)."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
from jaxtyping import Int

from jaxid.data.grid import GridItem
from jaxid.errors import InputError
from jaxid.families.base import Model
from jaxid.ids.spatial import FULL_SIZE, IDBatch, SpatialIDs, accumulate_ids
from jaxid.interp.trace import residuals_at
from jaxid.prompts.processor import Prompts

QUESTION = "Is the {b} to the left or right of the {a}?"
"""The published question; its word {b} is the one whose activations are read."""

Item = TypeVar("Item")


def in_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def activations_at(model: Model, prompts: Prompts, positions: Int[np.ndarray, "B"]) -> np.ndarray:
    """Residual stream at a position of each prompt: Float[B, L + 1, D], index 0 the embeddings."""
    return np.asarray(residuals_at(model, prompts, positions))[:, :, 0].swapaxes(0, 1)


def extract(
    model: Model,
    items: Iterable[GridItem],
    *,
    pairs: Sequence[tuple[str, str]],
    sizes: Sequence[float] = (FULL_SIZE,),
    question: str = QUESTION,
    batch_size: int = 128,
) -> SpatialIDs:
    """Extracts spatial IDs, reading only the asked word's positions.

    Args:
        model: the model.
        items: grid pictures in any order; wrap the iterable in tqdm for a progress bar.
        pairs: all ordered pairs (A, B) that occur.
        sizes: all object sizes that occur, pixels.
        question: with places for {a} and {b}.
        batch_size: pictures per forward pass.

    Returns:
        IDs of every object that stands second in a pair.

    Raises:
        InputError: if an item's pair or size is not among those announced, or its objects have the same name.
        PromptError: if the question does not hold the object's word exactly once.
    """
    pair_numbers = {pair: number for number, pair in enumerate(pairs)}
    objects = tuple(dict.fromkeys(b for _, b in pairs))
    size_numbers = {size: number for number, size in enumerate(sizes)}

    def batches() -> Iterator[IDBatch]:
        for batch in in_batches(items, batch_size):
            for item in batch:
                if (item.object_a, item.object_b) not in pair_numbers or item.size not in size_numbers:
                    raise InputError(
                        f"grid item {item.object_a}/{item.object_b} of size {item.size} was not announced."
                    )
            # A short last batch is filled up with its first item, marked as padding: one compile for all batches.
            padding = batch_size - len(batch) if len(batch) < batch_size else 0
            full = batch + batch[:1] * padding
            prompts = model.prepare(
                [item.picture for item in full], [question.format(a=item.object_a, b=item.object_b) for item in full]
            )
            names = [(item.object_a, item.object_b) for item in full]
            word = prompts.word([item.object_b for item in full], beside=names)
            pair = [pair_numbers[item.object_a, item.object_b] for item in batch] + [-1] * padding
            yield IDBatch(
                activations=activations_at(model, prompts, word),
                object_index=np.array([objects.index(item.object_b) for item in full]),
                pair_index=np.array(pair),
                a_cell=np.array([item.cell_a[1] * 4 + item.cell_a[0] for item in full]),
                b_cell=np.array([item.cell_b[1] * 4 + item.cell_b[0] for item in full]),
                size_index=np.array([size_numbers[item.size] for item in full]),
            )

    return accumulate_ids(
        batches(),
        pairs=len(pairs),
        objects=objects,
        sizes=tuple(sizes),
        model=model.name,
        fingerprint=model.fingerprint,
    )
