"""Occlusion: where boxes lie, what a blur touches, answers variant by variant, and the run."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest
from families import CASES, over
from families.base import Case
from PIL import Image, ImageFilter
from run_data import columns, experiment
from test_cli import refused
from test_cli import run as command

from jaxid.data.coco_spatial import INSTANCES_FILE, write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import DataError, InputError, OutputError
from jaxid.experiments import occlusion
from jaxid.experiments.occlusion import (
    KINDS,
    Occluded,
    Occlusion,
    OcclusionSummary,
    ask,
    blurred,
    occlude,
    pixels,
    random_boxes,
    variants,
)
from jaxid.experiments.reference import with_bugs
from jaxid.families.base import Model
from jaxid.interp.forward import forward
from jaxid.io import write_json, write_table

pytestmark = [
    # The random models' vocabulary lacks most of what the drawn pictures hold.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

CASE = CASES[0]
ITEMS = 6
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)


def test_pixels_that_boxes_touch() -> None:
    boxes = np.array([[0.2, 1.0, 2.0, 3.0], [59.5, 39.99, 0.5, 0.01], [60, 0, 0, 40]])
    np.testing.assert_array_equal(pixels(boxes, (60, 40)), [[0, 1, 3, 4], [59, 39, 60, 40], [59, 0, 60, 40]])


def test_random_boxes_avoid_both_objects_and_are_drawn_again_alike() -> None:
    objects = np.array([[5, 5, 20, 15], [30, 20, 50, 38]])
    found = random_boxes(np.random.default_rng(7), (60, 40), objects[0], objects, count=50)
    np.testing.assert_array_equal(found[:, 2:] - found[:, :2], np.tile([15, 10], (50, 1)))
    assert found.min() >= 0 and (found[:, 2:] <= [60, 40]).all()
    taken = np.zeros((40, 60), bool)
    for left, upper, right, lower in objects:
        taken[upper:lower, left:right] = True
    assert not any(taken[upper:lower, left:right].any() for left, upper, right, lower in found)
    assert len({tuple(box) for box in found}) > 20
    again = random_boxes(np.random.default_rng(7), (60, 40), objects[0], objects, count=50)
    np.testing.assert_array_equal(found, again)
    # A box that only just fits beside an object is found: touching edges are no overlap.
    tight = random_boxes(np.random.default_rng(0), (4, 2), np.array([0, 0, 2, 2]), np.array([[0, 0, 2, 2]]), count=2)
    np.testing.assert_array_equal(tight, [[2, 0, 4, 2]] * 2)


@pytest.mark.parametrize("size", [(10, 10), (19, 10)])
def test_a_crowded_picture_is_refused(size: tuple[int, int]) -> None:
    box = np.array([0, 0, 10, 10])
    with pytest.raises(DataError, match=r"too crowded.*500 tries"):
        random_boxes(np.random.default_rng(0), size, box, box[None])


def test_a_blur_touches_its_box_alone() -> None:
    boxes = np.array([[10, 5, 30, 20], [0, 0, 60, 40]])
    first, second = blurred(PICTURE, boxes, radius=3)
    soft = np.asarray(Image.fromarray(PICTURE).filter(ImageFilter.GaussianBlur(3)))
    inside = np.zeros((40, 60), bool)
    inside[5:20, 10:30] = True
    np.testing.assert_array_equal(first[~inside], PICTURE[~inside])
    np.testing.assert_array_equal(first[inside], soft[inside])
    assert (first[inside] != PICTURE[inside]).mean() > 0.9
    np.testing.assert_array_equal(second, soft)
    made = variants(PICTURE, boxes[0], boxes, radius=3)
    assert len(made) == 4 and made[0] is PICTURE
    for picture, expected in zip(made[1:], (first, first, second), strict=True):
        np.testing.assert_array_equal(picture, expected)
    for radius in (0, -1, float("nan")):
        with pytest.raises(InputError, match="radius"):
            blurred(PICTURE, boxes, radius)


def test_sensitivity_by_hand() -> None:
    right = np.array([[-1.0, -3, -9, -2, -1, -4, -5, -7, -8, -1, -1, -1]])
    result = Occluded(right=right, wrong=right)
    assert result.sensitivity() == [-9 + 3] and result.drop == [2]
    assert result.random_drop == pytest.approx([-1 + 3.9])
    steps = Occlusion(out=Path("out"), data=Path("data"))
    assert steps.sensitivity(result) == [-9 + 3]
    # The published code skips the first blur and includes the fifth.
    assert with_bugs(steps).sensitivity(result) == [-5 + 3]


@functools.cache
def shown() -> list[list[np.ndarray]]:
    made = []
    for row, item in enumerate(oracle.items("horizontal")):
        picture = np.asarray(item.picture)
        boxes = random_boxes(np.random.default_rng(row), (32, 32), np.array([0, 0, 9, 9]), np.array([[0, 0, 9, 9]]))
        made.append(variants(picture, np.array([0, 0, 9, 9]), boxes, radius=4))
    return made


def answers(model: Model, items: list[Any], together: int | None = None) -> Occluded:
    return occlude(model, ask(model, items, shown()[: len(items)], together=together), len(items))


@over((CASE.name,), (CASE.name, "gemma3"))
def test_answers_are_those_of_each_variant_by_itself(case: Case) -> None:
    model, items = fixtures.model(case), oracle.items("horizontal")[:2]
    result = answers(model, items)
    assert result.right.shape == (2, len(KINDS))
    for row, item in enumerate(items):
        truth = ("left", "right").index(item.relation)
        for variant in (0, 1, 2, 11):
            prompts = model.prepare([shown()[row][variant]], item.query)
            alone = np.asarray(forward(model, prompts).logprobs(["left", "right"]))[0]
            assert result.right[row, variant] == pytest.approx(alone[truth], abs=1e-4)
            assert result.wrong[row, variant] == pytest.approx(alone[1 - truth], abs=1e-4)
    assert np.ptp(result.right, axis=1).min() > 1e-3
    if case is CASE:  # passes of other sizes
        split = answers(model, items, together=5)
        np.testing.assert_allclose(split.right, result.right, atol=1e-5)
        np.testing.assert_allclose(split.wrong, result.wrong, atol=1e-5)


def test_every_item_needs_all_variants() -> None:
    with pytest.raises(InputError, match="12 pictures each"):
        ask(fixtures.model(CASE), oracle.items("horizontal"), [own[:5] for own in shown()])


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("occlusion")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(4), ITEMS, num_objects=(2, 2)), 48)
    return folder


def run(place: Path, out: str | Path, **changed: Any) -> OcclusionSummary:
    return experiment(Occlusion, place, out, **{"batch_size": 24, "radius": 5.0} | changed).run()


@functools.cache
def whole(place: Path) -> OcclusionSummary:
    return run(place, "out")


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures are drawn in another test."""
    monkeypatch.setattr(Occlusion, "figures", lambda *_: ())


def test_table_and_summary(place: Path) -> None:
    summary, table = whole(place), columns(place / "out")
    assert summary.items == ITEMS and len(table["item"]) == ITEMS * len(KINDS)
    boxes = {}
    for entry in json.loads((place / "data" / INSTANCES_FILE).read_text())["annotations"]:
        boxes.setdefault(entry["image_id"], []).append(entry["bbox"])
    for key in dict.fromkeys(table["item"].tolist()):
        own = {name: values[table["item"] == key] for name, values in table.items()}
        assert own["kind"].tolist() == list(KINDS) and own["variant"].tolist() == list(range(12))
        right = own["logp_correct"]
        assert own["sensitivity"] == pytest.approx(right[2:6].min() - right[1], abs=1e-5)
        assert own["drop"] == pytest.approx(right[0] - right[1], abs=1e-5)
        assert (own["correct"] == (right[0] > own["logp_wrong"][0])).all()
        for x, y, width, height in boxes[own["image_id"][0]]:
            for row in range(2, 12):
                apart = own["left"][row] >= x + width or own["right"][row] <= x
                assert apart or own["upper"][row] >= y + height or own["lower"][row] <= y
    first = table["variant"] == 0
    sensitivity, correct = table["sensitivity"][first], table["correct"][first]
    assert summary.sensitivity["all"]["mean"] == pytest.approx(sensitivity.mean())
    assert summary.share_sensitive == (sensitivity > 0).mean()
    assert summary.accuracy == summary.accuracy_by_kind["original"] == correct.mean()
    names = {path.name for path in (place / "out").iterdir() if not path.name.startswith(".")}
    pictures = {"occlusion.png", "occlusion_example.png"}
    assert names == {"parts", "config.yaml", "settings.json", "summary.json", "table.parquet"} | pictures


@pytest.mark.usefixtures("no_figures")
def test_reference_bugs_and_seed_count(place: Path, tmp_path: Path) -> None:
    whole(place)
    summary = run(place, tmp_path / "out", reference_bugs=True, seed=3, case="lower")
    before, after = columns(place / "out"), columns(tmp_path / "out")
    assert (before["left"] != after["left"]).any()
    original, objects = (before["variant"] == variant for variant in (0, 1))
    np.testing.assert_allclose(after["logp_correct"][original], before["logp_correct"][original], atol=1e-4)
    # Crops are blurred by themselves, so that other colours are in them.
    assert (np.abs(after["logp_correct"] - before["logp_correct"])[objects] > 1e-4).all()
    right = after["logp_correct"].reshape(ITEMS, 12)
    expected = right[:, 3:7].min(axis=1) - right[:, 1]
    np.testing.assert_allclose(after["sensitivity"].reshape(ITEMS, 12)[:, 0], expected, atol=1e-5)
    assert summary.settings["radius"] == 5


@pytest.mark.usefixtures("no_figures")
def test_a_stopped_run_is_resumed_to_the_same_table(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole(place)
    original, calls = occlude, []

    def stopping(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(occlusion, "occlude", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(place, tmp_path / "out")
    assert run(place, tmp_path / "out").resumed_items == 2
    before, after = columns(place / "out"), columns(tmp_path / "out")
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    with pytest.raises(OutputError, match="radius"):
        run(place, tmp_path / "out", radius=6.0)


@pytest.mark.usefixtures("no_figures")
def test_crowded_items_are_named_or_skipped(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "data", tmp_path / "data")
    path = tmp_path / "data" / INSTANCES_FILE
    content = json.loads(path.read_text())
    for entry in content["annotations"]:
        if entry["image_id"] == 2:
            entry["bbox"] = [1, 1, 45, 45]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"item '00001-.*too crowded.*--skip-bad"):
        run(tmp_path, "out")
    summary = run(tmp_path, "out", skip_bad=True)
    (entry,) = summary.skipped["items"]
    assert entry["key"].startswith("00001-") and summary.items == ITEMS - 1
    for entry in content["annotations"]:
        entry["bbox"] = [1, 1, 45, 45]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"no item .* could be used.*crowded"):
        run(tmp_path, "none", skip_bad=True)


def test_margins_of_a_deviation_run(place: Path, tmp_path: Path) -> None:
    whole(place)
    table = columns(place / "out")
    keys, sensitivity = (table[name][table["variant"] == 0] for name in ("item", "sensitivity"))
    write_json(tmp_path / "dev" / "summary.json", {"experiment": "deviation", "layer": 1})
    rows = [(key, layer, role) for key in keys[1:] for layer in (0, 1) for role in ("subject", "object")]
    of = dict(zip(keys, sensitivity, strict=True))
    margins = [-of[key] if (layer, role) == (1, "subject") else 0.0 for key, layer, role in rows]
    names, layers, roles = zip(*rows, strict=True)
    table = {"item": names, "layer": layers, "role": roles, "margin": margins, "verdict": ["correct"] * len(rows)}
    write_table(tmp_path / "dev" / "table.parquet", table)
    shutil.copytree(place / "out", tmp_path / "out")
    summary = run(place, tmp_path / "out", deviation=tmp_path / "dev")
    assert summary.margins is not None
    assert summary.margins["items"] == ITEMS - 1
    assert summary.margins["spearman"] == pytest.approx(-1)
    for folder in (tmp_path, place / "out"):
        with pytest.raises(DataError, match="no finished deviation run"):
            run(place, tmp_path / "other", deviation=folder)


@pytest.mark.usefixtures("no_figures")
def test_one_line_of_a_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments: list[Any] = ["run", "occlusion", "--model", fixtures.folder(CASE), "--data", place / "data"]
    arguments += ["--prompt", "{query}", "--out", tmp_path / "out", "--limit", "2", "--batch-size", "24"]
    capsys.readouterr()
    assert "radius must be" in refused(capsys, *arguments, "--radius", "0")
    assert "no finished deviation run" in refused(capsys, *arguments, "--deviation", tmp_path)
    assert command(*arguments) == 0
    line, written = capsys.readouterr().out.splitlines()
    assert written == str(tmp_path / "out" / "summary.json")
    assert line.startswith("2 items, ") and "jaxid" not in line
