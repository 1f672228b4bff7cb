"""How the published code extracts temporal IDs, bugs included ([ID] arXiv 2601.12626): for `--reference-bugs`."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxid.ids.accumulate import IDBatch
from jaxid.ids.temporal import TemporalIDs, accumulate_temporal_ids


def last_clips(batches: Iterable[IDBatch], **options: Any) -> TemporalIDs:
    """Temporal IDs without any mean: the last clip of an object and frame counts alone, and nothing is subtracted.

    Arguments and errors as in `accumulate_temporal_ids`, whose place it takes in `extract_temporal`.
    """
    last: dict[tuple[int, int], np.ndarray] = {}

    def noted() -> Iterator[IDBatch]:
        for batch in batches:
            yield batch  # it is checked before the next one is asked for
            for row in np.flatnonzero(np.asarray(batch.pair_index) != -1):
                key = int(batch.object_index[row]), int(batch.own_index[row])
                last[key] = np.asarray(batch.activations[row], np.float32)

    ids = accumulate_temporal_ids(noted(), **options)
    values = np.zeros((len(ids.values) + 1, *ids.values.shape[1:]), np.float32)
    counts = np.zeros_like(ids.counts)
    for (row, frame), activation in last.items():
        values[:, row, frame], counts[row, frame] = activation, 1
    return dataclasses.replace(ids, values=values[1:], embeddings=values[0], counts=counts)
