"""Steering as a run: tables hold every cell, single pictures, and the data that relations need."""

import json
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from families import CASES
from run_data import columns, experiment
from run_data import place as place
from test_cli import run as command

from jaxid.data.scenes import sample_free
from jaxid.data.three_objects import write_three_objects
from jaxid.errors import DataError, PromptError
from jaxid.runs import depth, steer
from jaxid.runs.common import RunConfig

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # The tiny model knows few of the drawn objects by name.
    pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning"),
]

CASE = CASES[0]


def test_default_layers_are_as_deep_as_the_published_ones() -> None:
    assert steer.scaled(steer.PUBLISHED_LAYERS, 32) == [12, 13, 14]
    assert steer.scaled(steer.PUBLISHED_LAYERS, 3) == [1]


def test_steer_and_depth_tables_hold_every_cell(place: Path) -> None:
    summary = steer.run(steer.SteerConfig(**options(place, "steer", layers="0,2", factor=1.0)))
    table = columns(place / "steer")
    assert len(table["change"]) == summary["items"] * 2 * 16 * 2
    np.testing.assert_allclose(table["change"], table["steered"] - table["control"], atol=1e-5)
    chosen = (table["layer"] == 0) & (table["x"] == 3) & (table["y"] == 1) & (table["word"] == "right")
    assert summary["change"][0, 3, 1, 1] == pytest.approx(table["change"][chosen].mean(), abs=1e-5)
    with pytest.raises(PromptError, match="front"):  # no such word in the tiny model's vocabulary
        depth.run(RunConfig(**options(place, "depth")))


def test_three_objects_and_near_far_need_their_data(place: Path) -> None:
    write_three_objects(place / "three", sample_free(np.random.default_rng(2), 6, num_objects=(3, 3)), 48)
    options_ = options(place, "between", data=place / "three", relation="between", factor=1.0)
    summary = steer.run(steer.SteerConfig(**options_))
    assert summary["words"] == ["yes", "no"]
    with pytest.raises(DataError, match=r"three_objects\.json"):
        steer.run(steer.SteerConfig(**options(place, "none", relation="between")))
    with pytest.raises(DataError):
        steer.run(steer.SteerConfig(**options(place, "none", relation="near-far")))


def test_single_picture(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = next((place / "data" / "val2017").glob("*.jpg"))
    arguments = ["run", "steer", "--picture", picture, "--subject", "star", "--object", "fish", "--template", "{query}"]
    arguments += ["--model", fixtures.folder(CASE), "--ids", place / "ids.safetensors", "--out", place / "single"]
    assert command(*arguments, "--layers", "0-1", "--cells", "0,0:3,1") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed if line.startswith("block")] == ["0", "1"]
    assert "star to cell 0,0, fish to cell 3,1" in printed[0]
    summary, table = json.loads((place / "single" / "summary.json").read_text()), columns(place / "single")
    assert summary["cells"] == [[0, 0], [3, 1]]
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
