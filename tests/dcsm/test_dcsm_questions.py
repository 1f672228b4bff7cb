"""Rows that come in several forms: NegBench's answers, CLEVR-bind as JSON, What'sUp's names, ARO's captions."""

import json
import re
from pathlib import Path

import layouts_benchmarks as layouts
import pytest

from jaxid.dcsm import orders
from jaxid.dcsm.benchmarks import read
from jaxid.dcsm.questions import Question
from jaxid.errors import DataError, InputError

COCO = f"{layouts.NEGBENCH_FOLDER}/COCO_val_mcq_llama3.1_rephrased.csv"
TWO = "clevr_bind/two_object"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layouts.everything(tmp_path)
    return tmp_path


def captions(folder: Path, name: str) -> list[tuple[str, ...]]:
    return [question.captions for question in read(folder, [name], rewrite=False)[name]]


# --- NegBench -------------------------------------------------------------------------------------------------------


def test_caption_0_of_negbench_is_right_and_the_template_names_its_kind(folder: Path) -> None:
    found = read(folder, ["negbench-coco", "negbench-voc"], rewrite=False)
    assert [question.captions[0] for question in found["negbench-coco"]] == [layouts.NEGATIONS[0], layouts.NEGATIONS[2]]
    assert [question.kind for question in found["negbench-coco"]] == ["positive", "hybrid"]
    assert [question.kind for question in found["negbench-voc"]] == ["negative"]


def test_negbench_may_say_which_caption_is_right(folder: Path) -> None:
    rows = [(right, *"abcd", "hybrid", "000000000139.jpg") for right in (0, 2, 3)]
    layouts.table(folder / COCO, f"correct_answer,{layouts.NEGBENCH}", rows)
    assert captions(folder, "negbench-coco") == [tuple("abcd"), tuple("cabd"), tuple("dabc")]


# --- CLEVR-bind -----------------------------------------------------------------------------------------------------


def test_clevr_bind_as_json_is_the_same(folder: Path) -> None:
    before = read(folder, ["clevr-bind-val"])
    (folder / TWO / "val.csv").unlink()
    wrong = ["blue cube", "red sphere", "gray cube", "red cylinder"]
    rows = {f"CLEVR_val_{number:06d}.png": {"pos": "red cube", "neg": wrong} for number in range(2)}
    layouts.save(folder / TWO / "val.json", rows)
    assert read(folder, ["clevr-bind-val"]) == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pos": "red cube", "neg": []}, "row 0: field 'neg' is not a list of one or more strings"),
        ({"pos": "", "neg": ["blue cube"]}, "row 0: field 'pos' does not hold text"),
        ({"pos": "red cube"}, "row 0: field 'neg_0' does not hold text"),
        (["red cube"], "row 0: field 'neg_0' does not hold text"),
    ],
)
def test_bad_rows_of_clevr_bind_as_json(folder: Path, row: object, message: str) -> None:
    (folder / TWO / "gen.csv").unlink()
    layouts.save(folder / TWO / "gen.json", {"CLEVR_gen_000000.png": row})
    with pytest.raises(DataError, match=message):
        read(folder, ["clevr-bind-gen"])


# --- What'sUp -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "scene"),
    [
        ("beer-bottle_on_armchair", "above", "beer-bottle, armchair"),
        ("beer-bottle_below_armchair", "below", "beer-bottle, armchair"),
        ("mug_left_of_plate", "left", "mug, plate"),
        ("mug_in-front_of_plate", "in-front", "mug, plate"),
        ("mug_behind_plate", "behind", "mug, plate"),
        ("00003_star_rightof_fish", "right", "00003_star, fish"),
        ("something_else", "", ""),
    ],
)
def test_names_of_whatsup_say_what_is_where(tmp_path: Path, name: str, kind: str, scene: str) -> None:
    options = ["A mug on a plate", "A mug under a plate"]
    layouts.save(
        tmp_path / "controlled_clevr_dataset.json", [{"image_path": f"{name}.jpeg", "caption_options": options}]
    )
    layouts.picture(tmp_path / "controlled_clevr" / f"{name}.jpeg")
    (question,) = read(tmp_path)["whatsup-b"]
    assert (question.kind, question.scene) == (kind, scene)


# --- ARO ------------------------------------------------------------------------------------------------------------


def test_vg_relation_names_the_relation_and_crops(folder: Path) -> None:
    (question,) = read(folder, ["vg-relation"])["vg-relation"]
    assert question.kind == "behind" and question.crop == (1, 2, 5, 5)
    assert question.captions == ("the man is behind the top", "the top is behind the man")


NAME = "val2014/COCO_val2014_1.jpg"
SENTENCES = ["A red cat sits near a dog.", "Two dogs, and a cat!"]


def tag(text: str) -> list[tuple[str, str]]:
    kinds = {"red": "JJ", "cat": "NN", "dog": "NN", "dogs": "NNS"}
    return [(word, kinds.get(word, "DT")) for word in re.findall(r"\w+|[,.!]", text)]


def karpathy(folder: Path, file: str, **place: str) -> None:
    """The test split holds the first picture alone."""
    sentences = [{"raw": sentence, "tokens": sentence.split()} for sentence in SENTENCES]
    splits = {"1.jpg": "test", "2.jpg": "train"}
    images = [{**place, "filename": name, "split": split, "sentences": sentences} for name, split in splits.items()]
    layouts.save(folder / file, {"images": images, "dataset": "coco"})


def checked(found: list[Question], count: int, picture: Path) -> None:
    assert [question.key for question in found] == [f"00000-{picture.stem}-{caption}" for caption in (0, 1)]
    assert {question.picture for question in found} == {picture}
    for question, right in zip(found, ("a red cat sits near a dog", "two dogs, and a cat"), strict=True):
        assert question.captions[0] == right and len(question.captions) == count
        assert len({*question.captions}) == count


def test_wrong_orders_are_drawn_by_the_seed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "tagger", lambda: tag)
    layouts.save(folder / "coco_karpathy_test.json", [{"image": NAME, "caption": SENTENCES}])
    found = read(folder, ["coco-order"])["coco-order"]
    checked(found, 5, folder / NAME)
    assert read(folder, ["coco-order"])["coco-order"] == found
    assert read(folder, ["coco-order"], seed=1)["coco-order"] != found


def test_a_seed_out_of_range_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="the seed must be an integer from 0"):
        read(folder, seed=-1)


def test_without_a_tagger_there_are_two_and_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "tagger", lambda: None)
    layouts.save(folder / "coco_karpathy_test.json", [{"image": NAME, "caption": SENTENCES}])
    with pytest.warns(UserWarning, match="coco-order: captions get two wrong orders, not four, as spaCy's"):
        found = read(folder, ["coco-order"])["coco-order"]
    checked(found, 3, folder / NAME)


@pytest.mark.parametrize(
    ("name", "file", "place", "folder_of"),
    [
        ("coco-order", "dataset_coco.json", {"filepath": "val2014"}, "val2014"),
        ("flickr30k-order", "dataset_flickr30k.json", {}, "flickr30k-images"),
    ],
)
def test_karpathys_files(
    tmp_path: Path, name: str, file: str, place: dict[str, str], folder_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "tagger", lambda: tag)
    karpathy(tmp_path, file, **place)
    layouts.picture(tmp_path / folder_of / "1.jpg")
    checked(read(tmp_path)[name], 5, tmp_path / folder_of / "1.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotations": []}, "neither a JSON array nor an object with a list of images"),
        ([{"image": NAME, "caption": ["cat"]}], "row 0: the words of caption 0, 'cat', have one order alone"),
        ([{"image": NAME, "caption": "a cat"}], "row 0: field 'caption' is not a list"),
        ({"images": [{"split": "test", "sentences": [{"raw": "a cat"}]}]}, "row 0: field 'image' does not hold text"),
        ({"images": [{"split": "test", "filename": "a.jpg"}]}, "row 0: field 'caption' is not a list"),
        ({"images": ["a.jpg"]}, "row 0: field 'image' does not hold text"),
    ],
)
def test_bad_captions(folder: Path, content: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "tagger", lambda: tag)
    (folder / "coco_karpathy_test.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        read(folder, ["coco-order"])
    assert "coco_karpathy_test.json" in str(caught.value)
