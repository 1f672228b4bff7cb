"""Boxes of COCO-Spatial items: read by pycocotools, chosen among instances, and every damage named."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_boxes import best_pair, find_instances, picture_size, read_instances
from jaxid.data.coco_spatial import SpatialItem, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError


def content() -> dict[str, Any]:
    """Two cats (and a crowd of them) and two dogs in a picture of 40 x 30."""
    boxes = [(1, [20, 0, 4, 4]), (1, [2, 0, 4, 4]), (2, [10, 10, 6, 6]), (2, [30, 20, 10.5, 10])]
    annotations = [
        {"id": row, "image_id": 7, "category_id": category, "bbox": box, "iscrowd": 0}
        for row, (category, box) in enumerate(boxes)
    ]
    crowd = {"id": 9, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 1}
    return {
        "images": [{"id": 7, "width": 40, "height": 30}],
        "annotations": [*annotations, crowd],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3, "name": "bus"}],
    }


def written(tmp_path: Path, what: Any) -> Path:
    path = tmp_path / "instances_val2017.json"
    path.write_text(json.dumps(what))
    return path


def item(**changed: Any) -> SpatialItem:
    fields = {"image_id": 7, "picture": np.zeros((30, 40, 3), np.uint8), "subject": "cat", "object": "Dog"}
    return SpatialItem(**{**fields, "relation": "left", **changed})


def test_boxes_of_the_pair_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    instances = read_instances(written(tmp_path, content()))
    assert capsys.readouterr().out == ""
    placed = instances.locate(item())
    assert placed.size == (40, 30) and placed.key == placed.item.key
    # The second cat is further to the left; the crowd is none. The dog's box is cut where it leaves the picture.
    np.testing.assert_array_equal(placed.boxes, [[2, 0, 4, 4], [30, 20, 10, 10]])
    np.testing.assert_allclose(placed.shares, [[0.05, 0, 0.1, 4 / 30], [0.75, 2 / 3, 0.25, 1 / 3]])
    np.testing.assert_array_equal(instances.locate(item(relation="right")).boxes, [[20, 0, 4, 4], [10, 10, 6, 6]])


@pytest.mark.parametrize(
    ("relation", "chosen"), [("left", (1, 0)), ("right", (0, 1)), ("above", (1, 1)), ("below", (0, 0))]
)
def test_choice_among_instances(relation: str, chosen: tuple[int, int]) -> None:
    subjects = np.array([[50.0, 60, 10, 10], [10, 10, 10, 10], [30, 30, 10, 10]])
    objects = np.array([[70.0, 0, 2, 2], [0, 80, 2, 2]])
    assert best_pair(subjects, objects, relation) == chosen
    assert best_pair(objects[:1], objects[[0, 0]], relation) == (0, 0)  # of equals, the first


def test_boxes_that_contradict_their_relation_are_seen(tmp_path: Path) -> None:
    instances = read_instances(written(tmp_path, content()))
    # Of two cats and two dogs, some pair fits each of these; no dog is above a cat.
    found = {
        relation: instances.locate(item(relation=relation)).against_relation for relation in ("left", "right", "below")
    }
    assert found == {"left": False, "right": False, "below": True}


def test_choice_needs_instances_and_a_relation() -> None:
    with pytest.raises(InputError, match="near"):
        best_pair(np.ones((1, 4)), np.ones((1, 4)), "near")
    with pytest.raises(InputError, match="1 and 0"):
        best_pair(np.ones((1, 4)), np.ones((0, 4)), "left")


def test_boxes_of_drawn_scenes_fit_their_relations(tmp_path: Path) -> None:
    scenes = sample_free(np.random.default_rng(0), 8, num_objects=(2, 2))
    items = write_coco_spatial(tmp_path, scenes, 40)
    instances = read_instances(find_instances(tmp_path))
    for row, one in enumerate(items):
        placed = instances.locate(one)
        drawn = scenes.boxes[row, scenes.objects[row] >= 0]
        assert placed.size == (40, 40)
        for box in placed.shares:
            assert np.abs(drawn - box).max(axis=1).min() < 1e-5
        centre = placed.boxes[:, :2] + placed.boxes[:, 2:] / 2
        axis, sign = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}[one.relation]
        assert sign * (centre[0, axis] - centre[1, axis]) > 0


def test_both_places_of_the_file_are_found(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no instances_val2017\.json"):
        find_instances(tmp_path)
    (tmp_path / "annotations").mkdir()
    below = written(tmp_path / "annotations", content())
    assert find_instances(tmp_path) == below
    assert find_instances(str(tmp_path)) == below
    beside = written(tmp_path, content())
    assert find_instances(tmp_path) == beside


def changed(**fields: Any) -> dict[str, Any]:
    """The content with the first cat's annotation changed, None taking a field away."""
    whole = content()
    first = whole["annotations"][0] | fields
    whole["annotations"][0] = {name: value for name, value in first.items() if value is not None}
    return whole


BAD = {
    "outside on the right": (changed(bbox=[38, 0, 6, 4]), {}, r"\[38.0, 0.0, 6.0, 4.0\] of 'cat' lies outside"),
    "outside above": (changed(bbox=[3, -5, 6, 4]), {}, "outside the picture of 40 x 30"),
    "wholly beyond the edge": (changed(bbox=[40, 0, 1, 4]), {}, "outside"),
    "no area": (changed(bbox=[3, 5, 0, 4]), {}, "annotation 0 of 'cat'"),
    "three numbers": (changed(bbox=[3, 5, 4]), {}, "expected four numbers"),
    "words": (changed(bbox="all of it"), {}, "all of it"),
    "not finite": (changed(bbox=[3, 5, 4, float("nan")]), {}, "nan"),
    "no box": (changed(bbox=None), {}, "None"),
    "no such object": (content(), {"object": "bus"}, "no box of it for the object 'bus'"),
    "no such category": (content(), {"subject": "yak"}, "no category 'yak'"),
    "no such picture": (content(), {"image_id": 8}, "no such picture"),
    "another size": (content(), {"picture": np.zeros((30, 41, 3), np.uint8)}, "41 x 30 pixels, the boxes.* 40 x 30"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_located_is_named(kind: str, tmp_path: Path) -> None:
    whole, fields, named = BAD[kind]
    path = written(tmp_path, whole)
    one = item(**fields)
    with pytest.raises(DataError, match=named) as caught:
        read_instances(path).locate(one)
    assert str(path) in str(caught.value) and one.key in str(caught.value)


def test_a_crowd_is_no_instance(tmp_path: Path) -> None:
    whole = content()
    for annotation in whole["annotations"][:2]:
        annotation["iscrowd"] = 1
    with pytest.raises(DataError, match="only a crowd"):
        read_instances(written(tmp_path, whole)).locate(item())


def test_sizes_of_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (9, 5)).save(tmp_path / "picture.png")
    assert picture_size(tmp_path / "picture.png") == picture_size(np.zeros((5, 9, 3), np.uint8)) == (9, 5)
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        picture_size(tmp_path / "broken.jpg")


@pytest.mark.parametrize(
    "whole",
    [[], {"images": []}, 3, {"images": [{}], "annotations": [], "categories": []}, changed(category_id=None)],
)
def test_files_of_another_form(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, whole)
    with pytest.raises(DataError, match="instances format") as caught:
        read_instances(path)
    assert str(path) in str(caught.value) and capsys.readouterr().out == ""


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_instances(tmp_path / "none.json")
    path = written(tmp_path, content())
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="instances format"):
        read_instances(path)


def test_pycocotools_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *more: Any, **named: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ImportError("No module named 'pycocotools'")
        return real(name, *more, **named)

    path = written(tmp_path, content())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'jaxid-vlm\[coco\]'"):
        read_instances(path)
