"""Reading and writing of safetensors folders, strict in both directions."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Shaped

from jaxid.errors import CheckpointError
from jaxid.models.keys import Key

Leaves = dict[str, Any]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Leaves:
    """Nested dictionaries as one, paths joined by dots."""
    flat: Leaves = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        flat.update(flatten(value, f"{path}.") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(leaves: Leaves) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


class TensorFolder:
    """The tensors of a checkpoint folder, memory-mapped, read one at a time."""

    def __init__(self, folder: Path):
        """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

        Raises:
            CheckpointError: for missing, truncated or corrupt files.
        """
        from safetensors import SafetensorError, safe_open

        self.files = self._files(folder)
        self.handles: dict[str, Any] = {}
        for file in self.files:
            try:
                handle = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors ({error}); it is truncated or corrupt: copy it again."
                ) from error
            for key in handle.keys():  # noqa: SIM118 - not a mapping
                if key in self.handles:
                    raise CheckpointError(f"tensor {key!r} stands in more than one file of {folder}.")
                self.handles[key] = handle

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.exists():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} is not a safetensors index ({error!r}).") from error
            files = [folder / name for name in names]
        else:
            files = [single]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            hint = ""
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
                hint = " The folder holds pickled weights, which jaxid never opens: convert them to safetensors."
            raise CheckpointError(f"no weights in {folder}: missing {', '.join(missing)}.{hint}")
        return files

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self.handles[key].get_slice(key).get_shape())

    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """A tensor.

        Raises:
            CheckpointError: if it cannot be read, for example in a number format that NumPy does not know.
        """
        try:
            return self.handles[key].get_tensor(key)
        except Exception as error:  # safetensors raises many kinds
            raise CheckpointError(f"tensor {key!r} cannot be read: {error}") from error


def load_parameters(
    tensors: TensorFolder,
    abstract: Leaves,
    keys: Sequence[Key],
    *,
    renames: Sequence[tuple[str, str]] = (),
    unused: Sequence[str] = (),
    dtype: Any = np.float32,
    place: Callable[[str, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Reads a checkpoint into parameters stacked over layers, tensor by tensor.

    Args:
        tensors: the open folder.
        abstract: shape of every parameter by dotted path.
        keys: the family's key table.
        renames: (pattern, replacement) pairs that bring other spellings of keys to the table's.
        unused: patterns of tensors that hold nothing learned.
        dtype: of the parameters.
        place: puts a finished host array on its devices, given the parameter's path; by default
            `jax.device_put`, one call per parameter.

    Returns:
        Nested dictionaries of arrays.

    Raises:
        CheckpointError: listing every unknown key, missing tensor, double assignment, wrong shape and tied
            tensor of other values.
    """
    available: dict[str, str] = {}
    problems: list[str] = []
    for name in tensors.handles:
        if any(re.search(pattern, name) for pattern in unused):
            continue
        spelled = name
        for pattern, replacement in renames:
            spelled = re.sub(pattern, replacement, spelled)
        if spelled in available:
            problems.append(f"both {available[spelled]!r} and {name!r} name {spelled!r}")
        available[spelled] = name

    plan: dict[str, list[tuple[Key, int | None, str]]] = {path: [] for path in abstract}
    copies: list[tuple[Key, str]] = []
    used: dict[str, list[tuple[int, int] | None]] = {}
    for key in keys:
        if key.copy:
            if key.source in available:
                copies.append((key, available.pop(key.source)))
            continue
        stacked = "{layer}" in key.source
        places = key.places(abstract[key.target].shape[0]) if stacked else [(0, None)]
        for layer, row in places:
            source = key.source.format(layer=layer)
            if source not in available:
                problems.append(f"tensor {source!r} is missing (parameter {key.target})")
                continue
            plan[key.target].append((key, row, available[source]))
            used.setdefault(source, []).append(key.part)
    for source, parts in used.items():
        whole = [(index, parts[0][1]) for index in range(parts[0][1])] if parts[0] else [None]
        if sorted(parts, key=str) != sorted(whole, key=str):
            problems.append(f"tensor {source!r} is read by {len(parts)} keys, which do not make it up")
        del available[source]
    problems += [f"unknown tensor {name!r}" for name in available.values()]

    # All shapes are compared before any tensor is read: large checkpoints take minutes.
    for path, rows in plan.items():
        expected = tuple(abstract[path].shape)
        numbers = [row for _, row, _ in rows]
        if len(set(numbers)) < len(numbers):
            problems.append(f"parameter {path} is set more than once")
        if None not in numbers and not problems and set(numbers) != set(range(expected[0])):
            problems.append(f"parameter {path} has rows that no tensor sets")
        for key, row, name in rows:
            shape = tensors.shape(name)
            if key.parameter_shape(shape) != (expected if row is None else expected[1:]):
                problems.append(f"tensor {name!r} has shape {shape}, which does not fit {path} {expected}")
    filled = {key.target for key in keys if not key.copy}
    problems += [f"parameter {path} is set by no key" for path in abstract if path not in filled]
    problems += [
        f"tensor {name!r} differs from {plan[key.target][0][2]!r}, to which the config ties it"
        for key, name in copies
        if plan[key.target] and not np.array_equal(tensors.read(name), tensors.read(plan[key.target][0][2]))
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(f"{tensors.files[0].parent} does not fit its config: {shown}.")

    leaves: Leaves = {}
    put = place or (lambda _, array: jax.device_put(array))
    for path, rows in plan.items():
        host = np.empty(abstract[path].shape, dtype)
        for key, row, name in rows:
            value = key.to_parameter(tensors.read(name))
            if row is None:
                host[...] = value
            else:
                host[row] = value
        leaves[path] = put(path, host)
    return unflatten(leaves)


def save_parameters(path: Path, parameters: Mapping[str, Any], keys: Sequence[Key]) -> None:
    """Writes parameters as one safetensors file in the checkpoint's own names, atomically."""
    from safetensors.numpy import save_file

    leaves = flatten(parameters)
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for key in keys:
        if key.copy:
            continue
        array, index = np.asarray(leaves[key.target]), key.part[0] if key.part else 0
        if "{layer}" in key.source:
            for layer, row in key.places(len(array)):
                piece = key.to_checkpoint(array[row])
                pieces.setdefault(key.source.format(layer=layer), []).append((index, piece))
        else:
            pieces.setdefault(key.source, []).append((index, key.to_checkpoint(array)))
    tensors = {}
    for name, found in pieces.items():
        parts = [piece for _, piece in sorted(found, key=lambda entry: entry[0])]
        tensors[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def fingerprint(folder: Path, files: Sequence[Path]) -> str:
    """Identifies a checkpoint by its config and by sizes, heads and tails of its weight files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            digest.update(stream.read())
    return digest.hexdigest()[:16]
