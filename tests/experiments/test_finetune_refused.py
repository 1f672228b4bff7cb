"""Fine-tuning runs and comparisons that are refused, in one line and early."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_finetune import command, ids, model, process, write_data

from jaxid.errors import JaxidError
from jaxid.experiments.finetune_study import FinetuneStudy
from jaxid.io import locked


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line on stderr of a command that fails."""
    from jaxid.cli import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1, lines
    return lines[0]


def test_what_is_wrong_shows_before_the_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jaxid.checkpoints import tensors as files

    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("the weights are read")

    folder = write_data(tmp_path)
    wide = dataclasses.replace(ids(), values=np.ones((model().num_layers, 1, 1, 4, 4, 7), np.float32))
    wide.save(folder / "wide.safetensors")
    for name in ("taken", "broken", "state"):
        (folder / name).mkdir()
    (folder / "taken" / "run.json").write_text("{}")
    (folder / "broken" / "run.json").write_text("[1")
    (folder / "state" / "state").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(files, "read_parameters", reached)
        for out, further, message in (
            ("run", ["--id-layer", "9"], "id_layer 9 is out of range"),
            ("run", ["--ids", str(folder / "wide.safetensors")], "width 7"),
            ("run", ["--ids", str(folder / "none.safetensors")], "none.safetensors"),
            ("run", ["--data", str(folder / "none")], "none"),
            ("run", ["--coco", str(folder / "none")], "none"),
            ("run", ["--prompt", "What?"], "{query}"),
            ("run", ["--budget", "1e-9"], "no tensor of"),
            ("run", ["--train", "mlp"], "selectors"),
            ("run", ["--learning-rate", "nan"], "must be a finite number"),
            ("run", ["--dtype", "int8"], "int8"),
            ("run", ["--seed", "-5"], "seed"),
            ("taken", [], "other settings"),
            ("broken", [], "run.json"),
            ("state", [], "run.json is gone"),
        ):
            assert message in refused(capsys, command(folder, out, *further)), further
        with locked(folder / "taken"):
            assert "other settings" in refused(capsys, command(folder, "taken"))
        with locked(folder / "run"):
            assert "another process" in refused(capsys, command(folder, "run"))
        with pytest.raises(AssertionError, match="the weights are read"):
            refused(capsys, command(folder, "run"))


@pytest.mark.slow
def test_two_processes_on_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_data(tmp_path)
    first = process(folder, command(folder, "run", "--steps", "100000"))
    try:
        while not (folder / "run" / "run.json").exists():
            assert first.poll() is None
            time.sleep(0.02)
        line = refused(capsys, command(folder, "run", "--steps", "100000"))
        assert "another process is working in" in line and first.poll() is None
    finally:
        first.kill()
        first.wait()


SUMMARY = {
    "experiment": "finetune",
    "model": "tiny-llava",
    "config": {"seed": 1, "id_weight": 1.0},
    "evaluations": [{"step": 0, "held_out": 0.5, "held_out_right": 5, "held_out_questions": 10}],
}


def without(name: str, part: str = "config") -> dict[str, Any]:
    changed = json.loads(json.dumps(SUMMARY))
    inner = changed[part] if part == "config" else changed[part][0]
    del inner[name]
    return changed


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", "[" * 100_000, '{"experiment": NaN}']
    + [json.dumps(value) for value in ({}, SUMMARY | {"experiment": "x"}, SUMMARY | {"evaluations": [None]})]
    + [json.dumps(value) for value in (SUMMARY | {"evaluations": {}}, SUMMARY | {"config": []}, without("seed"))]
    + [json.dumps(value) for value in (without("id_weight"), without("step", "evaluations"))]
    + [json.dumps(without("held_out_questions", "evaluations")), json.dumps(SUMMARY).replace("0.5", '"half"')],
    ids=range(15),
)
def test_a_comparison_of_damaged_runs(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "summary.json").write_text(content)
    line = refused(capsys, ["compare-finetune", str(tmp_path), "--out", str(tmp_path / "out")])
    assert f"{tmp_path} holds no finished fine-tuning run" in line


def test_a_run_is_compared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(json.dumps(SUMMARY))
    line = refused(capsys, ["compare-finetune", str(tmp_path / "one"), str(tmp_path / "other"), "--out", "out"])
    assert "runs of one kind with the same seed" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 121}, "pairs must be at most 120"),
        ({"pairs": 1}, "pairs must be 2 or more"),
        ({"questions": 0}, "questions must be 1"),
        ({"seeds": 0}, "seeds must be 1"),
        ({"seed": -1}, "seed must be"),
        ({"id_layer": 99}, "id_layer 99 is out of range"),
        ({"id_weight": 0.0}, "id_weight above 0"),
        ({"train": "mlp"}, "selectors"),
        ({"model": "none"}, "no model folder"),
    ],
)
def test_a_study_that_cannot_be_made(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(JaxidError, match=message):
        FinetuneStudy(out=tmp_path / "study", **options).run()
    assert not (tmp_path / "study").exists()
