"""The fine-tuning study: its runs see the same, share the work among processes, and are compared in pairs."""

import csv
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from test_finetune import CASE, QUICK, command, ids, items, model, write_data
from test_finetune_refused import refused

from jaxid import plots
from jaxid.errors import DataError, InputError, InUseError
from jaxid.experiments import finetune, finetune_study
from jaxid.experiments.finetune_comparison import ELSE, WITH, WITHOUT, CompareFinetune
from jaxid.experiments.finetune_study import FinetuneStudy
from jaxid.io import locked, write_json
from jaxid.stats import mean_interval
from jaxid.train.folder import begun

KINDS = (WITH, ELSE, WITHOUT)


def other_ids() -> Any:
    return dataclasses.replace(ids(), values=-ids().values, model="another", fingerprint="another")


# --- kinds of runs ---------------------------------------------------------------------------------------------------


def test_runs_of_a_seed_differ_in_the_ids_alone() -> None:
    """Whatever the weight of the ID loss and the IDs: the same batches in the same order, and the same start."""
    without = dataclasses.replace(QUICK, id_weight=0.0)
    with_ids, other, alone = (
        finetune.task(model(), items(), ids(), QUICK),
        finetune.task(model(), items(), other_ids(), QUICK, foreign=True),
        finetune.task(model(), items(), ids(), without),
    )
    for task in (other, alone):
        jax.tree.map(np.testing.assert_array_equal, with_ids.initial(), task.initial())
        assert [[one.row for one in group] for group in task.groups] == [
            [one.row for one in group] for group in with_ids.groups
        ]
        for step in (0, 5):
            first, second = (dict(one.stage().batch(step)) for one in (with_ids, task))
            targets = first.pop("target"), second.pop("target")
            jax.tree.map(np.testing.assert_array_equal, first, second)
            np.testing.assert_array_equal(targets[0], -targets[1] if task is other else targets[1])


def test_ids_of_another_model_must_be_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_data(tmp_path)
    other_ids().save(folder / "other.safetensors")
    own, other = str(folder / "ids.safetensors"), str(folder / "other.safetensors")
    line = refused(capsys, command(folder, "run", "--ids", other))
    assert "extracted from another" in line and "--ids-from-another-model if that is meant" in line
    line = refused(capsys, command(folder, "run", "--compared-ids", own))
    assert "both" in line and "own" in line
    wide = dataclasses.replace(other_ids(), values=np.ones((model().num_layers, 1, 1, 4, 4, 7), np.float32))
    with pytest.raises(InputError, match="width 7"):
        finetune.task(model(), items(), wide, QUICK, foreign=True)
    with pytest.raises(InputError, match="if that is meant"):
        finetune.task(model(), items(), other_ids(), QUICK)


# --- several processes -----------------------------------------------------------------------------------------------


def test_a_run_that_another_process_makes_is_left_to_it(tmp_path: Path) -> None:
    study, made = FinetuneStudy(out=tmp_path), []

    def run(folder: Path) -> None:
        with locked(folder):
            made.append(folder.name)

    folders = [tmp_path / name for name in ("taken", "free", "done")]
    for folder in folders:
        folder.mkdir()
    write_json(folders[2] / "summary.json", {})
    work = {folder: (lambda folder=folder: run(folder)) for folder in folders}
    with locked(folders[0]):
        assert study._made(work) == set(folders[1:]) and made == ["free"]
    assert study._made(work) == set(folders) and made == ["free", "taken", "free"]


def test_a_study_waits_while_another_process_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune_study, "_SECONDS", 0.01)
    settings: dict[str, Any] = {"settings": {"experiment": "finetune-study"}}
    study, order = FinetuneStudy(out=tmp_path / "study"), []
    drawing = threading.Event()

    def other() -> None:
        with begun(study.out, settings["settings"]):
            drawing.set()
            time.sleep(0.3)
            order.append("drawn")

    thread = threading.Thread(target=other)
    thread.start()
    assert drawing.wait(10)
    with study._alone(settings):
        order.append("next")
    thread.join()
    assert order == ["drawn", "next"]


def test_a_study_in_use_is_not_discarded(tmp_path: Path) -> None:
    run = tmp_path / "teacher-ids-0"
    run.mkdir()
    (run / "metrics.csv").write_text("")
    with locked(run), pytest.raises(InUseError, match="teacher-ids-0"):
        FinetuneStudy(out=tmp_path, restart=True).run()
    assert (run / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "tiny-llava-weak"}, "is the model itself"),
        ({"teacher": str(fixtures.folder(CASE))}, r"the teacher .* has \d+ layers of width \d+, tiny-llava-weak 8"),
    ],
)
def test_a_teacher_that_cannot_be(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        FinetuneStudy(out=tmp_path / "study", **options).run()
    assert not (tmp_path / "study").exists()


def test_kinds_of_runs_and_their_ids(tmp_path: Path) -> None:
    study = FinetuneStudy(out=tmp_path, seeds=2, seed=4)
    runs = {folder.name: run.__self__ for folder, run in study._runs().items()}  # type: ignore[attr-defined]
    assert list(runs) == [f"{kind}-ids-{seed}" for seed in (4, 5) for kind in ("with", "without", "teacher")]
    for name, run in runs.items():
        teacher = name.startswith("teacher")
        assert run.ids.name == ("teacher-" if teacher else "") + "ids.safetensors"
        assert run.ids_from_another_model == teacher
        assert {run.ids.name, run.compared_ids.name} == {"ids.safetensors", "teacher-ids.safetensors"}
        assert (run.id_weight, run.seed, run.steps) == (0.0 if "out" in name else 1.0, int(name[-1]), 3200)
    alone = dataclasses.replace(study, teacher="none")._runs()
    assert len(alone) == 4 and all(run.__self__.compared_ids is None for run in alone.values())  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_study_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = FinetuneStudy(
        out=tmp_path / "study",
        seeds=1,
        pairs=2,
        questions=8,
        steps=2,
        check_every=2,
        batch_size=4,
        mesh="data=1",
        progress=False,
    )
    with jax.numpy_dtype_promotion("standard"):
        found = study.run()
    assert set(found.comparison) == {"held_out", "coco_spatial", "cosine_own", "cosine_other", "variance"}
    before = [json.loads((study.out / f"{kind}-ids-0" / "summary.json").read_text()) for kind in ("with", "teacher")]
    for name in ("cosine_own", "cosine_other", "variance", "held_out"):  # the same model and questions
        assert before[0]["evaluations"][0][name] == before[1]["evaluations"][0][name]
    assert [run["ids_model"] for run in before] == ["tiny-llava-weak", "tiny-llava"]
    agreement = np.array(found.agreement)
    assert agreement.shape == (4, 4) and (np.abs(agreement) <= 1).all() and agreement.mean() > 0.2
    assert (study.out / "agreement.json").exists() and (study.out / "comparison" / "geometry.png").exists()
    assert any("between the IDs of tiny-llava-weak and tiny-llava" in line for line in study.report(found))

    def reached(*_: Any, **__: Any) -> Any:
        raise AssertionError("a run is made again")

    monkeypatch.setattr(finetune_study.Finetune, "run", reached)
    assert study.run() == found


# --- comparison ------------------------------------------------------------------------------------------------------


def write_run(folder: Path, seed: int, kind: str, accuracy: float) -> Path:
    """The summary of a finished run, whose accuracy ascends from 0.5."""
    evaluations = [
        {"step": step, "held_out": value, "held_out_right": 10 * value, "held_out_questions": 10}
        | {"cosine_own": 0.1 * value, "cosine_other": 0.2 * value, "variance": 0.5 + 0.1 * seed}
        for step, value in ((0, 0.5 + 0.1 * seed), (10, accuracy))
    ]
    own = kind != "other"
    write_json(
        folder / "summary.json",
        {"experiment": "finetune", "model": "tiny", "own_ids": own, "ids_model": "tiny" if own else "teacher"}
        | {"compared_model": "teacher" if own else "tiny", "evaluations": evaluations}
        | {"config": {"seed": seed, "id_weight": 0.0 if kind == "without" else 1.0}},
    )
    return folder


def test_three_kinds_are_compared_seed_by_seed(tmp_path: Path) -> None:
    reached = {"without": {0: 0.6, 1: 0.7, 2: 0.8}, "with": {0: 0.65, 1: 0.75}, "other": {1: 0.9, 2: 0.6}}
    folders = []
    for kind, seeds in reached.items():
        for seed, accuracy in seeds.items():
            folders.append(tmp_path / f"{kind}-{seed}")
            folders[-1].mkdir()
            write_run(folders[-1], seed, kind, accuracy)
    command = CompareFinetune(tuple(folders), out=tmp_path / "out")
    found = command.run()
    held = found["held_out"]
    assert held["before"].values == pytest.approx([0.5, 0.6, 0.7])  # once for every seed
    assert held["with_ids - without_ids"].values == pytest.approx([0.05, 0.05])
    assert held["other_ids - without_ids"].values == pytest.approx([0.2, -0.2])
    assert held["other_ids - with_ids"].values == pytest.approx([0.15])
    assert held["other_ids"].mean == pytest.approx(0.75)
    half = 12.706 * 0.2  # Student's of two values
    paired = held["other_ids - without_ids"]
    assert (paired.low, paired.high) == pytest.approx((-half, half), rel=1e-3)
    assert set(found) == {"held_out", "cosine_own", "cosine_other", "variance"}
    with (tmp_path / "out" / "comparison.csv").open() as file:
        rows = {(row["set"], row["runs"], row["step"]): row for row in csv.DictReader(file)}
    assert rows["held_out", "without_ids", "0"]["values"] == "0.5000 0.6000 0.7000"
    assert rows["cosine_other", "other_ids", "10"]["mean"] == "0.1500"
    written = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert written["variance"]["before"]["mean"] == pytest.approx(0.6)
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("comparison.png", "geometry.png"))
    assert any("other_ids - with_ids" in line for line in command.report(found))
    with pytest.raises(DataError, match="with the ID loss and without it"):
        CompareFinetune(tuple(folders[:3]), out=tmp_path / "out").run()


def test_runs_without_geometry_are_compared(tmp_path: Path) -> None:
    """Those of earlier versions."""
    for name, weight in (("one", 1.0), ("two", 0.0)):
        (tmp_path / name).mkdir()
        run = json.loads((write_run(tmp_path / name, 0, "with", 0.7) / "summary.json").read_text())
        for column in ("own_ids", "ids_model", "compared_model"):
            del run[column]
        run["config"]["id_weight"] = weight
        for row in run["evaluations"]:
            for measure in ("cosine_own", "cosine_other", "variance"):
                del row[measure]
        write_json(tmp_path / name / "summary.json", run)
    found = CompareFinetune((tmp_path / "one", tmp_path / "two"), out=tmp_path / "out").run()
    assert set(found) == {"held_out"} and not (tmp_path / "out" / "geometry.png").exists()


def test_the_figure_shows_every_kind_and_paired_differences() -> None:
    rows = {kind: 0.6 + 0.1 * np.random.default_rng(row).random((3, 4)) for row, kind in enumerate(KINDS)}
    pairs = {f"{kind} - {WITHOUT}": rows[kind] - rows[WITHOUT] for kind in (WITH, ELSE)}
    steps = np.array([0, 10, 20, 30])
    sets = ("held-out pairs", "COCO-Spatial")
    figure = plots.finetune_comparison(
        steps, dict.fromkeys(sets, rows), dict.fromkeys(sets, pairs), other="teacher", about=plots.About(model="tiny")
    )
    assert len(figure.axes) == 4
    for axes in figure.axes[:2]:
        thick = [line for line in axes.get_lines() if line.get_marker() == "o"]
        for line, kind in zip(thick, KINDS, strict=True):
            np.testing.assert_allclose(np.asarray(line.get_ydata()), rows[kind].mean(axis=0))
        names = axes.get_legend_handles_labels()[1]
        assert names == ["ID loss, own IDs, 3 seeds", "ID loss, IDs of teacher, 3 seeds", "answers alone, 3 seeds"]
    for axes in figure.axes[2:]:
        for whiskers, values in zip(axes.containers, pairs.values(), strict=True):
            line, _, (bars,) = whiskers
            np.testing.assert_allclose(np.asarray(line.get_ydata()), values.mean(axis=0))
            half = np.array([np.ptp(segment[:, 1]) / 2 for segment in bars.get_segments()])
            np.testing.assert_allclose(half, mean_interval(values))
