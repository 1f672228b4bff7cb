"""OpenCLIP's files: folders with `open_clip_config.json`, and single weight files of a named architecture."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from jaxid.checkpoints.tensors import TensorFolder
from jaxid.checkpoints.torch_files import read_torch_file
from jaxid.errors import CheckpointError
from jaxid.models.openclip import ARCHITECTURES

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "open_clip_pytorch_model.pt")
PICKLED = (".pt", ".pth", ".bin")


class TensorArrays:
    """Tensors of a file written by `torch.save`, in memory; what `TensorFolder` is for safetensors."""

    def __init__(self, path: Path):
        """Reads the file, tensors and plain values only.

        Takes what lies under "state_dict", as training checkpoints have it, and drops the prefix "module." of runs on
        several devices.

        Raises:
            CheckpointError: if it cannot be read or holds no tensors.
        """
        self.files, self.folder = [path], path.parent
        tree = read_torch_file(path)
        tree = tree.get("state_dict", tree) if isinstance(tree, Mapping) else {}
        arrays = {name: value for name, value in tree.items() if isinstance(value, np.ndarray)}
        if not arrays:
            raise CheckpointError(f"{path} holds no tensors by name.")
        if all(name.startswith("module.") for name in arrays):
            arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
        self.entries: Mapping[str, Any] = arrays

    def shape(self, key: str) -> tuple[int, ...]:
        """A tensor's shape."""
        return self.entries[key].shape

    def readable(self, key: str) -> bool:
        """Whether a tensor holds floating-point numbers."""
        kind = self.entries[key].dtype
        return np.issubdtype(kind, np.floating) or kind.name == "bfloat16"

    def read(self, key: str) -> Shaped[np.ndarray, "..."]:
        """A tensor."""
        return self.entries[key]

    def release(self, key: str, part: Shaped[np.ndarray, "..."]) -> None:
        """Nothing to let go of: the whole file is in memory."""


def open_weights(path: Path) -> TensorFolder | TensorArrays:
    """The tensors of one weight file.

    Raises:
        CheckpointError: if it cannot be read.
    """
    return TensorArrays(path) if path.suffix in PICKLED else TensorFolder(path)


def find_weights(folder: Path) -> Path:
    """The weight file of an OpenCLIP folder.

    Raises:
        CheckpointError: if there is none.
    """
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise CheckpointError(f"{folder} has none of {', '.join(WEIGHT_FILES)}; copy or download it again.")
    return found[0]


def read_openclip_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`model_cfg` and `preprocess_cfg` of a folder's config.

    Raises:
        CheckpointError: if it cannot be read.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return dict(fields["model_cfg"]), dict(fields.get("preprocess_cfg") or {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not an OpenCLIP config ({error!r}).") from error


def architecture(name: str | None, path: Path) -> dict[str, Any]:
    """The `model_cfg` of a named architecture.

    Raises:
        CheckpointError: if there is no name, or it is unknown.
    """
    known = ", ".join(ARCHITECTURES)
    if name is None:
        raise CheckpointError(f"{path} is a weight file; say of which architecture: {known}.")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"the architecture {name!r} is not one of {known}.")
    return dict(ARCHITECTURES[name])
