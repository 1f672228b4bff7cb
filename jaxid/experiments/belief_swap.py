"""Belief swap: spatial IDs added to the two words turn the answer round ([ID] arXiv 2601.12626, Figures 2 and 9)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxid.errors import InputError
from jaxid.experiments.relations import Compat, RelationBatch, answer_of
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.ids.temporal import TemporalIDs
from jaxid.interp.forward import forward
from jaxid.interp.generate import Generation, generate
from jaxid.interp.interventions import Edit, add
from jaxid.interp.trace import rerun, trace
from jaxid.nn.sites import Capture

CONDITIONS = ("belief", "noise")
"""What is added: the ID difference, or Gaussian noise of the same norm."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeliefSwap:
    """Log-probabilities of (first word, second word) before and after the swap.

    Attributes:
        control: Float[B, 2].
        steered: by condition, layer, factor: Float[2, L, F, B, 2].
        layers: Int[L].
        factors: Float[F].
        truth: index of the true answer, Int[B].
        control_texts: what the control run wrote, [B]; empty strings where nothing was generated.
        steered_texts: likewise under every edit, [2, L, F, B].
    """

    control: Float[np.ndarray, "B 2"]
    steered: Float[np.ndarray, "C L F B 2"]
    layers: Int[np.ndarray, "L"]
    factors: Float[np.ndarray, "F"]
    truth: Int[np.ndarray, "B"]
    control_texts: np.ndarray
    steered_texts: np.ndarray

    @property
    def correct(self) -> Bool[np.ndarray, "B"]:
        """Whether the control pass prefers the true answer."""
        return self.control.argmax(-1) == self.truth

    @property
    def swapped(self) -> Bool[np.ndarray, "C L F B"]:
        """Whether the sign of log p(correct) - log p(wrong) changed."""
        return (self.steered[..., 0] > self.steered[..., 1]) != (self.control[:, 0] > self.control[:, 1])


def require_same_model(model: Model, ids: SpatialIDs | TemporalIDs) -> None:
    """Checks that IDs can be of this model.

    Raises:
        InputError: if blocks, width or fingerprint differ.
    """
    if ids.values.shape[0] != model.num_layers or ids.values.shape[-1] != model.width:
        raise InputError(
            f"the IDs are of a model with {ids.values.shape[0]} blocks of width {ids.values.shape[-1]}, "
            f"{model.name} has {model.num_layers} of width {model.width}."
        )
    if ids.fingerprint and model.fingerprint and ids.fingerprint != model.fingerprint:
        raise InputError(
            f"the IDs were extracted from {ids.model} ({ids.fingerprint}), not from {model.name} "
            f"({model.fingerprint}); extract them again with jaxid ids extract."
        )


def directions(
    ids: SpatialIDs, axis: str, answers: Int[np.ndarray, "B"], layers: Int[np.ndarray, "L"]
) -> Float[Array, "L B 2 D"]:
    """What pushes each item's belief the other way: for the subject's word and, negated, for the object's.

    A subject that is believed to be on the right is pushed by U(0, 0) - U(3, 0), one above by U(0, 3) - U(0, 0);
    others reversed. `answers` holds the index of what is believed among the axis' two words.
    """
    first = ids[layers, 0, 0]
    far = ids[layers, 3, 0] if axis == "horizontal" else ids[layers, 0, 3]
    toward_first = jnp.asarray(first - far)[:, None]
    subject = toward_first * jnp.where(jnp.asarray(answers) == 1, 1.0, -1.0)[None, :, None]
    return jnp.stack([subject, -subject], axis=2)


def noise(seed: int, numbers: Int[np.ndarray, "B"], layers: int, width: int) -> Float[Array, "L B 2 D"]:
    """Gaussian vectors for every item, layer and word; an item's depend on its number alone, not on its batch."""
    keys = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(jnp.asarray(numbers))
    drawn = jax.vmap(lambda key: jax.random.normal(key, (layers, 2, width), jnp.float32))(keys)
    return jnp.moveaxis(drawn, 0, 1)


def rescaled(
    vectors: Float[Array, "L B 2 D"], norms: Float[Array, "L B 2"], factors: Float[np.ndarray, "F"]
) -> Float[Array, "L F B 2 D"]:
    """Vectors of length factor * norm."""
    unit = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (unit * norms[..., None])[:, None] * jnp.asarray(factors, jnp.float32)[None, :, None, None, None]


def run(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    factors: Sequence[float] = (5.0,),
    seed: int = 0,
    numbers: Int[np.ndarray, "B"] | None = None,
    max_new_tokens: int = 0,
    compat: Compat = "none",
    chunk: int | None = None,
) -> BeliefSwap:
    """Swaps the belief of every item at every layer and factor, beside noise of the same norm, in one call.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vectors are added.
        factors: norms of the vectors in units of the words' activations.
        seed: of the noise.
        numbers: of the items, on which their noise depends; 0 to B - 1 by default.
        max_new_tokens: writes the answers too, control and steered, with so many tokens at most. What is believed is
            then what the control run wrote (as published), where that is one of the two words; else the answer of
            higher probability.
        compat: "reference" measures a word's norm over all its occurrences together, generated text included, as
            the published code does; needs `max_new_tokens`.
        chunk: edits that run side by side.

    Raises:
        InputError: if IDs and model differ, or a layer is out of range.
    """
    require_same_model(model, ids)
    if compat == "reference" and not max_new_tokens:
        raise InputError("compat='reference' measures norms over the generated text too: set max_new_tokens.")
    chosen, strengths = np.asarray(layers), np.asarray(factors, np.float32)
    recorded = trace(model, batch.prompts)
    control = np.asarray(batch.read(recorded))
    believed = control.argmax(axis=-1)
    count = len(batch.prompts)
    control_texts = np.full(count, "", object)
    written: Generation | None = None
    if max_new_tokens:
        written = generate(model, recorded, max_new_tokens=max_new_tokens)
        control_texts = written.texts
        said = np.array([answer_of(text, batch.answers) for text in control_texts])
        believed = np.where(said >= 0, said, believed)
    words = batch.words[:, :2]
    if written is not None and compat == "reference":
        norms = occurrence_norms(model, batch, written)[chosen]
    else:
        norms = jnp.linalg.norm(recorded.at(words)[1:].astype(jnp.float32), axis=-1)[chosen]
    pushes = directions(ids, batch.axis, believed, chosen)
    drawn = noise(seed, np.arange(count) if numbers is None else numbers, model.num_layers, model.width)[chosen]
    vectors = jnp.stack([rescaled(pushes, norms, strengths), rescaled(drawn, norms, strengths)])
    sweep_layers = np.broadcast_to(chosen[None, :, None], vectors.shape[:3])
    edit: Edit = add(layer=sweep_layers, positions=words, vector=vectors)
    steered_texts = np.full((*vectors.shape[:3], count), "", object)
    if max_new_tokens:
        swapped = generate(model, recorded, edit, max_new_tokens=max_new_tokens)
        steered, steered_texts = batch.read(swapped.first), swapped.texts
    else:
        steered = batch.read(rerun(model, recorded, edit, chunk=chunk))
    return BeliefSwap(
        control=control,
        steered=np.asarray(steered),
        layers=chosen,
        factors=strengths,
        truth=batch.truth,
        control_texts=control_texts,
        steered_texts=steered_texts,
    )


def occurrence_norms(model: Model, batch: RelationBatch, written: Generation) -> Float[Array, "L B 2"]:
    """Norm of all activations together at the tokens that are the same as a word's, in prompt and generated text.

    The published code takes this for the word's norm; it is larger than that of the one activation that is edited.
    """
    longer = batch.prompts.extended(written.tokens, written.lengths)
    token_ids, rows = np.asarray(longer.inputs.token_ids), len(longer)
    words = np.take_along_axis(token_ids, batch.words[:, :2], axis=1)
    same = (token_ids[:, :, None] == words[:, None]) & np.asarray(longer.inputs.valid)[:, :, None]  # [B, T, 2]
    most = int(same.sum(axis=1).max())
    order = np.argsort(~same, axis=1, kind="stable")[:, :most]  # places of the word first, [B, most, 2]
    at = order.transpose(0, 2, 1).reshape(rows, 2 * most)
    found = forward(model, longer, capture=Capture(("resid_post",), positions=jnp.asarray(at))).captured["resid_post"]
    counted = np.take_along_axis(same, order, axis=1).transpose(0, 2, 1)  # [B, 2, most]
    squares = jnp.square(found.astype(jnp.float32)).sum(axis=-1).reshape(-1, rows, 2, most)
    return jnp.sqrt(jnp.where(counted, squares, 0.0).sum(axis=-1))
