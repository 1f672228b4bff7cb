"""Question files with bad rows, their keys, and the chosen placements of grid folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_spatial import find_coco_spatial, read_coco_spatial, write_coco_spatial
from jaxid.data.grid import NEAR_FAR, near_far_items, read_grid_folder, write_grid_folder
from jaxid.data.scenes import sample_free
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
    with pytest.raises(DataError, match="holds a dict"):
        read_coco_spatial(rows(tmp_path / "file.json", {}), tmp_path, bad=[])


def test_both_places_of_pictures_are_found(tmp_path: Path):
    with pytest.raises(DataError, match=r"holds no coco_qa_two_obj\.json"):
        find_coco_spatial(tmp_path / "missing")
    path = rows(tmp_path / "coco_qa_two_obj.json", [])
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
        with Image.open(item.picture) as file:
            drawn = (np.asarray(file) < 255).any(-1).reshape(4, 8, 4, 8).any(axis=(1, 3))
        assert {(int(x), int(y)) for y, x in np.argwhere(drawn)} == {(0, 0), (3, 0)}


def test_near_far_is_picked_out_of_a_whole_folder(tmp_path: Path):
    write_grid_folder(tmp_path / "a", [("star", "fish")], picture_size=8, object_sizes=(224,))
    assert len(near_far_items(tmp_path / "a")) == 2
    write_grid_folder(tmp_path / "b", [("star", "fish")], picture_size=8, object_sizes=(74,), cells=[((1, 1), (2, 2))])
    with pytest.raises(DataError, match="0_0 and 3_0"):
        near_far_items(tmp_path / "b")


@pytest.mark.parametrize("cells", [[], [((0, 0), (0, 0))], [((0, 0), (4, 0))]])
def test_cells_off_the_grid_are_refused(cells: list, tmp_path: Path):
    with pytest.raises(InputError, match="names no placements"):
        write_grid_folder(tmp_path, [("star", "fish")], cells=cells)
    with pytest.raises(InputError, match="names no placements"):
        write_grid_folder(tmp_path, [("star", "fish")], forbid_same_row=True, cells=NEAR_FAR)
    assert not list(tmp_path.iterdir())
