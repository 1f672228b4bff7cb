"""Grid scenes: placements, the folder of pictures, and the file names of the fine-tuning set.

Source: [ID] section 3 and its appendix on fine-tuning, arXiv 2601.12626. A cell is (column, row) of a 4 x 4 grid, the
row counted downwards.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict, Unpack

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
    """A picture on the grid: a file, or UInt8[Y, X, 3]."""

    picture: Picture
    object_a: str
    object_b: str
    cell_a: Cell
    cell_b: Cell
    size: int  # side of both objects, in pixels of the published 224-pixel cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneItem:
    """Two objects and their cells, as the name of a fine-tuning picture gives them."""

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


class Drawing(TypedDict, total=False):
    """How pictures may vary, as in `scenes.sample_grid`."""

    backgrounds: Sequence[str]
    jitter_size: float
    jitter_angle: float


def write_grid_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    object_sizes: Sequence[int] = OBJECT_SIZES,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
    **drawing: Unpack[Drawing],
) -> list[GridItem]:
    """Draws every placement of every pair at every size as `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`.

    Args:
        folder: where the pair folders are made.
        pairs: ordered pairs of different names from `OBJECTS`.
        seed: chooses colours, backgrounds and jitter; the same seed writes the same pictures.
        picture_size: side of the square pictures, in pixels.
        object_sizes: sides of the objects, in pixels of the published 224-pixel cell.
        cells: draw only these placements (cell of A, cell of B), such as `NEAR_FAR`.
        drawing: `backgrounds` (white by default, the paper's transparent setting), `jitter_size` and `jitter_angle`.

    Returns:
        The items written.

    Raises:
        InputError: if a pair is not two different drawn objects, or `cells` are not placements on the grid.
        OutputError: if a picture cannot be written.
    """
    placed = placements()
    if cells is not None:
        strange = [pair for pair in cells if pair not in placed]
        if strange or not cells:
            raise InputError(f"{strange or 'an empty list'} names no placements of two objects on the grid.")
        placed = list(dict.fromkeys(cells))

    def path(item: FinetuneItem, size: int) -> Path:
        (ax, ay), (bx, by) = item.cell_a, item.cell_b
        return Path(folder) / f"{item.object_a}_{item.object_b}" / f"{ax}_{ay}" / f"{bx}_{by}_{size}.png"

    return _draw(path, pairs, placed, object_sizes, seed, picture_size, drawing)


def write_finetune_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    **drawing: Unpack[Drawing],
) -> list[GridItem]:
    """Draws every placement of every pair as a fine-tuning set, `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`.

    Arguments and errors as in `write_grid_folder`.
    """

    def path(item: FinetuneItem, size: int) -> Path:
        return Path(folder) / finetune_name(item)

    return _draw(path, pairs, placements(), (CELL_SIZE,), seed, picture_size, drawing)


def _draw(
    path: Callable[[FinetuneItem, int], Path],
    pairs: Sequence[tuple[str, str]],
    placed: Sequence[tuple[Cell, Cell]],
    sizes: Sequence[int],
    seed: int,
    picture_size: int,
    drawing: Drawing,
) -> list[GridItem]:
    """Draws the placements of every pair at every size to the files that `path` names."""
    check_pairs(pairs)
    options: Drawing = {"backgrounds": ("white",), **drawing}
    cells_a, cells_b = np.asarray(placed).reshape(-1, 2, 2).swapaxes(0, 1)
    items = []
    for index, (name_a, name_b) in enumerate(pairs):
        rng = np.random.default_rng((seed, index))
        first, second = (np.full(len(placed), OBJECTS.index(name)) for name in (name_a, name_b))
        for size in sizes:
            scenes = sample_grid(rng, first, cells_a, second, cells_b, scale=size / CELL_SIZE, **options)
            for row, (cell_a, cell_b) in enumerate(placed):
                item = FinetuneItem(object_a=name_a, object_b=name_b, cell_a=cell_a, cell_b=cell_b)
                # One picture at a time: all 240 of the published size together would take gigabytes.
                picture = path(item, size)
                save_picture(picture, render(scenes[row : row + 1], picture_size)[0])
                items.append(GridItem(picture=picture, size=size, **dataclasses.asdict(item)))
    return items


_GRID_FILE = re.compile(
    r"(?P<a>[^_/]+)_(?P<b>[^_/]+)/(?P<ax>[0-3])_(?P<ay>[0-3])/(?P<bx>[0-3])_(?P<by>[0-3])_(?P<size>[1-9][0-9]*)\.png"
)


def _parsed(match: re.Match[str], where: str) -> FinetuneItem:
    """What a file's name says, or a DataError if it puts both objects in one cell."""
    ax, ay, bx, by = (int(match[name]) for name in ("ax", "ay", "bx", "by"))
    if (ax, ay) == (bx, by):
        raise DataError(f"{where} puts both objects in cell {(ax, ay)}: the two cells must differ.")
    return FinetuneItem(object_a=match["a"], object_b=match["b"], cell_a=(ax, ay), cell_b=(bx, by))


def read_grid_folder(folder: str | Path) -> list[GridItem]:
    """Lists the pictures of a grid folder, sorted by pair, cells and size (largest first).

    Hidden files and folders are skipped. Object names may contain spaces but no underscores.

    Raises:
        DataError: if the folder is missing or empty, or something in it does not fit
            `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`; the message names it.
    """
    folder = Path(folder)
    expected = "{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png with cells 0..3"
    if not folder.is_dir():
        raise DataError(f"the grid folder {folder} does not exist; give the folder that holds the {{A}}_{{B}} folders.")
    items = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        match = _GRID_FILE.fullmatch(name.as_posix())
        if match is None:
            raise DataError(f"{path} does not fit a grid folder: expected {folder}/{expected}. Remove or rename it.")
        item = _parsed(match, str(path))
        items.append(GridItem(picture=path, size=int(match["size"]), **dataclasses.asdict(item)))
    if not items:
        raise DataError(f"the grid folder {folder} holds no pictures: expected {expected}.")
    return sorted(items, key=lambda item: (item.object_a, item.object_b, item.cell_a, item.cell_b, -item.size))


def near_far_items(folder: str | Path) -> list[GridItem]:
    """The pictures of a grid folder with an object at each end of the top row, in the largest size only.

    Raises:
        DataError: if the folder holds no such picture, or is not a grid folder.
    """
    items = [item for item in read_grid_folder(folder) if (item.cell_a, item.cell_b) in NEAR_FAR]
    if not items:
        raise DataError(f"{folder} holds no picture with objects at 0_0 and 3_0, as near/far questions need.")
    return _largest(items)


def _largest(items: Sequence[GridItem]) -> list[GridItem]:
    """The items of the largest size."""
    largest = max(item.size for item in items)
    return [item for item in items if item.size == largest]


_FINETUNE = re.compile(r"(?P<a>[^_]+)_(?P<ax>[0-3])-(?P<ay>[0-3])_(?P<b>[^_]+)_(?P<bx>[0-3])-(?P<by>[0-3])\.png")


def finetune_name(item: FinetuneItem) -> str:
    """The file name `{A}_{ax}-{ay}_{B}_{bx}-{by}.png` of a fine-tuning picture.

    Raises:
        InputError: if no such name can describe the item: an object's name has an underscore, a cell is outside
            0..3, or both objects share a cell.
    """
    (ax, ay), (bx, by) = item.cell_a, item.cell_b
    name = f"{item.object_a}_{ax}-{ay}_{item.object_b}_{bx}-{by}.png"
    try:
        if parse_finetune_name(name) == item:
            return name
    except DataError as error:
        raise InputError(f"{item} has no file name: {error}") from error
    raise InputError(f"{item} has no file name: {name!r} describes another item.")


def parse_finetune_name(name: str) -> FinetuneItem:
    """Reads `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`; object names may contain spaces but no underscores.

    Args:
        name: the file's name, without its folder.

    Raises:
        DataError: if the name has another form, or both objects share a cell.
    """
    match = _FINETUNE.fullmatch(name)
    if match is None or any(match[name] != match[name].strip() for name in "ab"):
        raise DataError(
            f"{name!r} does not name a fine-tuning picture: expected {{A}}_{{ax}}-{{ay}}_{{B}}_{{bx}}-{{by}}.png "
            "with cells 0..3 and names without underscores, as in 'teapot_0-1_polar bear_3-2.png'."
        )
    return _parsed(match, repr(name))


def read_finetune_folder(folder: str | Path) -> list[GridItem]:
    """The pictures of a fine-tuning set, sorted by name, or the largest ones of a grid folder.

    Raises:
        DataError: if the folder is missing or empty, or holds a picture with another kind of name.
    """
    folder = Path(folder)
    found = sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))
    if not found:
        return _largest(read_grid_folder(folder))
    return [
        GridItem(picture=path, size=CELL_SIZE, **dataclasses.asdict(parse_finetune_name(path.name))) for path in found
    ]
