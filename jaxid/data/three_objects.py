"""Pictures of three objects for "Is the C in between the A and the B?" ([ID] arXiv 2601.12626, Figure 6 c).

Published pictures say in their names what they show, `{C}_{A}_{B}_{true|false}.png`. The layout of drawn scenes is
jaxid's own, modelled on COCO-Spatial's: `three_objects.json` lists [image_id, A, B, C, "yes" or "no"], and pictures are
named by the twelve-digit id.
"""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxid.data.coco_spatial import MOST_IDS, PICTURES_FOLDER, find_pictures, object_slots, picture_name
from jaxid.data.files import existing, save_picture, usable
from jaxid.data.relations import is_between
from jaxid.data.scenes import GRID, OBJECTS, SLOT_FIELDS, VARIED, Scenes, render, sample_grid
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, write_text
from jaxid.prompts.pictures import Picture

FILE = "three_objects.json"
_PICTURES = (".png", ".jpg", ".jpeg")
_PLACE = re.compile(r"[0-9]+(-[0-9]+)*|between|in|and|with", re.IGNORECASE)
_EXPECTED = '[image_id, A, B, C, "yes" or "no"], three different names'


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThreeObjectItem:
    """One question: is C in between A and B?"""

    image_id: int
    picture: Picture
    a: str
    b: str
    c: str
    between: bool
    row: int = 0  # in the file

    @property
    def key(self) -> str:
        """A unique name: the row, the picture and the objects."""
        return f"{self.row:05d}-{self.image_id:012d}-{self.c}-{self.a}-{self.b}"


def read_three_objects(folder: str | Path, *, bad: list[tuple[str, DataError]] | None = None) -> list[ThreeObjectItem]:
    """Reads a folder's three-object file and checks that every picture exists, or reads the names of its pictures.

    Args:
        folder: the folder of `three_objects.json` and the pictures, in `val2017/` or beside the file; or, without that
            file, of pictures in the published layout, see `parse_between_name`. Their ids count from 1 in the order
            of the names.
        bad: if given, rows or pictures that cannot be used are skipped and noted here: the row's or picture's name and
            its error.

    Raises:
        DataError: if there is neither such a file nor such pictures, the file is not a JSON list, or, without `bad`,
            for a row that is malformed or whose picture is missing, or a picture with another kind of name.
    """
    folder = Path(folder)
    named = sorted(path for path in folder.glob("*_*") if path.suffix.lower() in _PICTURES and path.name[0] != ".")
    if named and not (folder / FILE).exists():
        return _named_items(named, bad)
    rows = read_json(folder / FILE, DataError, expected=list)
    pictures = find_pictures(folder) if rows else folder
    return usable(rows, lambda index, row: _item(index, row, folder / FILE, pictures), bad)


def _named_items(paths: Sequence[Path], bad: list[tuple[str, DataError]] | None) -> list[ThreeObjectItem]:
    found = []
    for row, path in enumerate(paths):
        try:
            c, a, b, between = parse_between_name(path.name)
        except DataError as error:
            if bad is None:
                raise
            bad.append((path.name, error))
            continue
        found.append(ThreeObjectItem(image_id=row + 1, picture=path, a=a, b=b, c=c, between=between, row=row))
    return found


def parse_between_name(name: str) -> tuple[str, str, str, bool]:
    """Reads `{C}_{A}_{B}_{true|false}.png`: is C in between A and B?

    Cells, places and sizes that stand among the names, such as "1-2", "0" or "224", are ignored, and so are the
    words "between", "in", "and" and "with", and in `{C}_x_{A}_y_{B}_{true|false}` any x and y, as in the published
    names. Names of objects may contain spaces but no underscores.

    Args:
        name: the file's name, without its folder.

    Returns:
        C, A, B and the answer.

    Raises:
        DataError: if the name does not end in true or false, or does not hold three different objects.
    """
    *parts, answer = Path(name).stem.split("_")
    objects = parts[::2] if len(parts) == 5 else [part for part in parts if not _PLACE.fullmatch(part)]
    if answer.lower() not in ("true", "false") or len(objects) != 3 or len(set(objects)) < 3 or "" in objects:
        raise DataError(
            f"{name!r} does not name a picture of three objects: expected {{C}}_{{A}}_{{B}}_{{true|false}}.png with "
            "three different names without underscores, as in 'cup_star_polar bear_true.png'; rename it."
        )
    c, a, b = objects
    return c, a, b, answer.lower() == "true"


def _item(index: int, row: object, path: Path, pictures: Path) -> ThreeObjectItem:
    fits = (
        isinstance(row, list)
        and len(row) == 5
        and type(row[0]) is int
        and 0 <= row[0] < MOST_IDS
        and all(isinstance(text, str) and text.strip() for text in row[1:])
        and row[4] in ("yes", "no")
        and len(set(row[1:4])) == 3
    )
    if not isinstance(row, list) or not fits:
        raise DataError(f"{path}, row {index}: {row!r:.300} is malformed; expected {_EXPECTED}.")
    image_id, a, b, c, answer = row
    picture = existing(pictures, picture_name(image_id), f"{path}, row {index}")
    return ThreeObjectItem(image_id=image_id, picture=picture, a=a, b=b, c=c, between=answer == "yes", row=index)


def sample_in_between(rng: np.random.Generator, count: int, *, backgrounds: Sequence[str] = VARIED) -> Scenes:
    """Scenes of two objects at the ends of the grid's first row and a third one, in between in every other scene.

    In the other scenes the third object is two rows or more away, so that `write_three_objects` can ask as many
    questions with one answer as with the other.

    Args:
        rng: source of randomness.
        count: number of scenes.
        backgrounds: kinds of background to draw from (`scenes.BACKGROUNDS`).

    Returns:
        Scenes of three different objects; the third slot holds the one that may be in between.
    """
    names = rng.random((count, len(OBJECTS))).argsort(axis=1)[:, :3]
    columns = rng.integers(GRID, size=count)
    first, last = np.broadcast_to([[0, 0]], (count, 2)), np.broadcast_to([[GRID - 1, 0]], (count, 2))
    swapped = rng.random((count, 1)) < 0.5
    first, last = np.where(swapped, last, first), np.where(swapped, first, last)
    inside = np.stack([rng.integers(1, GRID - 1, size=count), 0 * columns], axis=-1)
    away = np.stack([columns, rng.integers(2, GRID, size=count)], axis=-1)
    third = np.where(np.arange(count)[:, None] % 2 == 0, inside, away)
    draw = functools.partial(sample_grid, rng, scale=0.85, jitter_angle=10.0, backgrounds=backgrounds)
    pair = draw(names[:, 0], first, names[:, 1], last)
    other = draw(names[:, 2], third, names[:, 0], first)
    both = {name: [getattr(pair, name), getattr(other, name)[:, :1]] for name in SLOT_FIELDS}
    return dataclasses.replace(pair, **{name: np.concatenate(parts, axis=1) for name, parts in both.items()})


def write_three_objects(folder: str | Path, scenes: Scenes, size: int) -> list[ThreeObjectItem]:
    """Draws three-object scenes as a data set, balanced between yes and no as far as the scenes allow.

    C is chosen so that the answer is clear; scenes without a clear question are skipped.

    Args:
        folder: the folder for `three_objects.json` and the pictures, as JPEG files in `val2017/`.
        scenes: scenes of exactly three different objects.
        size: side of the pictures in pixels.

    Returns:
        The items, as `read_three_objects` reads them back.

    Raises:
        InputError: if a scene does not hold three different objects, or no scene has a clear question.
        OutputError: if a file cannot be written.
    """
    folder, items, counts = Path(folder), [], {True: 0, False: 0}
    for index in range(len(scenes)):
        options = [
            (answer, (a, b, c))
            for a, b, c in itertools.permutations(object_slots(scenes, index, 3), 3)
            if (answer := is_between(scenes.centers[index, [a, b, c]])) is not None
        ]
        if not options:
            continue
        answer, chosen = min(options, key=lambda option: counts[option[0]])
        counts[answer] += 1
        a, b, c = (OBJECTS[scenes.objects[index, slot]] for slot in chosen)
        path = folder / PICTURES_FOLDER / picture_name(index + 1)
        save_picture(path, render(scenes[index : index + 1], size)[0])
        items.append(ThreeObjectItem(image_id=index + 1, picture=path, a=a, b=b, c=c, between=answer, row=len(items)))
    if not items:
        raise InputError("no scene has an object that is clearly in between two others, or clearly not.")
    rows = [[item.image_id, item.a, item.b, item.c, "yes" if item.between else "no"] for item in items]
    write_text(folder / FILE, json.dumps(rows, indent=1))
    return items
