"""Boxes of COCO-Spatial items: read by pycocotools, chosen among instances, and every damage named."""

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid.data.coco_boxes import Instances, best_pair, find_instances, read_instances, upright_boxes
from jaxid.data.coco_spatial import SpatialItem, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError
from jaxid.prompts.pictures import Stored, open_picture


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


def bears() -> dict[str, Any]:
    """A teddy bear, a bear, another bear further to the left, and before them all a crowd of bears."""
    whole = content()
    whole["categories"] = [{"id": 1, "name": "bear"}, {"id": 2, "name": "teddy bear"}]
    entries = [(1, [1, 2, 3, 4], 1), (2, [5, 6, 3, 4], 0), (1, [30, 6, 3, 4], 0), (1, [20, 6, 3, 4], 0)]
    whole["annotations"] = [
        {"id": row, "image_id": 7, "category_id": category, "bbox": box, "iscrowd": crowd}
        for row, (category, box, crowd) in enumerate(entries)
    ]
    return whole


@pytest.mark.parametrize("reversed_", [False, True])
def test_a_bear_is_no_teddy_bear(tmp_path: Path, reversed_: bool) -> None:
    whole = bears()
    whole["categories"] = whole["categories"][:: -1 if reversed_ else 1]
    whole["annotations"] = whole["annotations"][:: -1 if reversed_ else 1]
    instances = read_instances(written(tmp_path, whole))
    for subject, other in (("bear", "teddy bear"), ("Bear", "Teddy Bear")):
        asked = item(subject=subject, object=other, relation="right")
        np.testing.assert_array_equal(instances.locate(asked).boxes, [[30, 6, 3, 4], [5, 6, 3, 4]])
        asked = item(subject=other, object=subject, relation="left")
        np.testing.assert_array_equal(instances.locate(asked).boxes, [[5, 6, 3, 4], [30, 6, 3, 4]])
    named = [*instances.boxes(asked, "bear").tolist()]
    assert sorted(named) == [[20, 6, 3, 4], [30, 6, 3, 4]]
    assert sorted(instances.boxes(asked, "bear", crowds=True).tolist()) == [[1, 2, 3, 4], *sorted(named)]
    with pytest.raises(DataError, match="no category 'bears'"):
        instances.boxes(asked, "bears")


def test_the_published_box_is_that_of_the_first_category_that_contains_the_name(tmp_path: Path) -> None:
    whole = bears()
    for crowd, expected in (([], [5, 6, 3, 4]), (whole["annotations"][:1], [1, 2, 3, 4])):
        instances = read_instances(written(tmp_path, whole | {"annotations": crowd + whole["annotations"][1:]}))
        asked = item(subject="bear", object="Teddy", relation="right")
        placed = instances.locate(asked, Instances.first_box)
        np.testing.assert_array_equal(placed.boxes, [expected, [5, 6, 3, 4]])
    for name in ("bears", "cat"):
        with pytest.raises(DataError, match=f"no box for the object '{name}'"):
            instances.locate(item(subject=name, object="bear"), Instances.first_box)
    with pytest.raises(DataError, match="does not list this picture"):
        instances.locate(item(image_id=8, subject="bear", object="bear"), Instances.first_box)


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
    "outside on the right": (changed(bbox=[38, 0, 6, 4]), {}, r"\[38.0, 0.0, 6.0, 4.0\] of 'cat' is outside"),
    "outside above": (changed(bbox=[3, -5, 6, 4]), {}, "outside the picture of 40 x 30"),
    "wholly beyond the edge": (changed(bbox=[40, 0, 1, 4]), {}, "outside"),
    "no area": (changed(bbox=[3, 5, 0, 4]), {}, "annotation 0 of 'cat'"),
    "three numbers": (changed(bbox=[3, 5, 4]), {}, "expected four numbers"),
    "words": (changed(bbox="all of it"), {}, "all of it"),
    "beyond all pictures": (changed(bbox=[3, 5, 4, 10**400]), {}, "expected four numbers"),
    "true": (changed(bbox=[3, 5, 4, True]), {}, "True"),
    "no box": (changed(bbox=None), {}, "None"),
    "no such object": (content(), {"object": "bus"}, "no box for the object 'bus'"),
    "no such category": (content(), {"subject": "yak"}, "no category 'yak'"),
    "no such picture": (content(), {"image_id": 8}, "does not list this picture"),
    "another size": (
        content(),
        {"picture": np.zeros((30, 41, 3), np.uint8)},
        "41 x 30 pixels, but .* 40 x 30",
    ),
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


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_text("no picture")
    instances = read_instances(written(tmp_path, content()))
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        instances.locate(item(picture=tmp_path / "broken.jpg"))
    with pytest.raises(DataError, match=r"none\.jpg does not exist|no picture at .*none\.jpg"):
        instances.locate(item(picture=tmp_path / "none.jpg"))


# --- orientation tags -----------------------------------------------------------------------------------------------


def scene(path: Path, orientation: int, size: tuple[int, int] = (40, 30)) -> np.ndarray:
    """Stores a picture whose cat, at [2, 3, 4, 6] of the stored pixels, is bright; returns the upright picture."""
    picture = np.zeros((*size[::-1], 3), np.uint8)
    picture[3:9, 2:6] = 255
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(path, exif=exif)
    return np.asarray(open_picture(path))


def cat_and_dog(width: Any, height: Any) -> dict[str, Any]:
    whole = content()
    whole["images"][0] |= {"width": width, "height": height}
    whole["annotations"] = [
        {"id": 0, "image_id": 7, "category_id": 1, "bbox": [2, 3, 4, 6]},
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [20, 20, 4, 4]},
    ]
    return whole


def cropped(picture: np.ndarray, box: np.ndarray) -> np.ndarray:
    x, y, width, height = box.astype(int)
    return picture[y : y + height, x : x + width]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_stored_pixels_follow_the_picture(orientation: int, tmp_path: Path) -> None:
    upright = scene(tmp_path / "a.png", orientation)
    placed = read_instances(written(tmp_path, cat_and_dog(40, 30))).locate(item(picture=tmp_path / "a.png"))
    assert placed.size == (30, 40)
    shown = cropped(upright, placed.boxes[0])
    assert shown.shape == (4, 6, 3) and shown.all() and shown.sum() == upright.sum()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_the_upright_picture_stay(orientation: int, tmp_path: Path) -> None:
    scene(tmp_path / "a.png", orientation)
    placed = read_instances(written(tmp_path, cat_and_dog(30, 40))).locate(item(picture=tmp_path / "a.png"))
    assert placed.size == (30, 40)
    np.testing.assert_array_equal(placed.boxes, [[2, 3, 4, 6], [20, 20, 4, 4]])


@pytest.mark.parametrize(("orientation", "side"), [(2, 30), (3, 30), (4, 30), (5, 40), (6, 40), (7, 40), (8, 40)])
def test_tags_that_keep_the_size_leave_it_open(orientation: int, side: int, tmp_path: Path) -> None:
    scene(tmp_path / "a.png", orientation, (40, side))
    instances = read_instances(written(tmp_path, cat_and_dog(40, side)))
    with pytest.warns(UserWarning, match=f"item '00000.*tag {orientation} leaves open"):
        placed = instances.locate(item(picture=tmp_path / "a.png"))
    np.testing.assert_array_equal(placed.boxes, [[2, 3, 4, 6], [20, 20, 4, 4]])


@pytest.mark.parametrize("size", [(41, 30), (30, 41), ("40", 30), (40, None)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sizes_of_neither_are_refused(orientation: int, size: Any, tmp_path: Path) -> None:
    scene(tmp_path / "a.png", orientation)
    instances = read_instances(written(tmp_path, cat_and_dog(*size)))
    with pytest.raises(DataError, match=f"40 x 30 pixels.*, but the boxes are for {size[0]} x {size[1]}"):
        instances.locate(item(picture=tmp_path / "a.png"))


def test_without_a_stated_size_the_boxes_tell() -> None:
    low, high = np.array([[0.0, 25, 10, 14]]), np.array([[25.0, 0, 14, 10]])
    turned = Stored((40, 30), 6)
    np.testing.assert_array_equal(upright_boxes(low, turned, "row 1"), low)
    np.testing.assert_array_equal(upright_boxes(high, turned, "row 1"), [[20, 25, 10, 14]])
    np.testing.assert_array_equal(upright_boxes(low, Stored((40, 30)), "row 1"), low)
    for undecided in (low[:, [0, 0, 2, 2]], np.array([[50.0, 50, 1, 1]])):
        with pytest.warns(UserWarning, match="^row 1.*leaves open"):
            np.testing.assert_array_equal(upright_boxes(undecided, turned, "row 1"), undecided)


# --- files of another form ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "whole",
    [
        [],
        None,
        {"images": []},
        3,
        "text",
        {"images": [{}], "annotations": [], "categories": []},
        {"images": [3], "annotations": [], "categories": []},
        {"images": [{"id": [7]}], "annotations": [], "categories": []},
        {"images": [], "annotations": {}, "categories": []},
        {"images": [], "annotations": [], "categories": ["cat"]},
        changed(category_id=None),
        changed(bbox=[3, 5, 4, float("nan")]),
        changed(bbox=[3, 5, 4, float("inf")]),
    ],
)
def test_files_of_another_form(whole: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, whole)
    with pytest.raises(DataError, match=r"instances format|JSON") as caught:
        read_instances(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and capsys.readouterr().out == ""


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json is missing"):
        read_instances(tmp_path / "none.json")
    path = written(tmp_path, content())
    whole = path.read_text()
    for damaged in (whole[:-20], "[" * 100_000, ""):
        path.write_text(damaged)
        with pytest.raises(DataError, match="cannot be read as a JSON file"):
            read_instances(path)
    path.write_text(whole, encoding="utf-8-sig")
    assert read_instances(path).coco.imgs.keys() == {7}


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
