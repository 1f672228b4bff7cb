"""From a name to a CLIP-like model: alias, Hugging Face id or local folder."""

from pathlib import Path

from jaxid.checkpoints import tensors
from jaxid.checkpoints.loading import check_dtype, find_folder, load_network, parsed, read_config
from jaxid.errors import CheckpointError
from jaxid.models.base import Encoder
from jaxid.models.encoders import ENCODER_ALIASES, ENCODERS
from jaxid.processing.dual import DualProcessor


def load_encoder(name: str | Path, *, dtype: str = "float32") -> Encoder:
    """Loads a CLIP-like model.

    Args:
        name: an alias ("tiny-clip", "clip-b16"), a Hugging Face id, or a folder in Hugging Face layout.
        dtype: of parameters and activations: "float32", "bfloat16" or "float16".

    Returns:
        The encoder, its parameters on the default device.

    Raises:
        CheckpointError: if the folder is missing, foreign, incomplete or corrupt.
        InputError: for an unknown dtype.
    """
    check_dtype(dtype)
    folder = find_folder(ENCODER_ALIASES.get(str(name), name))
    fields = read_config(folder)
    model_type = str(fields.get("model_type"))
    if model_type not in ENCODERS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type {model_type!r} is no CLIP-like model that is supported; "
            f"supported: {', '.join(sorted(ENCODERS))}."
        )
    kind = ENCODERS[model_type]
    config = parsed(kind, fields, folder / "config.json")
    processor = DualProcessor.from_folder(folder, config)
    files = tensors.TensorFolder(folder)
    return Encoder(**load_network(kind, config, files, dtype), processor=processor, name=str(name))
