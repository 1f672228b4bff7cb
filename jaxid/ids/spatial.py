"""Spatial IDs: where in the picture an object is, and their geometry ([ID] arXiv 2601.12626).

A spatial ID is the part of an object word's activation that says where in the picture the object is. Cells (x, y):
column x to the right, row y **down**.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid.checks import check_finite
from jaxid.data.grid import CELL_SIZE, GRID
from jaxid.errors import InputError
from jaxid.ids.accumulate import IDBatch, accumulate, layer_names
from jaxid.ids.authors import Size, read_authors_ids
from jaxid.ids.container import IDs, mean_over_objects, take
from jaxid.kernels import probing
from jaxid.reprs import brief


@dataclass(frozen=True, eq=False, kw_only=True)
class SpatialIDs(IDs):
    """Spatial IDs of one model, by layer, object, object size and cell.

    `ids[k, x, y]` is the universal ID (the mean over objects) of layer k at column x and row y, at the largest size.

    Raises:
        InputError: The arrays and names do not fit each other.
    """

    KIND: ClassVar = "spatial IDs"
    FORMAT: ClassVar = "jaxid.spatial_ids"
    AXES: ClassVar = ("layer", "object", "size", "column", "row", "width")
    INDEXED: ClassVar = ("layer", "column", "row")
    NAMES: ClassVar[Mapping[str, str]] = {"object": "objects", "size": "sizes", "layer": "layer_names"}

    values: Float[np.ndarray, "L O S X Y D"]
    counts: Int[np.ndarray, "O S X Y"]
    sizes: tuple[Size, ...]  # of the object pictures, in pixels; the largest is the main size
    embeddings: Float[np.ndarray, "O S X Y D"] | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite("sizes", self.sizes)
        if min(self.values.shape[3:5]) < 2:
            raise InputError(f"values must be on a grid of at least 2 x 2, not {list(self.values.shape)}.")

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
        values, counts = self.values[:, :, index], self.counts[:, index]
        self._require_cells(counts, "any object", index)
        return mean_over_objects(values, counts)

    def for_object(self, name: str, size: Size | None = None) -> Float[Array, "L X Y D"]:
        """IDs of one object at one size; the largest by default.

        Raises:
            InputError: There is no such object or size, or the object has no data at some cell.
        """
        if name not in self.objects:
            raise InputError(f"There are no IDs of {name!r}; the objects are {', '.join(self.objects)}.")
        row, index = self.objects.index(name), self._size_index(size)
        self._require_cells(self.counts[[row], index], repr(name), index)
        return jnp.asarray(self.values[:, row, index])

    def at_box(
        self,
        layer: int | Sequence[int] | Int[np.ndarray, "*layers"] | Int[Array, "*layers"],
        box: Sequence[float | int] | Float[np.ndarray, "*boxes 4"] | Float[Array, "*boxes 4"],
        image_size: tuple[Size, Size] = (1.0, 1.0),
        half_cell: bool = True,
    ) -> Float[Array, "..."]:
        """The ID of a box's centre, mixed from the universal IDs of the cells around it.

        Args:
            layer: Layer or layers.
            box: (x, y, width, height) of the box, or many boxes; x, y is the upper left corner.
            image_size: Width and height of the image, in the same unit; 1 if boxes are shares of them.
            half_cell: False reproduces the published mapping, half a cell off and with weights lost in the last column
                and row (`kernels.probing.bilinear`).

        Returns:
            IDs [*layers, *boxes, D].

        Raises:
            InputError: A layer outside the model, boxes that are not of four numbers, or an empty image.
        """
        layers = self.entry("layer", layer)
        # In double precision where possible: in the published mapping, much depends on which side of a cell a place is.
        boxes = jnp.asarray(box, jnp.float32) if isinstance(box, Array) else np.asarray(box, np.float64)
        if not isinstance(boxes, Tracer):
            check_finite("boxes", boxes)
        width, height = (float(side) for side in image_size)
        if boxes.shape[-1:] != (4,) or min(width, height) <= 0:
            raise InputError(
                "at_box needs boxes (x, y, width, height) and a positive image size, not "
                f"{list(boxes.shape)} and {image_size}."
            )
        columns, rows = self.universal.shape[1:3]
        x = (boxes[..., 0] + boxes[..., 2] / 2) / width * columns
        y = (boxes[..., 1] + boxes[..., 3] / 2) / height * rows
        x, y = (jnp.asarray(place, jnp.float32) for place in (x, y))
        return probing.bilinear(take(self.universal, layers), x, y, half_cell=half_cell)

    def axes(self, equal_pairs: bool = False) -> tuple[Float[Array, "L D"], Float[Array, "L D"]]:
        """The x axis (rightwards) and the y axis (downwards) of each layer's universal IDs.

        Args:
            equal_pairs: True reproduces the published axes, 2/3 as long (`kernels.probing.axes`).
        """
        return probing.axes(self.universal, equal_pairs=equal_pairs)

    def plane(self) -> tuple[Float[Array, "L D"], Float[Array, "L D"]]:
        """Orthonormal directions (u, v) of each layer's plane of axes."""
        return probing.plane(*self.axes())

    def plane_coordinates(self, values: Float[Array, "L *batch D"] | None = None) -> Float[Array, "L *batch 2"]:
        """Coordinates in each layer's plane; of the universal IDs [L, X, Y, 2] by default."""
        return probing.plane_coordinates(self.universal if values is None else values, *self.plane())

    def explained_variance(self) -> Float[Array, "L"]:
        """Share of the universal IDs' variance in the plane."""
        return probing.explained_variance(self.universal, *self.plane())

    def separations(self) -> Float[Array, "L O 2"]:
        """Smallest gap between the neighbouring columns, and between the neighbouring rows, of each object.

        Above 0 if they are in order and apart in the plane (`kernels.probing.separations`).

        Raises:
            InputError: An object has no data at some cell.
        """
        found = [probing.separations(self.plane_coordinates(self.for_object(name))) for name in self.objects]
        return jnp.stack(found, axis=1)

    def agreement(self) -> Float[Array, "L"]:
        """Mean cosine between two objects' IDs of the same cell, at the largest size."""
        index = self._size_index(None)
        values = self.values[:, :, index]
        present = self.counts[:, index] > 0
        return probing.cosine_agreement(
            jnp.asarray(values.reshape(*values.shape[:2], -1, values.shape[-1])),
            jnp.asarray(present.reshape(present.shape[0], -1)),
        )

    @classmethod
    def from_torch(cls, path: str | Path, size: Size | None = None, layer_key: str = "hf") -> "SpatialIDs":
        """Reads a `.pt` file in the layout of the paper's authors.

        Such a file is `[layer][object][(x, y, size)]` -> [D], or universal without the object (the one object
        is then called "universal"), or keyed (x, y) without the size. It does not hold the number of
        pictures averaged in an ID: each count is 1. Files made from Hugging Face's `hidden_states` hold the last layer
        after the final norm.

        Args:
            path: The file.
            size: Reads only this size; all of them by default. Names the size of a file keyed (x, y), 224 by
                default.
            layer_key: What layers are keyed by: "hf" (0 = embeddings, k + 1 = layer k) or "layer" (k = layer k).

        Raises:
            CheckpointError: The file is missing, damaged, incomplete or of another layout; the message names
                the key.
        """
        values, embeddings, objects, sizes = read_authors_ids(path, size, layer_key)
        return cls._from_file(
            path,
            values=values,
            counts=np.ones(values.shape[1:5], np.int32),
            embeddings=embeddings,
            objects=objects,
            sizes=sizes,
            layer_names=layer_names(len(values)),
        )

    def _size_index(self, size: Size | None) -> int:
        """Index of a size, of the largest by default."""
        size = max(self.sizes) if size is None else size
        if size not in self.sizes:
            raise InputError(f"There are no IDs of size {size}; the sizes are {list(self.sizes)}.")
        return self.sizes.index(size)

    def _require_cells(self, counts: Int[np.ndarray, "O X Y"], whose: str, size_index: int) -> None:
        """Refuses a grid with holes, which axes and interpolation would silently treat as zero vectors."""
        holes = [(int(x), int(y)) for x, y in np.argwhere((counts == 0).all(axis=0))]
        if holes:
            raise InputError(
                f"There is no ID of {whose} at cells {holes}, size {self.sizes[size_index]}: extract from "
                "pictures that cover every cell."
            )


def accumulate_ids(
    batches: Iterable[IDBatch],
    *,
    pairs: int,
    objects: Sequence[str],
    sizes: Sequence[Size] = (CELL_SIZE,),
    model: str = "",
    fingerprint: str = "",
) -> SpatialIDs:
    """Spatial IDs from a stream of activations ([ID] arXiv 2601.12626, extraction of spatial IDs); see `accumulate`.

    Args:
        batches: Batches in any order; places are cells y * 4 + x. Equal lengths (padded) compile once.
        pairs: Number of ordered pairs.
        objects: Names of the objects.
        sizes: Object sizes in pixels.
        model: Name of the model, stored in the container.
        fingerprint: Fingerprint of its parameters, stored in the container.

    Returns:
        The IDs; an object or cell without pictures has count 0.

    Raises:
        InputError: as `accumulate`.
    """
    values, counts = accumulate(batches, pairs=pairs, objects=objects, places=GRID * GRID, sizes=len(sizes))
    # Cells are numbered row by row; the container has columns first.
    values = values.reshape(*values.shape[:3], GRID, GRID, -1).swapaxes(3, 4)
    counts = counts.reshape(*counts.shape[:2], GRID, GRID).swapaxes(2, 3)
    return SpatialIDs(
        values=values[1:],
        counts=counts,
        embeddings=values[0],
        objects=tuple(objects),
        sizes=tuple(sizes),
        layer_names=layer_names(len(values) - 1),
        model=model,
        fingerprint=fingerprint,
    )
