"""Temporal IDs in video models: extraction, time-reversed swap, steering ([ID] arXiv 2601.12626, Figure 10)."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.data.clips import AppearItem, OrderItem
from jaxid.data.videos import with_times
from jaxid.experiments.activation_swap import ActivationSwap
from jaxid.experiments.belief_swap import require_same_model
from jaxid.experiments.reference_extraction import last_clips
from jaxid.experiments.relations import Case, Compat, RelationBatch, fill
from jaxid.experiments.steering import Steering
from jaxid.families.base import Model
from jaxid.ids.extract import TEMPORAL_QUESTION as QUESTION
from jaxid.ids.extract import centred_words, extract_temporal
from jaxid.ids.temporal import TemporalIDs, accumulate_temporal_ids
from jaxid.interp.interventions import add
from jaxid.interp.trace import Trace, rerun, swap, trace
from jaxid.prompts.pictures import Clip
from jaxid.prompts.processor import Prompts

ANSWERS = ("before", "after")


def extract(
    model: Model,
    items: Iterable[AppearItem],
    *,
    pairs: Sequence[tuple[str, str]],
    question: str = QUESTION,
    batch_size: int = 16,
    compat: Compat = "none",
) -> TemporalIDs:
    """Extracts temporal IDs, reading only the two words' positions.

    Args:
        model: the model.
        items: clips in any order; wrap the iterable in tqdm for a progress bar.
        pairs: all ordered pairs (A, B) that occur.
        question: with places for {a} and {b}.
        batch_size: clips per forward pass.
        compat: "reference" reproduces the published code, see `reference_extraction.last_clips`.

    Raises:
        InputError: if an item's pair is not among those announced, or its clip cannot be read.
        DataError: for a video that is unreadable or too short.
        PromptError: if the question does not hold an object's word.
    """
    accumulate = last_clips if compat == "reference" else accumulate_temporal_ids
    return extract_temporal(model, items, pairs=pairs, question=question, batch_size=batch_size, accumulate=accumulate)


def word_coordinates(
    model: Model, ids: TemporalIDs, words: Sequence[str] = ANSWERS
) -> dict[str, Float[np.ndarray, "L"]]:
    """Words without a clip, less their mean, on each layer's line from early to late."""
    centred = centred_words(model, words)
    return dict(zip(words, ids.line().coordinates(centred, centred=True).T, strict=True))


# --- questions of order ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderBatch:
    """Questions of order, prepared.

    Attributes:
        asked: the prompts, how their answers are read, and each scene's last word.
        first: positions of all words of the scene that is named first, Int[B, P].
        second: of the other one, Int[B, Q].
    """

    asked: RelationBatch
    first: Int[np.ndarray, "B P"]
    second: Int[np.ndarray, "B Q"]

    @property
    def words(self) -> Int[np.ndarray, "B R"]:
        """Positions of both scenes' words."""
        return np.concatenate([self.first, self.second], axis=1)


def prepare(
    model: Model,
    items: Sequence[OrderItem],
    *,
    clips: Sequence[Clip] | None = None,
    template: str = "{query}",
    case: Case = "both",
) -> OrderBatch:
    """Prepares questions about clips; scenes' words are located in each question.

    Args:
        model: the model.
        items: the questions.
        clips: their clips, if they are open already.
        template: the user's text behind the times, with a place for the {query}.
        case: which form of the answer words is read.

    Raises:
        DataError: for a video that is unreadable or too short.
        PromptError: if a query does not hold a scene's words.
    """
    clips = [item.open() for item in items] if clips is None else list(clips)
    texts = [with_times(clip, fill(template, item.query, ANSWERS)) for clip, item in zip(clips, items, strict=True)]
    prompts = model.prepare(clips, texts)
    scenes = [(item.scene1, item.scene2) for item in items]
    first, second = (prompts.word_tokens(column, beside=scenes, occurrence=0) for column in zip(*scenes, strict=True))
    asked = RelationBatch(
        prompts=prompts,
        words=np.stack([first[:, -1], second[:, -1]], axis=1),
        truth=np.array([ANSWERS.index(item.answer) for item in items]),
        axis="time",
        answers=list(ANSWERS),
        case=case,
    )
    return OrderBatch(asked=asked, first=first, second=second)


def reversed_prompts(model: Model, batch: OrderBatch, clips: Sequence[Clip]) -> Prompts:
    """The same questions about the clips played backwards; what is said of their times stays."""
    return model.prepare([clip.reversed() for clip in clips], list(batch.asked.prompts.questions))


def run_swap(
    model: Model,
    batch: OrderBatch,
    backwards: Prompts,
    *,
    layers: Sequence[int] | None = None,
    chunk: int | None = None,
) -> ActivationSwap:
    """Swaps activations of the clip played backwards into the control run: each token set at every layer.

    Args:
        model: the model.
        batch: prepared questions (the control).
        backwards: the same about the reversed clips.
        layers: decoder blocks after which values are swapped; all by default.
        chunk: edits that run side by side.

    Raises:
        InputError: if the two differ in their questions, or a layer is out of range.
    """
    chosen = np.arange(model.num_layers) if layers is None else np.asarray(layers)
    recorded, changed = trace(model, batch.asked.prompts), trace(model, backwards)
    patched = [
        batch.asked.read(rerun(model, recorded, swap(changed, chosen, at), chunk=chunk))
        for at in ("image", "text", batch.words)
    ]
    return ActivationSwap(
        control=np.asarray(batch.asked.read(recorded)),
        intervened=np.asarray(batch.asked.read(changed)),
        patched=np.stack([np.asarray(part) for part in patched]),
        layers=chosen,
    )


def frame_vectors(ids: TemporalIDs, layers: Sequence[int]) -> Float[Array, "L F D"]:
    """Every frame's ID less that of the frame across the middle, ID[f] - ID[8 - f]."""
    universal = ids.universal[np.asarray(layers)]
    return universal - jnp.flip(universal, axis=1)


def run_steering(
    model: Model,
    batch: OrderBatch | tuple[OrderBatch, Trace],
    ids: TemporalIDs,
    *,
    layers: Sequence[int],
    multiplier: float = 5.0,
    compat: Compat = "none",
    chunk: int | None = None,
) -> Steering:
    """Steers the words of the second scene to every frame, at each layer.

    Args:
        model: the model.
        batch: prepared questions; with their trace where there is one already.
        ids: the model's temporal IDs.
        layers: decoder blocks after which the vector is added.
        multiplier: of the vectors, which are not rescaled.
        compat: "reference": `change` has the sign that the published code plots.
        chunk: edits that run side by side.

    Returns:
        Log-probabilities of "before" and "after", those steered Float[L, F, B, 2].

    Raises:
        InputError: if IDs and model differ, or a layer is out of range.
    """
    require_same_model(model, ids)
    batch, recorded = batch if isinstance(batch, tuple) else (batch, trace(model, batch.asked.prompts))
    chosen = np.asarray(list(layers))
    vectors = frame_vectors(ids, layers)
    sweep = np.broadcast_to(chosen[:, None], vectors.shape[:2])
    edit: Any = add(layer=sweep, positions=batch.second, vector=multiplier * vectors)
    steered = batch.asked.read(rerun(model, recorded, edit, chunk=chunk))
    return Steering(control=np.asarray(batch.asked.read(recorded)), steered=np.asarray(steered), compat=compat)
