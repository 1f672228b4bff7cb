"""The bugs of the published code, as overrides of the steps of our experiments (`--reference-bugs`).

Nothing else knows of them: an experiment's own steps are what the paper says, and these are what its code does.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap, Patched
from jaxid.experiments.base import Command
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.depth import Depth
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.occlusion import Occluded, Occlusion
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.steer_picture import SteerPicture
from jaxid.experiments.steering import Steer, Steered
from jaxid.experiments.temporal import TemporalSteer, TemporalSwap
from jaxid.experiments.temporal_ids import ExtractTemporalIDs
from jaxid.families.base import Model
from jaxid.ids.accumulate import IDBatch
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs, accumulate_temporal_ids
from jaxid.interp.forward import forward
from jaxid.interp.generate import Generation
from jaxid.interp.trace import Trace
from jaxid.nn.sites import AnyArray, Capture

CommandT = TypeVar("CommandT", bound=Command[Any])


def occurrence_norms(
    model: Model, batch: RelationBatch, recorded: Trace, written: Generation | None
) -> Float[Array, "L B 2"]:
    """Norm of all activations together at the tokens that are the same as a word's, in prompt and generated text.

    The published code takes this for the word's norm; it is larger than that of the one activation that is edited.

    Raises:
        InputError: if no text was generated.
    """
    if written is None:
        raise InputError("the published code measures norms over the generated text too: set max_new_tokens.")
    longer = batch.prompts.extended(written.tokens, written.lengths)
    token_ids, rows = np.asarray(longer.inputs.token_ids), len(longer)
    words = np.take_along_axis(token_ids, batch.words[:, :2], axis=1)
    same = (token_ids[:, :, None] == words[:, None]) & np.asarray(longer.inputs.valid)[:, :, None]  # [B, T, 2]
    most = int(same.sum(axis=1).max())
    order = np.argsort(~same, axis=1, kind="stable")[:, :most]  # positions of the word first, [B, most, 2]
    positions = order.transpose(0, 2, 1).reshape(rows, 2 * most)
    capture = Capture(("resid_post",), positions=jnp.asarray(positions))
    found = forward(model, longer, capture=capture).captured["resid_post"]
    counted = np.take_along_axis(same, order, axis=1).transpose(0, 2, 1)  # [B, 2, most]
    squares = jnp.square(found.astype(jnp.float32)).sum(axis=-1).reshape(-1, rows, 2, most)
    return jnp.sqrt(jnp.where(counted, squares, 0.0).sum(axis=-1))


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BeliefSwap(BeliefSwap):
    """Norms over all occurrences of a word; the best layers are chosen on the items that are reported."""

    same_items = True
    norms = staticmethod(occurrence_norms)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_new_tokens:
            raise InputError("the published code measures norms over the generated text too: set max_new_tokens.")


class ScoresAsPublished:
    """Beside an activation swap: an answer that the changed picture leaves as it is scores 0; means are drawn."""

    statistic = "mean"

    def scores(self, found: Patched) -> Float[np.ndarray, "P L B 2"]:
        """How far the swaps carry the answers."""
        return np.nan_to_num(np.stack(list(found.scores.values())))


class _MirrorSwap(ScoresAsPublished, MirrorSwap):
    """See `ScoresAsPublished`."""


class _AttributeSwap(ScoresAsPublished, AttributeSwap):
    """See `ScoresAsPublished`."""


class _Negated:
    """Beside a steering experiment: the change of log-probabilities has the other sign."""

    def change(self, found: Steered) -> Float[AnyArray, "*S B 2"]:
        return -found.change


class _Misplaced(_Negated):
    """Beside a steering experiment: the same; and IDs read one layer earlier are added, one token late.

    The code counts as Hugging Face's hidden states do, where 0 is the embeddings, which hold no place.
    """

    def read_ids(self) -> SpatialIDs:
        ids = super().read_ids()  # pyright: ignore[reportAttributeAccessIssue] - of the experiment beside it
        values = np.concatenate([np.zeros_like(ids.values[:1]), ids.values[:-1]])
        return dataclasses.replace(ids, values=values)

    def positions(self, batch: RelationBatch, words: int = 1) -> Int[np.ndarray, "B W"]:
        return batch.words[:, :words] + 1


class _Steer(_Misplaced, Steer):
    """See `_Misplaced`."""


class _SteerPicture(_Misplaced, SteerPicture):
    """See `_Misplaced`."""


class _Depth(_Misplaced, Depth):
    """See `_Misplaced`; the figure's two questions have each other's names."""

    panels = ("depth", "height")


class _Deviation(Deviation):
    """Ground-truth IDs are half a cell off."""

    true_ids = staticmethod(partial(SpatialIDs.at_box, half_cell=False))


class _Occlusion(Occlusion):
    """The first random blur is not compared, the fifth one is."""

    def sensitivity(self, found: Occluded) -> Float[AnyArray, "B"]:
        return found.sensitivity(1, 4)


class _TemporalSwap(ScoresAsPublished, TemporalSwap):
    """See `ScoresAsPublished`."""


class _TemporalSteer(_Negated, TemporalSteer):
    """See `_Negated`."""


class _ExtractTemporalIDs(ExtractTemporalIDs):
    """IDs are those of `last_clips`."""

    accumulate = staticmethod(last_clips)


_VARIANTS: dict[type[Command[Any]], type[Command[Any]]] = {
    BeliefSwap: _BeliefSwap,
    MirrorSwap: _MirrorSwap,
    AttributeSwap: _AttributeSwap,
    Steer: _Steer,
    SteerPicture: _SteerPicture,
    Depth: _Depth,
    Deviation: _Deviation,
    Occlusion: _Occlusion,
    TemporalSwap: _TemporalSwap,
    TemporalSteer: _TemporalSteer,
    ExtractTemporalIDs: _ExtractTemporalIDs,
}


def with_bugs(experiment: CommandT) -> CommandT:
    """The experiment with the published code's bugs in its steps; itself if its code has none."""
    kind = _VARIANTS.get(type(experiment), type(experiment))
    options = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    return kind(**options)  # pyright: ignore[reportReturnType]
