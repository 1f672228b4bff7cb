"""Shards of a run: each is run on its own, together they are the run, and nothing is joined that does not belong."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_data import ITEMS, columns, experiment
from run_data import place as place
from test_cli import refused
from test_cli import run as command

from jaxid import cli
from jaxid.errors import InputError
from jaxid.experiments.base import Experiment
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.io import read_json, write_json
from jaxid.parts import Shard
from jaxid.places import Elsewhere

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")

OPTIONS: dict[str, Any] = {"layers": "0-1", "max_new_tokens": 0, "limit": 11, "seed": 3}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """The run that is not divided."""
    experiment(BeliefSwap, place, "whole", **OPTIONS).run()
    return place / "whole"


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose figures are drawn in another test."""
    monkeypatch.setattr(BeliefSwap, "figures", lambda *_: ())


@pytest.fixture(scope="module")
def shards(place: Path) -> list[Path]:
    """The same run in three shards, of 3, 4 and 4 items."""
    for index in (1, 2, 3):
        experiment(BeliefSwap, place, f"shard{index}", shard=f"{index}/3", **OPTIONS).run()
    return [place / f"shard{index}" for index in (1, 2, 3)]


def by_item(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rows of a table, those of an item side by side: their order within a chunk depends on its size."""
    order = np.lexsort((table["layer"], table["condition"], table["item"]))
    return {name: values[order] for name, values in table.items()}


@pytest.mark.slow
def test_a_run_in_shards_is_the_run(whole: Path, shards: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = whole.parent / "joined"
    assert command("merge", shards[2], shards[0], shards[1], "--out", out) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out / "summary.json")
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
    one, joined = by_item(columns(whole)), by_item(columns(out))
    assert one.keys() == joined.keys()
    for name, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(joined[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(joined[name], values)
    # Items in the order of the run, though chunks were of other sizes.
    assert list(dict.fromkeys(columns(out)["item"])) == list(dict.fromkeys(columns(whole)["item"]))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, out)]
    for summary in summaries:
        del summary["seconds"], summary["resumed_items"]
    assert_close(*summaries)


def assert_close(one: Any, other: Any) -> None:
    """Two values of JSON types are the same but for rounding."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert_close(value, other[name])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert other == (pytest.approx(one, abs=1e-5) if isinstance(one, float) else one)


@pytest.mark.slow
@pytest.mark.usefixtures("no_figures")
def test_the_runs_own_command_finds_the_result_finished(
    whole: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = whole.parent / "resumed"
    assert command("merge", *shards, "--out", out) == 0

    def compute(*_: object) -> None:
        raise AssertionError("nothing is left to compute")

    with monkeypatch.context() as patch:
        patch.setattr(BeliefSwap, "compute", compute)
        assert experiment(BeliefSwap, whole.parent, "resumed", **OPTIONS).run().resumed_items == 11
        assert command("run", "belief-swap", "--config", out / "config.yaml") == 0
    # A part that is lost is computed again, like that of any run.
    (out / "parts" / "00001.parquet").unlink()
    assert experiment(BeliefSwap, whole.parent, "resumed", **OPTIONS).run().resumed_items == 7


@pytest.mark.usefixtures("no_figures")
def test_a_shard_without_items_is_finished(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = OPTIONS | {"limit": 2}
    with pytest.raises(Elsewhere, match=r"empty1: of 2 items, shard 1/3 has none; it is done\."):
        experiment(BeliefSwap, place, "empty1", shard="1/3", **few).run()
    for index in (2, 3):
        experiment(BeliefSwap, place, f"empty{index}", shard=f"{index}/3", **few).run()
    assert command("merge", *(place / f"empty{index}" for index in (1, 2, 3)), "--out", place / "few") == 0
    assert read_json(place / "few" / "summary.json")["items"] == 2
    with pytest.raises(Elsewhere):  # and again, as an array job that is repeated
        experiment(BeliefSwap, place, "empty1", shard="1/3", **few).run()
    capsys.readouterr()
    assert refused(capsys, "merge", place / "empty1", place / "empty2", "--out", place / "no").endswith(
        "shards are missing, 1 of 3: 3/3."
    )


@pytest.mark.slow
def test_another_shard_does_not_resume(place: Path, shards: list[Path]) -> None:
    with pytest.raises(Exception, match=r"holds a run with other settings: shard was 1/3, is now 2/3\."):
        experiment(BeliefSwap, place, shards[0].name, shard="2/3", **OPTIONS).run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("1 2", "shards are missing, 1 of 3: 3/3."),
        ("1 1 2", "are the same shard, 1/3."),
        ("1 whole 3", "whole holds a whole run, not a shard of one."),
        ("1 2 none", "none holds no run; give the --out folders of the shards."),
        ("", "give the folders of the shards that are to be joined."),
    ],
)
def test_shards_that_are_not_all_there(
    whole: Path, shards: list[Path], given: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"shard{name}" if name.isdigit() else name for name in given.split()]
    out = whole.parent / "refused"
    assert refused(capsys, "merge", *(whole.parent / name for name in names), "--out", out).endswith(message)
    assert not out.exists() and not list(whole.parent.glob(".refused*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("settings", "seed", 4), "do not belong together: seed is 3 and 4."),
        (("settings", "fingerprint", "x"), 'and "x".'),
        (("shard", "of", 4), "do not belong together: number of shards is 3 and 4."),
        (("shard", "versions", {"jax": "0"}), 'jaxlib is "'),
        (("shard", "items", {"count": 9, "digest": "x"}), "items is {"),
        (("shard", "index", 7), "settings.json is damaged; run this shard anew with --restart."),
    ],
)
def test_shards_that_do_not_belong_together(
    shards: list[Path], tmp_path: Path, change: tuple[str, str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(shards[1], tmp_path / "other")
    stored = read_json(other / "settings.json")
    stored[change[0]][change[1]] = change[2]
    write_json(other / "settings.json", stored)
    assert message in refused(capsys, "merge", shards[0], other, shards[2], "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shards_that_are_not_finished_or_damaged(
    shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(shards[1], tmp_path / "other")
    arguments = ("merge", shards[0], other, shards[2], "--out", tmp_path / "out")
    (other / "parts" / "00000.parquet").write_bytes(b"not a table")
    assert "00000.parquet is damaged; delete it, and resume its shard first." in refused(capsys, *arguments)
    (other / "parts" / "00000.parquet").unlink()
    assert refused(capsys, *arguments).endswith("(shard 2/3) is not finished: 4 items are missing; resume it first.")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    assert refused(capsys, *arguments).endswith("out exists; give --out a new folder.")


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/3", "1/3/4"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(InputError, match=r"--shard is given as 3/16, the third of sixteen, not as"):
        Shard.parse(text)


def test_shards_are_even_and_whole() -> None:
    for count in (0, 2, ITEMS, 33):
        found = [Shard(index, 5).part(range(count)) for index in range(1, 6)]
        assert [one for part in found for one in part] == list(range(count))
        assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("path", [path for path in cli.COMMANDS if path.startswith("run ")])
def test_every_experiment_can_be_joined(path: str) -> None:
    """The name that a run notes in its settings is that of its command."""
    module, name = cli.COMMANDS[path].split(":")
    kind = getattr(importlib.import_module(module), name)
    if issubclass(kind, Experiment):
        assert f"run {kind.name}" == path
        assert {"shard", "mesh", "restart", "progress"} <= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.slow
def test_options_that_are_damaged(shards: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, config = shards[0], (shards[0] / "config.yaml").read_text()
    for text, message in (
        ("- a\n", "config.yaml"),
        (f"{config}unknown: 3\n", "does not hold the options of belief-swap"),
        (None, "config.yaml: the file does not exist."),
    ):
        copy = shutil.copytree(first, tmp_path / "copy")
        (copy / "config.yaml").unlink() if text is None else (copy / "config.yaml").write_text(text)
        assert message in refused(capsys, "merge", copy, *shards[1:], "--out", tmp_path / "out")
        shutil.rmtree(copy)
