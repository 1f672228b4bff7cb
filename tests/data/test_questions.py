"""What the question files and the chosen placements of grid folders give: keys, bad rows, near/far, in between."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_spatial import find_coco_spatial, read_coco_spatial, write_coco_spatial
from jaxid.data.grid import NEAR_FAR, near_far_items, read_grid_folder, write_grid_folder
from jaxid.data.relations import is_between
from jaxid.data.scenes import OBJECTS, render, sample_free
from jaxid.data.three_objects import read_three_objects, sample_in_between, write_three_objects
from jaxid.errors import DataError, InputError

RNG = np.random.default_rng(0)
GOOD = ["A photo of a cup above a dining table", "A photo of a cup below a dining table"]


def picture(folder: Path, image_id: int) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{image_id:012d}.jpg"
    Image.new("RGB", (4, 4)).save(path)
    return path


def rows(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


# --- COCO-Spatial -----------------------------------------------------------------------------------------------


def test_bad_rows_are_noted_and_the_others_keep_their_keys(tmp_path: Path):
    picture(tmp_path, 1)
    content = [[1, *GOOD], "text", [2, *GOOD], [1, *GOOD], [1, GOOD[0], GOOD[0]]]
    path = rows(tmp_path / "coco_qa_two_obj.json", content)
    bad: list[tuple[str, DataError]] = []
    items = read_coco_spatial(path, tmp_path, bad=bad)
    assert [item.row for item in items] == [0, 3]
    assert [name for name, _ in bad] == ["row 1", "row 2", "row 4"]
    assert "malformed" in str(bad[0][1])
    assert "000000000002.jpg" in str(bad[1][1])
    assert "does not contradict" in str(bad[2][1])
    # The same question twice, and yet two keys; rows left out change none.
    assert [item.key for item in items] == [
        "00000-000000000001-cup-above-dining table",
        "00003-000000000001-cup-above-dining table",
    ]
    with pytest.raises(DataError, match="row 1"):
        read_coco_spatial(path, tmp_path)


def test_a_file_that_is_no_list_is_an_error_even_with_bad_rows(tmp_path: Path):
    with pytest.raises(DataError, match="holds dict where a JSON array"):
        read_coco_spatial(rows(tmp_path / "file.json", {}), tmp_path, bad=[])


def test_both_places_of_pictures_are_found(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no coco_qa_two_obj\.json"):
        find_coco_spatial(tmp_path / "missing")
    path = rows(tmp_path / "coco_qa_two_obj.json", [])
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.jpg")  # no picture of the data set
    (tmp_path / "val2017").mkdir()
    with pytest.raises(DataError, match=r"val2017 nor .* holds pictures such as 000000000001\.jpg"):
        find_coco_spatial(tmp_path)
    picture(tmp_path, 1)
    assert find_coco_spatial(tmp_path) == (path, tmp_path)
    picture(tmp_path / "val2017", 1)
    assert find_coco_spatial(str(tmp_path)) == (path, tmp_path / "val2017")


def test_written_folder_is_found_and_its_keys_differ(tmp_path: Path):
    written = write_coco_spatial(tmp_path, sample_free(RNG, 12, num_objects=(2, 2)), 32)
    assert read_coco_spatial(*find_coco_spatial(tmp_path)) == written
    assert len({item.key for item in written}) == 12


# --- near and far -----------------------------------------------------------------------------------------------


def test_only_chosen_placements_are_drawn_and_read_back(tmp_path: Path):
    pairs = [("star", "fish"), ("fish", "star")]
    written = write_grid_folder(tmp_path, pairs, picture_size=32, object_sizes=(224, 124), cells=NEAR_FAR)
    names = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert names == sorted(
        f"{first}_{second}/{cells}_{size}.png"
        for first, second in pairs
        for cells in ("0_0/3_0", "3_0/0_0")
        for size in (224, 124)
    )
    assert set(read_grid_folder(tmp_path)) == set(written)
    items = near_far_items(tmp_path)
    assert {item.size for item in items} == {224}
    assert {(item.object_a, item.cell_a, item.cell_b) for item in items} == {
        (first, *cells) for first, _ in pairs for cells in NEAR_FAR
    }
    for item in items:
        with Image.open(str(item.picture)) as file:
            drawn = (np.asarray(file) < 255).any(-1).reshape(4, 8, 4, 8).any(axis=(1, 3))
        assert {(int(x), int(y)) for y, x in np.argwhere(drawn)} == {(0, 0), (3, 0)}


def test_near_far_is_picked_out_of_a_whole_folder(tmp_path: Path):
    write_grid_folder(tmp_path / "a", [("star", "fish")], picture_size=8, object_sizes=(224,))
    assert len(near_far_items(tmp_path / "a")) == 2
    cells = [((1, 1), (2, 2)), ((1, 1), (2, 2))]
    assert (
        len(write_grid_folder(tmp_path / "b", [("star", "fish")], picture_size=8, object_sizes=(74,), cells=cells)) == 1
    )
    with pytest.raises(DataError, match="0_0 and 3_0"):
        near_far_items(tmp_path / "b")


@pytest.mark.parametrize("cells", [[], [((0, 0), (0, 0))], [((0, 0), (4, 0))]])
def test_cells_off_the_grid_are_refused(cells: list, tmp_path: Path):
    with pytest.raises(InputError, match="names no placements"):
        write_grid_folder(tmp_path, [("star", "fish")], cells=cells)
    assert not list(tmp_path.iterdir())


# --- in between -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("third", "answer"),
    [
        ((0.5, 0.2), True),
        ((0.4, 0.25), True),
        ((0.25, 0.2), None),  # near one end
        ((0.5, 0.4), None),  # near the line
        ((0.5, 0.6), False),
        ((0.95, 0.2), False),  # beyond an end
        ((0.02, 0.2), False),
    ],
)
def test_in_between_is_said_only_where_it_is_clear(third: tuple[float, float], answer: bool | None):
    centers = np.array([(0.1, 0.2), (0.8, 0.2), third])
    assert is_between(centers) is answer
    assert is_between(centers[[1, 0, 2]]) is answer
    assert is_between(centers[:, ::-1]) is answer
    assert is_between(np.array([(0.1, 0.2), (0.3, 0.2), third])) is None  # nothing fits between these two


def test_sampled_scenes_hold_two_ends_of_the_first_row_and_every_other_time_something_between():
    scenes = sample_in_between(np.random.default_rng(1), 400)
    assert scenes.objects.shape == (400, 3)
    assert (np.sort(scenes.objects) == scenes.objects[np.arange(400)[:, None], scenes.objects.argsort()]).all()
    assert all(len(set(names)) == 3 for names in scenes.objects.tolist())
    cells = np.floor(scenes.centers * 4).astype(int)
    assert (cells[:, :2, 1] == 0).all()
    assert (np.sort(cells[:, :2, 0]) == [0, 3]).all()
    assert 0.4 < (cells[:, 0, 0] == 0).mean() < 0.6
    answers = [is_between(centers) for centers in scenes.centers]
    assert answers == [True, False] * 200
    assert len(set(map(tuple, cells[1::2, 2].tolist()))) == 8
    again = sample_in_between(np.random.default_rng(1), 400)
    np.testing.assert_array_equal(render(scenes[:4], 24), render(again[:4], 24))
    boxes = scenes.boxes
    assert boxes[..., :2].min() >= 0 and (boxes[..., :2] + boxes[..., 2:]).max() <= 1 + 1e-6


def test_three_objects_round_trip_balanced(tmp_path: Path):
    scenes = sample_in_between(RNG, 30)
    items = write_three_objects(tmp_path, scenes, 32)
    assert read_three_objects(tmp_path) == items
    assert len(items) == len({item.key for item in items}) == 30
    assert sum(item.between for item in items) == 15
    for item, names, centers in zip(items, scenes.objects, scenes.centers, strict=True):
        slots = [[OBJECTS[name] for name in names].index(name) for name in (item.a, item.b, item.c)]
        assert is_between(centers[slots]) is item.between
    first = json.loads((tmp_path / "three_objects.json").read_text())[0]
    assert first == [1, items[0].a, items[0].b, items[0].c, "yes"]
    assert items[0].key == f"00000-000000000001-{items[0].c}-{items[0].a}-{items[0].b}"
    with Image.open(str(items[7].picture)) as file:
        difference = np.asarray(file).astype(int) - render(scenes[7:8], 32)[0]
    assert np.abs(difference).mean() < 12


def test_unclear_scenes_are_left_out_and_wrong_ones_refused(tmp_path: Path):
    scenes = sample_free(np.random.default_rng(0), 60, num_objects=(3, 3))
    items = write_three_objects(tmp_path, scenes, 16)
    assert 0 < len(items) < 60
    assert read_three_objects(tmp_path) == items
    with pytest.raises(InputError, match="scene 0 must hold 3 different objects, has "):
        write_three_objects(tmp_path, sample_free(RNG, 2, num_objects=(2, 2)), 16)
    kept = {item.image_id - 1 for item in items}
    unclear = scenes[[index for index in range(60) if index not in kept]]
    with pytest.raises(InputError, match="no scene has an object"):
        write_three_objects(tmp_path / "none", unclear, 16)


@pytest.mark.parametrize(
    "row",
    [
        "text",
        [1, "cup", "key", "star"],
        ["1", "cup", "key", "star", "yes"],
        [True, "cup", "key", "star", "yes"],
        [-1, "cup", "key", "star", "yes"],
        [1, "cup", "key", "star", "maybe"],
        [1, "cup", "key", "cup", "no"],
        [1, "cup", " ", "star", "no"],
        [1, "cup", 2, "star", "no"],
        [2, "cup", "key", "star", "no"],  # has no picture
    ],
)
def test_malformed_three_object_rows_are_named_or_noted(row: object, tmp_path: Path):
    picture(tmp_path, 1)
    rows(tmp_path / "three_objects.json", [row, [1, "cup", "dining table", "star", "no"]])
    with pytest.raises(DataError, match="row 0"):
        read_three_objects(tmp_path)
    bad: list[tuple[str, DataError]] = []
    (item,) = read_three_objects(tmp_path, bad=bad)
    assert [name for name, _ in bad] == ["row 0"]
    assert (item.row, item.b, item.between, item.picture) == (1, "dining table", False, tmp_path / f"{1:012d}.jpg")


def test_three_object_folder_failures(tmp_path: Path):
    with pytest.raises(DataError, match=r"three_objects\.json is missing"):
        read_three_objects(tmp_path)
    rows(tmp_path / "three_objects.json", {})
    with pytest.raises(DataError, match="holds dict where a JSON array"):
        read_three_objects(tmp_path, bad=[])
    rows(tmp_path / "three_objects.json", [[1, "cup", "key", "star", "no"]])
    with pytest.raises(DataError, match="holds pictures such as"):
        read_three_objects(tmp_path, bad=[])
