"""Scenes with depth: every cue tells the truth, and nothing else tells the depth."""

import dataclasses
import itertools
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxid.cli import main
from jaxid.data.backgrounds import BACKGROUNDS, draw_backgrounds, horizons
from jaxid.data.coco_spatial import find_coco_spatial, read_coco_spatial
from jaxid.data.perspective import CUES, MOST_HIDDEN, RATIO, SIZES, sample_perspective
from jaxid.data.relations import MIN_DISTANCE, is_in_front, is_near
from jaxid.data.scenes import OBJECTS, VARIED, Scenes, render, sample_free
from jaxid.errors import InputError

GROUND = BACKGROUNDS.index("ground")
Drawn = tuple[Scenes, np.ndarray]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Drawn]:
    return {cue: sample_perspective(np.random.default_rng(0), 1200, cues=cue) for cue in CUES}


def pairs(drawn: Drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scene, the slot of the farther and that of the nearer object, for every pair of objects."""
    objects = drawn[0].objects
    slots = itertools.combinations(range(objects.shape[1]), 2)
    found = [(row, far, near) for far, near in slots for row in np.flatnonzero(objects[:, near] >= 0)]
    row, far, near = np.array(found).T
    return row, far, near


def covered(scenes: Scenes, row: np.ndarray, far: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Share of the farther object's bounding square that the nearer one's covers."""
    first, second = scenes.boxes[row, far], scenes.boxes[row, near]
    low = np.maximum(first[:, :2], second[:, :2])
    high = np.minimum(first[:, :2] + first[:, 2:], second[:, :2] + second[:, 2:])
    return np.prod(np.maximum(high - low, 0), axis=1) / np.prod(first[:, 2:], axis=1)


def feet(scenes: Scenes) -> np.ndarray:
    return scenes.centers[..., 1] + scenes.sizes / 2


# --- every kind of scene -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cue", CUES)
def test_slots_run_from_far_to_near_and_objects_are_in_the_picture(drawn: dict[str, Drawn], cue: str) -> None:
    scenes, depths = drawn[cue]
    present = scenes.objects >= 0
    assert set(present.sum(axis=1).tolist()) == {2, 3}
    assert present[:, :2].all()
    assert (depths[present] > 0).all()
    assert not depths[~present].any()
    assert not scenes.sizes[~present].any()
    assert not scenes.centers[~present].any()
    row, far, near = pairs(drawn[cue])
    assert (depths[row, far] > depths[row, near]).all()
    assert all(len(set(names[names >= 0])) == (names >= 0).sum() for names in scenes.objects)
    assert scenes.sizes[present].min() >= SIZES[0]
    assert scenes.sizes.max() <= SIZES[1]
    boxes = scenes.boxes[present]
    assert boxes[:, :2].min() >= -1e-6
    assert (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6
    assert scenes.mirrored.any() and not scenes.mirrored.all()


@pytest.mark.parametrize("cue", CUES)
def test_names_colors_and_sides_tell_nothing_about_depth(drawn: dict[str, Drawn], cue: str) -> None:
    scenes, _ = drawn[cue]
    present = scenes.objects >= 0
    slots = np.nonzero(present)[1] + 3 * np.broadcast_to(present.sum(1, keepdims=True) == 3, present.shape)[present]
    columns = (scenes.centers[present][:, 0] > 0.5).astype(int)
    tables = {
        "name": (scenes.objects[present], slots),
        "color": (scenes.colors[present], slots),
        "side": (columns, slots),
        "name and side": (scenes.objects[present], columns),
        "name and row": (scenes.objects[present], (scenes.centers[present][:, 1] * 4).astype(int)),
    }
    for what, (one, other) in tables.items():
        table = np.zeros((one.max() + 1, other.max() + 1))
        np.add.at(table, (one, other), 1)
        table = table[:, table.any(axis=0)]
        if (what, cue) == ("name", "overlap"):
            table = table[:, [0, 1, 2, 4]]  # the pair; a bystander's shape plays no part in what overlaps
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 5 * np.sqrt(2 * freedom), what


def test_same_seed_gives_the_same_scenes() -> None:
    def draw(seed: int, cue: str) -> np.ndarray:
        scenes, depths = sample_perspective(np.random.default_rng(seed), 5, cues=cue)
        return np.concatenate([render(scenes, 32).ravel(), depths.ravel()])

    for cue in CUES:
        np.testing.assert_array_equal(draw(3, cue), draw(3, cue))
        assert (draw(3, cue) != draw(4, cue)).any()


def test_fewer_objects() -> None:
    scenes, depths = sample_perspective(np.random.default_rng(0), 20, num_objects=(2, 2))
    assert scenes.objects.shape == depths.shape == (20, 2)
    assert (scenes.objects >= 0).all()
    empty, depths = sample_perspective(np.random.default_rng(0), 0)
    assert len(empty) == len(depths) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_objects": (1, 2)}, "2 <= least"),
        ({"num_objects": (3, 2)}, r"got \(3, 2\)"),
        ({"num_objects": (2, 4)}, "most <= 3"),
        ({"cues": "shadow"}, "all, size, height, overlap; got 'shadow'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sample_perspective(np.random.default_rng(0), 2, **arguments)


# --- the cues ------------------------------------------------------------------------------------------------------


def test_all_cues_follow_one_camera(drawn: dict[str, Drawn]) -> None:
    scenes, depths = drawn["all"]
    present = scenes.objects >= 0
    assert (scenes.background_kinds == GROUND).all()
    true_sizes = (scenes.sizes * depths)[present] / SIZES[1]
    assert true_sizes.min() > 0.849
    assert true_sizes.max() < 1.151
    assert true_sizes.std() > 0.05
    heights = (feet(scenes) - horizons(scenes.background_seeds)[:, None]) * depths
    np.testing.assert_allclose(heights[present], np.broadcast_to(heights[:, :1], heights.shape)[present], rtol=1e-4)
    assert np.ptp(heights[:, 0]) > 0.3  # the eye is not always equally high
    row, far, near = pairs(drawn["all"])
    assert (depths[row, far] > (RATIO - 1e-5) * depths[row, near]).all()
    assert np.abs(scenes.centers[row, far] - scenes.centers[row, near]).max(axis=1).min() > MIN_DISTANCE - 1e-6
    hidden = np.zeros_like(depths)
    np.add.at(hidden, (row, far), covered(scenes, row, far, near))
    assert hidden.max() <= MOST_HIDDEN + 1e-4
    assert 0.2 < (hidden > 0.02).any(axis=1).mean() < 0.8  # overlap is a cue in some scenes


def test_size_alone(drawn: dict[str, Drawn]) -> None:
    scenes, depths = drawn["size"]
    assert set(scenes.background_kinds.tolist()) == {BACKGROUNDS.index(kind) for kind in VARIED}
    row, far, near = pairs(drawn["size"])
    assert (scenes.sizes[row, near] > (RATIO - 1e-5) * scenes.sizes[row, far]).all()
    true_sizes = scenes.sizes * depths
    np.testing.assert_allclose(true_sizes[row, near], true_sizes[row, far], rtol=1e-5)
    np.testing.assert_array_equal(scenes.centers[row, near, 1], scenes.centers[row, far, 1])
    assert not covered(scenes, row, far, near).any()


def test_height_alone(drawn: dict[str, Drawn]) -> None:
    scenes, depths = drawn["height"]
    assert (scenes.background_kinds == GROUND).all()
    below = feet(scenes) - horizons(scenes.background_seeds)[:, None]
    row, far, near = pairs(drawn["height"])
    np.testing.assert_array_equal(scenes.sizes[row, near], scenes.sizes[row, far])
    assert (below[row, near] > below[row, far] + 0.079).all()
    assert (below[row, near] > (RATIO - 1e-3) * below[row, far]).all()
    eye = below * depths
    np.testing.assert_allclose(eye[row, near], eye[row, far], rtol=1e-4)
    assert not covered(scenes, row, far, near).any()


def test_overlap_alone(drawn: dict[str, Drawn]) -> None:
    scenes, depths = drawn["overlap"]
    grounds = (scenes.background_kinds == GROUND).mean()
    assert 0.4 < grounds < 0.6
    row, far, near = pairs(drawn["overlap"])
    np.testing.assert_array_equal(scenes.sizes[row, near], scenes.sizes[row, far])
    np.testing.assert_array_equal(feet(scenes)[row, near], feet(scenes)[row, far])
    last = (scenes.objects >= 0).sum(axis=1)[row] - 1
    of_the_pair, share = (far == 0) & (near == last), covered(scenes, row, far, near)
    assert share[of_the_pair].min() > 0.19
    assert share[of_the_pair].max() < 0.61
    assert not share[~of_the_pair].any()
    answers = [is_in_front(each) for each in depths[row[:, None], np.stack([near, far], axis=1)]]
    assert answers == [True if pair else None for pair in of_the_pair]


def silhouettes(scenes: Scenes, slot: np.ndarray, size: int) -> np.ndarray:
    """The pixels that one object of each scene covers entirely."""
    alone = np.where(np.arange(scenes.objects.shape[1]) == slot[:, None], scenes.objects, -1)
    white = np.full_like(scenes.background_colors, 1)
    shapes = dataclasses.replace(
        scenes, objects=alone, fills=0 * scenes.fills, background_colors=white, background_kinds=0 * slot
    )
    return render(shapes, size)[..., 0] == 0


def test_overlap_can_be_seen_and_the_nearer_object_is_whole(drawn: dict[str, Drawn]) -> None:
    scenes = drawn["overlap"][0][:150]
    last = (scenes.objects >= 0).sum(axis=1) - 1
    far, near = silhouettes(scenes, 0 * last, 96), silhouettes(scenes, last, 96)
    hidden = (far & near).sum(axis=(1, 2)) / far.sum(axis=(1, 2))
    assert hidden.min() > 0.02
    assert hidden.max() < 0.5
    # Taking away the farther object changes nothing where the nearer one is; the other way round it does.
    names = np.arange(scenes.objects.shape[1])
    without_far = dataclasses.replace(scenes, objects=np.where(names == 0, -1, scenes.objects))
    without_near = dataclasses.replace(scenes, objects=np.where(names == last[:, None], -1, scenes.objects))
    whole = render(scenes, 96).astype(int)
    both = far & near
    assert np.abs(render(without_far, 96) - whole)[both].max() <= 3
    assert np.abs(render(without_near, 96) - whole)[both].max(axis=-1).mean() > 20


# --- truths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depths", "answer"),
    [((1, 1.3), True), ((1.3, 1), False), ((1, 1.15), None), ((1.15, 1), None), ((0, 1), None), ((1, 0), None)],
)
def test_in_front(depths: tuple[float, float], answer: bool | None) -> None:
    assert is_in_front(np.array(depths, float)) is answer


@pytest.mark.parametrize(
    ("second", "answer"),
    [((0.4, 0.1), True), ((0.1, 0.42), True), ((0.45, 0.1), None), ((0.45, 0.35), None), ((0.45, 0.5), False)],
)
def test_near(second: tuple[float, float], answer: bool | None) -> None:
    assert is_near(np.array([(0.1, 0.1), second])) is answer
    assert is_near(np.array([second, (0.1, 0.1)])) is answer


# --- the ground ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grounds() -> tuple[np.ndarray, np.ndarray]:
    """Weights of the ground's colour at 100 pixels, and the horizons."""
    seeds = np.random.default_rng(1).integers(2**31 - 1, size=40)
    black_and_white = np.stack([np.zeros((40, 3)), np.ones((40, 3))], axis=1)
    pictures = draw_backgrounds(np.full(40, GROUND), black_and_white, seeds, 100)
    return pictures[..., 0], horizons(seeds)


def test_ground_begins_at_the_horizon(grounds: tuple[np.ndarray, np.ndarray]) -> None:
    weights, where = grounds
    assert where.min() >= 0.15
    assert where.max() <= 0.4
    assert np.ptp(where) > 0.2
    first = (weights.min(axis=2) > 0.39).argmax(axis=1)
    np.testing.assert_allclose(first, where * 100, atol=1.01)
    for picture, row in zip(weights, first, strict=True):
        assert not picture[: row - 1].any()
        assert picture[row:].min() > 0.39
        assert np.ptp(picture[row:]) > 0.5  # it bears a pattern


def test_pattern_gets_denser_towards_the_horizon(grounds: tuple[np.ndarray, np.ndarray]) -> None:
    weights, where = grounds
    for picture, horizon in zip(weights, where, strict=True):
        rows = np.array([round(100 * horizon) + 12, 98])
        across = [(np.diff(picture[row] > 0.7) != 0).sum() for row in rows]
        along = [
            (np.diff(picture[start:stop] > 0.7, axis=0) != 0).sum()
            for start, stop in ((rows[0] - 6, rows[0] + 14), (78, 98))
        ]
        assert across[0] > across[1] or along[0] > along[1]


def test_ground_looks_the_same_at_every_size() -> None:
    scenes, _ = sample_perspective(np.random.default_rng(0), 30, cues="height")
    large = render(scenes, 288).astype(float).reshape(30, 72, 4, 72, 4, 3).mean(axis=(2, 4))
    assert np.abs(large - render(scenes, 72)).mean() < 1.5


def test_sky_and_ground_differ_and_are_never_vivid() -> None:
    scenes, _ = sample_perspective(np.random.default_rng(0), 400)
    sky, ground = np.moveaxis(scenes.background_colors, 1, 0)
    assert np.abs(sky.mean(axis=1) - ground.mean(axis=1)).min() > 0.05
    assert (np.ptp(scenes.background_colors, axis=-1) < 0.17).all()


GOLDEN: dict[str, tuple[int, list[float]]] = {
    "white": (659641902, [247.077, 246.937, 247.309]),
    "plain": (1149119775, [195.395, 203.79, 213.26]),
    "gradient": (3775897676, [189.703, 197.908, 204.926]),
    "noise": (2183191421, [189.671, 197.749, 204.846]),
    "texture": (1889385643, [189.586, 197.859, 204.751]),
}
"""Digests and mean colours of scenes drawn before there were grounds."""


@pytest.mark.parametrize("kind", GOLDEN)
def test_other_backgrounds_stay_as_they_were(kind: str) -> None:
    scenes = sample_free(np.random.default_rng(7), 3, num_objects=(2, 3), backgrounds=(kind,))
    described = (scenes.objects, scenes.colors, scenes.mirrored, scenes.background_kinds, scenes.background_seeds)
    digest, mean = GOLDEN[kind]
    assert zlib.crc32(b"".join(values.astype(np.int64).tobytes() for values in described)) == digest
    # One level in ten pixels: the processor's sine may round a pixel otherwise, no more.
    np.testing.assert_allclose(render(scenes, 48).mean(axis=(0, 1, 2)), mean, atol=2e-3)


def test_free_scenes_have_no_ground() -> None:
    assert VARIED == ("plain", "gradient", "noise", "texture")
    assert (sample_free(np.random.default_rng(0), 300).background_kinds != GROUND).all()


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_draws_scenes_in_perspective(tmp_path: Path) -> None:
    def draw(name: str, *options: str) -> Path:
        arguments = ["data", "coco-spatial", "--count", "12", "--picture-size", "48", "--out", str(tmp_path / name)]
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, *options])
        assert stopped.value.code == 0
        return tmp_path / name

    items = read_coco_spatial(*find_coco_spatial(draw("ground", "--ground", "--seed", "5")))
    scenes, _ = sample_perspective(np.random.default_rng(5), 12, num_objects=(2, 2))
    compare: dict[str, Callable[[np.ndarray, np.ndarray], bool]] = {
        "left": lambda one, other: one[0] < other[0],
        "right": lambda one, other: one[0] > other[0],
        "above": lambda one, other: one[1] < other[1],
        "below": lambda one, other: one[1] > other[1],
    }
    for item, names, centers in zip(items, scenes.objects, scenes.centers, strict=True):
        slots = [[OBJECTS[name] for name in names].index(name) for name in (item.subject, item.object)]
        assert compare[item.relation](*centers[slots])
    assert {item.relation for item in items} == set(compare)
    plain = read_coco_spatial(*find_coco_spatial(draw("plain", "--seed", "5")))
    assert [item.subject for item in plain] != [item.subject for item in items]
