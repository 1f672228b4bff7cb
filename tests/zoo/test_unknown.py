"""Pictures and words that tiny-llava's training never shows: the truth about them, and how it is counted."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import jaxid
from jaxid import cli
from jaxid.data import scenes as drawn
from jaxid.data.files import save_picture
from jaxid.data.scenes import OBJECTS, Scenes
from jaxid.errors import DataError
from jaxid.io import to_json
from jaxid.stats import confidence_interval
from jaxid.zoo import drawings, evaluation, unknown
from jaxid.zoo import tiny_llava as recipe

SIZE = 96


def alone(names: tuple[str, ...], *, side: float = 0.5, angle: float = 0.0, mirrored: bool = False) -> Scenes:
    """One red object at the lower left of each picture, on white."""
    count = len(names)
    objects = np.array([[OBJECTS.index(name)] for name in names])
    scenes = drawn.dress(
        np.random.default_rng(0),
        objects,
        np.tile([[[0.4, 0.6]]], (count, 1, 1)),
        np.full((count, 1), side),
        np.full((count, 1), angle),
        ["white"],
        float(mirrored),
    )
    return dataclasses.replace(scenes, fills=np.tile(np.array([0.8, 0.1, 0.1], np.float32), (count, 1, 1)))


def white(count: int) -> np.ndarray:
    return np.full((count, SIZE, SIZE, 3), 255, np.uint8)


def ink(pictures: np.ndarray) -> np.ndarray:
    return (pictures != 255).any(axis=-1)


@pytest.mark.parametrize("style", drawings.STYLES)
def test_objects_are_drawn_at_their_places_and_sizes(style: drawings.Style) -> None:
    pictures = drawings.redraw(alone(OBJECTS), white(len(OBJECTS)), drawings.shape, style)
    for name, seen, picture in zip(OBJECTS, ink(pictures), pictures, strict=True):
        rows, columns = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
        assert abs(max(np.ptp(rows), np.ptp(columns)) + 1 - 0.5 * SIZE) <= 2, name
        middle = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
        np.testing.assert_allclose(middle, (0.4 * SIZE, 0.6 * SIZE), atol=1.5, err_msg=name)
        red, green, _ = picture[seen].mean(axis=0)
        assert red > 1.2 * green, name


def test_styles_cover_more_or_less_of_an_object() -> None:
    shares = {
        style: ink(drawings.redraw(alone(("square",)), white(1), drawings.shape, style)).mean()
        for style in drawings.STYLES
    }
    assert shares["outline"] < 0.3 * shares["flat"] < shares["hatched"] <= shares["flat"] == shares["thick"]
    thick = drawings.redraw(alone(("square",)), white(1), drawings.shape, "thick")[0]
    edge, middle = thick[int(0.6 * SIZE), int(0.16 * SIZE)], thick[int(0.6 * SIZE), int(0.4 * SIZE)]
    assert edge.max() < 60 and middle[0] > 190


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("angle", [0.0, 40.0, -40.0])
def test_shapes_agree_with_those_of_training(angle: float, mirrored: bool) -> None:
    """In angle and mirroring, too: the overlap is large with the right ones alone."""
    names = ("key", "bolt", "moon")
    expected = ink(drawn.render(alone(names, angle=angle, mirrored=mirrored), SIZE))

    def overlap(angle: float, mirrored: bool) -> np.ndarray:
        own = alone(names, angle=angle, mirrored=mirrored)
        found = ink(drawings.redraw(own, white(len(names)), drawings.shape))
        return (found & expected).sum((1, 2)) / (found | expected).sum((1, 2))

    right = overlap(angle, mirrored)
    assert (right > 0.5).all()
    for other in ((angle + 60, mirrored), (angle - 60, mirrored), (angle, not mirrored)):
        assert (right > overlap(*other)).all()


@pytest.mark.parametrize("font", drawings.FONTS)
def test_fonts_have_the_glyphs(font: str) -> None:
    shapes = {name: np.asarray(drawings.glyphs(font)(name).resize((64, 64))) for name in drawings.FONTS[font]}
    missing = np.asarray(drawings.glyph(font, "\U0010fffd").resize((64, 64)))
    for name, shape in shapes.items():
        assert (shape != missing).any(), name
    overlaps = [np.mean(one == other) for one in shapes.values() for other in shapes.values() if one is not other]
    assert max(overlaps) < 0.9  # no two are the same box


@pytest.fixture(scope="module")
def conditions() -> dict[str, unknown.Condition]:
    return {condition.name: condition for condition in unknown.conditions(12, 5)}


def test_sorts_of_pictures(conditions: dict[str, unknown.Condition]) -> None:
    clean = conditions["clean"]
    assert len(conditions) == 18 and next(iter(conditions)) == "clean"
    for name, condition in conditions.items():
        assert len(condition.scenes) == len(condition.pictures) == 12, name
        assert recipe.is_held_out(condition.scenes).all() or name == "rotated", name
        gaps = np.abs(condition.scenes.centers[:, 0] - condition.scenes.centers[:, 1])
        assert (gaps >= 0.09).all(), name
        if name != "clean" and condition.pictures.shape == clean.pictures.shape:
            assert (condition.pictures != clean.pictures).any(axis=(1, 2, 3)).all(), name
    assert conditions["four times larger"].pictures.shape == (12, 288, 288, 3)
    assert (np.ptp(conditions["grey"].pictures, axis=-1) == 0).all()
    for side in (0.1, 0.4):
        np.testing.assert_allclose(conditions[f"objects of {side}"].scenes.sizes, side, rtol=1e-6)
    for font, glyphs in (("DejaVuSans", drawings.FONTS["DejaVuSans-Bold.ttf"]),):
        assert {OBJECTS[index] for index in conditions[f"font {font}"].scenes.objects.ravel()} <= set(glyphs)


def test_rotated_places_are_where_the_pixels_are(conditions: dict[str, unknown.Condition]) -> None:
    clean, rotated = conditions["clean"], conditions["rotated"]
    before, after = ((condition.scenes.centers * 72).astype(int) for condition in (clean, rotated))
    for row in range(12):
        for slot in range(2):
            (x, y), (own_x, own_y) = before[row, slot], after[row, slot]
            np.testing.assert_array_equal(rotated.pictures[row, 71 - x, y], clean.pictures[row, y, x])
            assert (own_x, own_y) == pytest.approx((y, 71 - x), abs=1)


def test_backgrounds_are_replaced_and_objects_are_not(conditions: dict[str, unknown.Condition]) -> None:
    clean, photographs = conditions["clean"], conditions["photograph"]
    same = unknown.over(clean.scenes, unknown._ground(clean.scenes, 72))
    assert np.abs(same.astype(int) - clean.pictures).max() <= 2
    places = (clean.scenes.centers * 72).astype(int)
    kept = [
        np.abs(photographs.pictures[row, y, x].astype(int) - clean.pictures[row, y, x]).max() <= 1
        for row in range(12)
        for x, y in places[row]
        if OBJECTS[clean.scenes.objects[row, 0]] in ("circle", "square", "heart")
    ]
    corner = (photographs.pictures[:, :4, :4] != clean.pictures[:, :4, :4]).mean()
    assert corner > 0.5 and np.mean(kept or [True]) > 0.5


def test_questions_are_true_and_the_same_for_all_pictures(conditions: dict[str, unknown.Condition]) -> None:
    clean = conditions["clean"]
    names = [[OBJECTS[index] for index in row] for row in clean.scenes.objects]
    for axis, kind, words in ((0, "left_right", ("left", "right")), (1, "above_below", ("above", "below"))):
        for row, (question, truth) in enumerate(zip(*unknown.asked(clean, kind, 3), strict=True)):
            first = int(question.index(f"the {names[row][0]}") > question.index(f"the {names[row][1]}"))
            own, other = clean.scenes.centers[row, first, axis], clean.scenes.centers[row, 1 - first, axis]
            assert truth == words[int(own > other)], question
    questions, truths = unknown.asked(clean, "exists", 3)
    for row, (question, truth) in enumerate(zip(questions, truths, strict=True)):
        name = question.removeprefix("Is there a ").removesuffix("?")
        assert (name in names[row]) == (truth == "yes") and (row % 2 == 0) == (truth == "yes")
    for kind in unknown.KINDS:
        assert unknown.asked(clean, kind, 3) == unknown.asked(conditions["JPEG"], kind, 3)
    strange = conditions["a stranger beside it"]
    asked = unknown.asked(strange, "color", 3)[0]
    assert asked == [f"What color is the {own[1]}?" for own in names]


def test_measurement_counts_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a model that always says yes."""
    monkeypatch.setattr(evaluation, "answers", lambda model, shown, questions, *_: ["yes"] * len(questions))
    folder = tmp_path / "photographs"
    folder.mkdir()
    save_picture(folder / "one.png", np.full((40, 60, 3), 90, np.uint8))
    model = jaxid.load("tiny-llava")
    found = unknown.measure(model, count=10, seed=2, photographs=folder, sheet=tmp_path / "sheet.png")
    for row in found.rows:
        exists = row.accuracy["exists"]
        assert (exists.value, exists.count) == (0.5, 10), row.name
        assert (exists.low, exists.high) == confidence_interval(5, 10)
        assert {kind: own.value for kind, own in row.accuracy.items() if kind != "exists"} == {
            kind: 0.0 for kind in row.accuracy if kind != "exists"
        }
    assert set(found.rows[0].accuracy) == set(unknown.KINDS)
    by_name = {row.name: row for row in found.rows}
    assert set(by_name["grey"].accuracy) == set(unknown.KINDS) - {"color"}
    assert "cut-outs of 1 photographs" in by_name["photograph"].about
    assert found.words == {kind: {"yes": 1.0} for kind in unknown.KINDS}
    lines = unknown.table(json.loads(to_json(found)))
    assert lines[2].startswith("| clean | 0.0% (0.0% to 27.8%)") and "| 50.0% (23.7% to 76.3%) |" in lines[2]
    assert '- "Is there a dog?": "yes" 100%.' in lines
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match="photographs"):
        unknown.measure(model, count=10, seed=2, photographs=tmp_path / "none")


@pytest.mark.parametrize(
    ("arguments", "word"), [(["tiny-video"], "tiny-llava"), (["tiny-llava", "--count", "4"], "count")]
)
def test_other_models_and_too_few_pictures_are_refused(
    arguments: list[str],
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["zoo", "unknown", *arguments, "--out", str(tmp_path / "out")])
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1 and word in line


@pytest.mark.slow
def test_the_shipped_model_knows_clean_pictures_and_not_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sorts of pictures, those whose accuracy is compared."""
    every, some = unknown.conditions, ("clean", "four times larger", "photograph")
    monkeypatch.setattr(unknown, "conditions", lambda *given: (one for one in every(*given) if one.name in some))
    found = {row.name: row.accuracy for row in unknown.measure(jaxid.load("tiny-llava"), count=48, seed=7).rows}
    for kind, share in found["clean"].items():
        assert share.value > 0.9, kind
    assert found["four times larger"]["left_right"].value > 0.9
    assert found["photograph"]["exists"].high < found["clean"]["exists"].low
