"""The tokens that the published code edits and reads, which it counts and finds in its own ways."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxid.data.clips import OrderItem
from jaxid.errors import PromptError
from jaxid.experiments.relations import RelationBatch
from jaxid.prompts.processor import Processor, Prompts, padded_rows


def all_tokens(prompts: Prompts, positions: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B P"]:
    """Positions of all tokens of a prompt that are the same as the one at a position; rows are padded with the last."""
    token_ids, valid = np.asarray(prompts.inputs.token_ids), np.asarray(prompts.inputs.valid)
    same = (token_ids == np.take_along_axis(token_ids, positions[:, None], axis=1)) & valid
    return padded_rows([np.flatnonzero(row).tolist() for row in same])


def from_end(prompts: Prompts, offsets: Sequence[Sequence[int]]) -> Int[np.ndarray, "B P"]:
    """Positions that are counted from the end of each prompt, -1 being the last token; rows are padded with the last.

    Raises:
        PromptError: if a prompt is shorter.
    """
    rows = [[last + 1 + offset for offset in own] for last, own in zip(prompts.last().tolist(), offsets, strict=True)]
    if min(min(row) for row in rows) < 0:
        raise PromptError("the published code edits tokens at fixed distances from the end; a prompt is shorter.")
    return padded_rows(rows)


def lengths(items: Sequence[OrderItem]) -> list[tuple[int, int]]:
    """Numbers of words of both scenes of each item, split at single spaces."""
    return [(len(item.scene1.split(" ")), len(item.scene2.split(" "))) for item in items]


def entries_read(processor: Processor, batch: RelationBatch) -> RelationBatch:
    """Questions whose answers are read at the vocabulary's entries of the words, as they are written.

    Nothing changes where the published forms are not read, or where the vocabulary lacks an entry.
    """
    vocabulary = processor.tokenizer.get_vocab()
    return _read(batch, [vocabulary.get(word) for word in batch.answers])


def first_tokens_read(processor: Processor, batch: RelationBatch) -> RelationBatch:
    """Questions whose answers are read at the first tokens of the capitalised words; see `entries_read`."""
    try:
        tokens = processor.answer_tokens([word.capitalize() for word in batch.answers])
    except PromptError:
        return batch
    return _read(batch, [own[0] for own in tokens])


def _read(batch: RelationBatch, ids: Sequence[int | None]) -> RelationBatch:
    first, second = ids
    if batch.case != "published" or first is None or second is None or first == second:
        return batch
    return dataclasses.replace(batch, answer_ids=(first, second))
