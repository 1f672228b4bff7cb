"""Pictures and CSV files on disk, usable rows, and the files that rows name."""

import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import UInt8

from jaxid.errors import DataError, OutputError
from jaxid.io import reading, whole_file, write_text

Item = TypeVar("Item")
Row = TypeVar("Row")


def save_picture(path: str | Path, picture: UInt8[np.ndarray, "Y X C"], *, compression: int = 6) -> None:
    """Writes a PNG or JPEG (quality 95) file atomically; the name's ending says which.

    Args:
        path: the file.
        picture: in RGB; for a PNG file, also in RGBA.
        compression: of a PNG file, 0 to 9; less is faster, and the file somewhat larger.

    Raises:
        OutputError: The name ends in neither `.png` nor `.jpg`, or the file cannot be written.
    """
    from PIL import Image

    jpeg = ("JPEG", {"quality": 95})
    kinds = {".png": ("PNG", {"compress_level": compression}), ".jpg": jpeg, ".jpeg": jpeg}
    if Path(path).suffix.lower() not in kinds:
        raise OutputError(f"{path} cannot be written: a picture's name must end in .png or .jpg.")
    kind, options = kinds[Path(path).suffix.lower()]
    with whole_file(path) as temporary:
        Image.fromarray(picture).save(temporary, kind, **options)


def read_csv(path: str | Path) -> list[object]:
    """The rows of a CSV file as mappings from the first line's names; a byte-order mark is skipped.

    Raises:
        DataError: The file cannot be read.
    """
    with reading(path, "a CSV file", DataError), open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path: str | Path, rows: Iterable[Sequence[object]]) -> None:
    """Writes rows as a CSV file, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    write_text(path, buffer.getvalue())


def usable(
    rows: Iterable[Row], read: Callable[[int, Row], Item], bad: list[tuple[str, DataError]] | None
) -> list[Item]:
    """The items that the rows of a file describe, in order.

    Args:
        rows: the rows.
        read: turns a row's index and the row into an item.
        bad: where given, rows that cannot be used are skipped and noted here: "row 3" and its error.

    Raises:
        DataError: without `bad`, for the first row that cannot be used.
    """
    items = []
    for index, row in enumerate(rows):
        try:
            items.append(read(index, row))
        except DataError as error:
            if bad is None:
                raise
            bad.append((f"row {index}", error))
    return items


def inside(folder: str | Path, name: object, where: str) -> Path:
    """The path of a file that a manifest names relative to a folder, which the name must not leave.

    Links inside the folder may point anywhere: whoever made them meant it.

    Args:
        folder: the folder that the name is relative to.
        name: the name as the manifest gives it.
        where: begins error messages, such as "row 3 of manifest.csv".

    Returns:
        The path, whether or not a file is there.

    Raises:
        DataError: if the name is not a string, is absolute, leads out of the folder, or cannot be a path.
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(f"{where}: {name!r:.80} is not the name of a file.")
    short = os.path.normpath(name)
    if os.path.isabs(name) or short.split(os.sep)[0] == os.pardir:
        raise DataError(
            f"{where}: {name!r:.80} leads out of {folder}, to which names are relative; move or link the file there."
        )
    path = Path(folder, short)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name too long, or with characters that names do not have
        raise DataError(f"{where}: {name!r:.80} cannot be the name of a file ({type(error).__name__}).") from error
    return path


def existing(folder: str | Path, name: object, where: str, *, folders: bool = False) -> Path:
    """The path of a file that a manifest names, as from `inside`, if the file exists.

    Args:
        folder: the folder that the name is relative to.
        name: the name as the manifest gives it.
        where: begins error messages.
        folders: accept a folder as well.

    Raises:
        DataError: as from `inside`, or if the file does not exist.
    """
    path = inside(folder, name, where)
    if not path.is_file() and not (folders and path.is_dir()):
        raise DataError(f"{where}: {path} does not exist; put it there, or correct the name.")
    return path
