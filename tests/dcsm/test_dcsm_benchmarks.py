"""The evaluation sets, written out as they are published and read back."""

import dataclasses
from pathlib import Path
from typing import Any

import layouts_benchmarks as layouts
import numpy as np
import pytest
from PIL import Image, ImageOps

from jaxid.dcsm.benchmarks import BENCHMARKS, Question, find, load_picture, published_caption, read
from jaxid.errors import DataError, InputError

COCO = f"{layouts.NEGBENCH_FOLDER}/COCO_val_mcq_llama3.1_rephrased.csv"

# Name of the set -> pictures, below the data folder.
PICTURES = {
    "clevr-bind-train": [f"clevr_bind/two_object/images/train/CLEVR_train_00000{number}.png" for number in range(3)],
    "clevr-bind-val": [f"clevr_bind/two_object/images/val/CLEVR_val_00000{number}.png" for number in range(2)],
    "clevr-bind-gen": ["clevr_bind/two_object/images/gen/CLEVR_gen_000000.png"],
    "ncd": [
        "NCD_colorful_composite_squares/green_pear_purple_plum_7.jpg",
        "NCD_colorful_composite_squares/red_apple_yellow_banana.png",
    ],
    "ncd-reversed": [
        "NCD_colorful_composite_squares/green_pear_purple_plum_7.jpg",
        "NCD_colorful_composite_squares/red_apple_yellow_banana.png",
    ],
    "vg-attribution": ["VG_100K/2370.jpg"],
    "vg-relation": ["VG_100K/2370.jpg"],
    "whatsup-a": ["controlled_images/mug_on_armchair.jpeg", "controlled_images/mug_left_of_armchair.jpeg"],
    "whatsup-b": ["controlled_clevr/mug_in-front_of_armchair.jpeg", "controlled_clevr/mug_left_of_armchair.jpeg"],
    "coco-spatial-one": ["val2017/000000000139.jpg", "val2017/000000000139.jpg"],
    "coco-spatial-two": ["val2017/000000000285.jpg"],
    "vg-spatial-one": ["vg_images/2370.jpg"],
    "vg-spatial-two": ["vg_images/61.jpg"],
    "negbench-coco": ["val2017/000000000139.jpg", "val2017/000000000285.jpg"],
    "negbench-voc": ["VOC2007/JPEGImages/000001.jpg"],
    "coco-order": ["val2014/COCO_val2014_1.jpg"],
    "flickr30k-order": ["flickr30k-images/1.jpg"],
}

# Name of the set, row -> captions as files hold them, and as the published scorer sees them.
CAPTIONS: dict[tuple[str, int], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("clevr-bind-val", 0): (
        ("red cube", "blue cube", "red sphere", "gray cube", "red cylinder"),
        (
            "An image of a red cube",
            "An image of a blue cube",
            "An image of a red sphere",
            "An image of a gray cube",
            "An image of a red cylinder",
        ),
    ),
    ("ncd", 1): (
        ("A picture of a red apple and a yellow banana", "A picture of a yellow apple and a red banana"),
        ("A picture of a red apple and a yellow banana", "A picture of a yellow apple and a red banana"),
    ),
    ("ncd-reversed", 0): (
        ("A picture of a purple plum and a green pear", "A picture of a green plum and a purple pear"),
        ("A picture of a purple plum and a green pear", "A picture of a green plum and a purple pear"),
    ),
    ("vg-attribution", 0): (
        ("the white top and the open door", "the open top and the white door"),
        ("An image of the white top and the open door", "An image of the open top and the white door"),
    ),
    ("vg-relation", 0): (
        ("the man is behind the top", "the top is behind the man"),
        ("the man is behind the top", "the top is behind the man"),
    ),
    ("coco-order", 0): (
        ("a cat on top of a dog", "a dog on top of a cat", "of a cat dog on top a"),
        ("a cat on top of a dog", "a dog on top of a cat", "of a cat dog on top a"),
    ),
    ("whatsup-a", 0): (
        (
            "A mug on a armchair",
            "A mug under a armchair",
            "A mug to the left of a armchair",
            "A mug to the right of a armchair",
        ),
        (
            "An image of A mug above a armchair",
            "An image of A mug below a armchair",
            "An image of A mug to the left of a armchair",
            "An image of A mug to the right of a armchair",
        ),
    ),
    ("whatsup-b", 1): (
        (
            "A mug to the left of a armchair",
            "A mug in front of a armchair",
            "A mug behind a armchair",
            "A mug to the right of a armchair",
        ),
        (
            "An image of A mug to the left of a armchair",
            "An image of A mug below a armchair",
            "An image of A mug above a armchair",
            "An image of A mug to the right of a armchair",
        ),
    ),
    ("coco-spatial-one", 0): (  # "on" is changed in What'sUp alone
        ("A photo of a cat on the left", "A photo of a cat on the right"),
        ("A photo of a cat on the left", "A photo of a cat on the right"),
    ),
    ("coco-spatial-one", 1): (
        ("A photo of a cat at the top", "A photo of a cat at the bottom"),
        ("A photo of a cat at the above", "A photo of a cat at the below"),
    ),
    ("vg-spatial-two", 0): (
        ("A photo of a cat behind a dog", "A photo of a cat in front of a dog"),
        ("A photo of a cat above a dog", "A photo of a cat below a dog"),
    ),
    ("negbench-coco", 1): (
        ("A dog, but no cat", "A cat; no, a dog", "This image features a dog", "There is no dog"),
        ("A dog, but no cat", "A cat; no, a dog", "This image features a dog", "There is no dog"),
    ),
    ("negbench-voc", 0): (
        ("There is no dog", "A dog, but no cat", "A cat; no, a dog", "This image features a dog"),
        ("There is no dog", "A dog, but no cat", "A cat; no, a dog", "This image features a dog"),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layouts.everything(tmp_path)
    return tmp_path


# --- what is read ---------------------------------------------------------------------------------------------------


def test_every_set_is_found_and_read(folder: Path) -> None:
    assert find(folder) == list(BENCHMARKS) == list(PICTURES)
    sets = read(folder)
    pictures = {name: [str(question.picture.relative_to(folder)) for question in sets[name]] for name in sets}
    assert pictures == PICTURES


def test_names_are_the_keys(folder: Path) -> None:
    assert [benchmark.name for benchmark in BENCHMARKS.values()] == list(BENCHMARKS)
    for name, questions in read(folder).items():
        keys = [question.key for question in questions]
        assert len(set(keys)) == len(keys), name


@pytest.mark.parametrize(("name", "row"), CAPTIONS)
def test_captions(folder: Path, name: str, row: int) -> None:
    raw, published = CAPTIONS[name, row]
    assert read(folder, [name], rewrite=False)[name][row].captions == raw
    assert read(folder, [name])[name][row].captions == published


def test_baselines_see_words_for_depth() -> None:
    assert published_caption("whatsup-b", "A mug behind a cup", flat=False) == "An image of A mug behind a cup"
    assert published_caption("whatsup-a", "A mug under a cup", flat=False) == "An image of A mug below a cup"
    assert published_caption("clevr-bind-gen", "red cube", flat=False) == "An image of a red cube"


def test_words_are_changed_where_they_begin() -> None:
    caption = "A laptop and a stop sign"
    assert published_caption("whatsup-b", caption) == f"An image of {caption}"
    assert published_caption("coco-spatial-one", "top shelf") == "top shelf"
    assert published_caption("whatsup-a", "top star on a bottom") == "An image of top star above a below"
    assert published_caption("clevr-bind-val", "top cube") == "An image of a top cube"


def test_captions_of_aro_are_not_reworded() -> None:
    assert published_caption("vg-attribution", "top star and the moon") == "An image of top star and the moon"
    for name in ("vg-relation", "coco-order", "flickr30k-order"):
        assert published_caption(name, "a cat on top of a dog behind a bus") == "a cat on top of a dog behind a bus"


def test_only_the_sets_asked_for_are_read(folder: Path) -> None:
    (folder / "coco_qa_one_obj.json").write_text("broken")
    assert list(read(folder, ["whatsup-b", "ncd"])) == ["whatsup-b", "ncd"]


def test_sets_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    layouts.ncd(tmp_path)
    assert list(read(tmp_path)) == ["ncd", "ncd-reversed"]


def test_negbench_keys_name_the_kind_of_answer(folder: Path) -> None:
    keys = [question.key for question in read(folder, ["negbench-coco"])["negbench-coco"]]
    assert keys == ["00000-000000000139-positive", "00001-000000000285-hybrid"]


# --- other places ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "here", "there"),
    [
        ("vg-attribution", "VG_100K", "images"),
        ("negbench-voc", "VOC2007", "VOCdevkit/VOC2007"),
        ("negbench-voc", layouts.NEGBENCH_FOLDER, "images"),
    ],
)
def test_second_places(folder: Path, name: str, here: str, there: str) -> None:
    before = read(folder, [name])[name]
    (folder / there).parent.mkdir(exist_ok=True)
    (folder / here).rename(folder / there)
    after = read(folder, [name])[name]
    assert [question.captions for question in after] == [question.captions for question in before]


def test_whatsup_pictures_that_the_published_evaluation_renamed(folder: Path) -> None:
    pictures = folder / "controlled_images"
    (pictures / "mug_on_armchair.jpeg").rename(pictures / "mug_above_armchair.jpeg")
    questions = read(folder, ["whatsup-a"])["whatsup-a"]
    assert questions[0].picture == pictures / "mug_above_armchair.jpeg"


# --- pictures -------------------------------------------------------------------------------------------------------


def test_a_whole_picture(folder: Path) -> None:
    (question,) = read(folder, ["coco-spatial-two"])["coco-spatial-two"]
    assert question.crop is None
    np.testing.assert_array_equal(load_picture(question), layouts.pixels())


def test_a_crop_is_the_box(folder: Path) -> None:
    (question,) = read(folder, ["vg-attribution"])["vg-attribution"]
    np.testing.assert_array_equal(load_picture(question), layouts.pixels()[2:5, 1:5])


def test_a_crop_beyond_the_edge_is_black_there(folder: Path) -> None:
    layouts.save(folder / "visual_genome_attribution.json", [layouts.attribution(bbox_x=-1, bbox_w=3)])
    (question,) = read(folder, ["vg-attribution"])["vg-attribution"]
    shown = load_picture(question)
    np.testing.assert_array_equal(shown[:, 1:], layouts.pixels()[2:5, :2])
    assert not shown[:, 0].any()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_crop_follows_a_turned_picture(orientation: int, tmp_path: Path) -> None:
    """Stored as 40 x 20: one box fits these pixels alone, one the upright picture alone, one both."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = Image.open(tmp_path / "a.png")
    upright = np.asarray(ImageOps.exif_transpose(upright))

    def shown(*box: Any) -> np.ndarray:
        return load_picture(Question("one", tmp_path / "a.png", ("right", "wrong"), box))

    marked = Image.fromarray(pixels).crop((25, 2, 38, 9))
    marked.getexif()[274] = orientation
    np.testing.assert_array_equal(shown(25, 2, 38, 9), np.asarray(ImageOps.exif_transpose(marked)))
    np.testing.assert_array_equal(shown(2, 25, 9, 38), upright[25:38, 2:9])
    with pytest.warns(UserWarning, match=r"a\.png: the picture's orientation tag"):
        np.testing.assert_array_equal(shown(1, 2, 4, 9), upright[2:9, 1:4])


@pytest.mark.parametrize("box", [(-9, 0, 0, 3), (0, 9, 3, 12), (0, 0, 10**9, 10**9)])
def test_a_crop_of_nothing_or_of_gigabytes_is_refused(box: tuple[int, int, int, int], folder: Path) -> None:
    (question,) = read(folder, ["vg-attribution"])["vg-attribution"]
    with pytest.raises(InputError, match="no part to show in the box"):
        load_picture(dataclasses.replace(question, crop=box))


def test_numbers_that_are_too_large_are_bad_rows(folder: Path) -> None:
    for value in (10**400, "9" * 5000):
        layouts.save(folder / "visual_genome_attribution.json", [layouts.attribution(bbox_x=value)])
        with pytest.raises(DataError, match="'bbox_x' does not hold an integer below"):
            read(folder, ["vg-attribution"])


def test_grey_pictures_become_coloured(tmp_path: Path) -> None:
    Image.fromarray(layouts.pixels()[:, :, 0]).save(tmp_path / "grey.png")
    shown = load_picture(Question("one", tmp_path / "grey.png", ("right", "wrong"), (0, 1, 2, 4)))
    np.testing.assert_array_equal(shown, np.repeat(layouts.pixels()[1:4, :2, :1], 3, axis=2))


def test_pictures_are_not_opened(folder: Path) -> None:
    (folder / "vg_images" / "61.jpg").write_text("broken")
    (question,) = read(folder, ["vg-spatial-two"])["vg-spatial-two"]
    with pytest.raises(InputError, match=r"61\.jpg cannot be read as a picture"):
        load_picture(question)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [lambda folder: read(folder, ["whatsup"]), lambda _: published_caption("whatsup", "")])
def test_unknown_names(folder: Path, use: Any) -> None:
    with pytest.raises(InputError, match=r"'whatsup'.*clevr-bind-train, .*whatsup-a, .*negbench-voc"):
        use(folder)


def test_a_folder_without_sets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no evaluation set.*vg_qa_one_obj\.json"):
        read(tmp_path)


def test_a_set_that_is_not_there(tmp_path: Path) -> None:
    layouts.ncd(tmp_path)
    with pytest.raises(DataError, match=r"holds no negbench-coco; it belongs at NegBench/.* or images/COCO_val"):
        read(tmp_path, ["ncd", "negbench-coco"])


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("whatsup-a", "controlled_images_dataset.json", b"[", "cannot be read as a JSON file"),
        ("whatsup-a", "controlled_images_dataset.json", b"{}", "holds dict where a JSON array"),
        ("whatsup-a", "controlled_images_dataset.json", b"[]", "holds no question"),
        ("negbench-coco", COCO, layouts.NEGBENCH.encode(), "holds no question"),
        ("negbench-coco", COCO, b"caption_0\n\xff\xfe", "cannot be read as a CSV file"),
        (
            "clevr-bind-gen",
            "clevr_bind/two_object/gen.csv",
            b'file_name\n"' + b"x" * 200_000,
            "cannot be read as a CSV file",
        ),
    ],
)
@pytest.mark.parametrize("bad", [None, []])
def test_broken_files(folder: Path, name: str, file: str, content: bytes, message: str, bad: Any) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(folder, [name], bad=bad)
    assert str(folder / file) in str(caught.value)


MUG = {"image_path": "data/controlled_images/mug_on_armchair.jpeg", "caption_options": ["A mug on a cup", "A mug"]}
CUBES = ["CLEVR_gen_000000.png", "red cube", "blue cube", "red sphere", "gray cube", "red cylinder"]
MCQ = [*layouts.NEGATIONS, "positive", "000000000139.jpg"]
NUMBERED = f"{layouts.NEGBENCH},correct_answer"
CAT = [61, "A cat behind a dog", "A dog behind a cat"]
BOX = layouts.attribution()
ORDERED: Any = {"image": "val2014/COCO_val2014_1.jpg", "caption_options": ["a cat and a dog", "a dog and a cat"]}

# Name of the set, its file, a good row, a bad one, and what is said about it.
BAD = [
    ("clevr-bind-gen", "clevr_bind/two_object/gen.csv", CUBES, CUBES[:5], "'neg_3'"),
    ("clevr-bind-gen", "clevr_bind/two_object/gen.csv", CUBES, layouts.changed(CUBES, 1, " "), "'pos'"),
    (
        "clevr-bind-gen",
        "clevr_bind/two_object/gen.csv",
        CUBES,
        layouts.changed(CUBES, 0, "no.png"),
        r"picture.*no\.png",
    ),
    ("vg-attribution", "visual_genome_attribution.json", BOX, layouts.changed(BOX, "bbox_w", 0), "'bbox_w'.*0 x 3"),
    ("vg-attribution", "visual_genome_attribution.json", BOX, layouts.changed(BOX, "bbox_x", None), "'bbox_x'"),
    ("vg-attribution", "visual_genome_attribution.json", BOX, layouts.changed(BOX, "bbox_y", True), "'bbox_y'"),
    ("vg-attribution", "visual_genome_attribution.json", BOX, layouts.changed(BOX, "false_caption", 3), "'false_capt"),
    ("vg-attribution", "visual_genome_attribution.json", BOX, "2370.jpg", "'bbox_x'.*2370"),
    ("whatsup-a", "controlled_images_dataset.json", MUG, layouts.changed(MUG, "image_path", "x.jpeg"), r"x\.jpeg"),
    (
        "whatsup-a",
        "controlled_images_dataset.json",
        MUG,
        layouts.changed(MUG, "caption_options", ["A"]),
        "'caption_opt",
    ),
    (
        "whatsup-a",
        "controlled_images_dataset.json",
        MUG,
        layouts.changed(MUG, "caption_options", ["A", ""]),
        "'caption",
    ),
    ("vg-spatial-two", "vg_qa_two_obj.json", CAT, CAT[:2], "'id'.*61.*right caption, wrong caption"),
    ("vg-spatial-two", "vg_qa_two_obj.json", CAT, layouts.changed(CAT, 0, "6x"), "'id'"),
    ("vg-spatial-two", "vg_qa_two_obj.json", CAT, layouts.changed(CAT, 2, None), "'wrong'"),
    ("coco-spatial-two", "coco_qa_two_obj.json", [285, "A", "B"], [7, "A", "B"], r"val2017/000000000007\.jpg"),
    ("negbench-coco", COCO, [*MCQ, 0], [*MCQ, 4], "'correct_answer' is 4"),
    ("negbench-coco", COCO, [*MCQ, 0], [*MCQ, ""], "'correct_answer' does not hold an integer"),
    ("negbench-coco", COCO, MCQ, layouts.changed(MCQ, 2, ""), "'caption_2'"),
    ("negbench-coco", COCO, MCQ, layouts.changed(MCQ, 4, ""), "'correct_answer_template'"),
    ("negbench-coco", COCO, MCQ, MCQ[:5], "'image_path'"),
    ("vg-relation", "visual_genome_relation.json", BOX, layouts.changed(BOX, "bbox_h", -1), "'bbox_h'.*4 x -1"),
    ("coco-order", "coco_karpathy_test.json", ORDERED, {"image": ORDERED["image"]}, "'caption' is not a list of one"),
    (
        "flickr30k-order",
        "flickr30k_test.json",
        ORDERED,
        layouts.changed(ORDERED, "caption_options", ["a"]),
        "'caption_opt.*two or",
    ),
    ("flickr30k-order", "flickr30k_test.json", ORDERED, layouts.changed(ORDERED, "image", "no.jpg"), r"no\.jpg"),
]


@pytest.mark.parametrize(("name", "file", "good", "bad", "message"), BAD)
def test_bad_rows_are_named_or_skipped(folder: Path, name: str, file: str, good: Any, bad: Any, message: str) -> None:
    rows = [good, bad, good]
    if file.endswith(".csv"):
        header = {5: layouts.CLEVR, 6: layouts.CLEVR if file != COCO else layouts.NEGBENCH, 7: NUMBERED}[len(good)]
        layouts.table(folder / file, header, rows)
    else:
        layouts.save(folder / file, rows)
    with pytest.raises(DataError, match=rf"row 1: .*{message}") as caught:
        read(folder, [name])
    assert str(folder / file) in str(caught.value)

    skipped: list[tuple[str, DataError]] = []
    sets = read(folder, [name], bad=skipped)
    assert [question.key[:5] for question in sets[name]] == ["00000", "00002"]
    assert [(row, str(error)) for row, error in skipped] == [("row 1", str(caught.value))]


def test_composites_with_other_names(folder: Path) -> None:
    place = folder / "NCD_colorful_composite_squares"
    layouts.picture(place / "kiwi.png")
    with pytest.raises(DataError, match=r"row 1: .*'kiwi\.png'.*colour_object_colour_object"):
        read(folder, ["ncd"])
    skipped: list[tuple[str, DataError]] = []
    sets = read(folder, ["ncd", "ncd-reversed"], bad=skipped)
    assert [len(questions) for questions in sets.values()] == [2, 2]
    assert [row for row, _ in skipped] == ["row 1", "row 1"] and all(str(place) in str(one) for _, one in skipped)


def test_nothing_is_skipped_of_good_sets(folder: Path) -> None:
    skipped: list[tuple[str, DataError]] = []
    assert read(folder, bad=skipped) == read(folder) and skipped == []
