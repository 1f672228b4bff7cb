"""What containers of IDs share: checks of arrays and indices, and files whose metadata names every axis."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxid import __version__
from jaxid.checks import check_finite
from jaxid.errors import CheckpointError, InputError, OutputError
from jaxid.io import reading, reporting

VERSION = "1"

Axes = Mapping[str, Sequence[str]]
"""Names of every array's axes."""


def check(values: Any, counts: Any, embeddings: Any) -> None:
    """Checks that IDs are finite real numbers and that nothing is counted less than 0 times.

    Raises:
        InputError: naming the array.
    """
    for name, array in (("values", values), ("embeddings", embeddings)):
        if array is None or isinstance(array, Tracer):
            continue
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"{name} must hold floating-point numbers, not {array.dtype}.")
        check_finite(name, array)
    if np.asarray(counts).dtype.kind not in "iu" or (np.asarray(counts) < 0).any():
        raise InputError("counts must be integers of 0 or more.")


def entries(name: str, index: Any, length: int, note: str = "") -> Any:
    """An index, checked where it is known; a slice as integers.

    Args:
        name: what is indexed, in the message.
        index: integers, or a slice of them.
        length: how many entries there are.
        note: ends the message.

    Raises:
        InputError: for anything but integers from 0 to the last entry.
    """
    if isinstance(index, slice):
        bounds = [bound for bound in (index.start, index.stop) if bound is not None]
        known = all(isinstance(bound, int | np.integer) and 0 <= bound <= length for bound in bounds)
        if known and isinstance(index.step, int | np.integer | None) and index.step != 0:
            return np.arange(length)[index]
        raise InputError(f"a slice of {name}s lies between 0 and {length}, not {index}{note}.")
    if isinstance(index, Tracer):
        if jnp.issubdtype(index.dtype, jnp.integer):
            return index
        raise InputError(f"a {name} is an integer from 0 to {length - 1}, not {index.dtype}{note}.")
    array = np.asarray(index)
    if array.dtype.kind not in "iu" or (array < 0).any() or (array >= length).any():
        raise InputError(f"a {name} is an integer from 0 to {length - 1}, not {index}{note}.")
    return array


def take(values: Float[Array, "..."], *indices: Any) -> Float[Array, "..."]:
    """Values at checked indices of the leading axes; NaN at traced ones out of range."""
    places = []
    for axis, index in enumerate(indices):
        traced = isinstance(index, Tracer)
        places.append(jnp.where(index < 0, values.shape[axis], index) if traced else index)
    return values.at[tuple(places)].get(mode="fill", fill_value=jnp.nan)


@contextlib.contextmanager
def loading(path: str | Path, shown: str) -> Iterator[None]:
    """Turns whatever is wrong with what a file holds into an error that names it.

    Raises:
        CheckpointError: naming the file.
    """
    message = f"{path} is an incomplete file of {shown}"
    with reporting(message, CheckpointError):
        try:
            yield
        except InputError as problem:  # of the container that is made of it
            raise CheckpointError(f"{message}: {problem}") from problem


def write(
    path: str | Path, kind: str, shown: str, axes: Axes, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes arrays and metadata.

    Args:
        path: the file.
        kind: of IDs, as the file says it.
        shown: the same for people, e.g. "Spatial IDs".
        axes: of every array that there may be.
        tensors: the arrays; "counts" as integers.
        metadata: further entries.

    Raises:
        OutputError: The file cannot be written. A file that was there is then unharmed.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    numbers = {name: value.astype(np.int32 if name == "counts" else np.float32) for name, value in tensors.items()}
    entries = {
        "format": kind,
        "format_version": VERSION,
        "created_by": f"jaxid {__version__}",
        "axes": json.dumps({name: list(axes[name]) for name in tensors}),
        **metadata,
    }
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in numbers.items()}, temporary, entries)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"{shown} cannot be written to {path}: {error}") from error


def read(path: str | Path, kind: str, shown: str, axes: Axes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays and metadata of a file that `write` wrote.

    Raises:
        CheckpointError: The file is missing, damaged, or not of this kind and version.
    """
    from safetensors import safe_open

    with reading(path, f"a file of {shown}"), safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (kind, VERSION):
        raise CheckpointError(
            f"{path} is not a file of {shown} that this version reads: its format is {found}, not {(kind, VERSION)}."
        )
    with loading(path, shown):
        if json.loads(metadata["axes"]) != {name: list(axes[name]) for name in tensors}:
            raise CheckpointError(f"{path} has axes {metadata['axes']}, not {dict(axes)}.")
    for name, tensor in tensors.items():
        expected: Any = np.int32 if name == "counts" else np.float32
        if tensor.dtype != expected or not np.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {path} must be finite numbers of {expected.__name__}.")
    return tensors, metadata
