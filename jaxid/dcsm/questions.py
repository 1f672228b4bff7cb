"""Rows of the evaluation sets' files, and the questions that they ask."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from jaxid.data.files import existing, read_csv
from jaxid.dcsm import orders
from jaxid.dcsm.datasets import named
from jaxid.errors import DataError
from jaxid.io import read_json

_SUFFIXES = (".png", ".jpeg", ".jpg")
_LARGEST = 10**12
"""Picture ids and pixel coordinates must be smaller than this."""

_PLACED = re.compile(r"(.+)_(left|right|above|below|on|under|in-front|behind)(?:_?of)?_(.+)")
"""Names of What'sUp's pictures: an object, how it is placed, the other object."""

_RENAMED = {"on": "above", "under": "below"}
"""Relations in the names that the published evaluation gives to the pictures."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One picture and the captions to choose from; the answer is correct if caption 0 scores highest.

    Attributes:
        key: a name that is unique in its set: the index of the row and the picture; in NegBench also the kind; in
            COCO-Order and Flickr30k-Order also the index of the caption.
        picture: the picture's file.
        captions: the correct one first.
        crop: left, top, right and bottom, in pixels, of the part of the picture that is shown; None for all of it.
        kind: in NegBench the kind of the correct answer (positive, negative or hybrid), in What'sUp and VG-Relation the
            relation; else empty.
        scene: in What'sUp the two objects, which questions of a pair or set share; else empty.
    """

    key: str
    picture: Path
    captions: tuple[str, ...]
    crop: tuple[int, int, int, int] | None = None
    kind: str = ""
    scene: str = ""


class Row(NamedTuple):
    """A row of a file and its index.

    Attributes:
        index: counted from 0.
        content: the row, unchecked.
        seed: of what is drawn for it.
    """

    index: int
    content: object
    seed: int = 0

    def value(self, field: str) -> object:
        """The value of a field, or None if there is no such field."""
        return self.content.get(field) if isinstance(self.content, Mapping) else None

    def text(self, field: str) -> str:
        """The value of a field that must hold text."""
        value = self.value(field)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"field {field!r} does not hold text, in {self.shown}")
        return value

    def texts(self, *fields: str) -> tuple[str, ...]:
        """The values of several fields that must hold text."""
        return tuple(self.text(field) for field in fields)

    def listed(self, field: str, least: int = 1) -> tuple[str, ...]:
        """The value of a field that must hold a list of texts."""
        value = self.value(field)
        if (
            not isinstance(value, list)
            or len(value) < least
            or not all(isinstance(c, str) and c.strip() for c in value)
        ):
            count = {1: "one", 2: "two"}[least]
            raise DataError(f"field {field!r} is not a list of {count} or more strings, in {self.shown}")
        return tuple(value)

    def integer(self, field: str) -> int:
        """The value of a field that must hold an integer or its digits."""
        value = self.value(field)
        if type(value) is int and abs(value) < _LARGEST:
            return value
        if not isinstance(value, str) or not value.strip().isdecimal() or len(value.strip()) >= len(str(_LARGEST)):
            raise DataError(f"field {field!r} does not hold an integer below {_LARGEST}, in {self.shown}")
        return int(value)

    @property
    def shown(self) -> str:
        """The row as error messages show it."""
        return f"{self.content!r:.300}"

    def question(self, pictures: Path, name: str, captions: Iterable[str], *, label: object = None) -> Question:
        """The row's question, if its picture exists in its folder.

        Args:
            pictures: the folder.
            name: of the picture.
            captions: the correct one first.
            label: tells questions of one row apart.
        """
        picture = existing(pictures, name, "picture")
        key = f"{self.index:05d}-{picture.stem}"
        return Question(key if label is None else f"{key}-{label}", picture, tuple(captions))


Parse = Callable[[Row, Path], list[Question]]
"""Turns a row and the folder of pictures into its questions."""


# --- files to rows --------------------------------------------------------------------------------------------------


def json_rows(path: Path) -> list[object]:
    """The entries of a JSON array."""
    return read_json(path, DataError, expected=list)


def json_triples(path: Path) -> list[object]:
    """The entries of a JSON array of [id, right caption, wrong caption]."""
    names = ("id", "right", "wrong")
    rows = json_rows(path)
    return [dict(zip(names, row, strict=True)) if isinstance(row, list) and len(row) == 3 else row for row in rows]


def clevr_rows(path: Path) -> list[object]:
    """The rows of a CSV file; or of a JSON object whose keys are the pictures' names."""
    if path.suffix == ".csv":
        return read_csv(path)
    found = read_json(path, DataError, expected=dict)
    return [{"file_name": name, **row} if isinstance(row, Mapping) else row for name, row in found.items()]


def caption_rows(path: Path) -> list[object]:
    """The entries of a JSON array with several captions each; or those of Karpathy's test split."""
    found = read_json(path, DataError, expected=None)
    if isinstance(found, list):
        return found
    images = found.get("images") if isinstance(found, Mapping) else None
    if not isinstance(images, list):
        raise DataError(f"{path} holds neither a JSON array nor an object with a list of images.")
    tested = [row for row in images if not isinstance(row, Mapping) or row.get("split") == "test"]
    return [_of_karpathy(row) if isinstance(row, Mapping) else row for row in tested]


def _of_karpathy(row: Mapping[str, object]) -> dict[str, object]:
    name, sentences = row.get("filename"), row.get("sentences")
    said = sentences if isinstance(sentences, list) else []
    captions = [sentence.get("raw") if isinstance(sentence, Mapping) else None for sentence in said]
    return {"image": f"{row.get('filepath', 'flickr30k-images')}/{name}" if name else None, "caption": captions}


def picture_rows(folder: Path) -> list[object]:
    """The pictures of a folder by name, without mirrored ones."""
    names = sorted(path.name for path in folder.glob("*") if path.suffix in _SUFFIXES)
    return [{"name": name} for name in names if "MIRROR" not in name]


def is_drawn(row: object) -> bool:
    """Whether a row of COCO-Order or Flickr30k-Order has captions whose wrong orders must be drawn."""
    return isinstance(row, Mapping) and "caption_options" not in row and "caption" in row


# --- rows to questions ----------------------------------------------------------------------------------------------


def fields(picture: Callable[[Row], str], *captions: str) -> Parse:
    """Reads rows whose captions are in fields of their own."""
    return lambda row, pictures: [row.question(pictures, picture(row), row.texts(*captions))]


def clevr(row: Row, pictures: Path) -> list[Question]:
    """CLEVR-bind: the wrong captions in four fields, or in a list."""
    listed = isinstance(row.content, Mapping) and "neg" in row.content
    wrong = row.listed("neg") if listed else row.texts("neg_0", "neg_1", "neg_2", "neg_3")
    return [row.question(pictures, row.text("file_name"), (row.text("pos"), *wrong))]


def composite(row: Row, pictures: Path, *, reverse: bool) -> list[Question]:
    """NCD: the picture's name says what it shows."""
    name = row.text("name")
    parts = named(Path(name).stem).split("_")
    if len(parts) < 4 or not all(parts[:4]):
        raise DataError(f"the picture's name {name!r} does not have the form colour_object_colour_object")
    one, first, other, second = parts[:4]
    if reverse:
        captions = (f"a {other} {second} and a {one} {first}", f"a {one} {second} and a {other} {first}")
    else:
        captions = (f"a {one} {first} and a {other} {second}", f"a {other} {first} and a {one} {second}")
    return [row.question(pictures, name, (f"A picture of {caption}" for caption in captions))]


def cropped(row: Row, pictures: Path) -> list[Question]:
    """VG-Attribution and VG-Relation: a box of a picture, a right caption and a wrong one."""
    left, top, width, height = (row.integer(f"bbox_{name}") for name in "xywh")
    if width <= 0 or height <= 0:
        raise DataError(f"fields 'bbox_w' and 'bbox_h' give an empty box of {width} x {height} pixels")
    question = row.question(pictures, row.text("image_path"), row.texts("true_caption", "false_caption"))
    relation = row.value("relation_name")
    kind = relation if isinstance(relation, str) else ""
    return [dataclasses.replace(question, crop=(left, top, left + width, top + height), kind=kind)]


def whatsup(row: Row, pictures: Path) -> list[Question]:
    """What'sUp: four captions; the picture's name says which objects are shown and how they are placed."""
    captions = row.listed("caption_options", least=2)
    name = PurePosixPath(row.text("image_path")).name
    # The published evaluation renames the files in place, so a folder that it was run on has other names.
    renamed = name.replace("_on_", "_above_").replace("_under_", "_below_")
    try:
        question = row.question(pictures, name, captions)
    except DataError:
        if renamed == name:
            raise
        question = row.question(pictures, renamed, captions)
    found = _PLACED.fullmatch(question.picture.stem)
    if found is None:
        return [question]
    first, relation, second = found.groups()
    kind = _RENAMED.get(relation, relation)
    return [dataclasses.replace(question, kind=kind, scene=f"{first}, {second}")]


def negbench(row: Row, pictures: Path) -> list[Question]:
    """NegBench: caption 0 is correct, unless a field names another one."""
    captions = row.texts(*(f"caption_{index}" for index in range(4)))
    if isinstance(row.content, Mapping) and "correct_answer" in row.content:
        right = row.integer("correct_answer")
        if not 0 <= right < 4:
            raise DataError(f"field 'correct_answer' is {right}, not 0 to 3")
        captions = (captions[right], *captions[:right], *captions[right + 1 :])
    kind = row.text("correct_answer_template")
    name = PurePosixPath(row.text("image_path")).name
    return [dataclasses.replace(row.question(pictures, name, captions, label=kind), kind=kind)]


def order(row: Row, pictures: Path) -> list[Question]:
    """COCO-Order and Flickr30k-Order: a question for every caption; wrong orders are drawn unless the row has them."""
    name = row.text("image")
    if isinstance(row.content, Mapping) and "caption_options" in row.content:
        return [row.question(pictures, name, row.listed("caption_options", least=2))]
    found = []
    for index, caption in enumerate(row.listed("caption")):
        rng = np.random.default_rng((row.seed, row.index, index))
        wrong = orders.wrong_orders(caption, rng, orders.tagger())
        if not wrong:
            raise DataError(f"the words of caption {index}, {caption!r:.80}, have one order alone")
        found.append(row.question(pictures, name, (orders.plain(caption), *wrong), label=index))
    return found
