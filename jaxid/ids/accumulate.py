"""IDs from a stream of activations: an object word's activation minus its mean.

With the partner at a fixed place, the ID of a word is its activation minus the mean over all of its own places and
sizes. IDs are then averaged over the partner's places, then over the pairs of each object ([ID] arXiv 2601.12626,
extraction of spatial IDs). Places are cells of a grid, or frames of a clip.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxid.errors import InputError
from jaxid.kernels import probing
from jaxid.nn.sites import as_integers

_add = jax.jit(probing.accumulate, donate_argnums=0)


class IDBatch(NamedTuple):
    """One batch of activations, one word a row. Rows with pair -1 are padding and are ignored.

    Attributes:
        activations: At the word's last sub-token; index 0 the embeddings, k + 1 the output of layer k.
        object_index: Index of the object that the word names.
        pair_index: Index of the object, its partner and its role together; a pair has one object.
        own_index: Place of the object: its cell y * 4 + x in a picture, or the index of its frame in a clip.
        other_index: Place of its partner.
        size_index: Index of the object's size.
        order: Order in which the words were read, among all batches; nothing but the published code depends on it.
    """

    activations: Float[Array, "B L+1 D"] | Float[np.ndarray, "B L+1 D"]
    object_index: Int[np.ndarray, "B"]
    pair_index: Int[np.ndarray, "B"]
    own_index: Int[np.ndarray, "B"]
    other_index: Int[np.ndarray, "B"]
    size_index: Int[np.ndarray, "B"] | None = None  # None: there is one size
    order: Int[np.ndarray, "B"] | None = None  # None: that of the rows


def accumulate(
    batches: Iterable[IDBatch], *, pairs: int, objects: Sequence[str], places: int, sizes: int = 1
) -> tuple[Float[np.ndarray, "L1 O S P D"], Int[np.ndarray, "O S P"]]:
    """IDs by layer (index 0 the embeddings), object, size and place.

    Memory on the device: float32 [pairs, places * (sizes + 1), L + 1, D], whatever the number of rows.

    Args:
        batches: in any order; equal lengths (padded) compile once.
        pairs: number of pairs.
        objects: names of the objects.
        places: number of places that an object can have.
        sizes: number of object sizes.

    Returns:
        The IDs and the number of rows averaged in each; both are zero where there are none.

    Raises:
        InputError: An index out of range, both objects of a pair in one place, a pair of two different objects,
            activations that are not finite or change shape, or no batch at all.
    """
    crossings = np.zeros((pairs, places, sizes * places), np.int32)
    object_of_pair = np.full(pairs, -1)
    own_sums = other_sums = None
    for index, batch in enumerate(batches):
        activations = jnp.asarray(batch.activations)
        pair, own, other = _checked(batch, index, object_of_pair, len(objects), places, sizes)
        if own_sums is None or other_sums is None:
            own_sums = probing.empty_sums(pairs, sizes * places, *activations.shape[1:])
            other_sums = probing.empty_sums(pairs, places, *activations.shape[1:])
        if activations.shape[1:] != own_sums.sums.shape[2:]:
            raise InputError(
                f"Batch {index} has activations {list(activations.shape)}; earlier ones end in "
                f"{list(own_sums.sums.shape[2:])} (layers, width)."
            )
        used = pair >= 0
        np.add.at(crossings, (pair[used], other[used], own[used]), 1)
        own_sums = _add(own_sums, activations, jnp.asarray(pair), jnp.asarray(own))
        other_sums = _add(other_sums, activations, jnp.asarray(pair), jnp.asarray(other))
    if own_sums is None or other_sums is None or not crossings.any():
        raise InputError("There are no activations to find IDs in: the batches hold only padding.")

    layers, width = own_sums.sums.shape[2:]
    values = np.zeros((layers, len(objects), sizes * places, width), np.float32)
    counts = np.zeros((len(objects), sizes * places), np.int32)
    # An object at a time: the IDs of all pairs would double the memory.
    for row in np.unique(object_of_pair[object_of_pair >= 0]):
        chosen = np.flatnonzero(object_of_pair == row)
        ids, rows = probing.placed_ids(
            probing.CellSums(own_sums.sums[chosen], own_sums.counts[chosen]),
            probing.CellSums(other_sums.sums[chosen], other_sums.counts[chosen]),
            jnp.asarray(crossings[chosen]),
        )
        mean, rows = (np.asarray(array) for array in probing.average(ids, rows, axis=0))
        if not np.isfinite(mean).all():
            raise InputError(f"Activations at the word of {objects[row]!r} are not finite.")
        values[:, row], counts[row] = mean.swapaxes(0, 1), rows
    return values.reshape(layers, len(objects), sizes, places, width), counts.reshape(-1, sizes, places)


def _checked(
    batch: IDBatch, index: int, object_of_pair: np.ndarray, objects: int, places: int, sizes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked pair, own place with size, and partner's place; notes each pair's object in `object_of_pair`."""
    used = np.asarray(batch.pair_index) != -1
    limits = {
        "object_index": objects,
        "pair_index": len(object_of_pair),
        "own_index": places,
        "other_index": places,
        "size_index": sizes,
    }
    fields = batch._asdict()
    if batch.size_index is None:
        fields["size_index"] = np.zeros(used.shape, np.int32)
    indices = {name: as_integers(name, fields[name]) for name in limits}
    for name, limit in limits.items():
        if indices[name].shape != batch.activations.shape[:1]:
            raise InputError(
                f"Batch {index}: {name} is {list(indices[name].shape)}, activations {list(batch.activations.shape)}."
            )
        if ((indices[name] < 0) | (indices[name] >= limit))[used].any():
            raise InputError(f"Batch {index}: {name} must be from 0 to {limit - 1} (pair -1 is padding).")
    object_, pair, own, other, size = indices.values()
    if (own == other)[used].any():
        raise InputError(f"Batch {index} has both objects of a pair in one place.")
    known = object_of_pair.copy()
    object_of_pair[pair[used]] = object_[used]
    changed = (known >= 0) & (known != object_of_pair)
    if changed.any() or (object_of_pair[pair] != object_)[used].any():
        raise InputError(f"Batch {index} has a pair with two different objects: a pair is one A and one B.")
    return pair, size * places + own, other


def layer_names(layers: int) -> tuple[str, ...]:
    """Names of the sites at which IDs are read, after each layer."""
    return tuple(f"blocks.{k}.resid_post" for k in range(layers))
