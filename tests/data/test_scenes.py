import dataclasses
import itertools

import numpy as np
import pytest

from jaxid.data.objects import half_sides, templates
from jaxid.data.scenes import (
    BACKGROUNDS,
    COLORS,
    OBJECTS,
    Scenes,
    concatenate,
    preview,
    render,
    sample_free,
    sample_grid,
)
from jaxid.errors import InputError, OutputError


@pytest.fixture(scope="module")
def free() -> Scenes:
    return sample_free(np.random.default_rng(0), 4000, num_objects=(0, 4), size_range=(0.15, 0.26))


def alone(angles: list[float], size: float = 0.75) -> Scenes:
    """Every object at every angle, one to a picture, black on white; the object varies slowest."""
    count = len(OBJECTS) * len(angles)
    return Scenes(
        objects=np.repeat(np.arange(len(OBJECTS)), len(angles))[:, None],
        colors=np.zeros((count, 1), int),
        fills=np.zeros((count, 1, 3), np.float32),
        centers=np.full((count, 1, 2), 0.5, np.float32),
        sizes=np.full((count, 1), size, np.float32),
        angles=np.tile(np.asarray(angles, np.float32), len(OBJECTS))[:, None],
        mirrored=np.zeros(count, bool),
        background_kinds=np.zeros(count, int),
        background_colors=np.ones((count, 2, 3), np.float32),
        background_seeds=np.zeros(count, int),
    )


def test_names_are_single_words_without_clash():
    names = [*OBJECTS, *COLORS]
    assert len(OBJECTS) == 16
    assert len(set(names)) == len(names)
    # Prompts say "a <name>": no name may ask for "an".
    assert all(name.isalpha() and name.islower() and name[0] not in "aeiou" for name in OBJECTS)


def test_same_seed_gives_the_same_pictures():
    def draw(seed: int) -> np.ndarray:
        return render(sample_free(np.random.default_rng(seed), 6), 40)

    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()


def test_pictures_do_not_depend_on_their_neighbours(free: Scenes):
    whole = render(free[:70], 24)
    np.testing.assert_array_equal(whole[40:50], render(free[40:50], 24))
    np.testing.assert_array_equal(whole[::7], render(free[np.arange(0, 70, 7)], 24))


def test_objects_stay_apart_and_inside(free: Scenes):
    present = free.objects >= 0
    boxes = free.boxes[present]
    assert boxes[:, :2].min() >= 0
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6
    for first, second in itertools.combinations(range(4), 2):
        both = present[:, first] & present[:, second]
        apart = np.abs(free.centers[both, first] - free.centers[both, second]).max(-1)
        gap = apart - (free.sizes[both, first] + free.sizes[both, second]) / 2
        assert gap.min() >= 0.02 - 1e-6
        assert (free.objects[both, first] != free.objects[both, second]).all()
    assert np.array_equal(np.unique(present.sum(1)), np.arange(5))
    assert (present == (free.colors >= 0)).all()
    assert (free.sizes[~present] == 0).all()


def test_object_is_independent_of_place_color_and_size(free: Scenes):
    present = free.objects >= 0
    objects = free.objects[present]
    cells = (free.centers[present] * 4).astype(int)
    others = {
        "column": cells[:, 0],
        "row": cells[:, 1],
        "color": free.colors[present],
        "size": np.digitize(free.sizes[present], [0.18, 0.22]),
        "slot": np.nonzero(present)[1],
        "background": np.broadcast_to(free.background_kinds[:, None], present.shape)[present],
    }
    for name, values in others.items():
        table = np.zeros((16, values.max() + 1))
        np.add.at(table, (objects, values), 1)
        table = table[:, table.any(0)]
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        freedom = 15 * (table.shape[1] - 1)
        statistic = ((table - expected) ** 2 / expected).sum()
        # Mean of a chi-square is its degrees of freedom, its variance twice that: five deviations.
        assert statistic < freedom + 5 * np.sqrt(2 * freedom), name


def test_places_of_all_slots_have_the_same_spread(free: Scenes):
    full = free[free.objects[:, 3] >= 0]
    assert np.allclose(full.centers.mean(0), 0.5, atol=0.03)
    spread = full.centers.std(axis=0)
    assert np.allclose(spread, spread.mean(), rtol=0.08)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_objects": (3, 2)}, "num_objects"),
        ({"num_objects": (17, 17)}, "num_objects"),
        ({"size_range": (0.3, 0.2)}, "size_range"),
        ({"backgrounds": ("plain", "marble")}, "marble"),
        ({"num_objects": (6, 6), "size_range": (0.6, 0.6)}, "do not fit"),
    ],
)
def test_impossible_scenes_are_refused(arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        sample_free(np.random.default_rng(0), 2, **arguments)


@pytest.mark.parametrize("size", [37, 72])
def test_rendered_object_fills_its_box_and_nothing_else(size: int):
    scenes = sample_free(np.random.default_rng(5), 160, num_objects=(3, 3), max_angle=30.0)
    assert set(scenes.background_kinds.tolist()) == {1, 2, 3, 4}
    empty = dataclasses.replace(scenes, objects=np.where(np.arange(3) == 1, -1, scenes.objects))
    changed = (render(scenes, size) != render(empty, size)).any(-1)
    x, y, width, height = np.moveaxis(scenes.boxes[:, 1] * size, -1, 0)
    for index, picture in enumerate(changed):
        rows, columns = np.nonzero(picture)
        # Pixel i covers i..i+1; the half pixel more is the soft edge.
        assert columns.min() + 1 > x[index] - 0.5
        assert columns.max() < x[index] + width[index] + 0.5
        assert rows.min() + 1 > y[index] - 0.5
        assert rows.max() < y[index] + height[index] + 0.5
        extent = max(np.ptp(columns), np.ptp(rows)) + 1
        assert extent > 0.7 * width[index]
        assert len(rows) > 0.15 * width[index] * height[index]


def test_object_partly_outside_is_cut_off():
    scenes = alone([0.0])
    shifted = dataclasses.replace(scenes, centers=scenes.centers + np.array([0.5, -0.25], np.float32))
    moved = render(shifted, 64)
    np.testing.assert_allclose(moved[:, :48, 32:].astype(int), render(scenes, 64)[:, 16:, :32].astype(int), atol=1)


def test_drawing_at_twice_the_size_looks_the_same():
    scenes = sample_free(np.random.default_rng(2), 20, backgrounds=("plain", "gradient"))
    large = render(scenes, 288).astype(float).reshape(20, 72, 4, 72, 4, 3).mean(axis=(2, 4))
    assert np.abs(large - render(scenes, 72)).mean() < 1.5


def test_objects_differ_at_18_pixels_under_all_turns_used():
    angles = [-15.0, -7.5, 0.0, 7.5, 15.0]
    pictures = render(alone(angles), 24)[..., 0]
    silhouettes = 1 - pictures.reshape(16, len(angles), -1) / 255.0
    reversed_ = 1 - pictures[:, :, ::-1].reshape(16, len(angles), -1) / 255.0
    for first, second in itertools.combinations(range(16), 2):
        for others in (silhouettes[second], reversed_[second]):
            overlap = np.minimum(silhouettes[first][:, None], others[None]).sum(-1)
            union = np.maximum(silhouettes[first][:, None], others[None]).sum(-1)
            limit = 0.85 if {OBJECTS[first], OBJECTS[second]} == {"circle", "square"} else 0.79
            assert (overlap / union).max() < limit, (OBJECTS[first], OBJECTS[second])


def test_templates_are_distances():
    outer = templates()[..., 0]
    assert outer.shape == (16, 128, 128)
    slopes = np.abs(np.diff(outer, axis=2)) / (2.4 / 127)
    # A distance never changes faster than the place does.
    assert slopes.max() < 1.01
    assert (half_sides()[:, 0] > 0.99).all()
    assert (half_sides() < np.sqrt(2) + 0.02).all()


def test_turn_is_clockwise_and_centers_are_right_and_down():
    scenes = alone([0.0, 90.0])
    upright, turned = render(scenes, 64).reshape(16, 2, 64, 64, 3).astype(int).swapaxes(0, 1)
    np.testing.assert_allclose(turned, np.rot90(upright, -1, axes=(1, 2)), atol=3)
    moved = dataclasses.replace(
        scenes, centers=np.broadcast_to(np.array([0.9, 0.2], np.float32), (32, 1, 2)), sizes=scenes.sizes / 5
    )
    rows, columns = np.nonzero((render(moved, 64) < 128).all(-1).any(0))
    assert columns.mean() > 50
    assert rows.mean() < 20


def test_mirrored_scenes_are_drawn_reversed(free: Scenes):
    scenes = free[:60]
    assert scenes.mirrored.any()
    assert not scenes.mirrored.all()
    centers = np.stack([1 - scenes.centers[..., 0], scenes.centers[..., 1]], axis=-1)
    reversed_ = render(dataclasses.replace(scenes, centers=centers, mirrored=~scenes.mirrored), 48).astype(int)
    np.testing.assert_allclose(reversed_, render(scenes, 48)[:, :, ::-1].astype(int), atol=1)


def test_slicing_and_concatenation():
    few = sample_free(np.random.default_rng(0), 5, num_objects=(1, 2))
    many = sample_free(np.random.default_rng(1), 4, num_objects=(3, 3))
    both = concatenate([few, many])
    assert len(both) == 9
    assert both.objects.shape == (9, 3)
    assert (both.objects[:5, 2] == -1).all()
    np.testing.assert_array_equal(render(both, 32), np.concatenate([render(few, 32), render(many, 32)]))
    np.testing.assert_array_equal(both[5:].centers, many.centers)
    np.testing.assert_array_equal(both[np.arange(9) > 7].objects, many[[3]].objects)
    assert render(both[:0], 32).shape == (0, 32, 32, 3)
    with pytest.raises(InputError, match="at least one"):
        concatenate([])
    with pytest.raises(InputError, match="size=0"):
        render(both, 0)


def test_grid_scenes_sit_in_their_cells():
    rng = np.random.default_rng(0)
    cells_a, cells_b = np.array([[0, 3], [1, 1], [2, 0]]), np.array([[3, 0], [1, 2], [3, 3]])
    scenes = sample_grid(rng, np.array([0, 1, 2]), cells_a, np.array([3, 4, 5]), cells_b, scale=174 / 224)
    np.testing.assert_allclose(scenes.centers, (np.stack([cells_a, cells_b], axis=1) + 0.5) / 4)
    np.testing.assert_allclose(scenes.sizes, 174 / 224 / 4, rtol=1e-6)
    assert (scenes.angles == 0).all()
    np.testing.assert_array_equal(scenes.objects, [[0, 3], [1, 4], [2, 5]])
    scaled = sample_grid(rng, np.arange(3), cells_a, np.arange(3) + 3, cells_b, scale=np.array([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(scaled.sizes, np.array([[1, 1], [0.5, 0.5], [0.25, 0.25]]) / 4)


def test_white_background_is_white():
    scenes = sample_grid(
        np.random.default_rng(0), np.array([0]), np.array([[0, 0]]), np.array([1]), np.array([[3, 3]]),
        backgrounds=("white",),
    )  # fmt: skip
    assert BACKGROUNDS[scenes.background_kinds[0]] == "white"
    assert (render(scenes, 64)[0, :16, 16:] == 255).all()


def test_jittered_grid_objects_stay_apart_and_inside():
    rng = np.random.default_rng(0)
    cells = np.tile([[[1, 1], [2, 1]], [[0, 0], [1, 1]], [[0, 0], [3, 3]]], (300, 1, 1))
    scenes = sample_grid(
        rng, np.zeros(900, int), cells[:, 0], np.ones(900, int), cells[:, 1],
        jitter_size=0.1, jitter_angle=15.0, jitter_center=0.15,
    )  # fmt: skip
    apart = np.abs(scenes.centers[:, 0] - scenes.centers[:, 1]).max(-1)
    assert (apart - scenes.sizes.mean(-1)).min() > -1e-6
    assert scenes.boxes[..., :2].min() > -1e-6
    assert scenes.boxes.reshape(-1, 2, 2).sum(1).max() < 1 + 1e-6
    assert scenes.sizes.std() > 0.005
    assert (scenes.centers - (cells + 0.5) / 4).std(axis=0).min() > 0.005
    assert 10 < np.abs(scenes.angles).max() <= 15


@pytest.mark.parametrize(
    ("objects_b", "cells_b", "message"),
    [
        ([1], [[4, 0]], r"0\.\.3; got 0\.\.4"),
        ([1], [[0, 0]], "both objects in cell"),
        ([16], [[1, 0]], "indices 0..15"),
    ],
)
def test_impossible_grid_scenes_are_refused(objects_b: list, cells_b: list, message: str):
    with pytest.raises(InputError, match=message):
        sample_grid(np.random.default_rng(0), np.array([0]), np.array([[0, 0]]), np.array(objects_b), np.array(cells_b))


def test_preview_writes_a_sheet(tmp_path):
    from PIL import Image

    preview(tmp_path / "new" / "sheet.png", count=4, size=32)
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        assert sheet.width > 8 * 32
        assert len(np.unique(np.asarray(sheet.convert("RGB")).reshape(-1, 3), axis=0)) > 100
    with pytest.raises(OutputError, match=r"\.png or \.jpg"):
        preview(tmp_path / "sheet.gif", count=2, size=16)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write .*sheet\.png"):
        preview(tmp_path / "file" / "sheet.png", count=2, size=16)
