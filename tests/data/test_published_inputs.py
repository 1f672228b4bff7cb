"""The published data sets as they lie on disk: near/far and in-between pictures, MVBench's manifest, captions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid.data.clips import read_mvbench
from jaxid.data.coco_spatial import read_coco_spatial
from jaxid.data.grid import near_far_items, read_grid_folder
from jaxid.data.three_objects import parse_between_name, read_three_objects
from jaxid.errors import DataError
from jaxid.prompts.pictures import WithoutAlpha, open_picture, stored


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)


# --- near and far ---------------------------------------------------------------------------------------------------


def test_the_flat_near_far_folder_asks_about_the_first_object(tmp_path: Path) -> None:
    pictures(
        tmp_path,
        "camel_3-0_polar bear_0-0.png",
        "camel_0-0_frog_3-0.png",
        "MIRROR_camel_0-0_frog_3-0.png",
        "camel_0-0_frog_2-1.png",
        "camel_0-3_frog_3-3.png",
    )
    (tmp_path / "README.txt").write_text("passed over")
    first, second = near_far_items(tmp_path)
    assert (first.names, first.cell_a, first.cell_b) == (("camel", "frog"), (0, 0), (3, 0))
    assert (second.names, second.cell_a, second.cell_b) == (("camel", "polar bear"), (3, 0), (0, 0))
    assert first.key == "camel-frog-0_0-224" and first.picture == tmp_path / "camel_0-0_frog_3-0.png"
    pictures(tmp_path, "camel.png")
    with pytest.raises(DataError, match=r"'camel\.png' does not name a fine-tuning picture"):
        near_far_items(tmp_path)


def test_nested_near_far_folders_ask_about_the_second_object(tmp_path: Path) -> None:
    pictures(tmp_path, "camel_frog/0_0/3_0_224.png", "camel_frog/3_0/0_0_224.png", "camel_frog/3_0/0_0_74.png")
    assert [(item.names, item.key) for item in near_far_items(tmp_path)] == [
        (("frog", "camel"), "frog-camel-3_0-224"),
        (("frog", "camel"), "frog-camel-0_0-224"),
    ]


def test_names_with_underscores_are_told_apart_where_they_can_be(tmp_path: Path) -> None:
    pictures(tmp_path, "fire_truck_dog/0_0/1_0_224.png", "dog_fire_truck/0_0/1_0_224.png")
    assert {item.names for item in read_grid_folder(tmp_path)} == {("dog", "fire truck"), ("fire truck", "dog")}
    pictures(tmp_path, "dog_cat/0_0/1_0_224.png", "cat_dog/0_0/1_0_224.png")
    assert len(read_grid_folder(tmp_path)) == 4
    pictures(tmp_path, "a_b_c/0_0/1_0_224.png")
    with pytest.raises(DataError, match="a_b_c can be split into two names in several ways"):
        read_grid_folder(tmp_path)


# --- in between -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("cup_star_polar bear_true.png", ("cup", "star", "polar bear", True)),
        ("cup_star_fish_False.jpg", ("cup", "star", "fish", False)),
        ("cup_1-2_star_0-2_fish_3-2_true.png", ("cup", "star", "fish", True)),
        ("cup_between_star_and_fish_224_false.png", ("cup", "star", "fish", False)),
        ("cup_amid_star_plus_fish_true.png", ("cup", "star", "fish", True)),
    ],
)
def test_names_of_in_between_pictures(name: str, found: tuple[str, str, str, bool]) -> None:
    assert parse_between_name(name) == found


@pytest.mark.parametrize(
    "name", ["cup_star_true.png", "cup_star_fish.png", "cup_star_cup_true.png", "a_b_c_d_true.png", "_a_b_true.png", ""]
)
def test_wrong_names_of_in_between_pictures(name: str) -> None:
    with pytest.raises(DataError, match=r"expected \{C\}_\{A\}_\{B\}"):
        parse_between_name(name)


def test_a_folder_of_in_between_pictures(tmp_path: Path) -> None:
    pictures(tmp_path, "fish_cup_key_false.png", "cup_star_fish_true.png")
    first, second = read_three_objects(tmp_path)
    assert (first.c, first.a, first.b, first.between) == ("cup", "star", "fish", True)
    assert (second.c, second.between, second.picture) == ("fish", False, tmp_path / "fish_cup_key_false.png")
    assert first.key == "00000-000000000001-cup-star-fish" != second.key
    pictures(tmp_path, "cup_star_true.png")
    with pytest.raises(DataError, match=r"'cup_star_true\.png'"):
        read_three_objects(tmp_path)
    bad: list[tuple[str, DataError]] = []
    assert [item.c for item in read_three_objects(tmp_path, bad=bad)] == ["cup", "fish"]
    assert [name for name, _ in bad] == ["cup_star_true.png"]


# --- order of scenes ------------------------------------------------------------------------------------------------


def scenes(**changed: Any) -> dict[str, Any]:
    return {
        "video_path": "a.mp4",
        "scene1": "opens the door",
        "scene2": "sits down",
        "query": "Does the scene 'opens the door' occur before or after the scene 'sits down'?",
        "correct_order": [0, 1],
        "query_order": [0, 1],
    } | changed


def manifest(folder: Path, *rows: Any) -> None:
    (folder / "video").mkdir(exist_ok=True)
    (folder / "video" / "a.mp4").write_bytes(b"")
    (folder / "mvbench_scene_queries.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("correct", "asked", "answer"),
    [([0, 1], [0, 1], "before"), ([1, 0], [1, 0], "before"), ([1, 0], [0, 1], "after"), ([0, 1], [1, 0], "after")],
)
def test_the_published_manifest(correct: list[int], asked: list[int], answer: str, tmp_path: Path) -> None:
    manifest(tmp_path, scenes(correct_order=correct, query_order=asked))
    (item,) = read_mvbench(tmp_path)
    assert item == read_mvbench(tmp_path / "mvbench_scene_queries.json")[0]
    assert (item.answer, item.video) == (answer, tmp_path / "video" / "a.mp4")
    # The query says which scene it names first, whatever the orders count from.
    assert (item.scene1, item.scene2) == ("opens the door", "sits down")
    manifest(tmp_path, scenes(correct_order=correct, query_order=asked, query="Which is first?"))
    (item,) = read_mvbench(tmp_path)
    assert (item.answer, item.scene1) == (answer, "opens the door" if asked == [0, 1] else "sits down")


@pytest.mark.parametrize("order", [[0, 0], [0, 2], [0], [0, 1, 2], "0", [None, 1]])
def test_orders_that_are_none(order: object, tmp_path: Path) -> None:
    manifest(tmp_path, scenes(), scenes(query_order=order))
    with pytest.raises(DataError, match=r"query_order in row 1 of .*mvbench_scene_queries\.json is .*or \[0, 1\]"):
        read_mvbench(tmp_path)


def test_missing_videos_and_manifests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"or mvbench_scene_queries\.json; give"):
        read_mvbench(tmp_path)
    manifest(tmp_path, scenes(video_path="b.mp4"))
    with pytest.raises(DataError, match=r"video/b\.mp4 does not exist"):
        read_mvbench(tmp_path)
    manifest(tmp_path, scenes(video_path="../a.mp4"))
    with pytest.raises(DataError, match="leads out of"):
        read_mvbench(tmp_path)


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_with_and_without_an_article(tmp_path: Path) -> None:
    pictures(tmp_path, f"{7:012d}.jpg")
    rows = [
        [7, "A photo of a cat to the left of an orange", "A photo of a cat to the right of an orange"],
        [7, "A photo of a hair drier right of a cat", "A photo of a hair drier left of a cat"],
    ]
    (tmp_path / "coco_qa_two_obj.json").write_text(json.dumps(rows))
    found = read_coco_spatial(tmp_path / "coco_qa_two_obj.json", tmp_path)
    assert [(item.subject, item.relation, item.object) for item in found] == [
        ("cat", "left", "orange"),
        ("hair drier", "right", "cat"),
    ]


# --- alpha channels -------------------------------------------------------------------------------------------------


def test_alpha_is_blended_with_white_or_dropped(tmp_path: Path) -> None:
    colors = np.array([[(9, 8, 7, 0), (0, 0, 0, 0)], [(200, 100, 0, 255), (200, 100, 0, 51)]], np.uint8)
    Image.fromarray(colors).save(tmp_path / "a.png")
    shares = colors[..., 3:] / 255
    white = np.rint(shares * colors[..., :3] + (1 - shares) * 255)
    assert np.abs(np.asarray(open_picture(tmp_path / "a.png")) - white).max() <= 1
    dropped = WithoutAlpha(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(open_picture(dropped)), colors[..., :3])
    assert stored(dropped).size == (2, 2) and str(dropped) == str(tmp_path / "a.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert np.asarray(open_picture(tmp_path / "p.png")).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    assert np.asarray(open_picture(WithoutAlpha(tmp_path / "p.png"))).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "rgb.png")
    np.testing.assert_array_equal(open_picture(WithoutAlpha(tmp_path / "rgb.png")), open_picture(tmp_path / "rgb.png"))
