"""The evaluation sets of [DCSM] (arXiv 2503.08723): one picture and several captions, the first of them correct.

Paths below the data folder; where there are two, the first that exists is used:

| name | questions | pictures |
| --- | --- | --- |
| `clevr-bind-train`, `-val`, `-gen` | `{train,val,gen}.csv` (+) | `images/{train,val,gen}/` (+) |
| `ncd`, `ncd-reversed` | names of the pictures | `NCD_colorful_composite_squares/` |
| `vg-attribution` | `visual_genome_attribution.json` | `VG_100K/` or `images/` |
| `whatsup-a` | `controlled_images_dataset.json` | `controlled_images/` |
| `whatsup-b` | `controlled_clevr_dataset.json` | `controlled_clevr/` |
| `coco-spatial-one`, `-two` | `coco_qa_{one,two}_obj.json` | `val2017/` |
| `vg-spatial-one`, `-two` | `vg_qa_{one,two}_obj.json` | `vg_images/` |
| `negbench-coco` | `COCO_val_mcq_llama3.1_rephrased.csv` (*) | `val2017/` |
| `negbench-voc` | `VOC2007_mcq_llama3.1_rephrased.csv` (*) | `VOC2007/JPEGImages/` or `VOCdevkit/VOC2007/JPEGImages/` |

(+) in `clevr_bind/two_object/`; (*) in `NegBench/evaluation data/images/` or `images/`.

The published evaluation rewords captions, see `published_caption`.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxid.data.coco_boxes import upright_boxes
from jaxid.data.coco_spatial import picture_name
from jaxid.data.files import existing, read_csv, usable
from jaxid.dcsm.datasets import named
from jaxid.errors import DataError, InputError
from jaxid.io import read_json
from jaxid.prompts.pictures import MOST_PIXELS, open_picture, stored

_ON_THE_PAGE = ((" behind ", " above "), (" in front of ", " below "), (" bottom", " below"), (" top", " above"))
"""Words for depth and edges, and the functional words that replace them for the scorer."""

_OF_TABLES = ((" on", " above"), (" under", " below"))
"""Words of What'sUp, and the functional words that replace them."""

_NEGBENCH = ("NegBench/evaluation data/", "")
"""Folders that hold its `images/`."""

_SUFFIXES = (".png", ".jpeg", ".jpg")
_LARGEST = 10**12
"""Picture ids and pixel coordinates must be smaller than this."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One picture and the captions to choose from; the answer is correct if caption 0 scores highest.

    Attributes:
        key: a name that is unique in its set: the index of the row and the picture; in NegBench also the kind of the
            correct answer (positive, negative or hybrid).
        picture: the picture's file.
        captions: the correct one first.
        crop: left, top, right and bottom, in pixels, of the part of the picture that is shown; None for all of it.
    """

    key: str
    picture: Path
    captions: tuple[str, ...]
    crop: tuple[int, int, int, int] | None = None


class _Row(NamedTuple):
    """A row of a file and its index."""

    index: int
    content: object

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

    def question(self, pictures: Path, name: str, captions: Iterable[str], *, kind: str = "") -> Question:
        """The row's question, if its picture exists in its folder."""
        picture = existing(pictures, name, "picture")
        key = f"{self.index:05d}-{picture.stem}"
        return Question(f"{key}-{kind}" if kind else key, picture, tuple(captions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One set of questions, and how the published evaluation words it.

    Attributes:
        name: as in the table above.
        files: possible paths of the file of questions below the data folder (NCD: of the folder of pictures).
        pictures: possible paths of the folder of pictures below the data folder.
        row: what a row of the file looks like, for error messages.
        rows: reads the file's rows, unchecked.
        parse: turns a row and the folder of pictures into a question.
        prefix: the text that the published evaluation puts before every caption.
        words: the words that it replaces in every caption before that, with their replacements.
    """

    name: str
    files: tuple[str, ...]
    pictures: tuple[str, ...]
    row: str
    rows: Callable[[Path], list[object]]
    parse: Callable[[_Row, Path], Question]
    prefix: str = ""
    words: tuple[tuple[str, str], ...] = ()

    def find(self, folder: str | Path) -> Path | None:
        """The file of questions below a data folder, or None."""
        places = (Path(folder, place) for place in self.files)
        return next((place for place in places if place.exists()), None)


# --- rows of files --------------------------------------------------------------------------------------------------


def _json_rows(path: Path) -> list[object]:
    return read_json(path, DataError, expected=list)


def _json_triples(path: Path) -> list[object]:
    names = ("id", "right", "wrong")
    rows = _json_rows(path)
    return [dict(zip(names, row, strict=True)) if isinstance(row, list) and len(row) == 3 else row for row in rows]


def _picture_rows(folder: Path) -> list[object]:
    names = sorted(path.name for path in folder.glob("*") if path.suffix in _SUFFIXES)
    return [{"name": name} for name in names if "MIRROR" not in name]


# --- rows to questions ----------------------------------------------------------------------------------------------


def _fields(picture: Callable[[_Row], str], *captions: str) -> Callable[[_Row, Path], Question]:
    """Reads rows whose captions are in fields of their own."""
    return lambda row, pictures: row.question(pictures, picture(row), row.texts(*captions))


def _composite(row: _Row, pictures: Path, *, reverse: bool) -> Question:
    name = row.text("name")
    parts = named(Path(name).stem).split("_")
    if len(parts) < 4 or not all(parts[:4]):
        raise DataError(f"the picture's name {name!r} does not have the form colour_object_colour_object")
    one, first, other, second = parts[:4]
    if reverse:
        captions = (f"a {other} {second} and a {one} {first}", f"a {one} {second} and a {other} {first}")
    else:
        captions = (f"a {one} {first} and a {other} {second}", f"a {other} {first} and a {one} {second}")
    return row.question(pictures, name, (f"A picture of {caption}" for caption in captions))


def _vg_attribution(row: _Row, pictures: Path) -> Question:
    left, top, width, height = (row.integer(f"bbox_{name}") for name in "xywh")
    if width <= 0 or height <= 0:
        raise DataError(f"fields 'bbox_w' and 'bbox_h' give an empty box of {width} x {height} pixels")
    question = row.question(pictures, row.text("image_path"), row.texts("true_caption", "false_caption"))
    return dataclasses.replace(question, crop=(left, top, left + width, top + height))


def _whatsup(row: _Row, pictures: Path) -> Question:
    captions = row.value("caption_options")
    if (
        not isinstance(captions, list)
        or len(captions) < 2
        or not all(isinstance(c, str) and c.strip() for c in captions)
    ):
        raise DataError(f"field 'caption_options' is not a list of two or more strings, in {row.shown}")
    name = PurePosixPath(row.text("image_path")).name
    # The published evaluation renames the files in place, so a folder that it was run on has other names.
    renamed = name.replace("_on_", "_above_").replace("_under_", "_below_")
    try:
        return row.question(pictures, name, captions)
    except DataError:
        if renamed == name:
            raise
    return row.question(pictures, renamed, captions)


def _negbench(row: _Row, pictures: Path) -> Question:
    captions = row.texts(*(f"caption_{index}" for index in range(4)))
    right = row.integer("correct_answer")
    if not 0 <= right < 4:
        raise DataError(f"field 'correct_answer' is {right}, not 0 to 3")
    captions = (captions[right], *captions[:right], *captions[right + 1 :])
    return row.question(
        pictures, PurePosixPath(row.text("image_path")).name, captions, kind=row.text("correct_answer_template")
    )


# --- the sets -------------------------------------------------------------------------------------------------------


_ALL = (
    *(
        Benchmark(
            name=f"clevr-bind-{split}",
            files=(f"clevr_bind/two_object/{split}.csv",),
            pictures=(f"clevr_bind/two_object/images/{split}",),
            row="file_name, pos, neg_0, neg_1, neg_2, neg_3",
            rows=read_csv,
            parse=_fields(lambda row: row.text("file_name"), "pos", "neg_0", "neg_1", "neg_2", "neg_3"),
            prefix="An image of a ",
        )
        for split in ("train", "val", "gen")
    ),
    *(
        Benchmark(
            name=name,
            files=("NCD_colorful_composite_squares",),
            pictures=("NCD_colorful_composite_squares",),
            row="a picture named colour_object_colour_object.png or .jpg",
            rows=_picture_rows,
            parse=partial(_composite, reverse=reverse),
        )
        for name, reverse in (("ncd", False), ("ncd-reversed", True))
    ),
    Benchmark(
        name="vg-attribution",
        files=("visual_genome_attribution.json",),
        pictures=("VG_100K", "images"),
        row='{"image_path": ..., "bbox_x", "bbox_y", "bbox_w", "bbox_h": ..., "true_caption", "false_caption": ...}',
        rows=_json_rows,
        parse=_vg_attribution,
        prefix="An image of ",
    ),
    *(
        Benchmark(
            name=f"whatsup-{letter}",
            files=(f"{stem}_dataset.json",),
            pictures=(stem,),
            row='{"image_path": ..., "caption_options": [right, wrong, ...]}',
            rows=_json_rows,
            parse=_whatsup,
            prefix="An image of ",
            words=_OF_TABLES,
        )
        for letter, stem in (("a", "controlled_images"), ("b", "controlled_clevr"))
    ),
    *(
        Benchmark(
            name=f"{source}-spatial-{count}",
            files=(f"{source}_qa_{count}_obj.json",),
            pictures=(pictures,),
            row="[id, right caption, wrong caption]",
            rows=_json_triples,
            parse=_fields(picture, "right", "wrong"),
        )
        for source, pictures, picture in (
            ("coco", "val2017", lambda row: picture_name(row.integer("id"))),
            ("vg", "vg_images", lambda row: f"{row.integer('id')}.jpg"),
        )
        for count in ("one", "two")
    ),
    *(
        Benchmark(
            name=f"negbench-{name}",
            files=tuple(
                f"{place}images/{stem}_mcq_llama3.1_rephrased.csv" for place in ("NegBench/evaluation data/", "")
            ),
            pictures=pictures,
            row="image_path, correct_answer (0 to 3), caption_0 to caption_3, correct_answer_template",
            rows=read_csv,
            parse=_negbench,
        )
        for name, stem, pictures in (
            ("coco", "COCO_val", ("val2017",)),
            ("voc", "VOC2007", ("VOC2007/JPEGImages", "VOCdevkit/VOC2007/JPEGImages")),
        )
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _ALL})
"""Every evaluation set by its name."""


# --- use ------------------------------------------------------------------------------------------------------------


def find(folder: str | Path) -> list[str]:
    """The names of the evaluation sets whose questions are in a data folder."""
    return [name for name, benchmark in BENCHMARKS.items() if benchmark.find(folder)]


def read(
    folder: str | Path,
    names: Iterable[str] | None = None,
    *,
    rewrite: bool = True,
    bad: list[tuple[str, DataError]] | None = None,
) -> dict[str, list[Question]]:
    """Reads evaluation sets. Pictures are not opened, but must exist.

    Args:
        folder: the data folder, arranged as in the module's table.
        names: which sets to read; None for all that the folder holds.
        rewrite: reword the captions as the published evaluation does for its scorer (see `published_caption`);
            otherwise they stay as in the files.
        bad: if given, malformed rows and rows without a picture are skipped and noted here: "row 3" and its error,
            which names the file.

    Returns:
        The questions of every set by its name, in the file's order (NCD: sorted by the pictures' names). If bad rows
        are skipped, a set may be empty.

    Raises:
        InputError: if a name is unknown.
        DataError: if a requested set, or any set at all, is missing; if a file cannot be read or holds no question;
            or, without `bad`, if a row is malformed or lacks its picture.
    """
    benchmarks = [_benchmark(name) for name in (find(folder) if names is None else names)]
    if not benchmarks:
        looked = sorted({place for benchmark in BENCHMARKS.values() for place in benchmark.files})
        raise DataError(f"{folder} holds no evaluation set; looked for {', '.join(looked)}.")
    return {benchmark.name: _read(benchmark, Path(folder), rewrite, bad) for benchmark in benchmarks}


def published_caption(name: str, caption: str, *, flat: bool = True) -> str:
    """A caption of an evaluation set as the published evaluation rewords it.

    It replaces words of What'sUp (on: above, under: below), then adds the set's prefix: "An image of a " in CLEVR-bind,
    "An image of " in What'sUp and VG-Attribution, none elsewhere. For the scorer, and in every set, it also replaces
    behind and top by above, and in front of and bottom by below, whatever they mean: "a white top" becomes "a white
    above". The plain cosine baselines see captions without this last change.

    Args:
        name: of the evaluation set.
        caption: the caption in the set's file.
        flat: include the last change, as for the scorer; False gives the baselines' caption.

    Raises:
        InputError: if the name is unknown.
    """
    benchmark = _benchmark(name)
    for word, replacement in benchmark.words:
        caption = caption.replace(word, replacement)
    caption = benchmark.prefix + caption
    for word, replacement in _ON_THE_PAGE if flat else ():
        caption = caption.replace(word, replacement)
    return caption


def load_picture(question: Question) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture of a question, upright and in colour, cropped; parts of the box outside the picture are black.

    Raises:
        InputError: if the picture is missing or unreadable, or the box is outside it or too large.
    """
    picture = open_picture(question.picture)
    if question.crop is None:
        return np.asarray(picture)
    corners = np.array([question.crop], np.float64)
    box = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    left, top, width, height = upright_boxes(box, stored(question.picture), str(question.picture))[0].tolist()
    inside = left < picture.width and top < picture.height and left + width > 0 and top + height > 0
    if not inside or width * height > MOST_PIXELS:
        raise InputError(f"{question.picture} has no part to show in the box {question.crop}; correct it or skip it.")
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def _benchmark(name: str) -> Benchmark:
    if name not in BENCHMARKS:
        raise InputError(f"{name!r} is not an evaluation set; the known ones are {', '.join(BENCHMARKS)}.")
    return BENCHMARKS[name]


def _read(benchmark: Benchmark, folder: Path, rewrite: bool, bad: list[tuple[str, DataError]] | None) -> list[Question]:
    file = benchmark.find(folder)
    if file is None:
        raise DataError(f"{folder} holds no {benchmark.name}; it belongs at {' or '.join(benchmark.files)}.")
    rows = benchmark.rows(file)
    if not rows:
        raise DataError(f"{file} holds no question; every row is {benchmark.row}.")
    places = [folder / place for place in benchmark.pictures]
    pictures = next((place for place in places if place.is_dir()), places[0])

    def question(index: int, content: object) -> Question:
        try:
            found = benchmark.parse(_Row(index, content), pictures)
        except DataError as error:
            reason = str(error).rstrip(".")
            raise DataError(f"{file}, row {index}: {reason}. A row is {benchmark.row}; --skip-bad skips it.") from error
        if not rewrite:
            return found
        captions = tuple(published_caption(benchmark.name, caption) for caption in found.captions)
        return dataclasses.replace(found, captions=captions)

    return usable(rows, question, bad)
