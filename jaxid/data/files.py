"""Atomic writing of files and pictures."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from jaxid.errors import OutputError
from jaxid.results import whole_file


def save_bytes(path: str | Path, data: bytes) -> None:
    """Writes a whole file or nothing: a temporary name in the same folder, then a rename; makes missing folders.

    Raises:
        OutputError: The file cannot be written. A file that was there is then unharmed.
    """
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def save_picture(path: str | Path, picture: UInt8[np.ndarray, "Y X 3"]) -> None:
    """Writes a PNG or (quality 95) JPEG file, by the name's ending, atomically.

    Raises:
        OutputError: The name ends in neither `.png` nor `.jpg`, or the file cannot be written.
    """
    from PIL import Image

    kinds = {".png": ("PNG", {}), ".jpg": ("JPEG", {"quality": 95}), ".jpeg": ("JPEG", {"quality": 95})}
    if Path(path).suffix.lower() not in kinds:
        raise OutputError(f"{path} cannot be written: a picture's name must end in .png or .jpg.")
    kind, options = kinds[Path(path).suffix.lower()]
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind, **options)
    save_bytes(path, buffer.getvalue())
