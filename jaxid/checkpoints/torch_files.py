"""Reads files written by `torch.save`, without ever running code from them.

The only module that imports torch, and only when a file is read.
"""

import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from jaxid.errors import CheckpointError, InputError

_REPEATED = 2**26  # bytes that a tensor with repeated numbers may take in any file
_GRID = 4  # columns and rows of the published scenes
_UNNAMED_SIZE = 224  # of files that are keyed by (x, y) alone

Size = int | float  # of an object picture, in pixels
Cell = tuple[int, int, Size]  # column, row, size


def read_torch_file(path: str | Path) -> Any:
    """Contents of a file written by `torch.save`, tensors as numpy arrays of the same type.

    Args:
        path: The file: nested dictionaries, lists and tuples of tensors and plain values.

    Returns:
        The same nesting; keys and plain values as they are.

    Raises:
        CheckpointError: torch is not installed, or the file is missing, damaged, or holds anything but
            tensors and plain containers (such a file could run code when read, and is refused).
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"Reading {path} needs PyTorch, which is not installed: pip install 'jaxid-vlm[torch]'."
        ) from error

    def to_numpy(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if value.numel() * value.element_size() > max(size, _REPEATED):
                raise ValueError("a tensor repeats its numbers beyond the file's size")
            value = value.detach().contiguous()
            if value.dtype == torch.bfloat16:  # numpy has no such type of its own
                return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
            return value.numpy()
        if isinstance(value, dict):
            return {key: to_numpy(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(to_numpy(item) for item in value)
        return value

    if not Path(path).is_file():
        raise CheckpointError(f"There is no file {path}.")
    try:
        size = Path(path).stat().st_size
        _refuse_compressed(path)
        with torch.serialization.safe_globals(_numpy_numbers()):
            return to_numpy(torch.load(path, map_location="cpu", weights_only=True))
    # A damaged file can fail in any way: the unpickler raises KeyError, EOFError, ... on foreign bytes.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as a torch file of tensors and plain containers: it is damaged, of "
            f"another kind, or holds Python objects ({type(error).__name__}). In the last case save it again "
            "as plain dictionaries of tensors: jaxid loads no objects."
        ) from error


def _refuse_compressed(path: str | Path) -> None:
    """PyTorch never compresses; a file that is compressed may unpack to any size."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist()):
                raise ValueError("the file is compressed")


def _numpy_numbers() -> list[Any]:
    """What builds a NumPy number, which schedules leave in training checkpoints; it runs no code of the file."""
    from numpy._core.multiarray import scalar

    return [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, type(np.dtype("float64"))]


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
        size: Reads this size alone; all by default. Names the size of a file keyed (x, y), 224 by default.
        layer_key: What layers are keyed by: "hf" (0 = embeddings, k + 1 = layer k) or "block" (k = layer k).

    Returns:
        IDs after each block, IDs of the embeddings where the file has them, names of the objects (the one
        object "universal" where it names none), and sizes from large to small. All float32.

    Raises:
        InputError: An unknown `layer_key`.
        CheckpointError: The file is missing, damaged, incomplete or of another layout; the message names the
            key.
    """
    if layer_key not in ("hf", "block"):
        raise InputError(f'layer_key is "hf" or "block", not {layer_key!r}.')
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
    places = {(x, y, s) for x in range(_GRID) for y in range(_GRID) for s in sizes}

    values = np.zeros((len(order), len(objects), len(sizes), _GRID, _GRID, width), np.float32)
    for layer, key in enumerate(order):
        if set(layers[key]) != set(objects):
            raise CheckpointError(f"{path}: layer {key} is of {list(layers[key])}, not of {list(objects)}.")
        for row, name in enumerate(objects):
            where, vectors = f"{path}: [{key}][{name!r}]", layers[key][name]
            if set(vectors) != places:
                wrong = min(set(vectors) ^ places)
                raise CheckpointError(f"{where} {'has no' if wrong in places else 'has a strange'} cell {wrong}.")
            for (x, y, s), vector in vectors.items():
                if vector.shape != (width,) or not np.isfinite(vector).all():
                    raise CheckpointError(f"{where}[{(x, y, s)}] is not a finite vector of width {width}.")
                values[layer, row, sizes.index(s), x, y] = vector
    blocks = values[-(len(order) - (order[0] < first)) :]
    return blocks, values[0] if order[0] < first else None, objects, sizes


def _layers(tree: Any, size: Size | None, path: str) -> dict[int, dict[str, dict[Cell, np.ndarray]]]:
    """The nested dictionary as [layer][object][(x, y, size)], whichever of the layouts the file has."""
    layers = {}
    for key, entry in _filled(tree, path).items():
        where = f"{path}: [{key!r}]"
        if isinstance(key, bool) or not str(key).isdecimal() or int(key) in layers:
            raise CheckpointError(f"{where} is not the number of a layer, or is one twice.")
        if all(isinstance(name, tuple) for name in _filled(entry, where)):
            entry = {"universal": entry}
        if not all(isinstance(name, str) for name in entry):
            raise CheckpointError(f"{where} is keyed by {list(entry)[:3]}, neither objects nor cells.")
        layers[int(key)] = {name: _cells(cells, size, f"{where}[{name!r}]") for name, cells in entry.items()}
    return layers


def _filled(value: Any, where: str) -> Mapping[Any, Any]:
    """The value, which must be a dictionary with something in it."""
    if not isinstance(value, Mapping) or not value:
        raise CheckpointError(f"{where} is not a dictionary of spatial IDs, or an empty one.")
    return value


def _cells(cells: Any, size: Size | None, where: str) -> dict[Cell, np.ndarray]:
    """Vectors by (x, y, size): of the asked size, or of all."""
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


def check_torch(purpose: str) -> None:
    """Refuses what needs PyTorch, such as "Writing scorer.pt", where it is not installed.

    Raises:
        CheckpointError: torch is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise CheckpointError(f"{purpose} needs PyTorch, which is not installed: pip install 'jaxid-vlm[torch]'.")


def write_torch_file(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dictionaries of arrays as `torch.save` does.

    Raises:
        CheckpointError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            f"Writing {path} needs PyTorch, which is not installed: pip install 'jaxid-vlm[torch]'."
        ) from error

    def to_torch(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: to_torch(item) for name, item in value.items()}
        return torch.from_numpy(np.array(value))

    torch.save(to_torch(tree), path)
