import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_boxes import read_instances
from jaxid.data.coco_spatial import OPPOSITE, caption, query, read_coco_spatial, write_coco_spatial
from jaxid.data.grid import (
    FinetuneItem,
    finetune_name,
    parse_finetune_name,
    placements,
    read_grid_folder,
    write_grid_folder,
)
from jaxid.data.scenes import OBJECTS, render, sample_free
from jaxid.errors import DataError, InputError


def test_placements_are_all_ordered_pairs_of_cells():
    everything = placements()
    assert len(everything) == len(set(everything)) == 16 * 15
    assert all(a != b for a, b in everything)


def test_grid_folder_round_trip(tmp_path: Path):
    pairs = [("star", "fish")]
    apart = [(a, b) for a, b in placements() if a[0] != b[0] and a[1] != b[1]]
    options = {"picture_size": 16, "object_sizes": (224, 74), "cells": apart}
    written = write_grid_folder(tmp_path / "a", pairs, **options)
    assert len(written) == 2 * 16 * 9
    read = read_grid_folder(tmp_path / "a")
    assert set(read) == set(written)
    assert (tmp_path / "a" / "star_fish" / "0_1" / "3_2_74.png") in {Path(str(item.picture)) for item in read}
    assert [item.size for item in read[:2]] == [224, 74]
    with Image.open(str(read[0].picture)) as picture:
        assert picture.size == (16, 16)
    again = write_grid_folder(tmp_path / "b", pairs, **options)
    for one, other in zip(again[::20], written[::20], strict=True):
        assert Path(str(one.picture)).read_bytes() == Path(str(other.picture)).read_bytes()


def test_grid_pictures_show_the_objects_in_their_cells(tmp_path: Path):
    items = write_grid_folder(tmp_path, [("square", "circle")], picture_size=32, object_sizes=(174,))
    for item in items[::7]:
        with Image.open(str(item.picture)) as picture:
            cells = (np.asarray(picture) < 255).any(-1).reshape(4, 8, 4, 8).any(axis=(1, 3))
        assert {(int(x), int(y)) for y, x in np.argwhere(cells)} == {item.cell_a, item.cell_b}


def test_grid_folder_failures(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing does not exist"):
        read_grid_folder(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no pictures"):
        read_grid_folder(tmp_path)
    for wrong in ("star_fish/0_1/4_0_224.png", "star/0_1/3_0_224.png", "star_fish/0_1.png", "a_b/1_1/1_1_74.png"):
        path = tmp_path / wrong
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        with pytest.raises(DataError, match=path.name):
            read_grid_folder(tmp_path)
        path.unlink()
    with pytest.raises(InputError, match="robot"):
        write_grid_folder(tmp_path, [("star", "robot")])
    with pytest.raises(InputError, match="two different"):
        write_grid_folder(tmp_path, [("star", "star")])


def test_finetune_names_round_trip():
    item = FinetuneItem(object_a="polar bear", cell_a=(0, 3), object_b="cup", cell_b=(2, 1))
    assert finetune_name(item) == "polar bear_0-3_cup_2-1.png"
    assert parse_finetune_name(finetune_name(item)) == item
    for a, b in placements()[::13]:
        item = FinetuneItem(object_a="tree", cell_a=a, object_b="traffic light", cell_b=b)
        assert parse_finetune_name(finetune_name(item)) == item


@pytest.mark.parametrize(
    "name",
    [
        "cup_0-3_star_2-4.png",
        "cup_0-3_star_2-1.jpg",
        "cup_0-3_star_2-1.png.png",
        "cup_0-3_star.png",
        "cup_03_star_21.png",
        "_0-3_star_2-1.png",
        "a_cup_0-3_star_2-1.png",
        "cup _0-3_star_2-1.png",
        "cup_0-3_star_0-3.png",
        "folder/cup_0-3_star_2-1.png\n",
        "",
    ],
)
def test_wrong_finetune_names_are_refused(name: str):
    with pytest.raises(DataError) as caught:
        parse_finetune_name(name)
    assert repr(name) in str(caught.value)


def test_items_without_a_finetune_name_are_refused():
    for first, cell in (("polar_bear", (0, 0)), ("cup", (0, 4)), ("cup", (1, 1))):
        with pytest.raises(InputError, match="no file name"):
            finetune_name(FinetuneItem(object_a=first, cell_a=cell, object_b="star", cell_b=(1, 1)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("coco")
    scenes = sample_free(np.random.default_rng(0), 80, num_objects=(2, 2))
    return folder, scenes, write_coco_spatial(folder, scenes, 64)


def test_coco_spatial_round_trip(dataset):
    folder, scenes, items = dataset
    assert read_coco_spatial(folder / "coco_qa_two_obj.json", folder / "val2017") == items
    counts = Counter(item.relation for item in items)
    assert set(counts) == set(OPPOSITE)
    assert max(counts.values()) - min(counts.values()) <= 4
    first = json.loads((folder / "coco_qa_two_obj.json").read_text())[0]
    assert first[0] == 1
    assert first[1] == caption(items[0].subject, items[0].object, items[0].relation)
    assert sorted(path.name for path in (folder / "val2017").iterdir())[0] == "000000000001.jpg"
    with Image.open(str(items[5].picture)) as picture:
        difference = np.asarray(picture).astype(int) - render(scenes[5:6], 64)[0]
    assert np.abs(difference).mean() < 8


def test_coco_spatial_relations_are_true_and_clear(dataset):
    folder, _, items = dataset
    instances = read_instances(folder / "instances_val2017.json")
    for item in items:
        (subject,), (object_,) = instances.boxes(item, item.subject), instances.boxes(item, item.object)
        right, down = (subject[:2] + subject[2:] / 2 - object_[:2] - object_[2:] / 2) / 64
        distance = {"left": -right, "right": right, "above": -down, "below": down}[item.relation]
        assert distance > 0.12
        assert item.query == query(item.subject, item.object, item.relation)


def test_coco_spatial_instances_load_in_pycocotools(dataset, capsys):
    coco_module = pytest.importorskip("pycocotools.coco")
    folder, scenes, items = dataset
    coco = coco_module.COCO(str(folder / "instances_val2017.json"))
    capsys.readouterr()
    assert len(coco.getImgIds()) == len(items)
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(OBJECTS)
    assert coco.loadImgs([1])[0]["file_name"] == "000000000001.jpg"
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[3], iscrowd=False))
    np.testing.assert_allclose([annotation["bbox"] for annotation in annotations], scenes.boxes[2] * 64, rtol=1e-5)
    assert all(annotation["area"] > 0 for annotation in annotations)
    corners = np.reshape(annotations[0]["segmentation"][0], (4, 2))
    assert np.prod(corners.max(0) - corners.min(0)) == pytest.approx(annotations[0]["area"])


def test_coco_spatial_noise_changes_the_pictures_alone(tmp_path: Path):
    scenes = sample_free(np.random.default_rng(3), 4, num_objects=(2, 2))
    folders = [tmp_path / name for name in ("clean", "noisy", "again")]
    written = [
        write_coco_spatial(folder, scenes, 64, noise=noise)
        for folder, noise in zip(folders, (0.0, 0.3, 0.3), strict=True)
    ]
    for name in ("coco_qa_two_obj.json", "instances_val2017.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    clean, noisy, again = ([np.asarray(Image.open(str(item.picture)), float) for item in items] for items in written)
    for one, other, same in zip(clean, noisy, again, strict=True):
        assert 25 < np.std(other - one) < 77  # what is beyond black and white is cut off
        np.testing.assert_array_equal(other, same)
    with pytest.raises(InputError, match="noise is a share"):
        write_coco_spatial(tmp_path / "wrong", scenes, 64, noise=-0.1)


def test_coco_spatial_writer_refuses_unclear_scenes(tmp_path: Path):
    three = sample_free(np.random.default_rng(0), 2, num_objects=(3, 3))
    with pytest.raises(InputError, match="scene 0 must hold 2 different objects"):
        write_coco_spatial(tmp_path, three, 16)
    two = sample_free(np.random.default_rng(0), 2, num_objects=(2, 2))
    with pytest.raises(InputError, match="no relation between them is clear"):
        write_coco_spatial(tmp_path, two, 16, min_distance=0.99)


def write_rows(folder: Path, rows: object) -> Path:
    path = folder / "coco_qa_two_obj.json"
    path.write_text(json.dumps(rows))
    return path


def test_published_captions_are_read(tmp_path: Path):
    for number in (7, 8):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:012d}.jpg")
    path = write_rows(
        tmp_path,
        [
            [
                7,
                "A photo of an orange to the left of a dining table",
                "A photo of an orange to the right of a dining table",
            ],
            [8, "A photo of a small red cup above an umbrella", "A photo of an umbrella above a small red cup"],
        ],
    )
    first, second = read_coco_spatial(path, tmp_path)
    assert (first.subject, first.relation, first.object) == ("orange", "left", "dining table")
    assert first.query == "Is the orange to the left or right of the dining table?"
    assert second.query == "Is the small red cup above or below the umbrella?"
    assert second.picture == tmp_path / "000000000008.jpg"


GOOD = [1, "A photo of a cup above a key", "A photo of a cup below a key"]


@pytest.mark.parametrize(
    "row",
    [
        "text",
        [1, "A photo of a cup above a key"],
        ["1", *GOOD[1:]],
        [True, *GOOD[1:]],
        [1, "A photo of a cup near a key", GOOD[2]],
        [1, GOOD[1], "A photo of cup below a key"],
        [1, GOOD[1], None],
        [1, GOOD[1], GOOD[1]],
        [1, GOOD[1], "A photo of a cup to the left of a key"],
        [1, GOOD[1], "A photo of a cup below a ring"],
        [1, "A photo of a very small old cup above a key", GOOD[2]],
    ],
)
def test_malformed_rows_are_named(tmp_path: Path, row: object):
    Image.new("RGB", (4, 4)).save(tmp_path / f"{1:012d}.jpg")
    path = write_rows(tmp_path, [GOOD, row])
    with pytest.raises(DataError) as caught:
        read_coco_spatial(path, tmp_path)
    message = str(caught.value)
    assert "row 1" in message
    assert repr(row) in message
    assert "expected [image_id, right caption, wrong caption]" in message


def test_missing_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"000000000001\.jpg"):
        read_coco_spatial(write_rows(tmp_path, [GOOD]), tmp_path)
    with pytest.raises(DataError, match="holds dict where a JSON array"):
        read_coco_spatial(write_rows(tmp_path, {}), tmp_path)
    with pytest.raises(DataError, match=r"absent\.json is missing"):
        read_coco_spatial(tmp_path / "absent.json", tmp_path)
    (tmp_path / "broken.json").write_text("[1,")
    with pytest.raises(DataError, match=r"broken\.json cannot be read as a JSON file"):
        read_coco_spatial(tmp_path / "broken.json", tmp_path)
    for content in ({"images": []}, {"images": [], "categories": [], "annotations": [{"image_id": 1}]}):
        with pytest.raises(DataError, match="instances format"):
            read_instances(write_rows(tmp_path, content))


def test_captions_and_queries_know_four_relations():
    assert caption("orange", "cup", "right") == "A photo of an orange to the right of a cup"
    assert query("cup", "orange", "below") == "Is the cup above or below the orange?"
    for function in (caption, query):
        with pytest.raises(InputError, match="near"):
            function("cup", "key", "near")
