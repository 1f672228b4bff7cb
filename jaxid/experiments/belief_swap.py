"""Belief swap: adding spatial IDs to the two words swaps the answer ([ID] arXiv 2601.12626, Figures 2 and 9)."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from matplotlib.figure import Figure

from jaxid.checks import Range
from jaxid.data.coco_spatial import SpatialItem
from jaxid.experiments.base import Reading, Summary, WithLayers, WithSpatialIDs, WithStrength
from jaxid.experiments.compare import CONDITIONS, Rates, draw_best, draw_layers, rates
from jaxid.experiments.relations import RelationBatch, answer_of, prepare, verdicts
from jaxid.experiments.session import (
    Columns,
    Later,
    Session,
    by_axis,
    item_columns,
    on_host,
    padded,
    require_same_model,
    spread,
)
from jaxid.families.base import Model
from jaxid.families.registry import published
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.generate import Generation, generate
from jaxid.interp.interventions import add
from jaxid.interp.trace import Trace, rerun, trace
from jaxid.io import tidy
from jaxid.nn.sites import AnyArray
from jaxid.prompts.pictures import Picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Swapped:
    """Log-probabilities of (first word, second word) before and after the swap.

    Attributes:
        control: before the swap.
        steered: after it, by condition, layer and strength.
        layers: the layers after which vectors are added.
        strengths: norms of the vectors, in units of the words' norms.
        truth: index of the true answer.
        control_texts: texts of the control run, [B]; empty strings if nothing was generated.
        steered_texts: texts generated under every edit, [2, L, S, B]; empty strings if nothing was generated.
    """

    control: Float[AnyArray, "B 2"]
    steered: Float[AnyArray, "C L S B 2"]
    layers: Int[np.ndarray, "L"]
    strengths: Float[np.ndarray, "S"]
    truth: Int[np.ndarray, "B"]
    control_texts: np.ndarray
    steered_texts: np.ndarray

    @property
    def correct(self) -> Bool[AnyArray, "B"]:
        """Whether the control pass prefers the true answer."""
        return self.control.argmax(-1) == self.truth

    @property
    def swapped(self) -> Bool[AnyArray, "C L S B"]:
        """Whether the sign of log p(correct) - log p(wrong) changed."""
        return (self.steered[..., 0] > self.steered[..., 1]) != (self.control[:, 0] > self.control[:, 1])


def directions(
    ids: SpatialIDs, axis: str, answers: Int[AnyArray, "B"], layers: Int[np.ndarray, "L"]
) -> Float[Array, "L B 2 D"]:
    """The vectors that push each item's belief the other way, for the subject's and the object's word.

    A subject that is believed to be on the right is pushed by U(0, 0) - U(3, 0), one that is believed to be above by
    U(0, 3) - U(0, 0). Others, and the objects, get the negative. `answers` are indices of the believed answers.
    """
    first = ids[layers, 0, 0]
    far = ids[layers, 3, 0] if axis == "horizontal" else ids[layers, 0, 3]
    toward_first = jnp.asarray(first - far)[:, None]
    subject = toward_first * jnp.where(jnp.asarray(answers) == 1, 1.0, -1.0)[None, :, None]
    return jnp.stack([subject, -subject], axis=2)


def noise(seed: int, indices: Int[np.ndarray, "B"], layers: int, width: int) -> Float[Array, "L B 2 D"]:
    """Gaussian vectors for every item, layer and word. An item's vectors depend on its index, not on its batch."""
    keys = jax.vmap(lambda index: jax.random.fold_in(jax.random.key(seed), index))(jnp.asarray(indices))
    drawn = jax.vmap(lambda key: jax.random.normal(key, (layers, 2, width), jnp.float32))(keys)
    return jnp.moveaxis(drawn, 0, 1)


def rescaled(
    vectors: Float[Array, "L B 2 D"], norms: Float[Array, "L B 2"], strengths: Float[np.ndarray, "S"]
) -> Float[Array, "L S B 2 D"]:
    """Vectors of length strength * norm."""
    unit = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (unit * norms[..., None])[:, None] * jnp.asarray(strengths, jnp.float32)[None, :, None, None, None]


def word_norms(
    model: Model, batch: RelationBatch, recorded: Trace, written: Generation | None
) -> Float[Array, "L B 2"]:
    """Norm of the two words' activations after every layer."""
    return jnp.linalg.norm(recorded.at(batch.words[:, :2])[1:].astype(jnp.float32), axis=-1)


Norms = Callable[[Model, RelationBatch, Trace, Generation | None], Float[Array, "L B 2"]]
"""Computes the norms that strengths multiply, from model, batch, its trace, and the control run's texts."""


def swap_beliefs(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    strengths: Sequence[float] = (5.0,),
    seed: int = 0,
    indices: Int[np.ndarray, "B"] | None = None,
    max_new_tokens: int = 0,
    norms: Norms = word_norms,
    said: Callable[[str, Sequence[str]], int] = answer_of,
    recorded: Trace | None = None,
    chunk: int | None = None,
    fetch: bool = True,
) -> Swapped:
    """Swaps the belief of every item at every layer and strength, by IDs and by noise of the same norm.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        layers: decoder layers after which the vectors are added.
        strengths: norms of the vectors in units of the words' activations.
        seed: seed of the noise.
        indices: indices of the items, which their noise depends on; 0 to B - 1 by default.
        max_new_tokens: if above 0, answers of at most so many tokens are generated too. A belief is then the word that
            the control run wrote (as published), or the more probable answer if it wrote neither word or both.
        norms: computes the norms of the words, which the strengths multiply.
        said: finds the index of the answer word in a text, -1 if it holds neither word or both.
        recorded: the trace of the questions, if there is one already.
        chunk: number of edits that run together.
        fetch: copy the results to the host. If not, they are on the device, where they may still be computed.

    Raises:
        InputError: if the IDs are of another model, or a layer is out of range.
    """
    require_same_model(model, ids)
    chosen, multiples = np.asarray(layers), np.asarray(strengths, np.float32)
    recorded = trace(model, batch.prompts) if recorded is None else recorded
    control = batch.read(recorded)
    believed = control.argmax(axis=-1)
    count = len(batch.prompts)
    control_texts = np.full(count, "", object)
    written: Generation | None = None
    if max_new_tokens:
        written = generate(model, recorded, max_new_tokens=max_new_tokens)
        control_texts = written.texts
        answers = np.array([said(text, batch.answers) for text in control_texts])
        believed = jnp.where(answers >= 0, answers, believed)
    lengths = norms(model, batch, recorded, written)[chosen]
    pushes = directions(ids, batch.axis, believed, chosen)
    drawn = noise(seed, np.arange(count) if indices is None else indices, model.num_layers, model.width)[chosen]
    vectors = jnp.stack([rescaled(pushes, lengths, multiples), rescaled(drawn, lengths, multiples)])
    sweep_layers = np.broadcast_to(chosen[None, :, None], vectors.shape[:3])
    edit = add(layer=sweep_layers, positions=batch.words[:, :2], vector=vectors)
    steered_texts = np.full((*vectors.shape[:3], count), "", object)
    if max_new_tokens:
        swapped = generate(model, recorded, edit, max_new_tokens=max_new_tokens)
        steered, steered_texts = batch.read(swapped.first), swapped.texts
    else:
        steered = batch.read(rerun(model, recorded, edit, chunk=chunk))
    found = Swapped(
        control=control,
        steered=steered,
        layers=chosen,
        strengths=multiples,
        truth=batch.truth,
        control_texts=control_texts,
        steered_texts=steered_texts,
    )
    return on_host(found) if fetch else found


# --- the experiment --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeliefSwapSummary(Rates, Summary):
    """Summary of a belief swap."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeliefSwap(
    WithSpatialIDs[SpatialItem, RelationBatch, BeliefSwapSummary],
    WithLayers[SpatialItem, RelationBatch, BeliefSwapSummary],
    WithStrength[SpatialItem, RelationBatch, BeliefSwapSummary],
):
    """Swap beliefs with spatial IDs, and with noise of the same norm (Figure 2).

    The rates are of the items whose control answer is exactly one of the two words. Strengths are multiples of the norm
    of a word's activation.

    Attributes:
        max_new_tokens: length of the answers, without and with edits; 0 reads only the first token.
    """

    name: ClassVar[str] = "belief-swap"
    reading: ClassVar[Reading] = Reading(
        axes=("condition", "layer"),
        before=("control_correct", "control_wrong"),
        after=("steered_correct", "steered_wrong"),
        values={"swapped": "belief swapped (1) or kept (0)"},
        texts=("control_text", "text"),
    )
    as_published: ClassVar[bool] = False
    """How items are counted; see `compare.rates`."""
    norms: ClassVar[Norms] = staticmethod(word_norms)
    said: ClassVar[Callable[[str, Sequence[str]], int]] = staticmethod(answer_of)

    max_new_tokens: Annotated[int, Range(0)] = 250

    def items(self, session: Session) -> list[SpatialItem]:
        """Questions of both axes."""
        return session.spatial_items()

    def groups(self, items: Sequence[SpatialItem]) -> list[list[SpatialItem]]:
        """The items of each axis."""
        return by_axis(items, lambda item: item)

    def default_layers(self, model: Model) -> Sequence[int]:
        """The published layers of a model; of others, all layers up to 12, else those from 1/4 to 5/8 of the depth."""
        count = model.num_layers
        return published(self.model).belief_swap or (
            range(count) if count <= 12 else range(count // 4, count * 5 // 8 + 1)
        )

    def rows(self, session: Session) -> int:
        """Both conditions at every layer."""
        return 2 * len(session.layers)

    def prepare(self, session: Session, items: Sequence[SpatialItem]) -> RelationBatch:
        """The published questions."""
        return prepare(session.model, items, prompt=session.prompt, case=session.case)

    def pictured(self, item: SpatialItem) -> Picture:
        """The item's picture."""
        return item.picture

    def edited(self, batch: RelationBatch) -> dict[str, Int[np.ndarray, "B 2"]]:
        """Both words."""
        return {"": batch.words[:, :2]}

    def compute(self, session: Session, items: Sequence[SpatialItem], batch: RelationBatch) -> Later:
        """A row for each item, condition and layer."""
        found = swap_beliefs(
            session.model,
            batch,
            session.ids,
            layers=session.layers,
            strengths=(self.strength,),
            seed=self.seed,
            indices=np.array(padded([session.index[item.key] for item in items], session.batch_size)),
            max_new_tokens=self.max_new_tokens,
            norms=self.norms,
            said=self.said,
            fetch=False,
        )
        return partial(table_of, found, items, batch.answers, session.model.name, self.said)

    def summarise(self, session: Session, table: Columns) -> BeliefSwapSummary:
        """Shares by condition and layer."""
        found = rates(table, session.layers, seed=self.seed, as_published=self.as_published)
        return BeliefSwapSummary(**session.facts, **vars(found))

    def figures(self, session: Session, table: Columns, summary: BeliefSwapSummary) -> Iterator[tuple[str, Figure]]:
        """The best layers, and all layers."""
        yield "belief_swap", draw_best({summary.model: summary.best}, self.strength)
        about = summary.about(items=summary.answered_items)
        yield "belief_swap_by_layer", draw_layers(summary, self.strength, about)

    def report(self, summary: BeliefSwapSummary) -> Iterator[str]:
        """The shares at the best layers."""
        best = summary.best
        chosen = "the same items" if best.chosen_on == "same items" else "others"
        yield (
            f"{summary.answered_items} items, {summary.accuracy:.1%} answered correctly; best layers "
            f"{', '.join(map(str, sorted(best.layers)))}, chosen on {chosen}: {best.belief:.1%} swapped by IDs, "
            f"{best.noise:.1%} by noise (of {best.items} items){summary.skipped_note}"
        )


def table_of(
    found: Swapped,
    items: Sequence[SpatialItem],
    answers: Sequence[str],
    model: str,
    said: Callable[[str, Sequence[str]], int] = answer_of,
) -> Columns:
    """A row for each item, condition and layer, at the first strength."""
    found = on_host(found)
    count, rows = len(items), np.arange(len(items))
    truth, control, control_texts = found.truth[:count], found.control[:count], found.control_texts[:count]
    steered, swapped, texts = (  # by item, condition, layer
        np.moveaxis(values[:, :, 0, :count], 2, 0) for values in (found.steered, found.swapped, found.steered_texts)
    )
    shape = texts.shape

    def indices(texts: np.ndarray) -> np.ndarray:
        return np.array([said(text, answers) for text in texts.ravel()], int).reshape(texts.shape)

    written = control_texts != ""
    answered = np.where(written, indices(control_texts), control.argmax(axis=-1))
    chosen = np.where(written[:, None, None], indices(texts), steered.argmax(axis=-1))
    axes = {"item": [item.key for item in items], "condition": CONDITIONS, "layer": found.layers.tolist()}
    return tidy(steered[rows, :, :, truth], axes, name="steered_correct") | {
        "steered_wrong": steered[rows, :, :, 1 - truth].ravel(),
        "model": spread(model, shape),
        **item_columns(items, shape, 0),
        "strength": spread(float(found.strengths[0]), shape),
        "control_correct": spread(control[rows, truth], shape, 0),
        "control_wrong": spread(control[rows, 1 - truth], shape, 0),
        "swapped": swapped.ravel(),
        "control_verdict": spread(verdicts(answered, truth), shape, 0),
        "verdict": verdicts(chosen, truth[:, None, None]).ravel(),
        "control_text": spread(control_texts.astype(str), shape, 0),
        "text": texts.ravel().astype(str),
    }
