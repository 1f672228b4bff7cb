"""Belief swap: spatial IDs added to the two words turn the answer round ([ID] arXiv 2601.12626, Figure 2)."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxid.engine import forward
from jaxid.errors import InputError
from jaxid.experiments.relations import RelationBatch, control
from jaxid.ids import SpatialIDs
from jaxid.interventions import Edit, add
from jaxid.models.base import Model

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
    """

    control: Float[np.ndarray, "B 2"]
    steered: Float[np.ndarray, "C L F B 2"]
    layers: Int[np.ndarray, "L"]
    factors: Float[np.ndarray, "F"]
    truth: Int[np.ndarray, "B"]

    @property
    def correct(self) -> Bool[np.ndarray, "B"]:
        """Whether the control pass prefers the true answer."""
        return self.control.argmax(-1) == self.truth

    @property
    def swapped(self) -> Bool[np.ndarray, "C L F B"]:
        """Whether the sign of log p(correct) - log p(wrong) changed."""
        return (self.steered[..., 0] > self.steered[..., 1]) != (self.control[:, 0] > self.control[:, 1])


def directions(
    ids: SpatialIDs, axis: str, truth: Int[np.ndarray, "B"], layers: Int[np.ndarray, "L"]
) -> Float[Array, "L B 2 D"]:
    """What pushes each item's belief the wrong way: for the subject's word and, negated, for the object's.

    A subject truly to the right is pushed by U(0, 0) - U(3, 0), one above by U(0, 3) - U(0, 0); others reversed.
    """
    first = ids[layers, 0, 0]
    far = ids[layers, 3, 0] if axis == "horizontal" else ids[layers, 0, 3]
    toward_first = jnp.asarray(first - far)[:, None]
    subject = toward_first * jnp.where(jnp.asarray(truth) == 1, 1.0, -1.0)[None, :, None]
    return jnp.stack([subject, -subject], axis=2)


def rescaled(
    vectors: Float[Array, "L B 2 D"], activations: Float[Array, "L B 2 D"], factors: Float[np.ndarray, "F"]
) -> Float[Array, "L F B 2 D"]:
    """Vectors of length factor * |control activation of that word at that layer|."""
    norms = jnp.linalg.norm(activations.astype(jnp.float32), axis=-1, keepdims=True)
    unit = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return (unit * norms)[:, None] * jnp.asarray(factors, jnp.float32)[None, :, None, None, None]


def run(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    factors: Sequence[float] = (5.0,),
    seed: int = 0,
    chunk: int = 8,
) -> BeliefSwap:
    """Swaps the belief of every item at every layer and factor, beside noise of the same norm, in one call.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vectors are added.
        factors: norms of the vectors in units of the words' activations.
        seed: of the noise.
        chunk: edits that run side by side.

    Raises:
        InputError: if IDs and model differ, or a layer is out of range.
    """
    if ids.values.shape[0] != model.num_layers or ids.values.shape[-1] != model.width:
        raise InputError(
            f"the IDs are of a model with {ids.values.shape[0]} blocks of width {ids.values.shape[-1]}, "
            f"{model.name} has {model.num_layers} of width {model.width}."
        )
    chosen, strengths = np.asarray(layers), np.asarray(factors, np.float32)
    clean_answers, activations = control(model, batch)
    here = jnp.asarray(activations)[chosen]
    axis = batch.axis
    pushes = directions(ids, axis, batch.truth, chosen)
    noise = jax.random.normal(jax.random.key(seed), pushes.shape, jnp.float32)
    vectors = jnp.stack([rescaled(pushes, here, strengths), rescaled(noise, here, strengths)])
    sweep_layers = jnp.broadcast_to(jnp.asarray(chosen)[None, :, None], vectors.shape[:3])
    edit: Edit = add(layer=sweep_layers, at=batch.words, vector=vectors)
    steered = forward(model, batch.prompts, edit, chunk=chunk).logprobs(batch.answers)
    return BeliefSwap(
        control=clean_answers,
        steered=np.asarray(steered),
        layers=chosen,
        factors=strengths,
        truth=batch.truth,
    )
