"""Arbitrary steering: the subject's word is pushed to each of the 16 cells ([ID] arXiv 2601.12626, Figures 6 and 7)."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxid.experiments.belief_swap import require_same_model
from jaxid.experiments.relations import Compat, RelationBatch
from jaxid.families.base import Model
from jaxid.ids.spatial import SpatialIDs
from jaxid.interp.interventions import add
from jaxid.interp.trace import Trace, rerun, trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steering:
    """Log-probabilities of the two answers.

    Attributes:
        control: Float[B, 2].
        steered: by whatever was swept, Float[S..., B, 2].
        compat: whose sign `change` has.
    """

    control: Float[np.ndarray, "B 2"]
    steered: Float[np.ndarray, "*S B 2"]
    compat: Compat = "none"

    @property
    def change(self) -> Float[np.ndarray, "*S B 2"]:
        """Log p(steered) - log p(control); negated, as the published code plots it, with compat "reference"."""
        return (self.steered - self.control) * (-1 if self.compat == "reference" else 1)


def cell_vectors(ids: SpatialIDs, axis: str, layers: Sequence[int]) -> Float[Array, "L X Y D"]:
    """U(x, y) less the ID of the mirrored cell: (3 - x, y) for left/right, (x, 3 - y) for above/below."""
    return mirrored_difference(ids.universal[np.asarray(layers)], axis)


def mirrored_difference(universal: Float[Array, "L X Y D"], axis: str) -> Float[Array, "L X Y D"]:
    """Every cell's ID less the one across the picture's middle."""
    return universal - jnp.flip(universal, axis=1 if axis == "horizontal" else 2)


def run(
    model: Model,
    batch: RelationBatch | tuple[RelationBatch, Trace],
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    multiplier: float = 5.0,
    compat: Compat = "none",
    chunk: int | None = None,
) -> Steering:
    """Steers the subject to each cell, at each layer.

    Args:
        model: the model.
        batch: prepared questions of one axis; with their trace where there is one already.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vector is added.
        multiplier: m of the published procedure; the vector is not rescaled.
        compat: "reference" reproduces the published code: the vectors are those read one block earlier, they are
            added one token late, and `change` has the other sign.
        chunk: edits that run side by side.

    Returns:
        Log-probabilities, those steered Float[L, 4, 4, B, 2].

    Raises:
        InputError: if IDs and model differ, or a layer is out of range.
    """
    require_same_model(model, ids)
    batch, recorded = batch if isinstance(batch, tuple) else (batch, trace(model, batch.prompts))
    chosen = np.asarray(list(layers))
    at = batch.words[:, 0]
    if compat == "reference":
        vectors, at = mirrored_difference(_read_one_block_earlier(ids)[chosen], batch.axis), at + 1
    else:
        vectors = cell_vectors(ids, batch.axis, layers)
    sweep = np.broadcast_to(chosen[:, None, None], vectors.shape[:3])
    edit = add(layer=sweep, positions=at, vector=multiplier * vectors)
    steered = batch.read(rerun(model, recorded, edit, chunk=chunk))
    return Steering(control=np.asarray(batch.read(recorded)), steered=np.asarray(steered), compat=compat)


def single(
    model: Model,
    batch: RelationBatch,
    ids: SpatialIDs,
    *,
    layers: Sequence[int],
    cells: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (3, 0)),
    id_layer: int,
    multiplier: float = 5.0,
    compat: Compat = "none",
) -> Steering:
    """Steers both words of a picture apart with one layer's IDs, added at every layer in turn (Figure 6 d).

    The subject gets U(first cell) - U(second cell), the object the negative.

    Args:
        model: the model.
        batch: prepared questions.
        ids: the model's spatial IDs.
        layers: decoder blocks after which the vectors are added.
        cells: the two cells.
        id_layer: the block whose IDs are used throughout.
        multiplier: of the vectors, which are not rescaled.
        compat: as in `run`.

    Returns:
        Log-probabilities, those steered Float[L, B, 2].

    Raises:
        InputError: if IDs and model differ, or a layer or cell is out of range.
    """
    require_same_model(model, ids)
    recorded = trace(model, batch.prompts)
    (x1, y1), (x2, y2) = cells
    at = batch.words[:, :2]
    if compat == "reference":
        universal, at = _read_one_block_earlier(ids)[id_layer], at + 1
        push = universal[x1, y1] - universal[x2, y2]
    else:
        push = ids[id_layer, x1, y1] - ids[id_layer, x2, y2]
    vectors = multiplier * jnp.stack([push, -push])[None, None]  # [1, 1, 2, D]
    chosen = np.asarray(list(layers))
    edit = add(layer=chosen, positions=at, vector=jnp.broadcast_to(vectors, (len(chosen), *vectors.shape[1:])))
    steered = batch.read(rerun(model, recorded, edit))
    return Steering(control=np.asarray(batch.read(recorded)), steered=np.asarray(steered), compat=compat)


def _read_one_block_earlier(ids: SpatialIDs) -> Float[Array, "L X Y D"]:
    """Universal IDs as Hugging Face's index counts: k is what leaves block k - 1, and the embeddings hold no place."""
    return jnp.concatenate([jnp.zeros_like(ids.universal[:1]), ids.universal[:-1]])
