import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_spatial import read_coco_spatial
from jaxid.dcsm import datasets
from jaxid.dcsm.datasets import Item
from jaxid.errors import DataError, OutputError
from jaxid.experiments.dcsm_train import TrainScorer
from jaxid.experiments.reference import with_bugs


def picture(value: int) -> np.ndarray:
    made = np.full((6, 8, 3), value, np.uint8)
    made[0, 0] = [value, 0, 255]
    return made


def touch(folder: Path, *names: str) -> Path:
    """Empty files: readers look at names alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text(json.dumps(rows))
    return path


def row(**changes: object) -> dict[str, object]:
    names = {"img1_obj": ["cat", "kitten"], "img2_obj": ["house", "hut"]}
    return {"img1_path": "a.png", "img2_path": "b.png", **names} | changes


def coco_folder(folder: Path, *rows: list[object]) -> Path:
    write_rows(folder / "coco_qa_two_obj.json", *rows)
    touch(folder / "val2017", "000000000007.jpg")
    return folder


@pytest.mark.parametrize(
    ("relation", "captions", "opposite_captions"),
    [
        ("above", ("a star above an egg", "an egg below a star"), ("an egg above a star", "a star below an egg")),
        ("below", ("a star below an egg", "an egg above a star"), ("an egg below a star", "a star above an egg")),
        (
            "leftof",
            ("a star to the left of an egg", "an egg to the right of a star"),
            ("an egg to the left of a star", "a star to the right of an egg"),
        ),
        (
            "rightof",
            ("a star to the right of an egg", "an egg to the left of a star"),
            ("an egg to the right of a star", "a star to the left of an egg"),
        ),
    ],
)
def test_spatial(tmp_path: Path, relation: str, captions: tuple[str, str], opposite_captions: tuple[str, str]) -> None:
    name = f"star_{relation}_egg"
    datasets.write_pair(tmp_path, name, picture(10), picture(20))
    (item,) = datasets.read_spatial(tmp_path)
    assert item.key == name
    assert (Path(str(item.picture)).name, Path(str(item.opposite)).name) == (f"{name}.png", f"CUTMIX_{name}.png")
    np.testing.assert_array_equal(np.asarray(Image.open(str(item.picture))), picture(10))
    np.testing.assert_array_equal(np.asarray(Image.open(str(item.opposite))), picture(20))
    assert item.captions == tuple(f"A picture of {text}" for text in captions)
    assert item.opposite_captions == tuple(f"A picture of {text}" for text in opposite_captions)


def test_attributes(tmp_path: Path) -> None:
    for number, name in enumerate(("red_star_orange_egg", "small_star_big_egg")):
        datasets.write_pair(tmp_path, name, picture(number), picture(50 + number))
    colours, sizes = datasets.read_attributes(tmp_path)
    assert (Path(str(colours.picture)).name, Path(str(colours.opposite)).name) == (
        "red_star_orange_egg.png",
        "MIRROR_red_star_orange_egg.png",
    )
    np.testing.assert_array_equal(np.asarray(Image.open(str(sizes.opposite))), picture(51))
    assert colours.captions == (
        "A picture of a red star and an orange egg",
        "A picture of an orange egg and a red star",
    )
    assert colours.opposite_captions == (
        "A picture of an orange star and a red egg",
        "A picture of a red egg and an orange star",
    )
    assert sizes.captions[0] == "A picture of a small star and a big egg"
    assert sizes.opposite_captions[1] == "A picture of a small egg and a big star"


def test_names_of_several_words(tmp_path: Path) -> None:
    folder = touch(tmp_path / "spatial", "fire_truck_leftof_teddy-bear.jpg", "CUTMIX_fire_truck_leftof_teddy-bear.jpg")
    assert datasets.read_spatial(folder)[0].captions == (
        "A picture of a fire truck to the left of a teddy bear",
        "A picture of a teddy bear to the right of a fire truck",
    )
    names = ("red_fire_truck_blue_teddy_bear.png", "blue_egg_red_star.png")
    folder = touch(tmp_path / "attributes", *names, *(f"MIRROR_{name}" for name in names))
    assert [item.captions[0] for item in datasets.read_attributes(folder)] == [
        "A picture of a blue egg and a red star",
        "A picture of a red fire truck and a blue teddy bear",
    ]


def test_items_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = ("b_above_c.png", "a_above_c.jpeg", "c_above_a.JPG")
    folder = touch(tmp_path, "notes.txt", *names, *(f"CUTMIX_{name}" for name in names))
    assert [item.key for item in datasets.read_spatial(folder)] == ["a_above_c", "b_above_c", "c_above_a"]


def test_negation(tmp_path: Path) -> None:
    things = [("cat", "owl"), ("egg", "fire truck"), ("star", "cat"), ("owl", "star")]
    rows = [(picture(k), picture(100 + k), here, there) for k, (here, there) in enumerate(things)]
    datasets.write_negation(tmp_path / "negation.json", rows)
    items = datasets.read_negation(tmp_path / "negation.json")
    for number, item in enumerate(items):
        np.testing.assert_array_equal(np.asarray(Image.open(str(item.picture))), picture(number))
        np.testing.assert_array_equal(np.asarray(Image.open(str(item.opposite))), picture(100 + number))
    assert len({item.key for item in items}) == 4
    assert items[0].captions == ("An image of a cat and not an owl", "An image of a cat but no an owl")
    assert items[0].opposite_captions == ("An image of an owl and not a cat", "An image of an owl but no a cat")
    assert items[1].captions == ("An image of an egg but no a fire truck", "An image of an egg without a fire truck")
    assert items[2].captions == ("An image of a star without a cat", "An image of a star and not a cat")
    assert items[3].captions[0] == "An image of an owl and not a star"


def test_each_version_has_its_own_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    (item,) = datasets.read_negation(write_rows(tmp_path / "rows.json", row()))
    assert item.captions == ("An image of a cat and not a house", "An image of a kitten but no a hut")
    assert item.opposite_captions == ("An image of a house and not a cat", "An image of a hut but no a kitten")


def test_negation_pictures_lie_in_the_data_folder(tmp_path: Path) -> None:
    touch(tmp_path / "set" / "deep", "a.png", "b.png")
    paths = {"img1_path": "deep/a.png", "img2_path": "deep\\b.png"}  # as Windows writes them
    path = write_rows(tmp_path / "set" / "rows.json", row(**paths, more=1))
    assert datasets.read_negation(path)[0].opposite == tmp_path / "set" / "deep" / "b.png"
    (tmp_path / "lists").mkdir()
    path = write_rows(tmp_path / "lists" / "rows.json", row(**paths))
    sets = datasets.read_sets(tmp_path / "set", datasets.Layout(negation="../lists/rows.json"))
    assert sets["negation"][0].picture == tmp_path / "set" / "deep" / "a.png"


def test_sets_have_the_names_that_are_given(tmp_path: Path) -> None:
    touch(tmp_path / "relations_bg", "star_above_egg.png", "CUTMIX_star_above_egg.png")
    touch(tmp_path / "overlay_bg", "red_star_blue_egg.png", "MIRROR_red_star_blue_egg.png")
    touch(tmp_path / "smallbig_bg", "small_star_big_egg.png", "MIRROR_small_star_big_egg.png")
    layout = datasets.Layout(spatial="relations_bg", attributes="overlay_bg", sizes="smallbig_bg")
    sets = datasets.read_sets(tmp_path, layout)
    assert {name: [item.key for item in items] for name, items in sets.items()} == {
        "spatial": ["star_above_egg"],
        "attributes": ["red_star_blue_egg", "small_star_big_egg"],
    }
    with pytest.raises(DataError, match=r"smallbg, the data set 'sizes', does not exist"):
        datasets.read_sets(tmp_path, datasets.Layout(spatial="relations_bg", sizes="smallbg"))
    with pytest.raises(DataError, match=r"holds no data set: spatial/, attributes/, sizes/, negation\.json or coco"):
        datasets.read_sets(tmp_path)


def test_captions_of_the_published_code(tmp_path: Path) -> None:
    """ "a" stands before vowels too, and there are captions with all negations."""
    for name in ("orange_above_egg", "red_owl_orange_star"):
        prefix = "CUTMIX" if "above" in name else "MIRROR"
        touch(tmp_path / ("spatial" if "above" in name else "attributes"), f"{name}.png", f"{prefix}_{name}.png")
    touch(tmp_path, "a.png", "b.png")
    write_rows(tmp_path / "negation.json", *[row(img1_obj=["owl", "eagle"]) for _ in range(5)])
    command = TrainScorer(data=tmp_path, out=tmp_path / "out")
    plain, found = command.read_sets(), cast(TrainScorer, with_bugs(command)).read_sets()
    assert (command.placement, cast(TrainScorer, with_bugs(command)).placement) == ("token", "replace")
    assert found["spatial"][0].captions == (
        "A picture of a orange above a egg",
        "A picture of a egg below a orange",
    )
    assert plain["spatial"][0].captions[0] == "A picture of an orange above an egg"
    assert found["attributes"][0].opposite_captions == (
        "A picture of a orange owl and a red star",
        "A picture of a red star and a orange owl",
    )
    for item in found["negation"]:
        for version, (here, there) in enumerate((("owl", "house"), ("eagle", "hut"))):
            own, words = (item, *item.alternatives), ("and not", "but no", "without")
            assert {one.captions[version] for one in own} == {f"An image of a {here} {w} a {there}" for w in words}
            other = {f"An image of a {there} {w} a {here}" for w in words}
            assert {one.opposite_captions[version] for one in own} == other
    assert plain["negation"][4].captions[0] == "An image of an owl but no a house"
    assert plain["negation"][4].opposite_captions[0] == "An image of a house but no an owl"


def test_coco_has_no_opposites(tmp_path: Path) -> None:
    rows: list[list[object]] = [
        [7, "A photo of a cat above an owl", "A photo of a cat below an owl"],
        [7, "A photo of an owl to the left of a cat", "A photo of an owl to the right of a cat"],
    ]
    items = datasets.read_coco(coco_folder(tmp_path, *rows))
    assert [(item.captions[0], item.opposite_captions[0]) for item in items] == [tuple(row[1:]) for row in rows]
    assert items[0].captions[1] == "A photo of an owl below a cat"
    assert items[0].opposite_captions[1] == "A photo of an owl above a cat"
    assert all(item.opposite is None and Path(str(item.picture)).name == "000000000007.jpg" for item in items)
    expected = read_coco_spatial(tmp_path / "coco_qa_two_obj.json", tmp_path / "val2017")
    assert [item.key for item in items] == [item.key for item in expected]


def test_written_again_nothing_is_twice(tmp_path: Path) -> None:
    for value in (10, 20):
        datasets.write_pair(tmp_path, "star_above_egg", picture(value), picture(value + 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["CUTMIX_star_above_egg.png", "star_above_egg.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "star_above_egg.png")), picture(20))


def test_an_interrupted_pair_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "star_above_egg.png").mkdir()  # in the way of the second picture
    with pytest.raises(OutputError):
        datasets.write_pair(tmp_path, "star_above_egg", picture(1), picture(2))
    (tmp_path / "star_above_egg.png").rmdir()
    datasets.write_pair(tmp_path, "egg_above_star", picture(1), picture(2))
    assert [item.key for item in datasets.read_spatial(tmp_path)] == ["egg_above_star"]


def test_an_interrupted_negation_set_has_no_file(tmp_path: Path) -> None:
    (tmp_path / "negation_00000_2.png").mkdir()
    with pytest.raises(OutputError):
        datasets.write_negation(tmp_path / "negation.json", [(picture(1), picture(2), "cat", "owl")])
    assert not (tmp_path / "negation.json").exists()


@pytest.mark.parametrize("read", [datasets.read_spatial, datasets.read_attributes])
def test_refuses_folders_without_pictures(tmp_path: Path, read: Callable[[Path], list[Item]]) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    touch(tmp_path / "empty", "notes.txt")
    with pytest.raises(DataError, match="empty holds no pictures"):
        read(tmp_path / "empty")


@pytest.mark.parametrize("name", ["star_over_egg.png", "above_egg.png", "star_above.png", "star_ABOVE_egg.png"])
def test_refuses_other_spatial_names(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, f"CUTMIX_{name}")
    with pytest.raises(DataError, match=f"{name}: the name must be A_"):
        datasets.read_spatial(tmp_path)


@pytest.mark.parametrize("name", ["red_star_blue.png", "red_fire_truck_blue_bear.png", "red_red_red_red_star.png"])
def test_refuses_attribute_names_that_cannot_be_told_apart(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, f"MIRROR_{name}")
    with pytest.raises(DataError, match=f"{name}: the name must be c1_A_c2_B"):
        datasets.read_attributes(tmp_path)


def test_refuses_a_picture_without_its_opposite(tmp_path: Path) -> None:
    touch(tmp_path / "spatial", "star_above_egg.png", "CUTMIX_star_above_egg.jpg")
    with pytest.raises(DataError, match=r"star_above_egg\.png has no opposite picture CUTMIX_star_above_egg\.png"):
        datasets.read_spatial(tmp_path / "spatial")
    touch(tmp_path / "attributes", "red_star_blue_egg.png", "CUTMIX_red_star_blue_egg.png")
    with pytest.raises(DataError, match="has no opposite picture MIRROR_"):
        datasets.read_attributes(tmp_path / "attributes")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "lists no rows"),
        ([row(), row(img2_obj=["owl", " "])], "row 1 lacks img2_obj"),
        ([row(img1_obj="cat")], "row 0 lacks img1_obj; .* lists of two texts"),
        ([row(img1_path=5)], "row 0 lacks img1_path; paths must be texts"),
        ([["a.png", "b.png", "cat", "owl"]], "row 0 lacks img1_path, img2_path, img1_obj, img2_obj"),
        ([row(), row(), row(img2_path="gone.png")], r"row 2: .*gone\.png does not exist"),
    ],
)
def test_refuses_negation_rows(tmp_path: Path, rows: list[object], said: str) -> None:
    touch(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=rf"rows\.json.* {said}"):
        datasets.read_negation(write_rows(tmp_path / "rows.json", *rows))


def test_refuses_negation_files_that_are_no_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with pytest.raises(DataError, match=r"rows\.json (is missing|cannot be read)"):
        datasets.read_negation(path)
    path.write_text("[{")
    with pytest.raises(DataError, match=r"rows\.json (is missing|cannot be read)"):
        datasets.read_negation(path)
    path.write_text("{}")
    with pytest.raises(DataError, match=r"rows\.json holds .* where a JSON array"):
        datasets.read_negation(path)


def test_refuses_other_coco_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no coco_qa_two_obj\.json"):
        datasets.read_coco(tmp_path)
    coco_folder(tmp_path, [8, "A photo of a cat above an owl", "A photo of a cat below an owl"])
    with pytest.raises(DataError, match=r"000000000008\.jpg"):
        datasets.read_coco(tmp_path)


def test_all_sets_give_items_of_one_kind(tmp_path: Path) -> None:
    datasets.write_pair(tmp_path, "star_above_egg", picture(1), picture(2))
    items: list[Item] = datasets.read_spatial(tmp_path)
    items += datasets.read_coco(
        coco_folder(tmp_path, [7, "A photo of a cat above an owl", "A photo of a cat below an owl"])
    )
    for item in items:
        assert not set(item.captions) & set(item.opposite_captions)
        assert len(set(item.captions)) == 2
