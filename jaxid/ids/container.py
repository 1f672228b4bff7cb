"""The container of IDs: vectors with named axes, with checks, indexing and files."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from jaxid import __version__
from jaxid.checks import check_finite
from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.io import reading, reporting, whole_file
from jaxid.nn.sites import AnyArray

VERSION = "1"

Kind = TypeVar("Kind", bound="IDs")


@dataclass(frozen=True, eq=False, kw_only=True)
class IDs(ABC):
    """IDs of one model by layer, object and place; a subclass defines the axes of a place.

    Indices (`ids[layer, place]`) read the universal IDs and broadcast as in numpy: `ids[layers, 0, 0]` is
    [len(layers), D]. They count from 0; traced ones out of range give NaN. Layer k is the output of decoder block k,
    `resid_post[k]`; the embeddings (index 0 in Hugging Face's `hidden_states`) are kept apart.

    Raises:
        InputError: The arrays and names do not fit each other.
    """

    KIND: ClassVar[str]  # for people: "spatial IDs"
    FORMAT: ClassVar[str]  # the format named in files
    AXES: ClassVar[tuple[str, ...]]  # of `values`
    INDEXED: ClassVar[tuple[str, ...]]  # the axes of `universal` but for the width, as `ids[...]` takes them
    NAMES: ClassVar[Mapping[str, str]]  # axis -> the field that names its entries

    values: Float[np.ndarray, "L O *place D"]  # float32; zero where counts is zero
    counts: Int[np.ndarray, "O *place"]  # number of words averaged in each ID; zero: there is none
    objects: tuple[str, ...]
    layer_names: tuple[str, ...]
    embeddings: Float[np.ndarray, "O *place D"] | None = None  # IDs of the embeddings
    model: str = ""  # the model's name
    fingerprint: str = ""  # of the model's parameters

    def __post_init__(self) -> None:
        shape = self.values.shape
        if len(shape) != len(self.AXES):
            raise InputError(f"values must be [{', '.join(self.AXES)}], not {list(shape)}.")
        for axis, field in self.NAMES.items():
            names, length = getattr(self, field), shape[self.AXES.index(axis)]
            if not length or len(names) != length or len(set(names)) != length:
                raise InputError(f"{field} must name {length} different entries, not {list(names)}.")
        counts = np.asarray(self.counts)
        if counts.shape != shape[1:-1]:
            raise InputError(f"counts is {list(counts.shape)}; values needs {list(shape[1:-1])}.")
        if counts.dtype.kind not in "iu" or (counts < 0).any():
            raise InputError("counts must be integers of 0 or more.")
        for field, array, expected in (("values", self.values, shape), ("embeddings", self.embeddings, shape[1:])):
            if array is None:
                continue
            if array.shape != expected:
                raise InputError(f"{field} is {list(array.shape)}; values needs {list(expected)}.")
            if not jnp.issubdtype(array.dtype, jnp.floating):
                raise InputError(f"{field} must hold floating-point numbers, not {array.dtype}.")
            if not isinstance(array, Tracer):
                check_finite(field, array)

    @property
    @abstractmethod
    def universal(self) -> Float[Array, "L *place D"]:
        """Universal IDs: the mean over the objects that have data, weighted equally."""

    def __getitem__(self, key: object) -> Float[Array, "..."]:
        if not isinstance(key, tuple) or len(key) != len(self.INDEXED):
            raise InputError(f"Index {self.KIND} by {', '.join(self.INDEXED)}, not by {key!r:.80}.")
        return take(self.universal, *map(self.entry, self.INDEXED, key))

    def entry(self, axis: str, index: object) -> Int[AnyArray, "..."]:
        """Indices along one axis of `universal`, checked unless they are traced.

        Raises:
            InputError: for anything but integers from 0 to the last entry, or a slice of them.
        """
        length = self.values.shape[self.AXES.index(axis)]
        note = " (the embeddings' IDs are `.embeddings`)" if axis == "layer" else ""
        if isinstance(index, slice):
            bounds = [bound for bound in (index.start, index.stop) if bound is not None]
            known = all(isinstance(bound, int | np.integer) and 0 <= bound <= length for bound in bounds)
            if known and isinstance(index.step, int | np.integer | None) and index.step != 0:
                return np.arange(length)[index]
            raise InputError(f"a slice of {axis}s must lie between 0 and {length}, not {index}{note}.")
        wanted = f"a {axis} is an integer from 0 to {length - 1}, not"
        if isinstance(index, Tracer):
            if jnp.issubdtype(index.dtype, jnp.integer):
                return index
            raise InputError(f"{wanted} {index.dtype}{note}.")
        array = np.asarray(index)
        if array.dtype.kind not in "iu" or (array < 0).any() or (array >= length).any():
            raise InputError(f"{wanted} {index}{note}.")
        return array

    def save(self, path: str | Path) -> None:
        """Writes the IDs as a safetensors file whose metadata names every axis; `load` reads it.

        Raises:
            OutputError: The file cannot be written. An existing file is then unchanged.
        """
        from safetensors.numpy import save_file

        arrays = {"values": self.values, "counts": self.counts, "embeddings": self.embeddings}
        tensors = {
            name: np.ascontiguousarray(array, np.int32 if name == "counts" else np.float32)
            for name, array in arrays.items()
            if array is not None
        }
        metadata = {
            "format": self.FORMAT,
            "format_version": VERSION,
            "created_by": f"jaxid {__version__}",
            "axes": json.dumps(self._axes(tensors)),
            "model": self.model,
            "fingerprint": self.fingerprint,
            **{field: json.dumps(np.array(getattr(self, field)).tolist()) for field in self.NAMES.values()},
        }
        with whole_file(path) as temporary, reporting(f"cannot write {path}", OutputError):
            save_file(tensors, temporary, metadata)

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Reads a file written by `save`.

        Raises:
            CheckpointError: The file is missing, damaged, or not a file of such IDs in this version's format.
        """
        from safetensors import safe_open

        with reading(path, f"a file of {cls.KIND}"), safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
        found = metadata.get("format"), metadata.get("format_version")
        if found != (cls.FORMAT, VERSION):
            raise CheckpointError(
                f"{path} is not a file of {cls.KIND} that this version reads: its format is {found}, not "
                f"{(cls.FORMAT, VERSION)}."
            )
        with reporting(f"{path} is an incomplete file of {cls.KIND}", CheckpointError):
            axes = cls._axes(tensors)
            if json.loads(metadata["axes"]) != axes:
                raise CheckpointError(f"{path} has axes {metadata['axes']}, not {axes}.")
            for name, tensor in tensors.items():
                expected: type[np.generic] = np.int32 if name == "counts" else np.float32
                if tensor.dtype != expected or not np.isfinite(tensor).all():
                    raise CheckpointError(f"{name} in {path} must be finite numbers of {expected.__name__}.")
            names = {field: tuple(json.loads(metadata[field])) for field in cls.NAMES.values()}
            return cls._from_file(
                path,
                values=tensors["values"],
                counts=tensors["counts"],
                embeddings=tensors.get("embeddings"),
                model=metadata["model"],
                fingerprint=metadata["fingerprint"],
                **names,
            )

    @classmethod
    def _axes(cls, tensors: Iterable[str]) -> dict[str, list[str]]:
        """The axes of each tensor of a file."""
        axes = {"values": cls.AXES, "counts": cls.AXES[1:-1], "embeddings": cls.AXES[1:]}
        return {name: list(axes[name]) for name in tensors}

    @classmethod
    def _from_file(cls: type[Kind], path: str | Path, **fields: Any) -> Kind:
        """The container with the contents of a file.

        Raises:
            CheckpointError: if its parts do not fit each other; the message names the file.
        """
        try:
            return cls(**fields)
        except InputError as problem:
            raise CheckpointError(f"{path} is an incomplete file of {cls.KIND}: {problem}") from problem


def take(values: Float[Array, "..."], *indices: Int[AnyArray, "..."]) -> Float[Array, "..."]:
    """Values at indices of the leading axes that `IDs.entry` has checked; NaN at traced ones out of range."""
    inside = [
        jnp.where(index < 0, values.shape[axis], index) if isinstance(index, Tracer) else index
        for axis, index in enumerate(indices)
    ]
    return values.at[tuple(inside)].get(mode="fill", fill_value=jnp.nan)


def mean_over_objects(
    values: Float[np.ndarray, "L O *place D"], counts: Int[np.ndarray, "O *place"]
) -> Float[Array, "L *place D"]:
    """The mean over the objects that have data, weighted equally; some object must have data at every place."""
    present = (counts > 0).astype(np.float32)
    mean = np.einsum("lo...d,o...->l...d", np.asarray(values, np.float32), present)
    mean /= present.sum(axis=0)[..., None]
    # The result is cached, so it must not be a tracer even if it is first computed inside a traced function.
    with jax.ensure_compile_time_eval():
        return jnp.asarray(mean)
