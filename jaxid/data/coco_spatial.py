"""COCO-Spatial: pictures of two objects with a right and a wrong caption, read and written in the published layout.

`coco_qa_two_obj.json` lists [image_id, right caption, wrong caption]; pictures are named by the twelve-digit id;
boxes are COCO's `instances_val2017.json`. Source: [ID] section 4 (belief steering), arXiv 2601.12626.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from jaxid.data.files import existing, save_picture, usable
from jaxid.data.relations import MIN_DISTANCE
from jaxid.data.scenes import OBJECTS, Scenes, render
from jaxid.errors import DataError, InputError
from jaxid.io import read_json, write_text
from jaxid.prompts.pictures import Picture

CAPTIONS_FILE = "coco_qa_two_obj.json"
INSTANCES_FILE = "instances_val2017.json"
PICTURES_FOLDER = "val2017"
MOST_IDS = 10**12
"""Picture ids are below this, so that they have at most twelve digits."""

OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
"""Each relation and the one that contradicts it."""

ANSWERS = {"horizontal": ("left", "right"), "vertical": ("above", "below")}
"""Answer words of each axis; the first one is for the smaller coordinate."""

_PHRASES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_RELATIONS = {phrase: relation for relation, phrase in _PHRASES.items()} | {"left of": "left", "right of": "right"}
_NAME = r"([^\s.]+(?: [^\s.]+){0,2}?)"  # as short as possible, so that it never takes in "to the"
_CAPTION = re.compile(
    rf"A photo of an? {_NAME} ((?:to the )?(?:left|right) of|above|below) an? {_NAME}\.?", re.IGNORECASE
)
_PICTURE = re.compile(r"[0-9]{12,}\.jpg")
_EXPECTED = (
    '[image_id, right caption, wrong caption] with captions as "A photo of a cat to the left of a dog" '
    "(to the left of / to the right of / above / below; a or an; names of one to three words)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpatialItem:
    """One question about a picture: a file, or UInt8[Y, X, 3]."""

    image_id: int
    picture: Picture
    subject: str
    object: str
    relation: str  # of the subject to the object: left, right, above or below
    row: int = 0  # in the file

    @property
    def key(self) -> str:
        """A unique name: the row, the picture and what is asked."""
        return f"{self.row:05d}-{self.image_id:012d}-{self.subject}-{self.relation}-{self.object}"

    @property
    def query(self) -> str:
        """The question whose answer is the relation or its opposite."""
        return query(self.subject, self.object, self.relation)


def axis_of(item: SpatialItem) -> str:
    """The axis that an item asks about: "horizontal" or "vertical".

    Raises:
        InputError: if its relation is not left, right, above or below.
    """
    _check_relation(item.relation)
    return next(axis for axis, words in ANSWERS.items() if item.relation in words)


def _check_relation(relation: str) -> None:
    if relation not in OPPOSITE:
        raise InputError(f"a relation is one of {', '.join(OPPOSITE)}; got {relation!r}.")


def query(subject: str, object: str, relation: str) -> str:
    """The question whose answer is `relation` or its opposite.

    Raises:
        InputError: if the relation is not left, right, above or below.
    """
    _check_relation(relation)
    if relation in ("left", "right"):
        return f"Is the {subject} to the left or right of the {object}?"
    return f"Is the {subject} above or below the {object}?"


def caption(subject: str, object: str, relation: str) -> str:
    """The caption "A photo of a(n) subject <relation> a(n) object".

    Raises:
        InputError: if the relation is not left, right, above or below.
    """
    _check_relation(relation)
    return f"A photo of {article(subject)} {_PHRASES[relation]} {article(object)}"


def picture_name(image_id: int) -> str:
    """COCO's file name of a picture."""
    return f"{image_id:012d}.jpg"


def article(name: str) -> str:
    """The name with "a" or "an"."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def find_coco_spatial(folder: str | Path) -> tuple[Path, Path]:
    """A folder's two-object file and the folder of its pictures: `val2017` inside it, or the folder itself.

    Raises:
        DataError: if the file is missing, or neither folder holds a picture.
    """
    folder = Path(folder)
    path = folder / CAPTIONS_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {CAPTIONS_FILE}; give the folder of the published file and its pictures.")
    return path, find_pictures(folder)


def find_pictures(folder: Path) -> Path:
    """The folder with the pictures `{image_id:012d}.jpg` of a data set: `val2017` inside its folder, or the folder.

    Raises:
        DataError: if neither holds one.
    """
    for place in (folder / PICTURES_FOLDER, folder):
        if any(_PICTURE.fullmatch(path.name) for path in place.glob("*.jpg")):
            return place
    raise DataError(
        f"neither {folder / PICTURES_FOLDER} nor {folder} holds pictures such as {picture_name(1)}; put them there."
    )


def read_coco_spatial(
    json_path: str | Path, image_dir: str | Path, *, bad: list[tuple[str, DataError]] | None = None
) -> list[SpatialItem]:
    """Reads the two-object file and checks that every picture exists.

    Args:
        json_path: `coco_qa_two_obj.json`.
        image_dir: folder of the pictures `{image_id:012d}.jpg`.
        bad: if given, rows that are malformed or lack their picture are skipped and noted here: the row's name and
            its error.

    Returns:
        One item per row, in the file's order.

    Raises:
        DataError: if the file is missing or not a JSON list, or, without `bad`, for a row that is malformed or whose
            picture is missing.
    """
    rows = read_json(json_path, DataError, expected=list)
    return usable(rows, lambda index, row: _item(index, row, Path(json_path), Path(image_dir)), bad)


def _item(index: int, row: object, json_path: Path, image_dir: Path) -> SpatialItem:
    subject, relation, object, image_id = _parse_row(row, f"{json_path}, row {index}: {row!r:.300}")
    path = existing(image_dir, picture_name(image_id), f"{json_path}, row {index}")
    return SpatialItem(image_id=image_id, picture=path, subject=subject, object=object, relation=relation, row=index)


def _parse_row(row: object, where: str) -> tuple[str, str, str, int]:
    """Subject, relation, object and picture of one row; `where` begins the error messages."""
    fits = isinstance(row, list) and len(row) == 3 and type(row[0]) is int and 0 <= row[0] < MOST_IDS
    if not isinstance(row, list) or not fits or not all(isinstance(text, str) for text in row[1:]):
        raise DataError(f"{where} is malformed; expected {_EXPECTED}.")
    right, wrong = (_CAPTION.fullmatch(text.strip()) for text in row[1:])
    if right is None or wrong is None:
        which = "right" if right is None else "wrong"
        raise DataError(f"{where}: the {which} caption has another form; expected {_EXPECTED}.")
    relation, negation = (_RELATIONS[match[2].lower()] for match in (right, wrong))
    same = (right[1], right[3]) == (wrong[1], wrong[3]) and negation == OPPOSITE[relation]
    swapped = (right[1], right[3]) == (wrong[3], wrong[1]) and negation == relation
    if not (same or swapped):
        raise DataError(f"{where}: the wrong caption does not contradict the right one; expected {_EXPECTED}.")
    return right[1], relation, right[3], row[0]


def write_coco_spatial(
    folder: str | Path, scenes: Scenes, size: int, *, min_distance: float = MIN_DISTANCE, noise: float = 0.0
) -> list[SpatialItem]:
    """Draws two-object scenes as a dataset in the published layout, balanced over the four relations.

    Of a picture's true relations, the one asked about so far the least is chosen. Image ids count from 1.

    Args:
        folder: the folder for `coco_qa_two_obj.json`, `instances_val2017.json` (for pycocotools) and the pictures, as
            JPEG files in `val2017/`.
        scenes: scenes of exactly two different objects.
        size: side of the pictures in pixels.
        min_distance: least distance between the two centres along the axis in question, in picture fractions.
        noise: standard deviation of Gaussian noise on every colour, as a share of the colours' range; it is the same
            on every call.

    Returns:
        The items, as `read_coco_spatial` reads them back.

    Raises:
        InputError: if a scene does not hold two different objects, its objects are too close on both axes, or the
            noise is below 0.
        OutputError: if a file cannot be written.
    """
    if not 0 <= noise < np.inf:
        raise InputError(f"noise is a share of the colours' range and must be 0 or above, not {noise}.")
    folder = Path(folder)
    items, rows, annotations = [], [], []
    counts = dict.fromkeys(OPPOSITE, 0)
    for index in range(len(scenes)):
        slots = object_slots(scenes, index, 2)
        options = _true_relations(scenes.centers[index, slots], min_distance)
        if not options:
            raise InputError(
                f"the two objects of scene {index} are closer than {min_distance} of the picture along both axes: no "
                "relation between them is clear. Draw scenes without overlap (sample_free) or lower min_distance."
            )
        relation, first = min(options, key=lambda option: counts[option[0]])
        counts[relation] += 1
        subject, object = (OBJECTS[scenes.objects[index, slots[side]]] for side in (first, 1 - first))
        image_id = index + 1
        path = folder / PICTURES_FOLDER / picture_name(image_id)
        picture = render(scenes[index : index + 1], size)[0]
        added = np.random.default_rng((image_id, 41)).normal(0, 255 * noise, picture.shape) if noise else 0
        save_picture(path, np.clip(picture + added, 0, 255).astype(np.uint8))
        rows.append([image_id, caption(subject, object, relation), caption(subject, object, OPPOSITE[relation])])
        items.append(
            SpatialItem(image_id=image_id, picture=path, subject=subject, object=object, relation=relation, row=index)
        )
        for slot in slots:
            x, y, width, height = (float(value) * size for value in scenes.boxes[index, slot])
            right, bottom = x + width, y + height
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": int(scenes.objects[index, slot]) + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "segmentation": [[x, y, right, y, right, bottom, x, bottom]],
                    "iscrowd": 0,
                }
            )
    instances = {
        "info": {"description": "Drawn two-object scenes in the layout of COCO", "version": "1.0"},
        "licenses": [],
        "images": [
            {"id": item.image_id, "file_name": picture_name(item.image_id), "width": size, "height": size}
            for item in items
        ],
        "annotations": annotations,
        "categories": [
            {"id": index + 1, "name": name, "supercategory": "drawing"} for index, name in enumerate(OBJECTS)
        ],
    }
    write_text(folder / INSTANCES_FILE, json.dumps(instances))
    write_text(folder / CAPTIONS_FILE, json.dumps(rows, indent=1))
    return items


def object_slots(scenes: Scenes, index: int, count: int) -> Sequence[int]:
    """The slots of a scene that hold objects.

    Raises:
        InputError: if they do not hold that many different objects.
    """
    slots = np.flatnonzero(scenes.objects[index] >= 0).tolist()
    names = [OBJECTS[scenes.objects[index, slot]] for slot in slots]
    if not len(slots) == len(set(names)) == count:
        raise InputError(f"scene {index} must hold {count} different objects, has {', '.join(names) or 'none'}.")
    return slots


def _true_relations(centers: Float[np.ndarray, "2 2"], min_distance: float) -> list[tuple[str, int]]:
    """The clear relations between two centres, each with the index of its subject."""
    options = []
    for axis, (before, after) in enumerate(ANSWERS.values()):
        distance = float(centers[1, axis] - centers[0, axis])
        if abs(distance) > min_distance:
            first = 0 if distance > 0 else 1
            options += [(before, first), (after, 1 - first)]
    return options
