"""Reading and writing of safetensors folders, strict in both directions."""

import abc
import dataclasses
import json
import math
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Shaped, UInt8

from jaxid.checkpoints.identity import Seen, combined
from jaxid.checkpoints.streaming import Row, agreed, pieces, placed, slices
from jaxid.errors import CheckpointError
from jaxid.io import first_line, read_json, reading, whole_file
from jaxid.nn.keys import Key

Leaves = dict[str, Any]

_FLOATS = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
"""Number formats of parameters, by their names in safetensors files; those of 8 bits mean nothing without scales."""


def flatten(tree: dict[str, Any]) -> Leaves:
    """Nested dictionaries as one, paths joined by dots."""
    return traverse_util.flatten_dict(tree, sep=".")


def unflatten(leaves: Leaves) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(leaves, sep=".")


@dataclasses.dataclass(frozen=True, eq=False)
class _Entry:
    """Where a tensor is.

    Attributes:
        mapping: of its file.
        data: the whole file, as mapped.
        dtype: its number format in safetensors' name.
        shape: its shape.
        begin: the byte of the file at which it begins.
        file: which file.
    """

    mapping: mmap.mmap
    data: UInt8[np.ndarray, "bytes"]
    dtype: str
    shape: tuple[int, ...]
    begin: int
    file: Path


class Tensors(abc.ABC):
    """The tensors of a checkpoint by name, however they are stored.

    Attributes:
        folder: their folder.
        files: the files that hold them.
        entries: their names; the values have a `shape` and a `dtype`.
    """

    folder: Path
    files: list[Path]
    entries: Mapping[str, Any]

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.entries[key].shape

    @abc.abstractmethod
    def readable(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers of a format that NumPy knows."""

    @abc.abstractmethod
    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """A tensor, which is not to be written to.

        Raises:
            CheckpointError: if it holds no floating-point numbers of a format that NumPy knows.
        """

    def release(self, key: str, part: Shaped[np.ndarray, "..."]) -> None:
        """Lets go of the memory of a part that is no longer needed, if that is possible."""
        del key, part


class TensorFolder(Tensors):
    """The tensors of a checkpoint folder, memory-mapped."""

    def __init__(self, folder: Path):
        """Opens `model.safetensors`, the shards that `model.safetensors.index.json` lists, or one file by its own name.

        Raises:
            CheckpointError: listing every missing, truncated or corrupt file, every tensor that is in two files
                and every tensor that the index promises of a file without it.
        """
        self.folder = folder.parent if folder.is_file() else folder
        self.files, promised = ([folder], {}) if folder.is_file() else self._files(folder)
        entries: dict[str, Any] = {}
        problems: list[str] = []
        for file in self.files:
            try:
                with reading(file, "safetensors"):
                    found = _entries(file)
            except CheckpointError as error:
                problems.append(f"{first_line(error)}; it is truncated or corrupt: copy it again")
                continue
            problems += [f"tensor {name!r} is in more than one file of {folder}" for name in found if name in entries]
            problems += [
                f"the index promises tensor {name!r} in {file}, which does not have it"
                for name in promised.get(file.name, ())
                if name not in found
            ]
            entries |= found
        if problems:
            raise CheckpointError(f"{_listed(problems)}.")
        self.entries: Mapping[str, Any] = entries

    @staticmethod
    def _files(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
        """The folder's weight files, and the tensors that its index promises of each."""
        index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
        promised: dict[str, list[str]] = {}
        if index.exists():
            with reading(index, "a safetensors index"):
                for tensor, name in read_json(index)["weight_map"].items():
                    if Path(name).name != name:
                        raise CheckpointError(
                            f"{index} is not a safetensors index: {name!r} is not a file in the folder."
                        )
                    promised.setdefault(name, []).append(tensor)
            if not promised:
                raise CheckpointError(f"{index} is not a safetensors index (it lists no tensor).")
        files = [folder / name for name in sorted(promised)] or [single]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            hint = ""
            if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
                hint = " The folder holds pickled weights, which jaxid never opens: convert them to safetensors."
            raise CheckpointError(
                f"no weights in {folder}: missing {', '.join(missing)}; copy or download them again.{hint}"
            )
        return files, promised

    def readable(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers of a format that NumPy knows."""
        return self.entries[key].dtype in _FLOATS

    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """A tensor as it is in the file, which is read where it is touched."""
        entry = self.entries[key]
        if not self.readable(key):
            raise CheckpointError(f"tensor {key!r} cannot be read: it holds {entry.dtype} numbers.")
        return np.ndarray(entry.shape, _FLOATS[entry.dtype], entry.data, entry.begin)

    def release(self, key: str, part: Shaped[np.ndarray, "..."]) -> None:
        """Lets go of the memory in which a part of a tensor was read; it is read again where it is touched."""
        if not hasattr(mmap, "MADV_DONTNEED") or not part.size:
            return
        entry = self.entries[key]
        if not np.may_share_memory(part, entry.data):  # a copy, where no view has the axes that were asked for
            part = self.read(key)
        low, high = (address - entry.data.ctypes.data for address in np.lib.array_utils.byte_bounds(part))
        low -= low % mmap.PAGESIZE
        entry.mapping.madvise(mmap.MADV_DONTNEED, low, high - low)


def _entries(file: Path) -> dict[str, _Entry]:
    """The tensors of a file by name; raises whatever the library does if it is truncated or corrupt."""
    from safetensors import safe_open

    with safe_open(file, framework="numpy"):  # checks the header and that the tensors fill the file
        pass
    with file.open("rb") as stream:
        mapping = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapping[:8], "little")
    header, data = json.loads(mapping[8:start]), np.frombuffer(mapping, np.uint8)
    return {
        name: _Entry(mapping, data, fields["dtype"], tuple(fields["shape"]), start + fields["data_offsets"][0], file)
        for name, fields in header.items()
        if name != "__metadata__"
    }


def _listed(problems: Sequence[str]) -> str:
    """Problems in one line, the first dozen in words."""
    return "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")


def same_numbers(tensors: Tensors, one: str, other: str) -> bool:
    """Whether two tensors have the same values, compared piece by piece."""
    first, second = tensors.read(one), tensors.read(other)
    if first.shape != second.shape:
        return False
    for piece in pieces(first):
        parts = first[slices(piece)], second[slices(piece)]
        same = np.array_equal(parts[0].astype(np.float64), parts[1].astype(np.float64))
        tensors.release(one, parts[0])
        tensors.release(other, parts[1])
        if not same:
            return False
    return True


class _Row(NamedTuple):
    """A tensor that is read.

    Attributes:
        key: the row of the key table.
        index: the row of a stacked parameter that it fills.
        source: its name in the key table's spelling.
        name: its name in the file.
    """

    key: Key
    index: int | None
    source: str
    name: str

    def view(self, tensors: Tensors) -> Row:
        """The tensor in the parameter's axes."""
        seen = Seen(self.source, self.key.part or (0, 1), 0, self.name, digest="", finite=True, fits=True)
        array = self.key.to_parameter(tensors.read(self.name))
        return Row(self.index, array, partial(tensors.release, self.name), seen)


def published_name(name: str, renames: Sequence[tuple[str, str]]) -> str:
    """A tensor's name in the key table's spelling."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def read_parameters(
    tensors: Tensors,
    abstract: Leaves,
    keys: Sequence[Key],
    *,
    renames: Sequence[tuple[str, str]] = (),
    unused: Sequence[str] = (),
    dtype: DTypeLike = np.float32,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[dict[str, Any], str]:
    """Reads a checkpoint into parameters stacked over layers, tensor by tensor.

    Args:
        tensors: the open folder.
        abstract: shape of every parameter by dotted path.
        keys: the family's key table.
        renames: (pattern, replacement) pairs that bring other spellings of keys to the table's.
        unused: patterns of tensors that hold nothing learned.
        dtype: of the parameters.
        shardings: where the parameters go, by dotted path; the default device if there are none. Each process reads
            what its own devices hold, and its share of the rest for the digest.

    Returns:
        Nested dictionaries of arrays, and a digest of every number in the tensors that they were
        made of, whatever files these are in.

    Raises:
        CheckpointError: listing every unknown key, missing tensor, double assignment, wrong shape, tensor of no
            floating-point numbers and tied tensor of other values; or every tensor with NaN or infinity in it.
    """
    available: dict[str, str] = {}
    problems: list[str] = []
    for name in tensors.entries:
        if any(re.search(pattern, name) for pattern in unused):
            continue
        spelled = published_name(name, renames)
        if spelled in available:
            problems.append(f"both {available[spelled]!r} and {name!r} name {spelled!r}")
        available[spelled] = name

    plan: dict[str, list[_Row]] = {path: [] for path in abstract}
    copies: list[tuple[Key, str]] = []
    used: dict[str, list[tuple[int, int] | None]] = {}
    for key in keys:
        if key.copy:
            if key.source in available:
                copies.append((key, available.pop(key.source)))
            continue
        for source, row in key.tensors(abstract[key.target].shape):
            if source not in available:
                problems.append(f"tensor {source!r} is missing (parameter {key.target})")
                continue
            plan[key.target].append(_Row(key, row, source, available[source]))
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
        indices = [row.index for row in rows]
        if len(set(indices)) < len(indices):
            problems.append(f"parameter {path} is set more than once")
        if None not in indices and not problems and set(indices) != set(range(expected[0])):
            problems.append(f"parameter {path} has rows that no tensor sets")
        for row in rows:
            shape = tensors.shape(row.name)
            if row.key.parameter_shape(shape) != (expected if row.index is None else expected[1:]):
                problems.append(f"tensor {row.name!r} has shape {shape}, which does not fit {path} {expected}")
    filled = {key.target for key in keys if not key.copy}
    problems += [f"parameter {path} is set by no key" for path in abstract if path not in filled]
    names = dict.fromkeys([row.name for rows in plan.values() for row in rows] + [name for _, name in copies])
    unreadable = [name for name in names if not tensors.readable(name)]
    problems += [
        f"tensor {name!r} holds {tensors.entries[name].dtype}, no floating-point numbers of 16 bits or more"
        for name in unreadable
    ]
    for key, name in copies:
        originals = [row.name for row in plan[key.target]]
        if originals and not {name, originals[0]} & set(unreadable) and not same_numbers(tensors, name, originals[0]):
            problems.append(f"tensor {name!r} differs from {originals[0]!r}, to which the config ties it")
    if problems:
        raise CheckpointError(f"{tensors.files[0].parent} does not fit its config: {_listed(problems)}.")

    leaves: Leaves = {}
    seen: list[Seen] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        # Large ones first: where a device copies, little is held twice once most of the memory is taken.
        for path in sorted(plan, key=lambda path: -math.prod(abstract[path].shape)):
            rows = [row.view(tensors) for row in plan[path]]
            place = None if shardings is None else shardings[path]
            leaves[path], found = placed(tuple(abstract[path].shape), dtype, rows, place, pool)
            seen += found
    if shardings:
        seen = agreed(seen, next(iter(shardings.values())).device_set)
    spoilt = [f"tensor {name!r}" for name in sorted({piece.tensor for piece in seen if not piece.finite})]
    if spoilt:
        raise CheckpointError(
            f"{tensors.files[0].parent} holds NaN or infinite numbers in {_listed(spoilt)}; copy or train it again."
        )
    large = [f"tensor {name!r}" for name in sorted({piece.tensor for piece in seen if not piece.fits})]
    if large:
        raise CheckpointError(
            f"{tensors.files[0].parent} holds numbers too large for {np.dtype(dtype).name} in {_listed(large)}; "
            "load it as bfloat16 or float32."
        )
    return unflatten(leaves), combined(seen)


def save_parameters(path: Path, parameters: dict[str, Any], keys: Sequence[Key]) -> None:
    """Writes parameters as one safetensors file in the checkpoint's own names, atomically.

    Raises:
        CheckpointError: if keys set some, but not all parts of a tensor, or one part twice.
        OutputError: if the file cannot be written.
    """
    from safetensors.numpy import save_file

    leaves = flatten(parameters)
    pieces: dict[str, list[tuple[tuple[int, int], np.ndarray]]] = {}
    for key in keys:
        if key.copy:
            continue
        array = np.asarray(leaves[key.target])
        for source, row in key.tensors(array.shape):
            piece = key.to_checkpoint(array if row is None else array[row, ...])
            pieces.setdefault(source, []).append((key.part or (0, 1), piece))
    tensors = {}
    for name, found in pieces.items():
        parts = sorted(part for part, _ in found)
        if parts != [(index, parts[0][1]) for index in range(parts[0][1])]:
            raise CheckpointError(f"tensor {name!r} has {parts[0][1]} parts, of which keys set {parts}.")
        arrays = [array for _, array in sorted(found, key=lambda entry: entry[0])]
        tensors[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
