"""The bugs of the published code, as overrides of the steps of our experiments (`--reference-bugs`).

Nothing else knows of them: an experiment's own steps are what the paper says, and these are what its code does.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.clips import OrderItem
from jaxid.data.coco_boxes import Instances
from jaxid.data.coco_spatial import SpatialItem
from jaxid.data.grid import GridItem
from jaxid.data.pictures import recoloured_linearly
from jaxid.errors import DataError, InputError
from jaxid.experiments.activation_swap import AttributeSwap, MirrorSwap, Pair, Patched
from jaxid.experiments.base import Command
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.dcsm_evaluate import EvaluateScorers
from jaxid.experiments.dcsm_train import TrainScorer
from jaxid.experiments.depth import Batches, Depth
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.finetune_run import Finetune
from jaxid.experiments.occlusion import Occluded, Occlusion
from jaxid.experiments.reference_dcsm import PublishedEvaluation
from jaxid.experiments.reference_dcsm_training import TrainingAsPublished
from jaxid.experiments.reference_diagnosis import (
    answer_inside,
    blurred_crops,
    first_tokens,
    with_crowds,
    with_random_places,
)
from jaxid.experiments.reference_finetune import FinetuneAsPublished
from jaxid.experiments.reference_tokens import all_tokens, entries_read, first_tokens_read, from_end, lengths
from jaxid.experiments.relations import RelationBatch
from jaxid.experiments.session import Columns, Session, rows_where
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.experiments.steer_picture import SteerPicture
from jaxid.experiments.steering import Question, Steer, Steered
from jaxid.experiments.temporal import OrderBatch, TemporalSteer, TemporalSwap
from jaxid.experiments.temporal_ids import ExtractTemporalIDs
from jaxid.families.base import Model
from jaxid.ids.accumulate import IDBatch
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs, accumulate_temporal_ids
from jaxid.interp.forward import forward
from jaxid.interp.generate import Generation
from jaxid.interp.trace import Trace
from jaxid.nn.sites import AnyArray, Capture
from jaxid.prompts.pictures import without_alpha

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

    Clips count in the order of reading, and within a clip its first object before the second.

    Arguments and errors as in `accumulate_temporal_ids`, whose place it takes in `extract_temporal`.
    """
    last: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def noted() -> Iterator[IDBatch]:
        read = 0
        for batch in batches:
            yield batch  # it is checked before the next one is asked for
            pair = np.asarray(batch.pair_index)
            order = read + np.arange(len(pair)) if batch.order is None else np.asarray(batch.order)
            read += len(pair)
            for row in np.flatnonzero(pair != -1):
                key, when = (int(batch.object_index[row]), int(batch.own_index[row])), int(order[row])
                if key not in last or last[key][0] < when:
                    last[key] = when, np.asarray(batch.activations[row], np.float32)

    ids = accumulate_temporal_ids(noted(), **options)
    values = np.zeros((len(ids.values) + 1, *ids.values.shape[1:]), np.float32)
    counts = np.zeros_like(ids.counts)
    for (row, frame), (_, activation) in last.items():
        values[:, row, frame], counts[row, frame] = activation, 1
    return dataclasses.replace(ids, values=values[1:], embeddings=values[0], counts=counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BeliefSwap(BeliefSwap):
    """Norms over all occurrences of a word, and items are counted as published (`compare.rates`).

    Words are found by their last token, also inside other names, and answers in a written text inside other words.
    """

    as_published = True
    norms = staticmethod(occurrence_norms)
    said = staticmethod(answer_inside)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_new_tokens:
            raise InputError("the published code measures norms over the generated text too: set max_new_tokens.")

    def prepare(self, session: Session, items: Sequence[SpatialItem]) -> RelationBatch:
        batch = super().prepare(session, items)
        return dataclasses.replace(batch, words=first_tokens(batch.prompts, batch.names))


class ScoresAsPublished:
    """Beside an activation swap: an answer that the changed picture leaves as it is scores 0; means are drawn."""

    statistic = "mean"

    def scores(self, found: Patched) -> Float[np.ndarray, "P L B 2"]:
        """How far the swaps carry the answers."""
        return np.nan_to_num(np.stack(list(found.scores.values())))


class _PictureSwap(ScoresAsPublished):
    """Beside a swap of pictures: the text begins two tokens early, with the last two of the picture.

    Words are found by their last token, also inside other names. With a prompt that is not plain, answers are read at
    the vocabulary's entries without a space.
    """

    def questions(self, session: Session, items: Sequence[SpatialItem]) -> RelationBatch:
        batch = super().questions(session, items)  # pyright: ignore[reportAttributeAccessIssue] - of the swap beside it
        return entries_read(
            session.model.processor, dataclasses.replace(batch, words=first_tokens(batch.prompts, batch.names))
        )

    def text(self, batch: Pair[RelationBatch]) -> Int[np.ndarray, "B Q"]:
        prompts = batch.questions.prompts
        early = prompts.text_start()[:, None] - np.array([2, 1], np.int32)
        return np.concatenate([early, prompts.text_tokens()], axis=1)


class _MirrorSwap(_PictureSwap, MirrorSwap):
    """See `_PictureSwap`."""


class _AttributeSwap(_PictureSwap, AttributeSwap):
    """See `_PictureSwap`; and hues are blended as numbers, not along the colour circle."""

    recoloured = staticmethod(recoloured_linearly)


class _Negated:
    """Beside a steering experiment: the change of log-probabilities has the other sign."""

    def change(self, found: Steered) -> Float[AnyArray, "*S B 2"]:
        return -found.change


class _Late:
    """Beside a steering experiment: IDs are added one layer later than where they were read.

    The code counts as Hugging Face's hidden states do, where 0 is the embeddings, which hold no place.
    """

    def read_ids(self) -> Any:
        ids = super().read_ids()  # pyright: ignore[reportAttributeAccessIssue] - of the experiment beside it
        values = np.concatenate([np.zeros_like(ids.values[:1]), ids.values[:-1]])
        return dataclasses.replace(ids, values=values)


class _Misplaced(_Negated, _Late):
    """Beside a steering experiment: the same, and IDs are added one token late, wherever a word's last token stands."""

    def positions(self, batch: RelationBatch, words: int = 1) -> Int[np.ndarray, "B P"]:
        return all_tokens(batch.prompts, batch.words[:, 0]) + 1


class _Steer(_Misplaced, Steer):
    """See `_Misplaced`; alpha channels are dropped, and there is a figure for the items of each original answer."""

    split = True

    def items(self, session: Session) -> list[Question]:
        return [dataclasses.replace(one, picture=without_alpha(one.picture)) for one in super().items(session)]


class _SteerPicture(_Negated, SteerPicture):
    """See `_Negated`; and the object that is named second gets the subject's vector.

    With a prompt that is not plain, answers are read at the vocabulary's entries without a space.
    """

    def prepare(self, session: Session, items: Sequence[Question]) -> RelationBatch:
        return entries_read(session.model.processor, super().prepare(session, items))

    def positions(self, batch: RelationBatch, words: int = 2) -> Int[np.ndarray, "B W"]:
        return batch.words[:, words - 1 :: -1]


class _Depth(_Misplaced, Depth):
    """See `_Misplaced`; cells of the first column alone, and the figure's two questions have each other's names.

    With a prompt that is not plain, the first tokens of the capitalised answers are read ("A" of "Above").
    """

    columns = (0,)
    panels = ("depth", "height")

    def prepare(self, session: Session, items: Sequence[Question]) -> Batches:
        return {
            name: first_tokens_read(session.model.processor, batch)
            for name, batch in super().prepare(session, items).items()
        }


class _Deviation(Deviation):
    """Ground-truth IDs are half a cell off, and those of the last column and row lose weight.

    They are of the first box whose category contains the name; words are found by their last token, also inside other
    names. The answer that the model writes is judged, in which a word may be a part of another. The published axes are
    shorter than ours, but span the same plane.
    """

    true_ids = staticmethod(partial(SpatialIDs.at_box, half_cell=False))
    object_boxes = staticmethod(Instances.first_box)
    locate = staticmethod(first_tokens)
    said = staticmethod(answer_inside)
    default_new_tokens = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens == 0:
            raise InputError("the published code judges the answers that are written: set max_new_tokens.")


class _Occlusion(Occlusion):
    """Boxes are rounded and blurred by themselves; places elsewhere repeat each other where there is little room.

    The first random blur is not compared, the fifth one is. Items are grouped by the verdicts of the deviation run, if
    one is given.
    """

    published_case = "capital"
    object_boxes = staticmethod(with_crowds)
    with_boxes = staticmethod(with_random_places)
    blur = staticmethod(blurred_crops)

    def sensitivity(self, found: Occluded) -> Float[AnyArray, "B"]:
        return found.sensitivity(1, 4)

    def compared(self, table: Columns) -> Columns:
        rows = super().compared(table)
        if self.deviation is None:
            return rows
        found = self.deviations()
        verdicts = dict(zip(found["item"].tolist(), found["verdict"].tolist(), strict=True))
        own = np.array([verdicts.get(key, "nonsense") for key in rows["item"].tolist()])
        if (own == "nonsense").all():
            raise DataError(f"{self.deviation} holds no answer about any of these items; give the run about them.")
        return rows_where({**rows, "correct": own == "correct"}, own != "nonsense")


class _QwenAnswers:
    """Beside an experiment on the order of scenes: with the published prompt, fixed tokens of Qwen2's are read.

    Models whose vocabulary ends before these tokens are read at the answer words.
    """

    qwen_ids: ClassVar[tuple[int, int]]

    def answer_ids_of(self, model: Model) -> tuple[int, int] | None:
        return self.qwen_ids if model.config.text_config.vocab_size > max(self.qwen_ids) else None


class _Finetune(FinetuneAsPublished, Finetune):
    """See `FinetuneAsPublished`."""


class _TemporalSwap(_QwenAnswers, ScoresAsPublished, TemporalSwap):
    """See `ScoresAsPublished` and `_QwenAnswers`.

    The clip's tokens are counted from the prompt's beginning and those of the text from its end. With the published
    prompt, scenes are at fixed distances from the end, whatever their words.
    """

    qwen_ids = (24885, 46893)

    def questions(self, session: Session, items: Sequence[OrderItem]) -> OrderBatch:
        batch = super().questions(session, items)
        if session.prompt != self.published_text:
            return batch
        counts, prompts = lengths(items), batch.asked.prompts
        first = from_end(prompts, [range(-20 - other, -20 - other - own, -1) for own, other in counts])
        second = from_end(prompts, [range(-12, -12 - own, -1) for _, own in counts])
        return dataclasses.replace(batch, first=first, second=second)

    def pictures(self, batch: Pair[OrderBatch]) -> Int[np.ndarray, "B I"]:
        image = batch.questions.asked.prompts.image_tokens()
        return np.broadcast_to(np.arange(image.shape[1], dtype=np.int32), image.shape)

    def text(self, batch: Pair[OrderBatch]) -> Int[np.ndarray, "B Q"]:
        prompts = batch.questions.asked.prompts
        clip = prompts.image_tokens().shape[1]
        return from_end(prompts, [range(-1, -1 - (last + 2 - clip), -1) for last in prompts.last().tolist()])


class _TemporalSteer(_QwenAnswers, _Late, TemporalSteer):
    """See `_Late` and `_QwenAnswers`; with the published prompt, scenes are at fixed distances from the end."""

    qwen_ids = (10227, 6025)

    def questions(self, session: Session, items: Sequence[OrderItem]) -> OrderBatch:
        batch = super().questions(session, items)
        if session.prompt != self.published_text:
            return batch
        places = [range(-20 - own, -20) for _, own in lengths(items)]
        return dataclasses.replace(batch, second=from_end(batch.asked.prompts, places))


class _ExtractIDs(ExtractIDs):
    """The alpha channel of pictures is dropped: what is transparent has its stored colour, usually black."""

    def items(self) -> list[GridItem]:
        return [item.without_alpha() for item in super().items()]


class _ExtractTemporalIDs(ExtractTemporalIDs):
    """IDs are those of `last_clips`."""

    accumulate = staticmethod(last_clips)


class _TrainScorer(TrainingAsPublished, TrainScorer):
    """See `TrainingAsPublished`; and functional columns replace those at word indices, unless they are inserted."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placement == "token":
            object.__setattr__(self, "placement", "replace")


_VARIANTS: dict[type[Command[Any]], type[Command[Any]]] = {
    BeliefSwap: _BeliefSwap,
    MirrorSwap: _MirrorSwap,
    AttributeSwap: _AttributeSwap,
    Steer: _Steer,
    SteerPicture: _SteerPicture,
    Depth: _Depth,
    Deviation: _Deviation,
    Occlusion: _Occlusion,
    Finetune: _Finetune,
    TemporalSwap: _TemporalSwap,
    TemporalSteer: _TemporalSteer,
    ExtractIDs: _ExtractIDs,
    ExtractTemporalIDs: _ExtractTemporalIDs,
    EvaluateScorers: PublishedEvaluation,
    TrainScorer: _TrainScorer,
}


def with_bugs(experiment: CommandT) -> CommandT:
    """The experiment with the published code's bugs in its steps; itself if its code has none."""
    kind = _VARIANTS.get(type(experiment), type(experiment))
    options = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    return kind(**options)  # pyright: ignore[reportReturnType]
