"""Contents of run folders: every number is that of the table, and questions, tokens and pictures are the items'."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import pytest
from run_data import CASE, ITEMS, columns, experiment, ids
from run_data import place as place
from test_cli import refused
from test_cli import run as command

import jaxid
from jaxid.errors import InputError, JaxidWarning
from jaxid.experiments.activation_swap import MirrorSwap
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.dcsm_score import read_maps, write_maps
from jaxid.experiments.depth import QUESTIONS, Depth
from jaxid.experiments.steering import Kind
from jaxid.experiments.viewing import contents_of
from jaxid.viewer.content import Geometry, Maps, Run

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")


@pytest.fixture(scope="module")
def swapped(place: Path) -> Path:
    experiment(BeliefSwap, place, "swap", strength=2.0, layers="0-1", max_new_tokens=0).run()
    return place / "swap"


def run_of(folder: Path, **options: Any) -> Run:
    (found,) = contents_of(folder, **options)
    assert isinstance(found, Run)
    return found


def test_a_belief_swap(swapped: Path) -> None:
    run, table = run_of(swapped), columns(swapped)
    assert list(run.axes) == ["condition", "layer"] and run.axes["layer"] == [0, 1]
    assert run.after is not None and run.before.shape == (ITEMS, 1, 1, 2) and run.texts is None
    keys = [item.key for item in run.items]
    for row in range(len(table["item"])):
        at = (
            keys.index(table["item"][row]),
            list(run.axes["condition"]).index(table["condition"][row]),
            int(table["layer"][row]),
        )
        assert run.after[at].tolist() == [table["steered_correct"][row], table["steered_wrong"][row]]
        assert run.before[at[0], 0, 0].tolist() == [table["control_correct"][row], table["control_wrong"][row]]
        assert run.values[0].values[at] == table["swapped"][row]
        item = run.items[at[0]]
        assert item.words[item.truth] == table["relation"][row]
        assert item.question.startswith(f"Is the {table['subject'][row]} ")
    assert run.plane is not None
    np.testing.assert_allclose(run.plane.points[:, 0], np.asarray(ids().plane_coordinates()).reshape(-1, 16, 2))
    assert "".join(item.tokens[place] for item in run.items[:1] for place in item.edited[""]) != ""
    assert all(item.picture is not None for item in run.items)


def test_edited_tokens_are_the_words_that_were_edited(swapped: Path) -> None:
    count = fixtures.model(CASE).prepare([np.zeros((48, 48, 3), np.uint8)], "a").image_tokens().shape[1]
    for item in run_of(swapped).items:
        subject, other = item.key.split("-")[2], item.key.split("-")[4]
        text = "".join(token.replace("▁", " ") for token in item.tokens)
        assert subject in text and other in text
        assert len(item.edited[""]) == 2
        # A word that is split is edited at its last token.
        for index, word in zip(item.edited[""], (subject, other), strict=True):
            assert word.endswith(item.tokens[index].strip("▁ ")) or item.tokens[index] == "<unk>"
        (picture,) = [token for token in item.tokens if token.endswith("picture tokens]")]
        assert picture == f"[{count} picture tokens]"


def test_a_mirror_swap_marks_the_tokens_of_each_set(place: Path) -> None:
    experiment(MirrorSwap, place, "mirror", layers="0-1", limit=4).run()
    run, table = run_of(place / "mirror"), columns(place / "mirror")
    assert run.after is not None
    axes = {"item": [item.key for item in run.items], **run.axes, "word": list(run.items[0].words)}
    for row in range(len(table["item"])):
        at = tuple(list(entries).index(table[name][row]) for name, entries in axes.items())
        assert run.after[at] == table["patched"][row]
        assert run.before[at[0], 0, 0, at[-1]] == table["control"][row]
        np.testing.assert_equal(run.values[at[-1]].values[at[:-1]], table["score"][row])
    for item in run.items:
        (picture,) = item.edited["image"]
        assert item.tokens[picture].endswith("picture tokens]")
        assert item.edited["text"] == list(range(picture + 1, len(item.tokens)))
        assert set(item.edited["words"]) < set(item.edited["text"])


def test_depth_is_a_run_for_each_question(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tiny model's vocabulary lacks "front" and "behind".
    monkeypatch.setitem(QUESTIONS, "depth", Kind("Is the {0} left or right of the {1}?", ("left", "right"), "vertical"))
    experiment(Depth, place, "depth", layers="1", limit=4).run()
    table = columns(place / "depth")
    found = contents_of(place / "depth")
    assert [one.title for one in found] == ["depth · height · depth", "depth · depth · depth"]
    for run, question, words in zip(found, ("height", "depth"), (("above", "below"), ("left", "right")), strict=True):
        assert isinstance(run, Run) and run.after is not None
        assert all(item.words == words for item in run.items)
        assert all(("above" in item.question) == (question == "height") for item in run.items)
        rows = (table["question"] == question) & (table["x"] == 3) & (table["y"] == 1) & (table["word"] == words[1])
        by_item = dict(zip(table["item"][rows], table["steered"][rows], strict=True))
        assert run.after[:, 0, 3, 1, 1].tolist() == [by_item[item.key] for item in run.items]


def test_a_moved_run_is_shown_with_what_is_at_hand(swapped: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(swapped, tmp_path / "moved")
    run = run_of(moved, limit=3)
    assert len(run.items) == 3 and all(item.question for item in run.items)
    config = moved / "config.yaml"
    config.write_text(
        "\n".join(
            f"data: {tmp_path / 'gone'}" if line.startswith("data:") else line
            for line in config.read_text().splitlines()
        )
    )
    with pytest.warns(JaxidWarning, match="shown without all pictures and questions: .*gone"):
        bare = run_of(moved)
    assert [item.key for item in bare.items[:3]] == [item.key for item in run.items]
    assert all(item.picture is None and not item.tokens for item in bare.items)
    assert [item.words[item.truth] for item in bare.items[:3]] == [item.words[item.truth] for item in run.items]
    assert bare.plane is not None
    np.testing.assert_array_equal(bare.after[:3], run.after)  # pyright: ignore[reportOptionalSubscript]


def test_the_command(swapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("view", swapped, swapped.parent / "ids.safetensors", "--out", tmp_path / "a" / "view.html") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a" / "view.html")
    text = (tmp_path / "a" / "view.html").read_text()
    assert "belief-swap · swap" in text and "spatial IDs of" in text
    (tmp_path / "empty").mkdir()
    assert "holds no finished `jaxid run`" in refused(capsys, "view", tmp_path / "empty")
    assert "neither a folder nor a .safetensors file" in refused(capsys, "view", tmp_path / "none")
    assert "needs at least one folder" in refused(capsys, "view")
    assert "not a file of spatial IDs" in refused(capsys, "view", fixtures.folder(CASE) / "model.safetensors")


def test_in_a_notebook(swapped: Path) -> None:
    shown = jaxid.view(swapped, ids(), limit=2)
    assert len(shown.contents) == 2 and isinstance(shown.contents[1], Geometry)
    assert shown._repr_html_().startswith("<iframe srcdoc=")


def test_an_experiment_without_a_reading_says_so(swapped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BeliefSwap, "reading", None)
    with pytest.raises(InputError, match="runs of belief-swap cannot be viewed"):
        contents_of(swapped)


def test_maps_are_read_as_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    maps = Maps(
        title="dense maps",
        about={"model": "tiny"},
        picture=rng.integers(0, 255, (6, 6, 3), np.uint8),
        captions=["a star", "no star"],
        tokens=[[(0, "a", False), (1, "star", False)], [(0, "no", True), (1, "star", False)]],
        maps=rng.normal(size=(2, 3, 3, 2)).astype(np.float32),
        scores=np.array([1.0, -1.0], np.float32),
        cosines=np.array([0.1, 0.2], np.float32),
    )
    write_maps(tmp_path / "maps.safetensors", maps)
    again = read_maps(tmp_path / "maps.safetensors")
    for field in dataclasses.fields(maps):
        old, new = getattr(maps, field.name), getattr(again, field.name)
        np.testing.assert_equal(new, old)
    (shown,) = contents_of(tmp_path)
    assert isinstance(shown, Maps) and shown.captions == maps.captions
    ids().save(tmp_path / "maps.safetensors")
    with pytest.raises(InputError, match=r"maps.safetensors"):
        contents_of(tmp_path)
