"""Writing a changed model as a checkpoint folder that Hugging Face's classes read."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.typing import ArrayLike

from jaxid.checkpoints.loading import as_stored, described, find_folder
from jaxid.checkpoints.tensors import TensorFolder, flatten, published_name
from jaxid.errors import CheckpointError, OutputError
from jaxid.families.base import Model
from jaxid.nn.keys import Key

_KEPT = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "LICENSE*", "*.md")
"""Files of a checkpoint folder that a changed copy keeps."""


def export(model: Model, folder: str | Path, paths: set[str] | None = None) -> Path:
    """Writes a model's folder anew with its parameters as they are now.

    Files, names of tensors, number formats and everything that is not a parameter stay as they are in the checkpoint
    that the model was loaded from; only the numbers of changed tensors are written over, in a copy.

    Args:
        model: the changed model; its name says where it was loaded from.
        folder: the folder to write; an existing one is replaced once the new one is complete.
        paths: of the parameters that changed; all by default.

    Returns:
        The folder.

    Raises:
        CheckpointError: if the checkpoint is not the one that the model was loaded from.
        OutputError: if the folder cannot be written, or is the checkpoint itself.
    """
    source, target = find_folder(model.name).resolve(), Path(folder).resolve()
    if target == source or source in target.parents:
        raise OutputError(f"{folder} would overwrite the checkpoint {source}; choose another folder.")
    kind, described_config = described(source)
    config, renames, _ = as_stored(kind, described_config, TensorFolder(source))
    if config != model.config:
        raise CheckpointError(f"{source} holds another model than {model.name}, which was loaded from there.")
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for pattern in _KEPT:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, temporary / file.name)
        _write_over(TensorFolder(temporary), kind.keys(config), renames, flatten(model.parameters), paths)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose another folder.") from error
    return target


def _write_over(
    tensors: TensorFolder,
    keys: list[Key],
    renames: tuple[tuple[str, str], ...],
    parameters: Mapping[str, ArrayLike],
    paths: set[str] | None,
) -> None:
    """Writes parameters over a folder's tensors, in the tensors' own number formats."""
    names = {published_name(name, renames): name for name in tensors.entries}
    opened: dict[Path, np.memmap] = {}
    for key in keys:
        if paths is not None and key.target not in paths:
            continue
        parameter = np.asarray(parameters[key.target])
        for source, row in key.tensors(parameter.shape):
            name = names.get(source)
            if name is None:
                if key.copy:
                    continue
                raise CheckpointError(f"the checkpoint has no tensor {source!r} any more.")
            entry, old = tensors.entries[name], tensors.read(name)
            if entry.file not in opened:
                opened[entry.file] = np.memmap(entry.file, np.uint8, "r+")
            target = key.own_part(np.ndarray(old.shape, old.dtype, opened[entry.file], entry.begin))
            new = key.to_checkpoint(parameter if row is None else parameter[row])
            target[...] = new.astype(old.dtype).reshape(target.shape)
    for mapped in opened.values():
        mapped.flush()
