"""Steering as a run: tables hold every cell, single pictures, and the data that relations need."""

import json
from pathlib import Path

import fixtures
import numpy as np
import pytest
from matplotlib.figure import Figure
from run_data import CASE, columns, experiment
from run_data import place as place
from test_cli import run as command

from jaxid import plots
from jaxid.data.three_objects import read_three_objects, sample_in_between, write_three_objects
from jaxid.errors import DataError, PromptError
from jaxid.experiments import depth
from jaxid.experiments.depth import Depth
from jaxid.experiments.reference import with_bugs
from jaxid.experiments.session import scaled
from jaxid.experiments.steering import PUBLISHED_LAYERS, Steer

pytestmark = [
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]


def test_default_layers_are_as_deep_as_the_published_ones() -> None:
    assert scaled(PUBLISHED_LAYERS, 32) == [12, 13, 14]
    assert scaled(PUBLISHED_LAYERS, 3) == [1]


def test_steer_and_depth_tables_hold_every_cell(place: Path) -> None:
    summary = experiment(Steer, place, "steer", layers="0,2", strength=1.0).run()
    table = columns(place / "steer")
    assert len(table["change"]) == summary.items * 2 * 16 * 2
    np.testing.assert_allclose(table["change"], table["steered"] - table["control"], atol=1e-5)
    chosen = (table["layer"] == 0) & (table["x"] == 3) & (table["y"] == 1) & (table["word"] == "right")
    assert summary.change[0, 3, 1, 1] == pytest.approx(table["change"][chosen].mean(), abs=1e-5)
    with pytest.raises(PromptError, match="front"):  # no such word in the tiny model's vocabulary
        experiment(Depth, place, "depth").run()


def test_depth_asks_both_questions_of_the_same_steering(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the words of height in both questions, depth is height; and both are what steering says of it."""
    monkeypatch.setitem(depth.QUESTIONS, "depth", depth.QUESTIONS["height"])
    drawn = {}

    def draw(layers: np.ndarray, height: np.ndarray, depth: np.ndarray, *_: object, **more: object) -> Figure:
        drawn.update(height=height, depth=depth)
        return Figure()

    monkeypatch.setattr(plots, "depth_by_row", draw)
    summary = experiment(Depth, place, tmp_path / "depth", layers="0-1", strength=1.0).run()
    steered = experiment(Steer, place, tmp_path / "steer", relation="above-below", layers="0-1", strength=1.0).run()
    for name in ("height", "depth"):
        np.testing.assert_allclose(summary.change[name], steered.change, atol=1e-5)
        np.testing.assert_allclose(drawn[name], steered.change.mean(axis=1), atol=1e-5)
    assert summary.height_depth_correlation == pytest.approx(1)
    assert with_bugs(experiment(Depth, place, tmp_path)).panels == ("depth", "height")


def test_three_objects_and_near_far_need_their_data(place: Path) -> None:
    write_three_objects(place / "three", sample_in_between(np.random.default_rng(2), 6), 48)
    summary = experiment(Steer, place, "between", data=place / "three", relation="between", strength=1.0).run()
    assert summary.words == ["yes", "no"]
    # Results are told apart by where the steered object is, as in Figure 6.
    items = {item.key: item.between for item in read_three_objects(place / "three")}
    table = columns(place / "between")
    assert {key: place == "in between" for key, place in zip(table["item"], table["place"], strict=True)} == items
    assert summary.placed == {"in between": sum(items.values()), "elsewhere": 6 - sum(items.values())}
    chosen = (table["x"] == 2) & (table["y"] == 1) & (table["word"] == "no") & (table["place"] == "elsewhere")
    chosen &= table["layer"] == summary.layers[0]
    assert summary.change_of_placed["elsewhere"][0, 2, 1, 1] == pytest.approx(table["change"][chosen].mean(), abs=1e-5)
    drawn = sorted(path.name for path in (place / "between").rglob("steering_between*"))
    assert drawn == ["steering_between_elsewhere.png", "steering_between_in_between.png"]
    with pytest.raises(DataError, match=r"three_objects\.json"):
        experiment(Steer, place, "none", relation="between").run()
    with pytest.raises(DataError):
        experiment(Steer, place, "none", relation="near-far").run()


def test_single_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = next((place / "data" / "val2017").glob("*.jpg"))
    arguments = ["run", "steer-picture", "--picture", picture, "--subject", "star", "--object", "fish"]
    arguments += ["--model", fixtures.folder(CASE), "--prompt", "{query}"]
    arguments += ["--ids", place / "ids.safetensors", "--out", place / "single"]
    assert command(*arguments, "--layers", "0-1", "--cells", "0,0:3,1") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("layer")] == ["0", "1"]
    assert "star to cell 0,0, fish to cell 3,1" in printed[0]
    summary, table = json.loads((place / "single" / "summary.json").read_text()), columns(place / "single")
    assert (summary["subject"], summary["object"]) == (
        {"name": "star", "cell": [0, 0]},
        {"name": "fish", "cell": [3, 1]},
    )
    for name, value in (("subject_x", 0), ("subject_y", 0), ("object_x", 3), ("object_y", 1)):
        assert set(table[name].tolist()) == {value}
    assert command(*arguments, "--cells", "1,1:1,1") == 2
    assert "different" in capsys.readouterr().err
    assert command(*arguments, "--cells", "0,0") == 2
    assert "0,0:3,0" in capsys.readouterr().err
