"""Plans of fine-tuning and of evaluations of dense maps: without weights, close to what XLA's compiler says."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from test_finetune import CASE, command, items, model, write_data
from test_planning import CPU, H100, MARGIN, run, small

from jaxid import cli, meshes
from jaxid import plan as plans
from jaxid.checkpoints.encoders import load_encoder
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.dcsm.own_scorers import own_scorer
from jaxid.dcsm.scoring import Scorer
from jaxid.devices import Device
from jaxid.dry_run import Call
from jaxid.experiments import planning_finetune
from jaxid.experiments.dcsm_evaluate import EvaluateScorers
from jaxid.experiments.finetune import resolved, task
from jaxid.experiments.finetune_data import split_pairs
from jaxid.experiments.finetune_run import Finetune
from jaxid.experiments.planning import plan
from jaxid.meshes import Axes
from jaxid.plan import Plan, TrainingPlan
from jaxid.train import loop
from jaxid.train.placement import placement

MIB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and IDs, and the tiny model without its weights."""
    folder = write_data(tmp_path_factory.mktemp("finetune"))
    shutil.copytree(fixtures.folder(CASE), folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    with pytest.raises(SystemExit) as ended:
        cli.main(["dcsm", "data", "--out", str(folder), "--count", "12"])
    assert not ended.value.code
    return folder / "evaluation"


@pytest.fixture(autouse=True)
def loose() -> Any:
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for strict promotion
        yield


def finetune(data: Path, **changed: Any) -> Finetune:
    given: dict[str, Any] = {"model": str(data / "model"), "data": data / "data", "ids": data / "ids.safetensors"}
    given |= {"out": data / "out", "id_layer": 1, "prompt": "plain", "case": "lower", "held_out": 0.3}
    given |= {"batch_size": 4, "questions": 12, "steps": 6, "check_every": 4, **changed}
    return Finetune(**given)


def finetune_plan(command: Finetune, device: Any = H100, **options: Any) -> TrainingPlan:
    found = plan(command, device, **options)
    assert isinstance(found, TrainingPlan)
    return found


def test_a_plan_on_a_mesh_is_what_its_devices_hold(data: Path) -> None:
    command, axes = finetune(data, mesh="data=4,model=2", groups=4, train="lm-mlp,projector", budget=1.0), Axes(4, 2)
    found, alone = finetune_plan(command), finetune_plan(dataclasses.replace(command, mesh=None))
    own = open_checkpoint(fixtures.folder(CASE)).on(meshes.mesh(*axes)).load()
    read = command.read()
    job = task(own, read.training, dataclasses.replace(read.ids, fingerprint=own.fingerprint), resolved(command, own))
    initial = job.initial()
    where = placement(own.mesh, job.layout, initial)
    state = loop._placed_start(job.stage(), initial, where)

    def held(tree: Any) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert found.axes == axes and "data=4,model=2" in "\n".join(found.report())
    assert found.weights == held(own.parameters) < alone.weights
    assert found.trained == held(state["parameters"]) < 0.7 * alone.trained
    assert found.optimizer == held(state["optimizer"]) < 0.2 * alone.optimizer
    checkpoint, cards = open_checkpoint(str(data / "model")), dataclasses.replace(command, mesh="auto")
    room = int(1.2 * (alone.weights + alone.trained) / 0.6)  # not for the optimizer's copies
    tight = dataclasses.replace(H100, memory=room)
    assert cards.axes(checkpoint, 8, tight) == Axes(4, 2) and cards.axes(checkpoint, 8, H100) == Axes(8, 1)
    assert found.peak < alone.peak and found.flops == pytest.approx(alone.flops / 8)


@functools.cache
def roomy(data: Path, **changed: Any) -> TrainingPlan:
    """The plan of a run on a device that has room for it."""
    return finetune_plan(finetune(data, **changed))


def step(data: Path, **changed: Any) -> Call:
    """The plan of a step."""
    return roomy(data, **changed).programs[0]


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def test_a_run_is_planned_without_weights(data: Path) -> None:
    before = sorted(data.rglob("*"))
    found = finetune_plan(finetune(data))
    assert sorted(data.rglob("*")) == before
    assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(model().parameters))
    assert 0 < found.trained < found.weights and 2 * found.trained <= found.optimizer <= 2 * found.trained + 64
    one, *evaluations = found.programs
    assert (one.name, one.prompts) == ("training step", 2 * 4) and one.results < 64  # the state's memory is its own
    assert {call.name for call in evaluations} == {
        "forward",
        "answers",
        "trace at positions",
    } and found.evaluations == 3
    assert found.peak >= found.weights + found.trained + found.optimizer + one.memory
    each = H100.seconds(one.flops, one.moved)
    assert found.seconds == pytest.approx(6 * each + 3 * found.evaluation_seconds, rel=0.2)
    assert found.fits and found.sparing_peak is None and not found.measured


def test_the_published_run_is_planned(data: Path) -> None:
    """One small batch a step, in which both axes are asked about, and evaluations that write text."""
    found = finetune_plan(finetune(data, reference_bugs=True, held_out=0.4, batch_size=16))
    assert (found.small_batches, found.batch_size, found.programs[0].prompts) == (1, 16, 16)
    assert "generation" in {call.name for call in found.programs}


def test_more_pictures_take_more_and_recomputing_takes_less(data: Path) -> None:
    kept, cheap, lean = (step(data, batch_size=8, recompute=how) for how in ("nothing", "cheap", "all"))
    assert kept.temporary > cheap.temporary > lean.temporary
    assert cheap.flops < lean.flops
    few = step(data, batch_size=4, recompute="cheap")
    assert cheap.temporary > 1.3 * few.temporary and cheap.flops == pytest.approx(2 * few.flops, rel=0.1)
    assert step(data, batch_size=4, groups=4).flops == pytest.approx(2 * few.flops, rel=0.1)


def test_where_a_run_fits_only_with_everything_recomputed_that_is_said(data: Path) -> None:
    kept, lean = (roomy(data, questions=1, batch_size=12, recompute=how) for how in ("cheap", "all"))
    assert lean.peak < kept.peak
    device = small((lean.peak + kept.peak) / 2 / plans.USABLE)
    found = finetune_plan(finetune(data, questions=1, batch_size=12), device)
    assert not found.fits and found.sparing_peak == lean.peak
    lines = list(found.report())
    assert any(line.startswith("step") and line.endswith("2 x 12  pictures: does not fit") for line in lines)
    assert any(line.startswith("with --recompute all") and line.endswith("peak: fits") for line in lines)
    assert finetune_plan(finetune(data, questions=1, batch_size=12, recompute="all"), small(1)).sparing_peak is None


def test_estimates_of_a_run_are_close_to_what_xla_says(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for recompute in ("cheap", "all"):
        made = finetune(data, recompute=recompute, batch_size=8)
        estimated, measured = finetune_plan(made, CPU), finetune_plan(made, CPU, measure=True)
        names = [[call.name for call in found.programs] for found in (estimated, measured)]
        assert measured.measured and names[0] == names[1]
        held = measured.weights + measured.trained + measured.optimizer
        for ours, theirs in zip(estimated.programs, measured.programs, strict=True):
            assert abs(ours.memory - theirs.memory) <= MARGIN * (held + theirs.memory), (ours, theirs)
        # Evaluations do not learn: their programs are the same.
        monkeypatch.setattr(planning_finetune, "_evaluation", lambda *_: (0.0, []))


def test_the_data_is_that_of_the_run(data: Path) -> None:
    """A plan refuses what a run would."""
    train, held = split_pairs(items(), 0.3, 0)
    assert len(train) and held
    assert run("plan", *command(data, "out", "--ids", str(data / "none"))) == 2
    assert run("plan", *command(data, "out", "--budget", "1e-9")) == 2


# --- dense maps ------------------------------------------------------------------------------------------------------


@functools.cache
def evaluation_plan(benchmarks: Path, device: Device = H100, **options: Any) -> Plan:
    found = plan(EvaluateScorers(data=benchmarks, out=benchmarks / "no", batch_size=8), device, **options)
    assert isinstance(found, Plan)
    return found


def test_an_evaluation_is_planned_without_weights(benchmarks: Path, tmp_path: Path) -> None:
    encoder = load_encoder("tiny-clip", abstract=True)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(encoder.parameters))
    made = EvaluateScorers(data=benchmarks, out=tmp_path / "out", batch_size=8)
    found = plan(made, H100)
    assert isinstance(found, Plan) and not (tmp_path / "out").exists()
    assert found.weights == sum(leaf.nbytes for leaf in jax.tree.leaves(load_encoder("tiny-clip").parameters))
    assert (found.items, found.together, found.unit, found.batches) == (48, 8, "question", 6) and found.fits
    names = {call.name for call in found.programs}
    assert names == {"encoding of pictures", "encoding of captions", "scores of pairs"}
    asked = made.asked()
    pairs = sum(len(question.captions) for _, question in asked)
    assert pairs <= found.pairs <= 1.5 * pairs  # of the batches alike, that with most captions counts for all
    scores = next(call for call in found.programs if call.name == "scores of pairs")
    assert found.pairs_per_second > 0 and scores.prompts * scores.rows <= 8 * 4
    more = plan(dataclasses.replace(made, batch_size=16), H100)
    assert isinstance(more, Plan) and more.peak > found.peak and more.batches == 3


def test_an_evaluation_is_planned_for_a_mesh(benchmarks: Path, tmp_path: Path) -> None:
    made = EvaluateScorers(data=benchmarks, out=tmp_path, batch_size=8, mesh="data=2,model=2")
    alone, found = evaluation_plan(benchmarks), plan(made, H100)
    assert 0.5 * alone.weights < found.weights < alone.weights  # its 3 heads are not divided, its MLPs are
    for ours, theirs in zip(found.programs, alone.programs, strict=True):
        assert ours.name == theirs.name and abs(ours.flops - theirs.flops / 4) < 1e-6 * theirs.flops


def test_a_scorer_counts_as_what_it_computes(benchmarks: Path) -> None:
    """Two operations for each weight of the convolutions and place, and those of the maps."""
    found = evaluation_plan(benchmarks)
    path = own_scorer("tiny-clip")
    assert path is not None
    image, text = Scorer.load(path).map_shape
    scores = next(call for call in found.programs if call.name == "scores of pairs")
    maps = scores.prompts * scores.rows * image * text
    assert scores.flops > 2 * 9 * maps  # at least one 3 x 3 convolution


def test_estimates_of_an_evaluation_are_close_to_what_xla_says(benchmarks: Path) -> None:
    estimated, measured = evaluation_plan(benchmarks, CPU), evaluation_plan(benchmarks, CPU, measure=True)
    for ours, theirs in zip(estimated.programs, measured.programs, strict=True):
        assert ours.name == theirs.name
        assert abs(ours.memory - theirs.memory) <= MARGIN * (measured.weights + theirs.memory), (ours, theirs)


# --- the command line ------------------------------------------------------------------------------------------------


def test_the_commands(
    data: Path, benchmarks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = command(data, "out", "--model", str(data / "model"), "--groups", "4")
    assert run("plan", *given, "--device", "v5e") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("v5e: 15.75 GiB") and any("4 x 4  pictures: fits" in line for line in lines)
    assert lines[-1].startswith("6 steps of at least ") and ", 4 evaluations of " in lines[-1]
    assert run("plan", *given, "--device", "v5e", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"] == 6 and printed["small_batches"] == 4 and np.isfinite(printed["seconds"])
    assert run("plan", "dcsm", "eval", "--data", benchmarks, "--device", "h100") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith("64  questions together: fits") for line in lines)
    assert "48 questions in 1 batches" in lines[-2] and "pairs of picture and caption are scored" in lines[-1]
    assert list(tmp_path.iterdir()) == []
