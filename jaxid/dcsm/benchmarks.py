"""The evaluation sets of [DCSM] (arXiv 2503.08723): one picture and several captions, the first of them correct.

Paths below the data folder; where there are two, the first that exists is used:

| name | questions | pictures |
| --- | --- | --- |
| `clevr-bind-train`, `-val`, `-gen` | `{train,val,gen}.csv` or `.json` (+) | `images/{train,val,gen}/` (+) |
| `ncd`, `ncd-reversed` | names of the pictures | `NCD_colorful_composite_squares/` |
| `vg-attribution` | `visual_genome_attribution.json` | `VG_100K/` or `images/` |
| `vg-relation` | `visual_genome_relation.json` | `VG_100K/` or `images/` |
| `coco-order` | `coco_karpathy_test.json` or `dataset_coco.json` | as the file names them |
| `flickr30k-order` | `flickr30k_test.json` or `dataset_flickr30k.json` | the same, or `flickr30k-images/` |
| `whatsup-a` | `controlled_images_dataset.json` | `controlled_images/` |
| `whatsup-b` | `controlled_clevr_dataset.json` | `controlled_clevr/` |
| `coco-spatial-one`, `-two` | `coco_qa_{one,two}_obj.json` | `val2017/` |
| `vg-spatial-one`, `-two` | `vg_qa_{one,two}_obj.json` | `vg_images/` |
| `negbench-coco` | `COCO_val_mcq_llama3.1_rephrased.csv` (*) | `val2017/` |
| `negbench-voc` | `VOC2007_mcq_llama3.1_rephrased.csv` (*) | `VOC2007/JPEGImages/` or `VOCdevkit/VOC2007/JPEGImages/` |

(+) in `clevr_bind/two_object/`; (*) in `NegBench/evaluation data/images/` or `images/`.

The published evaluation rewords captions, see `published_caption`. VG-Attribution, VG-Relation, COCO-Order and
Flickr30k-Order are ARO's (arXiv 2210.01936). For the last two, wrong orders of a caption's words are drawn, see
`jaxid.dcsm.orders`, unless a row brings them as `caption_options`, the right one first.

In What'sUp, the four pictures of the same two objects are a set, and two of them with opposite relations (left and
right; on and under; in front and behind) are a pair, as the pictures' names say. A pair or a set is answered correctly
if all its questions are.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

from jaxid.checks import check_seed
from jaxid.data.coco_boxes import upright_boxes
from jaxid.data.coco_spatial import picture_name
from jaxid.data.files import read_csv, usable
from jaxid.dcsm import orders, questions
from jaxid.dcsm.questions import Parse, Question, Row
from jaxid.errors import DataError, InputError
from jaxid.prompts.pictures import MOST_PIXELS, open_picture, stored

_ON_THE_PAGE = ((" behind ", " above "), (" in front of ", " below "), (" bottom", " below"), (" top", " above"))
"""Words for depth and edges, and the functional words that replace them for the scorer."""

_OF_TABLES = ((" on", " above"), (" under", " below"))
"""Words of What'sUp, and the functional words that replace them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One set of questions, and how the published evaluation words it.

    Attributes:
        name: as in the table above.
        files: possible paths of the file of questions below the data folder (NCD: of the folder of pictures).
        pictures: possible paths of the folder of pictures below the data folder.
        row: what a row of the file looks like, for error messages.
        rows: reads the file's rows, unchecked.
        parse: turns a row and the folder of pictures into its questions.
        prefix: the text that the published evaluation puts before every caption.
        words: the words that it replaces in every caption before that, with their replacements.
        flat: whether it also replaces words for depth and edges for the scorer.
    """

    name: str
    files: tuple[str, ...]
    pictures: tuple[str, ...]
    row: str
    rows: Callable[[Path], list[object]]
    parse: Parse
    prefix: str = ""
    words: tuple[tuple[str, str], ...] = ()
    flat: bool = True

    def find(self, folder: str | Path) -> Path | None:
        """The file of questions below a data folder, or None."""
        places = (Path(folder, place) for place in self.files)
        return next((place for place in places if place.exists()), None)


# --- the sets -------------------------------------------------------------------------------------------------------


ORDERS: Mapping[str, tuple[str, ...]] = {
    "coco-order": ("coco_karpathy_test.json", "dataset_coco.json"),
    "flickr30k-order": ("flickr30k_test.json", "dataset_flickr30k.json"),
}
"""The sets for which wrong orders of words are drawn, and their files."""

_ALL = (
    *(
        Benchmark(
            name=f"clevr-bind-{split}",
            files=(f"clevr_bind/two_object/{split}.csv", f"clevr_bind/two_object/{split}.json"),
            pictures=(f"clevr_bind/two_object/images/{split}",),
            row='file_name, pos, neg_0, neg_1, neg_2, neg_3 (JSON: "file_name": {"pos": ..., "neg": [...]})',
            rows=questions.clevr_rows,
            parse=questions.clevr,
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
            rows=questions.picture_rows,
            parse=partial(questions.composite, reverse=reverse),
        )
        for name, reverse in (("ncd", False), ("ncd-reversed", True))
    ),
    *(
        Benchmark(
            name=f"vg-{name}",
            files=(f"visual_genome_{name}.json",),
            pictures=("VG_100K", "images"),
            row='{"image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "true_caption", "false_caption": ...}',
            rows=questions.json_rows,
            parse=questions.cropped,
            prefix=prefix,
            flat=False,
        )
        for name, prefix in (("attribution", "An image of "), ("relation", ""))
    ),
    *(
        Benchmark(
            name=f"whatsup-{letter}",
            files=(f"{stem}_dataset.json",),
            pictures=(stem,),
            row='{"image_path": ..., "caption_options": [right, wrong, ...]}',
            rows=questions.json_rows,
            parse=questions.whatsup,
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
            rows=questions.json_triples,
            parse=questions.fields(picture, "right", "wrong"),
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
            row="image_path, caption_0 (correct) to caption_3, correct_answer_template (and, if any, correct_answer)",
            rows=read_csv,
            parse=questions.negbench,
        )
        for name, stem, pictures in (
            ("coco", "COCO_val", ("val2017",)),
            ("voc", "VOC2007", ("VOC2007/JPEGImages", "VOCdevkit/VOC2007/JPEGImages")),
        )
    ),
    *(
        Benchmark(
            name=name,
            files=files,
            pictures=(".",),
            row='{"image": ..., "caption": [...]}, or {"image": ..., "caption_options": [right, wrong, ...]}',
            rows=questions.caption_rows,
            parse=questions.order,
            flat=False,
        )
        for name, files in ORDERS.items()
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
    seed: int = 0,
) -> dict[str, list[Question]]:
    """Reads evaluation sets. Pictures are not opened, but must exist.

    Args:
        folder: the data folder, arranged as in the module's table.
        names: which sets to read; None for all that the folder holds.
        rewrite: reword the captions as the published evaluation does for its scorer (see `published_caption`);
            otherwise they stay as in the files.
        bad: if given, malformed rows and rows without a picture are skipped and noted here: "row 3" and its error,
            which names the file.
        seed: of the wrong orders that COCO-Order and Flickr30k-Order draw.

    Warns:
        UserWarning: if wrong orders were drawn without a tagger, so that captions have two instead of four.

    Returns:
        The questions of every set by its name, in the file's order (NCD: sorted by the pictures' names). If bad rows
        are skipped, a set may be empty.

    Raises:
        InputError: if a name is unknown, or the seed is out of range.
        DataError: if a requested set, or any set at all, is missing; if a file cannot be read or holds no question;
            or, without `bad`, if a row is malformed or lacks its picture.
    """
    check_seed(seed)
    benchmarks = [_benchmark(name) for name in (find(folder) if names is None else names)]
    if not benchmarks:
        looked = sorted({place for benchmark in BENCHMARKS.values() for place in benchmark.files})
        raise DataError(f"{folder} holds no evaluation set; looked for {', '.join(looked)}.")
    return {benchmark.name: _read(benchmark, Path(folder), rewrite, bad, seed) for benchmark in benchmarks}


def published_caption(name: str, caption: str, *, flat: bool = True) -> str:
    """A caption of an evaluation set as the published evaluation rewords it.

    It replaces words of What'sUp (on: above, under: below). For the scorer it then replaces behind and top by above,
    and in front of and bottom by below, whatever they mean, in all sets but ARO's, whose captions stay as they are. It
    does so after a space alone: "top shelf" stays. Last comes the set's prefix: "An image of a " in CLEVR-bind,
    "An image of " in What'sUp and VG-Attribution, none elsewhere. The plain cosine baselines see captions without words
    for depth and edges replaced.

    Args:
        name: of the evaluation set.
        caption: the caption in the set's file.
        flat: replace words for depth and edges, as for the scorer; False gives the baselines' caption.

    Raises:
        InputError: if the name is unknown.
    """
    benchmark = _benchmark(name)
    for word, replacement in benchmark.words:
        caption = caption.replace(word, replacement)
    for word, replacement in _ON_THE_PAGE if flat and benchmark.flat else ():
        caption = caption.replace(word, replacement)
    return benchmark.prefix + caption


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


def _read(
    benchmark: Benchmark, folder: Path, rewrite: bool, bad: list[tuple[str, DataError]] | None, seed: int
) -> list[Question]:
    file = benchmark.find(folder)
    if file is None:
        raise DataError(f"{folder} holds no {benchmark.name}; it belongs at {' or '.join(benchmark.files)}.")
    rows = benchmark.rows(file)
    if not rows:
        raise DataError(f"{file} holds no question; every row is {benchmark.row}.")
    drawn = benchmark.name in ORDERS and any(map(questions.is_drawn, rows))
    if drawn and orders.tagger() is None:
        warnings.warn(
            f"{benchmark.name}: captions get two wrong orders, not four, as spaCy's {orders.PIPELINE} is not installed "
            f"(pip install 'jaxid-vlm[aro]'; python -m spacy download {orders.PIPELINE}).",
            stacklevel=3,
        )
    places = [folder / place for place in benchmark.pictures]
    pictures = next((place for place in places if place.is_dir()), places[0])

    def asked(index: int, content: object) -> list[Question]:
        try:
            found = benchmark.parse(Row(index, content, seed), pictures)
        except DataError as error:
            reason = str(error).rstrip(".")
            raise DataError(f"{file}, row {index}: {reason}. A row is {benchmark.row}; --skip-bad skips it.") from error
        return [_worded(benchmark, question) for question in found] if rewrite else found

    return [question for found in usable(rows, asked, bad) for question in found]


def _worded(benchmark: Benchmark, question: Question) -> Question:
    captions = tuple(published_caption(benchmark.name, caption) for caption in question.captions)
    return dataclasses.replace(question, captions=captions)
