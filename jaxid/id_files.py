"""Files of IDs: safetensors whose metadata names every axis, written whole or not at all."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid import __version__
from jaxid.errors import CheckpointError, OutputError

VERSION = "1"

Axes = Mapping[str, Sequence[str]]
"""Names of every array's axes."""


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a file of {shown}: {error}") from error
    found = (metadata.get("format"), metadata.get("format_version"))
    if found != (kind, VERSION):
        raise CheckpointError(
            f"{path} is not a file of {shown} that this version reads: its format is {found}, not {(kind, VERSION)}."
        )
    try:
        if json.loads(metadata["axes"]) != {name: list(axes[name]) for name in tensors}:
            raise CheckpointError(f"{path} has axes {metadata['axes']}, not {dict(axes)}.")
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is an incomplete file of {shown}: {error}") from error
    for name, tensor in tensors.items():
        expected: Any = np.int32 if name == "counts" else np.float32
        if tensor.dtype != expected or not np.isfinite(tensor).all():
            raise CheckpointError(f"{name} in {path} must be finite numbers of {expected.__name__}.")
    return tensors, metadata
