"""`jaxid ids extract`: spatial IDs from a folder of grid pictures."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checks import check_finite
from jaxid.data.grid import read_finetune_folder, read_grid_folder
from jaxid.errors import DataError
from jaxid.experiments import grid
from jaxid.runs.common import check_extraction, with_bar


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
