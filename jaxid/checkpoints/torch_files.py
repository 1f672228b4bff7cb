"""Reads files written by `torch.save`, without ever running code from them, and writes such files.

The only module that imports torch, and only when a file is read or written.
"""

import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxid.errors import CheckpointError

PLAIN = "save it again as plain dictionaries of tensors: jaxid loads no objects."
"""What to do with a file of objects, unless a reader knows better."""

_REPEATED = 2**26  # bytes that a tensor with repeated numbers may take in any file


class Embedding(NamedTuple):
    """What is written as a `torch.nn.Embedding`."""

    weight: np.ndarray


class _Object:
    """What stands for an object of a file: its fields, and nothing of its class, no code of which runs."""

    def __init__(self, *given: object) -> None:
        del given
        self.fields: Mapping[Any, Any] = {}

    def __setstate__(self, state: object) -> None:
        self.fields = state if isinstance(state, dict) else {}


def read_torch_file(path: str | Path, objects: Collection[str] = (), advice: str = PLAIN) -> Any:
    """Contents of a file written by `torch.save`, tensors as numpy arrays of the same type.

    Args:
        path: the file: nested dictionaries, lists and tuples of tensors and plain values.
        objects: full names of the classes, and of the functions that make objects, which the file may mention besides.
            None of them is imported or called. Of such an object the parameters are read, as a module has them.
        advice: what to do with a file that mentions others.

    Returns:
        The same nesting; keys and plain values as they are; parameters of objects by their names.

    Raises:
        CheckpointError: torch is not installed, or the file is missing, damaged, or holds anything but
            tensors, plain containers and those objects (such a file could run code when read, and is refused).
    """
    check_torch(f"Reading {path}")
    import torch

    def to_numpy(value: object) -> object:
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
        if isinstance(value, _Object):
            parameters = value.fields.get("_parameters")
            held = parameters if isinstance(parameters, dict) else {}
            return {name: to_numpy(item) for name, item in held.items() if isinstance(item, torch.Tensor)}
        return value

    if not Path(path).is_file():
        raise CheckpointError(f"{path} does not exist.")
    try:
        size = Path(path).stat().st_size
        _refuse_compressed(path)
        named: list[Any] = [(_Object, name) for name in objects]
        with torch.serialization.safe_globals([*_numpy_numbers(), *named]):
            return to_numpy(torch.load(path, map_location="cpu", weights_only=True))
    # A damaged file can fail in any way: the unpickler raises KeyError, EOFError, ... on foreign bytes.
    except Exception as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"among them {found[1]}" if found else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a torch file of tensors and plain containers: it is damaged, of "
            f"another kind, or holds Python objects ({reason}). In the last case {advice}"
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


def check_torch(purpose: str) -> None:
    """Refuses what needs PyTorch, such as "Writing scorer.pt", where it is not installed.

    Raises:
        CheckpointError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{purpose} needs PyTorch, which is not installed: pip install 'jaxid-vlm[torch]'."
        ) from error


def write_torch_file(path: Path, tree: Mapping[str, object]) -> None:
    """Writes nested dictionaries of arrays, embeddings and plain values as `torch.save` does.

    Raises:
        CheckpointError: torch is not installed.
    """
    check_torch(f"Writing {path}")
    import torch

    def to_torch(value: object) -> Any:
        if isinstance(value, Mapping):
            return {name: to_torch(item) for name, item in value.items()}
        if isinstance(value, Embedding):
            return torch.nn.Embedding.from_pretrained(torch.from_numpy(np.array(value.weight)), freeze=False)
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    torch.save(to_torch(tree), path)
