"""Grid scenes: the placements, the folder of pictures, and the file names of the fine-tuning set.

Source: [ID] section 3 and its appendix on fine-tuning, arXiv 2601.12626. A cell is (column, row) of a 4 x 4 grid, the
row counted downwards.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxid.data.files import save_picture
from jaxid.data.objects import OBJECTS, check_pairs
from jaxid.data.scenes import GRID, render, sample_grid
from jaxid.errors import DataError, InputError
from jaxid.prompts.pictures import Picture

Cell = tuple[int, int]
"""(column, row), each 0..3."""

CELL_SIZE = 224
"""Side of a cell in the published pictures, in pixels."""
OBJECT_SIZES = (224, 174, 124, 74)
"""Sides of the pasted objects in the published pictures, in pixels."""


NEAR_FAR: tuple[tuple[Cell, Cell], ...] = (((0, 0), (3, 0)), ((3, 0), (0, 0)))
"""Placements of the near/far question: the two ends of the top row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridItem:
    """One grid picture: a file, or UInt8[Y, X, 3]."""

    picture: Picture
    object_a: str
    object_b: str
    cell_a: Cell
    cell_b: Cell
    size: int  # side of both objects, in pixels of the published 224-pixel cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneItem:
    """Two objects and their cells: what the name of a fine-tuning picture says."""

    object_a: str
    object_b: str
    cell_a: Cell
    cell_b: Cell


def placements() -> list[tuple[Cell, Cell]]:
    """All 240 ordered placements of two objects in different cells.

    Returns:
        ((column, row) of the first object, (column, row) of the second), the first object's cell varying slowest.
    """
    return list(itertools.permutations([(x, y) for y in range(GRID) for x in range(GRID)], 2))


def write_grid_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    object_sizes: Sequence[int] = OBJECT_SIZES,
    backgrounds: Sequence[str] = ("white",),
    jitter_size: float = 0.0,
    jitter_angle: float = 0.0,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
) -> list[GridItem]:
    """Draws every placement of every pair at every size as `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`.

    Args:
        folder: Where the pair folders go.
        pairs: Ordered pairs of different names from `OBJECTS`.
        seed: Chooses colours, backgrounds and jitter; the same seed writes the same pictures.
        picture_size: Side of the square pictures, in pixels.
        object_sizes: Sides of the objects, in pixels of the published 224-pixel cell.
        backgrounds: Kinds of background (`scenes.BACKGROUNDS`); white is the paper's transparent setting.
        jitter_size: Sides change by up to this share either way.
        jitter_angle: Objects are rotated by up to this many degrees either way.
        cells: Draws only these placements (cell of A, cell of B), such as `NEAR_FAR`.

    Returns:
        The items written.

    Raises:
        InputError: A pair is not two different drawn objects.
        OutputError: A picture cannot be written.
    """
    placed = placements()
    if cells is not None:
        strange = [pair for pair in cells if pair not in placed]
        if strange or not cells:
            raise InputError(f"{strange or 'An empty list'} names no placements of two objects on the grid.")
        placed = list(dict.fromkeys(cells))

    def path(item: FinetuneItem, size: int) -> Path:
        (ax, ay), (bx, by) = item.cell_a, item.cell_b
        return Path(folder) / f"{item.object_a}_{item.object_b}" / f"{ax}_{ay}" / f"{bx}_{by}_{size}.png"

    return _draw(
        pairs,
        placed,
        object_sizes,
        path,
        seed,
        picture_size,
        jitter_size=jitter_size,
        jitter_angle=jitter_angle,
        backgrounds=backgrounds,
    )


def _draw(
    pairs: Sequence[tuple[str, str]],
    placed: Sequence[tuple[Cell, Cell]],
    sizes: Sequence[int],
    path: Callable[[FinetuneItem, int], Path],
    seed: int,
    picture_size: int,
    **drawing: Any,
) -> list[GridItem]:
    """Draws the placements of every pair at every size.

    Args:
        pairs: ordered pairs of different names from `OBJECTS`.
        placed: cells of both objects.
        sizes: sides of the objects, in pixels of the published 224-pixel cell.
        path: the file of a picture.
        seed: chooses colours, backgrounds and jitter.
        picture_size: side of the square pictures, in pixels.
        drawing: further options of `sample_grid`.
    """
    check_pairs(pairs)
    cells_a, cells_b = np.asarray(placed).reshape(-1, 2, 2).swapaxes(0, 1)
    items = []
    for index, (name_a, name_b) in enumerate(pairs):
        rng = np.random.default_rng((seed, index))
        first, second = (np.full(len(placed), OBJECTS.index(name)) for name in (name_a, name_b))
        for size in sizes:
            scenes = sample_grid(rng, first, cells_a, second, cells_b, scale=size / CELL_SIZE, **drawing)
            for row, (cell_a, cell_b) in enumerate(placed):
                item = FinetuneItem(object_a=name_a, object_b=name_b, cell_a=cell_a, cell_b=cell_b)
                # One picture at a time: all 240 of the published size together would take gigabytes.
                picture = path(item, size)
                save_picture(picture, render(scenes[row : row + 1], picture_size)[0])
                items.append(GridItem(picture=picture, size=size, **dataclasses.asdict(item)))
    return items


_PAIR = re.compile(r"([^_]+)_([^_]+)")
_CELL = re.compile(r"([0-3])_([0-3])")
_PLACED = re.compile(r"([0-3])_([0-3])_([1-9][0-9]*)\.png")


def read_grid_folder(folder: str | Path) -> list[GridItem]:
    """Lists the pictures of a grid folder, sorted by pair, cells and size (greatest first).

    Hidden files and folders are skipped. Object names may hold spaces but no underscores.

    Raises:
        DataError: The folder is missing or empty, or something in it does not fit
            `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`; the message names it.
    """
    folder = Path(folder)
    expected = "{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png with cells 0..3"
    if not folder.is_dir():
        raise DataError(f"Grid folder {folder} does not exist. Give the folder that holds the {{A}}_{{B}} folders.")
    items = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_dir() or any(part.startswith(".") for part in parts):
            continue
        matches = None
        if len(parts) == 3:
            matches = _PAIR.fullmatch(parts[0]), _CELL.fullmatch(parts[1]), _PLACED.fullmatch(parts[2])
        if matches is None or not all(matches):
            raise DataError(f"{path} does not fit a grid folder: expected {folder}/{expected}. Remove or rename it.")
        pair, cell_a, placed = (match.groups() for match in matches if match)
        items.append(
            GridItem(
                picture=path,
                object_a=pair[0],
                object_b=pair[1],
                cell_a=(int(cell_a[0]), int(cell_a[1])),
                cell_b=(int(placed[0]), int(placed[1])),
                size=int(placed[2]),
            )
        )
        if items[-1].cell_a == items[-1].cell_b:
            raise DataError(f"{path} puts both objects in cell {items[-1].cell_a}: the two cells must differ.")
    if not items:
        raise DataError(f"Grid folder {folder} holds no pictures: expected {expected}.")
    return sorted(items, key=lambda item: (item.object_a, item.object_b, item.cell_a, item.cell_b, -item.size))


def near_far_items(folder: str | Path) -> list[GridItem]:
    """The pictures of a grid folder whose objects stand at the two ends of the top row, the greatest size only.

    Raises:
        DataError: The folder holds none of them, or is no grid folder.
    """
    items = [item for item in read_grid_folder(folder) if (item.cell_a, item.cell_b) in NEAR_FAR]
    if not items:
        raise DataError(f"{folder} holds no picture with objects at 0_0 and 3_0, which near/far questions are about.")
    return _largest(items)


def _largest(items: Sequence[GridItem]) -> list[GridItem]:
    """The items of the greatest size."""
    largest = max(item.size for item in items)
    return [item for item in items if item.size == largest]


_FINETUNE = re.compile(r"([^_]+)_([0-3])-([0-3])_([^_]+)_([0-3])-([0-3])\.png")


def finetune_name(item: FinetuneItem) -> str:
    """The file name `{A}_{ax}-{ay}_{B}_{bx}-{by}.png` of a fine-tuning picture.

    Raises:
        InputError: No such name says what the item is: an underscore in an object's name, a cell outside 0..3,
            both objects in one cell.
    """
    (ax, ay), (bx, by) = item.cell_a, item.cell_b
    name = f"{item.object_a}_{ax}-{ay}_{item.object_b}_{bx}-{by}.png"
    try:
        if parse_finetune_name(name) == item:
            return name
    except DataError as error:
        raise InputError(f"{item} has no file name: {error}") from error
    raise InputError(f"{item} has no file name: {name!r} would be read as another item.")


def parse_finetune_name(name: str) -> FinetuneItem:
    """Reads `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`; object names may hold spaces but no underscores.

    Args:
        name: The file's name, without its folder.

    Raises:
        DataError: The name has another form, or both objects share a cell.
    """
    match = _FINETUNE.fullmatch(name)
    if match is None or match[1] != match[1].strip() or match[4] != match[4].strip():
        raise DataError(
            f"{name!r} is not the name of a fine-tuning picture: expected {{A}}_{{ax}}-{{ay}}_{{B}}_{{bx}}-{{by}}.png "
            "with cells 0..3 and names without underscores, as in 'teapot_0-1_polar bear_3-2.png'."
        )
    item = FinetuneItem(
        object_a=match[1],
        object_b=match[4],
        cell_a=(int(match[2]), int(match[3])),
        cell_b=(int(match[5]), int(match[6])),
    )
    if item.cell_a == item.cell_b:
        raise DataError(f"{name!r} puts both objects in cell {item.cell_a}: the two cells must differ.")
    return item


def write_finetune_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    backgrounds: Sequence[str] = ("white",),
    jitter_size: float = 0.0,
    jitter_angle: float = 0.0,
) -> list[GridItem]:
    """Draws every placement of every pair as a fine-tuning set, `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`.

    Arguments and errors as in `write_grid_folder`.
    """
    return _draw(
        pairs,
        placements(),
        (CELL_SIZE,),
        lambda item, _: Path(folder) / finetune_name(item),
        seed,
        picture_size,
        jitter_size=jitter_size,
        jitter_angle=jitter_angle,
        backgrounds=backgrounds,
    )


def read_finetune_folder(folder: str | Path) -> list[GridItem]:
    """The pictures of a fine-tuning set, sorted; of a grid folder instead, those of the greatest size.

    Raises:
        DataError: The folder is missing or empty, or holds a picture of another name.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
    if not found:
        return _largest(read_grid_folder(folder))
    return [
        GridItem(picture=path, size=CELL_SIZE, **dataclasses.asdict(parse_finetune_name(path.name))) for path in found
    ]
