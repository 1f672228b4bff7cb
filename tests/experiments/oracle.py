"""What the tests of the experiments share: questions about noise pictures, random IDs, and PyTorch's answers."""

import functools
import warnings
from collections.abc import Sequence

import fixtures
import numpy as np
import torch
from families import CASES, VOCABULARY

from jaxid.data.coco_spatial import ANSWERS, SpatialItem
from jaxid.errors import UnknownWordsWarning
from jaxid.experiments import relations
from jaxid.experiments.relations import RelationBatch
from jaxid.ids.spatial import SpatialIDs

CASE = CASES[0]
LAYERS, WIDTH = 3, 32
"""Of the model of that case."""

TRUTHS = (0, 1, 1, 0)
"""Which answer word is true of each item."""

PAIRS = (("star", "fish"), ("fish", "star"), ("cat", "star"), ("fish", "cat"))


def items(axis: str) -> list[SpatialItem]:
    """Four items of one axis, each with a noise picture of its own tint."""
    rng = np.random.default_rng(len(axis))
    return [
        SpatialItem(
            image_id=row,
            picture=(rng.integers(0, 256, (32, 32, 3)) * rng.uniform(0.2, 1, 3)).astype(np.uint8),
            subject=subject,
            object=other,
            relation=ANSWERS[axis][TRUTHS[row]],
        )
        for row, (subject, other) in enumerate(PAIRS)
    ]


@functools.cache
def batch(axis: str) -> RelationBatch:
    """The items of one axis, prepared."""
    # As many tokens on both axes, and so one program.
    suffix = " Above or below?" if axis == "vertical" else ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnknownWordsWarning)  # of the tiny vocabulary
        return relations.prepare(fixtures.model(CASE), items(axis), prompt="{query}" + suffix)


@functools.cache
def ids(layers: int = LAYERS, width: int = WIDTH) -> SpatialIDs:
    """Random IDs of two objects on the full grid."""
    values = np.random.default_rng(5).normal(size=(layers, 2, 1, 4, 4, width)).astype(np.float32)
    return SpatialIDs(
        values=values,
        counts=np.ones((2, 1, 4, 4), np.int32),
        objects=("star", "fish"),
        sizes=(224,),
        layer_names=tuple(f"blocks.{k}.resid_post" for k in range(layers)),
    )


def universal() -> np.ndarray:
    """Universal IDs [layer, x, y, D], straight from the values."""
    return ids().values[:, :, 0].astype(float).mean(axis=1)


def positions(batch: RelationBatch, words: Sequence[str]) -> np.ndarray:
    """Where each prompt's word stands: the words of the tiny models are single tokens."""
    token_ids = np.asarray(batch.prompts.inputs.token_ids)
    return np.array([list(row).index(VOCABULARY.index(word)) for row, word in zip(token_ids, words, strict=True)])


def torch_residuals(batch: RelationBatch) -> np.ndarray:
    """What PyTorch has after every block, [L, B, T, D]."""
    return fixtures.record(CASE, batch.prompts)["resid_post"]


def torch_logprobs(batch: RelationBatch, edits: Sequence[fixtures.TorchEdit] = ()) -> np.ndarray:
    """PyTorch's log-probabilities of the two answers, [B, 2]."""
    logits = fixtures.record(CASE, batch.prompts, edits)["logits"]
    rows = np.arange(len(batch.prompts))
    answers = torch.log_softmax(torch.tensor(logits[rows, np.asarray(batch.prompts.inputs.last)]), dim=-1).numpy()
    return answers[:, [VOCABULARY.index(word) for word in batch.answers]]


def adding(layer: int, places: np.ndarray, vectors: np.ndarray) -> fixtures.TorchEdit:
    """The edit that adds vectors [B, P, D] at places [B, P] after a block."""

    def change(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        for row, column in np.ndindex(places.shape):
            changed[row, places[row, column]] += torch.tensor(vectors[row, column], dtype=torch.float32)
        return changed

    return "resid_post", layer, change


def replacing(layer: int, places: np.ndarray, values: np.ndarray) -> fixtures.TorchEdit:
    """The edit that puts in rows of values [B, T, D] at places [B, P] after a block."""

    def change(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        for row, column in np.ndindex(places.shape):
            changed[row, places[row, column]] = torch.tensor(values[row, places[row, column]])
        return changed

    return "resid_post", layer, change
