"""Reads spatial IDs from files in the layout of the authors of [ID] arXiv 2601.12626."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxid.checkpoints.torch_files import read_torch_file
from jaxid.data.grid import GRID
from jaxid.errors import CheckpointError, InputError

_UNNAMED_SIZE = 224  # in files that are keyed by (x, y)

Size = int | float  # of an object picture, in pixels
Cell = tuple[int, int, Size]  # column, row, size


def read_authors_ids(
    path: str | Path, size: Size | None = None, layer_key: str = "hf"
) -> tuple[
    Float[np.ndarray, "L O S X Y D"],
    Float[np.ndarray, "O S X Y D"] | None,
    tuple[str, ...],
    tuple[Size, ...],
]:
    """Spatial IDs from a file in the layout of the authors of [ID] arXiv 2601.12626.

    Args:
        path: The file: `[layer][object][(x, y, size)]` -> [D], or without the object, or keyed (x, y).
        size: Reads only this size; all by default. Names the size of a file keyed (x, y), 224 by default.
        layer_key: The key of a layer: "hf" (0 = embeddings, k + 1 = layer k) or "layer" (k = layer k).

    Returns:
        IDs after each layer, IDs of the embeddings where the file has them, names of the objects (the one
        object "universal" where it names none), and sizes from large to small. All float32.

    Raises:
        InputError: An unknown `layer_key`.
        CheckpointError: The file is missing, damaged, incomplete or of another layout; the message names the
            key.
    """
    if layer_key not in ("hf", "layer"):
        raise InputError(f'layer_key is "hf" or "layer", not {layer_key!r}.')
    layers = _layers(read_torch_file(path), size, str(path))
    first = 1 if layer_key == "hf" else 0
    order = [key for key in sorted(layers) if key >= first]
    if order != list(range(first, first + len(order))) or not order:
        missing = min(set(range(first, first + len(order) + 1)) - set(order))
        raise CheckpointError(f"{path} has no layer {missing} ({layer_key} index).")
    order = [key for key in layers if key < first] + order
    objects = tuple(layers[order[0]])
    table = layers[order[0]][objects[0]]
    sizes = tuple(sorted({cell[2] for cell in table}, reverse=True))
    width = next(iter(table.values())).size
    places = {(x, y, s) for x in range(GRID) for y in range(GRID) for s in sizes}

    values = np.zeros((len(order), len(objects), len(sizes), GRID, GRID, width), np.float32)
    for layer, key in enumerate(order):
        if set(layers[key]) != set(objects):
            raise CheckpointError(f"{path}: layer {key} is of {list(layers[key])}, not of {list(objects)}.")
        for row, name in enumerate(objects):
            where, vectors = f"{path}: [{key}][{name!r}]", layers[key][name]
            if set(vectors) != places:
                wrong = min(set(vectors) ^ places)
                raise CheckpointError(f"{where} {'has no' if wrong in places else 'has an unexpected'} cell {wrong}.")
            for (x, y, s), vector in vectors.items():
                if vector.shape != (width,) or not np.isfinite(vector).all():
                    raise CheckpointError(f"{where}[{(x, y, s)}] is not a finite vector of width {width}.")
                values[layer, row, sizes.index(s), x, y] = vector
    after = values[-(len(order) - (order[0] < first)) :]
    return after, values[0] if order[0] < first else None, objects, sizes


def _layers(tree: object, size: Size | None, path: str) -> dict[int, dict[str, dict[Cell, np.ndarray]]]:
    """The nested dictionary as [layer][object][(x, y, size)], whichever of the layouts the file has."""
    layers = {}
    for key, entry in _filled(tree, path).items():
        where = f"{path}: [{key!r}]"
        if isinstance(key, bool) or not str(key).isdecimal() or int(key) in layers:
            raise CheckpointError(f"{where} is not the index of a layer, or repeats one.")
        if all(isinstance(name, tuple) for name in _filled(entry, where)):
            entry = {"universal": entry}
        if not all(isinstance(name, str) for name in entry):
            raise CheckpointError(f"{where} is keyed by {list(entry)[:3]}, neither objects nor cells.")
        layers[int(key)] = {name: _cells(cells, size, f"{where}[{name!r}]") for name, cells in entry.items()}
    return layers


def _filled(value: object, where: str) -> Mapping[Any, Any]:
    """The value, which must be a dictionary with something in it."""
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{where} is not a dictionary of spatial IDs, or is empty.")
    return value


def _cells(cells: object, size: Size | None, where: str) -> dict[Cell, np.ndarray]:
    """Vectors by (x, y, size), of the given size or of all."""
    found = {}
    for key, vector in _filled(cells, where).items():
        if (
            not isinstance(key, tuple)
            or len(key) not in (2, 3)
            or not all(isinstance(part, int | float) for part in key)
        ):
            raise CheckpointError(f"{where} has the key {key!r}, not a cell (x, y, size) or (x, y).")
        if not isinstance(vector, np.ndarray):
            raise CheckpointError(f"{where}[{key!r}] is not a tensor.")
        unnamed = _UNNAMED_SIZE if size is None else size
        found[(key[0], key[1], key[2] if len(key) == 3 else unnamed)] = vector.astype(np.float32)
    chosen = {key: vector for key, vector in found.items() if size is None or key[2] == size}
    if not chosen:
        raise CheckpointError(f"{where} has no size {size}; it has {sorted({key[2] for key in found})}.")
    return chosen
