"""Arbitrary steering: the subject's word is pushed to each of the 16 cells ([ID] arXiv 2601.12626, Figure 6)."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxid.engine import forward
from jaxid.experiments.relations import RelationBatch
from jaxid.ids import SpatialIDs
from jaxid.interventions import add
from jaxid.models.base import Model


def cell_vectors(ids: SpatialIDs, axis: str, layers: Sequence[int]) -> Float[Array, "L X Y D"]:
    """U(x, y) less the ID of the mirrored cell: (3 - x, y) for left/right, (x, 3 - y) for above/below."""
    universal = ids.universal[np.asarray(layers)]
    return universal - jnp.flip(universal, axis=1 if axis == "horizontal" else 2)


def run(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    multiplier: float = 5.0,
    chunk: int = 16,
) -> Float[np.ndarray, "L X Y B 2"]:
    """Change of the two answers' log-probabilities when the subject is steered to each cell.

    Args:
        model: the model.
        batch: prepared items of one axis.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vector is added.
        multiplier: m of the published procedure; the vector is not rescaled.
        chunk: edits that run side by side.

    Returns:
        log p(steered) - log p(control), Float[L, 4, 4, B, 2].
    """
    vectors = multiplier * cell_vectors(ids, batch.axis, layers)
    sweep_layers = jnp.broadcast_to(jnp.asarray(list(layers))[:, None, None], vectors.shape[:3])
    edit = add(layer=sweep_layers, at=batch.words[:, 0], vector=vectors)
    control = forward(model, batch.prompts).logprobs(batch.answers)
    return np.asarray(forward(model, batch.prompts, edit, chunk=chunk).logprobs(batch.answers) - control)
