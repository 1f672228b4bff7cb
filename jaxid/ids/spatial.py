"""Spatial IDs: their extraction from batches of activations, their container and their files.

A spatial ID is the part of an object word's activation that says where in the picture the object is ([ID]
arXiv 2601.12626). Cells (x, y): column x to the right, row y **down**. Layer k is the output of block k,
`resid_post[k]`; the embeddings (index 0 in Hugging Face's `hidden_states`) are kept apart.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.checkpoints.torch_files import Size, read_authors_ids
from jaxid.checks import check_finite
from jaxid.errors import InputError
from jaxid.ids import files as id_files
from jaxid.kernels import probing
from jaxid.nn.sites import as_integers

GRID = 4  # columns and rows of the published scenes
FULL_SIZE = 224  # pixels: the published size of an object that fills its cell

_FORMAT = "jaxid.spatial_ids"
_AXES = {
    "values": ["layer", "object", "size", "column", "row", "width"],
    "counts": ["object", "size", "column", "row"],
    "embeddings": ["object", "size", "column", "row", "width"],
}

_accumulate = jax.jit(probing.accumulate, donate_argnums=0)


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialIDs:
    """Spatial IDs of one model, by layer, object, object size and cell.

    `ids[k, x, y]` is the universal ID (the mean over objects) of layer k at column x and row y, at the
    largest size; indices broadcast as in numpy: `ids[layers, 0, 0]` is [len(layers), D]. They count from 0; traced
    ones out of range give NaN.

    Raises:
        InputError: The arrays and names do not fit each other.
    """

    values: Float[np.ndarray, "L O S X Y D"]  # float32; zero where counts is zero
    counts: Int[np.ndarray, "O S X Y"]  # pictures behind each ID; zero: there is none
    objects: tuple[str, ...]
    sizes: tuple[Size, ...]  # of the object pictures, in pixels; the largest is the main size
    layer_names: tuple[str, ...]
    embeddings: Float[np.ndarray, "O S X Y D"] | None = None  # the same before the first block
    model: str = ""  # name of the model
    fingerprint: str = ""  # of the model's parameters

    def __post_init__(self) -> None:
        id_files.check(self.values, self.counts, self.embeddings)
        if self.values.ndim != 6 or self.values.shape[3] < 2 or self.values.shape[4] < 2:
            raise InputError(
                "values must be [layer, object, size, column, row, width] on a grid of at least 2 x 2, "
                f"not {list(self.values.shape)}."
            )
        layers, objects, sizes = self.values.shape[:3]
        for name, entries, length in (
            ("objects", self.objects, objects),
            ("sizes", self.sizes, sizes),
            ("layer_names", self.layer_names, layers),
        ):
            if not length or len(entries) != length or len(set(entries)) != length:
                raise InputError(f"{name} must name {length} different entries, not {list(entries)}.")
        check_finite("sizes", self.sizes)
        if self.counts.shape != self.values.shape[1:5]:
            raise InputError(f"counts is {list(self.counts.shape)}; values asks for {list(self.values.shape[1:5])}.")
        if self.embeddings is not None and self.embeddings.shape != self.values.shape[1:]:
            raise InputError(
                f"embeddings is {list(self.embeddings.shape)}; values asks for {list(self.values.shape[1:])}."
            )

    @cached_property
    def universal(self) -> Float[Array, "L X Y D"]:
        """Universal IDs at the largest size: the mean over the objects that have data, weighted equally.

        Raises:
            InputError: No object has data at some cell.
        """
        return self.universal_at()

    def universal_at(self, size: Size | None = None) -> Float[Array, "L X Y D"]:
        """Universal IDs at one size; the largest by default.

        Raises:
            InputError: There is no such size, or no object has data at some cell.
        """
        index = self._size_index(size)
        present = self.counts[:, index] > 0
        self._require_cells(present.any(axis=0), "any object", index)
        values = np.asarray(self.values[:, :, index], np.float32)
        mean = np.einsum("loxyd,oxy->lxyd", values, present.astype(np.float32))
        mean /= present.sum(axis=0, dtype=np.float32)[..., None]
        # The property keeps the array: one made inside a traced function would leak its tracer.
        with jax.ensure_compile_time_eval():
            return jnp.asarray(mean)

    def for_object(self, name: str, size: Size | None = None) -> Float[Array, "L X Y D"]:
        """IDs of one object at one size; the largest by default.

        Raises:
            InputError: There is no such object or size, or the object has no data at some cell.
        """
        if name not in self.objects:
            raise InputError(f"There are no IDs of {name!r}; the objects are {', '.join(self.objects)}.")
        row, index = self.objects.index(name), self._size_index(size)
        self._require_cells(self.counts[row, index] > 0, repr(name), index)
        return jnp.asarray(self.values[:, row, index])

    def __getitem__(self, key: Any) -> Float[Array, "..."]:
        if not isinstance(key, tuple) or len(key) != 3:
            raise InputError("Index spatial IDs by layer, column and row: ids[k, x, y].")
        names = ("layer", "column", "row")
        universal = self.universal
        return id_files.take(universal, *map(_checked_index, names, key, universal.shape))

    def at_box(
        self,
        layer: int | Sequence[int] | Int[np.ndarray, "*layers"] | Int[Array, "*layers"],
        box: Sequence[float | int] | Float[np.ndarray, "*boxes 4"] | Float[Array, "*boxes 4"],
        image_size: tuple[Size, Size],
        half_cell: bool = True,
    ) -> Float[Array, "..."]:
        """The ID of a box's centre, mixed from the universal IDs of the cells around it.

        Args:
            layer: Layer or layers.
            box: (x, y, width, height) of the box, or many boxes, in pixels; x, y is the upper left corner.
            image_size: Width and height of the image in pixels.
            half_cell: False reproduces the published mapping, half a cell off (`kernels.probing.bilinear`).

        Returns:
            IDs [*layers, *boxes, D].

        Raises:
            InputError: A layer outside the model, boxes that are not of four numbers, or an empty image.
        """
        layers = _checked_index("layer", layer, len(self.layer_names))
        boxes = jnp.asarray(box, jnp.float32)
        if not isinstance(boxes, Tracer):
            check_finite("boxes", boxes)
        width, height = (float(side) for side in image_size)
        if boxes.shape[-1:] != (4,) or min(width, height) <= 0:
            raise InputError(
                "at_box needs boxes (x, y, width, height) and a positive image size, not "
                f"{list(boxes.shape)} and {image_size}."
            )
        columns, rows = self.universal.shape[1:3]
        x = (boxes[..., 0] + boxes[..., 2] / 2) * (columns / width)
        y = (boxes[..., 1] + boxes[..., 3] / 2) * (rows / height)
        return probing.bilinear(id_files.take(self.universal, layers), x, y, half_cell=half_cell)

    def axes(self, *, include_diagonal: bool = False) -> tuple[Float[Array, "L D"], Float[Array, "L D"]]:
        """The x axis (rightwards) and the y axis (downwards) of each layer's universal IDs.

        Args:
            include_diagonal: The published factor, see `kernels.probing.axes`.
        """
        return probing.axes(self.universal, include_diagonal=include_diagonal)

    def plane(self) -> tuple[Float[Array, "L D"], Float[Array, "L D"]]:
        """Orthonormal directions (u, v) of each layer's plane of axes."""
        return probing.plane(*self.axes())

    def plane_coordinates(self, values: Float[Array, "L *batch D"] | None = None) -> Float[Array, "L *batch 2"]:
        """Coordinates in each layer's plane; of the universal IDs [L, X, Y, 2] by default."""
        return probing.plane_coordinates(self.universal if values is None else values, *self.plane())

    def explained_variance(self) -> Float[Array, "L"]:
        """Share of the universal IDs' variance that lies in the plane."""
        return probing.explained_variance(self.universal, *self.plane())

    def agreement(self) -> Float[Array, "L"]:
        """Mean cosine between two objects' IDs of the same cell, at the largest size."""
        index = self._size_index(None)
        values = self.values[:, :, index]
        present = self.counts[:, index] > 0
        return probing.cosine_agreement(
            jnp.asarray(values.reshape(*values.shape[:2], -1, values.shape[-1])),
            jnp.asarray(present.reshape(present.shape[0], -1)),
        )

    def save(self, path: str | Path) -> None:
        """Writes the IDs as a safetensors file whose metadata names every axis; `load` reads it.

        Raises:
            OutputError: The file cannot be written. A file that was there is then unharmed.
        """
        tensors = {"values": self.values, "counts": self.counts}
        if self.embeddings is not None:
            tensors["embeddings"] = self.embeddings
        metadata = {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "objects": json.dumps(self.objects),
            "sizes": json.dumps([float(size) for size in self.sizes]),
            "layer_names": json.dumps(self.layer_names),
        }
        id_files.write(path, _FORMAT, "Spatial IDs", _AXES, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "SpatialIDs":
        """Reads a file written by `save`.

        Raises:
            CheckpointError: The file is missing, damaged, or not a file of spatial IDs of this version.
        """
        tensors, metadata = id_files.read(path, _FORMAT, "spatial IDs", _AXES)
        with id_files.loading(path, "spatial IDs"):
            return cls(
                values=tensors["values"],
                counts=tensors["counts"],
                embeddings=tensors.get("embeddings"),
                objects=tuple(json.loads(metadata["objects"])),
                sizes=tuple(json.loads(metadata["sizes"])),
                layer_names=tuple(json.loads(metadata["layer_names"])),
                model=metadata["model"],
                fingerprint=metadata["fingerprint"],
            )

    @classmethod
    def from_torch(cls, path: str | Path, size: Size | None = None, layer_key: str = "hf") -> "SpatialIDs":
        """Reads a `.pt` file in the layout of the paper's authors.

        Such a file is `[layer][object][(x, y, size)]` -> [D], or universal without the object (the one object
        is then called "universal"), or keyed (x, y) without the size. It does not say how many pictures are
        behind an ID: each count is 1. Files made from Hugging Face's `hidden_states` hold the last layer
        after the final norm.

        Args:
            path: The file.
            size: Reads this size alone; all of them by default. Names the size of a file keyed (x, y), 224 by
                default.
            layer_key: What layers are keyed by: "hf" (0 = embeddings, k + 1 = layer k) or "block" (layer k).

        Raises:
            CheckpointError: The file is missing, damaged, incomplete or of another layout; the message names
                the key.
        """
        values, embeddings, objects, sizes = read_authors_ids(path, size, layer_key)
        with id_files.loading(path, "spatial IDs"):
            return cls(
                values=values,
                counts=np.ones(values.shape[1:5], np.int32),
                embeddings=embeddings,
                objects=objects,
                sizes=sizes,
                layer_names=_layer_names(len(values)),
            )

    def _size_index(self, size: Size | None) -> int:
        """Position of a size, of the largest by default."""
        size = max(self.sizes) if size is None else size
        if size not in self.sizes:
            raise InputError(f"There are no IDs of size {size}; the sizes are {list(self.sizes)}.")
        return self.sizes.index(size)

    def _require_cells(self, present: Any, whose: str, size_index: int) -> None:
        """Refuses a grid with holes: axes and mixes of it would silently count them as zero vectors."""
        if not present.all():
            holes = [(int(x), int(y)) for x, y in np.argwhere(~present)]
            raise InputError(
                f"There is no ID of {whose} at cells {holes}, size {self.sizes[size_index]}: extract from "
                "pictures that cover every cell."
            )


class IDBatch(NamedTuple):
    """One batch of activations for `accumulate_ids`, a row a picture. Cells are numbered y * 4 + x.

    A row with pair -1 is padding: nothing of it is read.

    Attributes:
        activations: At the last sub-token of B's word; index 0 the embeddings, k + 1 the output of block k.
        object_index: Which object is B, the one asked about.
        pair_index: Which ordered pair (A, B).
        a_cell: Cell of A.
        b_cell: Cell of B.
        size_index: Which object size.
    """

    activations: Float[Array, "B L+1 D"] | Float[np.ndarray, "B L+1 D"]
    object_index: Int[np.ndarray, "B"]
    pair_index: Int[np.ndarray, "B"]
    a_cell: Int[np.ndarray, "B"]
    b_cell: Int[np.ndarray, "B"]
    size_index: Int[np.ndarray, "B"]


def accumulate_ids(
    batches: Iterable[IDBatch],
    *,
    pairs: int,
    objects: Sequence[str],
    sizes: Sequence[Size] = (FULL_SIZE,),
    model: str = "",
    fingerprint: str = "",
) -> SpatialIDs:
    """Spatial IDs from a stream of activations ([ID] arXiv 2601.12626, extraction of spatial IDs).

    For each pair (A, B) and place of A, an ID of B is its activation less the mean over B's places and sizes;
    IDs are averaged over A's places, then over the pairs of each object B. Memory on the device: float32
    [pairs, 16 * sizes + 16, L + 1, D], whatever the number of pictures.

    Args:
        batches: Batches in any order; equal lengths (padded) compile once.
        pairs: Number of ordered pairs.
        objects: Names of the objects.
        sizes: Object sizes in pixels.
        model: Name of the model, kept in the container.
        fingerprint: Fingerprint of its parameters, kept in the container.

    Returns:
        The IDs; an object or cell without pictures has count 0.

    Raises:
        InputError: An index out of range, A and B in one cell, a pair with two different objects B,
            activations that are not finite or change shape, or no batch at all.
    """
    cells, places = GRID * GRID, GRID * GRID * len(sizes)
    crossings = np.zeros((pairs, cells, places), np.int32)
    object_of_pair = np.full(pairs, -1)
    place_sums = folder_sums = None
    for number, batch in enumerate(batches):
        activations = jnp.asarray(batch.activations)
        pair, a_cell, place = _batch_indices(batch, number, object_of_pair, len(objects), len(sizes))
        used = pair >= 0
        np.add.at(crossings, (pair[used], a_cell[used], place[used]), 1)
        if place_sums is None or folder_sums is None:
            place_sums = probing.empty_sums(pairs, places, *activations.shape[1:])
            folder_sums = probing.empty_sums(pairs, cells, *activations.shape[1:])
        if activations.shape[1:] != place_sums.sums.shape[2:]:
            raise InputError(
                f"Batch {number} has activations {list(activations.shape)}; earlier ones end in "
                f"{list(place_sums.sums.shape[2:])} (layers, width)."
            )
        place_sums = _accumulate(place_sums, activations, jnp.asarray(pair), jnp.asarray(place))
        folder_sums = _accumulate(folder_sums, activations, jnp.asarray(pair), jnp.asarray(a_cell))
    if place_sums is None or folder_sums is None or not crossings.any():
        raise InputError("There are no activations to find IDs in: the batches hold no picture.")

    layers, width = place_sums.sums.shape[2:]
    values = np.zeros((layers, len(objects), len(sizes), GRID, GRID, width), np.float32)
    counts = np.zeros((len(objects), len(sizes), GRID, GRID), np.int32)
    # An object at a time: the IDs of all pairs would double the memory.
    for row in np.unique(object_of_pair[object_of_pair >= 0]):
        chosen = np.flatnonzero(object_of_pair == row)
        ids, pictures = probing.placed_ids(
            probing.CellSums(place_sums.sums[chosen], place_sums.counts[chosen]),
            probing.CellSums(folder_sums.sums[chosen], folder_sums.counts[chosen]),
            jnp.asarray(crossings[chosen]),
        )
        mean, pictures = (np.asarray(array) for array in probing.average(ids, pictures, axis=0))
        if not np.isfinite(mean).all():
            raise InputError(f"Activations at the word of {objects[row]!r} are not finite.")
        # Cells are numbered row by row; the container has columns first.
        values[:, row] = mean.reshape(len(sizes), GRID, GRID, layers, width).transpose(3, 0, 2, 1, 4)
        counts[row] = pictures.reshape(len(sizes), GRID, GRID).transpose(0, 2, 1)
    return SpatialIDs(
        values=values[1:],
        counts=counts,
        embeddings=values[0],
        objects=tuple(objects),
        sizes=tuple(sizes),
        layer_names=_layer_names(layers - 1),
        model=model,
        fingerprint=fingerprint,
    )


def _batch_indices(
    batch: IDBatch, number: int, object_of_pair: np.ndarray, objects: int, sizes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked pair, cell of A and place of B of each row; notes each pair's object in `object_of_pair`."""
    used = np.asarray(batch.pair_index) != -1
    limits = {
        "object_index": objects,
        "pair_index": len(object_of_pair),
        "a_cell": GRID * GRID,
        "b_cell": GRID * GRID,
        "size_index": sizes,
    }
    index = {name: as_integers(name, getattr(batch, name)) for name in limits}
    for name, limit in limits.items():
        if index[name].shape != batch.activations.shape[:1]:
            raise InputError(
                f"Batch {number}: {name} is {list(index[name].shape)}, activations {list(batch.activations.shape)}."
            )
        if ((index[name] < 0) | (index[name] >= limit))[used].any():
            raise InputError(f"Batch {number}: {name} must be from 0 to {limit - 1} (pair -1 is padding).")
    if (index["a_cell"] == index["b_cell"])[used].any():
        raise InputError(f"Batch {number} has a picture with both objects in one cell.")
    known = object_of_pair.copy()
    object_of_pair[index["pair_index"][used]] = index["object_index"][used]
    changed = (known >= 0) & (known != object_of_pair)
    if changed.any() or (object_of_pair[index["pair_index"]] != index["object_index"])[used].any():
        raise InputError(f"Batch {number} has a pair with two different objects: a pair is one A and one B.")
    place = index["size_index"] * (GRID * GRID) + index["b_cell"]
    return index["pair_index"].astype(np.int32), index["a_cell"].astype(np.int32), place.astype(np.int32)


def _layer_names(layers: int) -> tuple[str, ...]:
    """Names of the places where IDs are read: after each block."""
    return tuple(f"blocks.{k}.resid_post" for k in range(layers))


def _checked_index(name: str, index: Any, length: int) -> Any:
    note = " (the embeddings' IDs are `.embeddings`)" if name == "layer" else ""
    return id_files.entries(name, index, length, note)
