"""Grid scenes: placements, the folder of pictures, and the file names of the fine-tuning set.

Source: [ID] section 3 and its appendix on fine-tuning, arXiv 2601.12626. A cell is (column, row) of a 4 x 4 grid, the
row counted downwards.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypedDict, Unpack

import numpy as np
from jaxtyping import UInt8

from jaxid.data import folders
from jaxid.data.cutouts import Cutout, Pasting
from jaxid.data.objects import OBJECTS, check_pairs
from jaxid.data.scenes import GRID, Scenes, render, sample_grid
from jaxid.errors import DataError, InputError
from jaxid.prompts.pictures import Picture, without_alpha

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
    about: Literal["a", "b"] = "b"  # the subject of questions

    @property
    def names(self) -> tuple[str, str]:
        """The subject of questions about the picture, and the other object."""
        return (self.object_a, self.object_b) if self.about == "a" else (self.object_b, self.object_a)

    @property
    def cell(self) -> Cell:
        """The subject's cell."""
        return self.cell_a if self.about == "a" else self.cell_b

    @property
    def key(self) -> str:
        """The names, the subject's cell and the size."""
        x, y = self.cell
        return f"{'-'.join(self.names)}-{x}_{y}-{self.size}"

    def without_alpha(self) -> "GridItem":
        """The same item, whose file is shown without its alpha channel."""
        return dataclasses.replace(self, picture=without_alpha(self.picture))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneItem:
    """Two objects and their cells, as the name of a fine-tuning picture gives them."""

    object_a: str
    object_b: str
    cell_a: Cell
    cell_b: Cell


def placements(*, same_row: bool = True, same_column: bool = True) -> list[tuple[Cell, Cell]]:
    """All 240 ordered placements of two objects in different cells.

    Args:
        same_row: include those of two objects in one row.
        same_column: include those of two objects in one column.

    Returns:
        ((column, row) of the first object, (column, row) of the second), the first object's cell varying slowest.
    """
    return [
        (a, b)
        for a, b in itertools.permutations([(x, y) for y in range(GRID) for x in range(GRID)], 2)
        if (same_column or a[0] != b[0]) and (same_row or a[1] != b[1])
    ]


class Drawing(TypedDict, total=False):
    """How pictures may vary, as in `scenes.sample_grid`."""

    backgrounds: Sequence[str]
    jitter_size: float
    jitter_angle: float


class Writing(TypedDict, total=False):
    """How a folder is written, as in `folders.draw_folder`."""

    restart: bool
    progress: bool


class _Drawn(NamedTuple):
    """The layout of a folder: the path of a picture by what it shows and the size of the objects."""

    path: Callable[[FinetuneItem, int], Path]
    placed: Sequence[tuple[Cell, Cell]]
    sizes: Sequence[int]


def _grid(sizes: Sequence[int], cells: Sequence[tuple[Cell, Cell]] | None) -> _Drawn:
    placed = placements()
    if cells is not None:
        strange = [pair for pair in cells if pair not in placed]
        if strange or not cells:
            raise InputError(f"{strange or 'an empty list'} names no placements of two objects on the grid.")
        placed = list(dict.fromkeys(cells))

    def path(item: FinetuneItem, size: int) -> Path:
        (ax, ay), (bx, by) = item.cell_a, item.cell_b
        return Path(f"{item.object_a}_{item.object_b}", f"{ax}_{ay}", f"{bx}_{by}_{size}.png")

    return _Drawn(path, placed, list(dict.fromkeys(sizes)))


def _finetune(cells: Sequence[tuple[Cell, Cell]] | None = None) -> _Drawn:
    return _Drawn(lambda item, size: Path(finetune_name(item)), _grid((), cells).placed, (CELL_SIZE,))


def write_grid_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    object_sizes: Sequence[int] = OBJECT_SIZES,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
    writing: Writing | None = None,
    **drawing: Unpack[Drawing],
) -> list[GridItem]:
    """Draws every placement of every pair at every size as `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`.

    Pictures that are there are kept, so that drawing resumes after a kill.

    Args:
        folder: where the pair folders are made.
        pairs: ordered pairs of different names from `OBJECTS`.
        seed: chooses colours, backgrounds and jitter; the same seed writes the same pictures.
        picture_size: side of the square pictures, in pixels.
        object_sizes: sides of the objects, in pixels of the published 224-pixel cell.
        cells: draw only these placements (cell of A, cell of B), such as `NEAR_FAR`.
        writing: `restart` and `progress` of `folders.draw_folder`.
        drawing: `backgrounds` (white by default), `jitter_size` and `jitter_angle`.

    Returns:
        The items written.

    Raises:
        InputError: if a pair is not two different drawn objects, or `cells` are not placements on the grid.
        OutputError: if a picture cannot be written, or the folder holds pictures drawn in another way.
    """
    return _draw(folder, _grid(object_sizes, cells), pairs, seed, picture_size, drawing, writing)


def write_finetune_folder(
    folder: str | Path,
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
    picture_size: int = GRID * CELL_SIZE,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
    writing: Writing | None = None,
    **drawing: Unpack[Drawing],
) -> list[GridItem]:
    """Draws every placement of every pair as a fine-tuning set, `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`.

    Arguments and errors as in `write_grid_folder`.
    """
    return _draw(folder, _finetune(cells), pairs, seed, picture_size, drawing, writing)


def paste_grid_folder(
    folder: str | Path,
    objects: Mapping[str, Cutout],
    pairs: Sequence[tuple[str, str]] | None,
    pasting: Pasting,
    *,
    object_sizes: Sequence[int] = OBJECT_SIZES,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
    writing: Writing | None = None,
) -> list[GridItem]:
    """Pastes pictures of objects on the grid, every placement of every pair at every size.

    Args:
        folder: where the pair folders are made, `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`.
        objects: pictures of objects by their names, as from `cutouts.read_cutouts`.
        pairs: ordered pairs of names; by default all of them.
        pasting: how they are pasted.
        object_sizes: sides of the objects, in pixels of the published 224-pixel cell.
        cells: draw only these placements (cell of A, cell of B).
        writing: `restart` and `progress` of `folders.draw_folder`.

    Returns:
        The items written.

    Raises:
        InputError: if a pair is not two different objects, or `cells` are not placements on the grid.
        OutputError: if a picture cannot be written, or the folder holds pictures drawn in another way.
    """
    return _paste(folder, _grid(object_sizes, cells), objects, pairs, pasting, writing)


def paste_finetune_folder(
    folder: str | Path,
    objects: Mapping[str, Cutout],
    pairs: Sequence[tuple[str, str]] | None,
    pasting: Pasting,
    *,
    cells: Sequence[tuple[Cell, Cell]] | None = None,
    writing: Writing | None = None,
) -> list[GridItem]:
    """Pastes pictures of objects on the grid as a fine-tuning set, `{A}_{ax}-{ay}_{B}_{bx}-{by}.png`.

    Arguments and errors as in `paste_grid_folder`.
    """
    return _paste(folder, _finetune(cells), objects, pairs, pasting, writing)


def _draw(
    folder: str | Path,
    drawn: _Drawn,
    pairs: Sequence[tuple[str, str]],
    seed: int,
    picture_size: int,
    drawing: Drawing,
    writing: Writing | None,
) -> list[GridItem]:
    """Draws the placements of every pair at every size."""
    check_pairs(pairs)
    options: Drawing = {"backgrounds": ("white",), **drawing}
    cells_a, cells_b = np.asarray(drawn.placed).reshape(-1, 2, 2).swapaxes(0, 1)
    painted, settings = [], {}
    for index, (name_a, name_b) in enumerate(pairs):
        rng = np.random.default_rng((seed, index))
        first, second = (np.full(len(drawn.placed), OBJECTS.index(name)) for name in (name_a, name_b))
        # The pictures of a pair are drawn from one stream of random numbers, on which all of these have an influence.
        settings[f"{name_a}_{name_b}"] = {
            "seed": seed,
            "place_among_the_pairs": index,
            "picture_size": picture_size,
            "object_sizes": list(drawn.sizes),
            "placements": " ".join(f"{ax}{ay}-{bx}{by}" for (ax, ay), (bx, by) in drawn.placed),
            **options,
        }
        for size in drawn.sizes:
            scenes = sample_grid(rng, first, cells_a, second, cells_b, scale=size / CELL_SIZE, **options)
            for row, (cell_a, cell_b) in enumerate(drawn.placed):
                item = FinetuneItem(object_a=name_a, object_b=name_b, cell_a=cell_a, cell_b=cell_b)
                # One picture at a time: all 240 of the published size together would take gigabytes.
                painted.append((item, size, partial(_rendered, scenes, row, picture_size)))
    return _write(folder, drawn, painted, settings, writing)


def _rendered(scenes: Scenes, row: int, size: int) -> UInt8[np.ndarray, "Y X 3"]:
    return render(scenes[row : row + 1], size)[0]


def _paste(
    folder: str | Path,
    drawn: _Drawn,
    objects: Mapping[str, Cutout],
    pairs: Sequence[tuple[str, str]] | None,
    pasting: Pasting,
    writing: Writing | None,
) -> list[GridItem]:
    """Pastes the placements of every pair at every size."""
    pairs = list(itertools.permutations(objects, 2)) if pairs is None else pairs
    check_pairs(pairs, tuple(objects))
    painted, settings = [], {}
    for name_a, name_b in pairs:
        first, second = objects[name_a], objects[name_b]
        settings[f"{name_a}_{name_b}"] = pasting.settings(first, second)
        for size in drawn.sizes:
            side = size * pasting.picture_size / (GRID * CELL_SIZE)
            for cell_a, cell_b in drawn.placed:
                item = FinetuneItem(object_a=name_a, object_b=name_b, cell_a=cell_a, cell_b=cell_b)
                painted.append((item, size, partial(pasting.draw, first, cell_a, second, cell_b, side)))
    return _write(folder, drawn, painted, settings, writing)


def _write(
    folder: str | Path,
    drawn: _Drawn,
    painted: Sequence[tuple[FinetuneItem, int, Callable[[], UInt8[np.ndarray, "Y X C"]]]],
    settings: Mapping[str, Mapping[str, object]],
    writing: Writing | None,
) -> list[GridItem]:
    """Writes the pictures that are not there yet.

    Raises:
        InputError: if two of them would have one name.
    """
    drawings = [
        folders.PictureFile(path=drawn.path(item, size), pair=f"{item.object_a}_{item.object_b}", paint=paint)
        for item, size, paint in painted
    ]
    if len({drawing.path for drawing in drawings}) < len(drawings):
        raise InputError("a pair is given twice; give each ordered pair once.")
    folders.draw_folder(folder, drawings, settings=settings, **(writing or {}))
    return [
        GridItem(picture=Path(folder) / drawing.path, size=size, **dataclasses.asdict(item))
        for (item, size, _), drawing in zip(painted, drawings, strict=True)
    ]


_GRID_FILE = re.compile(
    r"(?P<pair>[^/]+_[^/]+)/(?P<ax>[0-3])_(?P<ay>[0-3])/(?P<bx>[0-3])_(?P<by>[0-3])_(?P<size>[1-9][0-9]*)\.png"
)


def _parsed(match: re.Match[str], names: tuple[str, str], where: str) -> FinetuneItem:
    """What a file's name says, or a DataError if it puts both objects in one cell."""
    ax, ay, bx, by = (int(match[name]) for name in ("ax", "ay", "bx", "by"))
    if (ax, ay) == (bx, by):
        raise DataError(f"{where} puts both objects in cell {(ax, ay)}: the two cells must differ.")
    return FinetuneItem(object_a=names[0], object_b=names[1], cell_a=(ax, ay), cell_b=(bx, by))


def read_grid_folder(folder: str | Path) -> list[GridItem]:
    """Lists the pictures of a grid folder, sorted by pair, cells and size (largest first).

    Hidden files and folders are skipped. Object names may contain spaces. If they contain underscores, these are read
    as spaces, and the pair's folder must be split in only one way into names that other folders hold too.

    Raises:
        DataError: if the folder is missing or empty, or something in it does not fit
            `{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png`; the message names it.
    """
    folder = Path(folder)
    expected = "{A}_{B}/{ax}_{ay}/{bx}_{by}_{size}.png with cells 0..3"
    if not folder.is_dir():
        raise DataError(f"the grid folder {folder} does not exist; give the folder that holds the {{A}}_{{B}} folders.")
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or path.is_dir():
            continue
        match = _GRID_FILE.fullmatch(name.as_posix())
        if match is None:
            raise DataError(f"{path} does not fit a grid folder: expected {folder}/{expected}. Remove or rename it.")
        found.append((path, match))
    if not found:
        raise DataError(f"the grid folder {folder} holds no pictures: expected {expected}.")
    names = _names_of(folder, dict.fromkeys(match["pair"] for _, match in found))
    items = [
        GridItem(
            picture=path,
            size=int(match["size"]),
            **dataclasses.asdict(_parsed(match, names[match["pair"]], str(path))),
        )
        for path, match in found
    ]
    return sorted(items, key=lambda item: (item.object_a, item.object_b, item.cell_a, item.cell_b, -item.size))


def _names_of(folder: Path, pairs: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The two names in the name of each pair's folder, with spaces for underscores.

    Raises:
        DataError: for a folder whose names cannot be told apart.
    """
    ways = {}
    for pair in pairs:
        parts = pair.split("_")
        split = [("_".join(parts[:end]), "_".join(parts[end:])) for end in range(1, len(parts))]
        ways[pair] = [(a, b) for a, b in split if a.strip("_ ") and b.strip("_ ") and a != b]
    certain = {name for own in ways.values() if len(own) == 1 for name in own[0]}
    names = {}
    for pair, own in ways.items():
        reverse = [(a, b) for a, b in own if f"{b}_{a}" in ways]
        known = [(a, b) for a, b in own if {a, b} <= certain]
        chosen = next((way for way in (own, reverse, known) if len(way) == 1), None)
        if chosen is None:
            reason = "does not name two objects" if not own else "can be split into two names in several ways"
            raise DataError(
                f"{folder / pair} {reason}: expected {{A}}_{{B}}. Rename it, with spaces within names, such as 'fire "
                "truck_dog'."
            )
        ((a, b),) = chosen
        names[pair] = (a.replace("_", " "), b.replace("_", " "))
    return names


def near_far_items(folder: str | Path) -> list[GridItem]:
    """The pictures with an object at each end of the top row.

    In the published folder all pictures are side by side, `{A}_0-0_{B}_3-0.png` or `{A}_3-0_{B}_0-0.png`, and questions
    are about A. Pictures of other placements, and mirrored ones (`MIRROR...`), are ignored, as published. Of a grid
    folder, the largest pictures are taken, and questions are about B.

    Raises:
        DataError: if the folder holds no such picture, or is neither a grid folder nor a flat one.
    """
    folder = Path(folder)
    flat = [path for path in _pictures_in(folder) if not path.name.startswith("MIRROR")]
    if flat:
        items = [
            GridItem(picture=path, size=CELL_SIZE, about="a", **dataclasses.asdict(parse_finetune_name(path.name)))
            for path in flat
        ]
    else:
        items = read_grid_folder(folder)
    items = [item for item in items if (item.cell_a, item.cell_b) in NEAR_FAR]
    if not items:
        raise DataError(f"{folder} holds no picture with objects at 0_0 and 3_0, as near/far questions need.")
    return items if flat else _largest(items)


def _pictures_in(folder: Path) -> list[Path]:
    """The PNG files that lie in a folder itself, sorted by name."""
    return sorted(path for path in folder.glob("*.png") if not path.name.startswith("."))


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
    return _parsed(match, (match["a"], match["b"]), repr(name))


def read_finetune_folder(folder: str | Path) -> list[GridItem]:
    """The pictures of a fine-tuning set, sorted by name, or the largest ones of a grid folder.

    Raises:
        DataError: if the folder is missing or empty, or holds a picture with another kind of name.
    """
    folder = Path(folder)
    found = _pictures_in(folder)
    if not found:
        return _largest(read_grid_folder(folder))
    return [
        GridItem(picture=path, size=CELL_SIZE, **dataclasses.asdict(parse_finetune_name(path.name))) for path in found
    ]
