"""`jaxid ids extract`: spatial IDs from a folder of grid pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import check_finite
from jaxid.data.grid import read_finetune_folder, read_grid_folder
from jaxid.errors import DataError, InputError, OutputError
from jaxid.experiments import grid
from jaxid.io import ensure_output_folder

Item = TypeVar("Item")


def extract(
    data: Path, out: Path, *, model: str = "tiny-llava", batch_size: int = 64, dtype: str = "float32"
) -> dict[str, Any]:
    """Extracts spatial IDs and writes them.

    Args:
        data: folder of grid pictures in the published layout, or a fine-tuning set.
        out: the file of IDs.
        model: alias, Hugging Face id or folder.
        batch_size: pictures per forward pass.
        dtype: of parameters and activations.

    Returns:
        Numbers of pictures and pairs, and by block the share of variance that two axes explain.

    Raises:
        DataError: if the folder holds no such pictures, or the model's activations are not finite.
        OutputError: if the file cannot be written.
    """
    check_extraction(out, batch_size)
    items = read_finetune_folder(data) if any(data.glob("*.png")) else read_grid_folder(data)
    checkpoint, first = open_checkpoint(model, dtype=dtype), items[0]
    asked = checkpoint.model.prepare([first.picture], grid.QUESTION.format(a=first.object_a, b=first.object_b))
    asked.word(first.object_b)
    pairs = list(dict.fromkeys((item.object_a, item.object_b) for item in items))
    sizes = sorted({item.size for item in items}, reverse=True)
    pictures = with_bar(items, batch_size, "picture")
    found = grid.extract(checkpoint.load(), pictures, pairs=pairs, sizes=sizes, batch_size=batch_size)
    check_finite(f"the IDs of {model} in {dtype}", np.asarray(found.values), DataError)
    found.save(out)
    return {"pictures": len(items), "pairs": len(pairs), "explained_variance": found.explained_variance()}


def check_extraction(out: Path, batch_size: int) -> None:
    """Checks where IDs are to be written, and how many pictures or clips are read together.

    Raises:
        OutputError: if the file's name or place cannot be.
        InputError: if the batch is empty.
    """
    if out.suffix != ".safetensors":
        raise OutputError(f"{out} cannot hold IDs: the name must end in .safetensors.")
    if out.is_dir():
        raise OutputError(f"cannot write {out}: a folder is in the way; choose another name.")
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, not {batch_size}.")
    ensure_output_folder(out.parent)


def with_bar(items: Sequence[Item], batch_size: int, unit: str) -> Iterator[Item]:
    """The items, counted by a progress bar on terminals, which says what the first batch waits for."""
    from tqdm import tqdm

    with tqdm(items, unit=unit, disable=None, desc=f"compiling for batches of {batch_size}") as bar:
        for number, item in enumerate(bar):
            if number == batch_size:
                bar.set_description(refresh=False)
            yield item
