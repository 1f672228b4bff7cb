"""Plans of experiments: without weights, close to what XLA's compiler says, and a batch that fits."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from run_data import CASE, ITEMS, columns, experiment
from run_data import place as place

from jaxid import cli
from jaxid import plan as plans
from jaxid.data.clips import write_appear_folder
from jaxid.data.grid import write_grid_folder
from jaxid.devices import DEVICES, GIB, Device
from jaxid.dry_run import dry_run
from jaxid.errors import OutOfMemoryError
from jaxid.experiments import planning, session
from jaxid.experiments.activation_swap import MirrorSwap
from jaxid.experiments.base import Command
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.blank_image import BlankImage
from jaxid.experiments.occlusion import KINDS, Occlusion
from jaxid.experiments.spatial_ids import ExtractIDs
from jaxid.experiments.temporal_ids import ExtractTemporalIDs
from jaxid.interp.programs import Program
from jaxid.meshes import ONE
from jaxid.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")

H100, CPU = DEVICES["h100"], DEVICES["cpu"]
MARGIN = 0.2
"""Of the estimate of all memory that a batch needs, against XLA's own account."""


@pytest.fixture(scope="module")
def weightless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder without its weights."""
    folder = tmp_path_factory.mktemp("plans") / "model"
    shutil.copytree(fixtures.folder(CASE), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def plan(command: Command[Any], device: Device, **options: Any) -> Plan:
    found = planning.plan(command, device, **options)
    assert isinstance(found, Plan)
    return found


@functools.cache
def planned(kind: type[Any], place: Path, weightless: Path, device: Device = H100, **options: Any) -> Plan:
    given = {"model": str(weightless), "batch_size": None, **options}
    return plan(experiment(kind, place, "nothing", **given), device)


def small(memory: float, device: Device = H100) -> Device:
    return dataclasses.replace(device, memory=int(memory))


# --- what a plan says -----------------------------------------------------------------------------------------------


def test_no_weights_are_read_and_nothing_is_written(place: Path, weightless: Path) -> None:
    before = sorted(place.rglob("*"))
    found = planned(BeliefSwap, place, weightless, batch_size=4, layers="0-1", max_new_tokens=0)
    assert sorted(place.rglob("*")) == before
    parameters = jax.tree.leaves(fixtures.model(CASE).parameters)
    assert found.weights == sum(leaf.nbytes for leaf in parameters)
    assert found.fits and not found.measured and found.items == ITEMS
    names = [call.name for call in found.programs]
    assert names[0] == "trace" and names.count("rerun") == 1 and found.programs[names.index("rerun")].rows == 4
    assert found.peak == found.weights + max(call.memory for call in found.programs)
    assert 0 < found.rerun_per_row < found.trace_per_prompt


def test_operations_are_those_of_the_model(place: Path, weightless: Path) -> None:
    """Two for each weight of the decoder and token, beside the tower's and attention's."""
    model = fixtures.model(CASE)
    found = planned(MirrorSwap, place, weightless, batch_size=4, layers="1")
    trace = found.programs[0]
    tower, decoder = (
        sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.ndim > 1)
        for tree in ({**model.parameters, "decoder": {}}, model.parameters["decoder"]["layers"])
    )
    tokens = model.processor.usual_tokens
    assert trace.prompts == 4
    assert 2 * decoder * 4 * tokens * 0.8 < trace.flops < 2 * (decoder + tower) * 4 * (tokens + 64) * 3
    whole = sum(H100.seconds(call.flops, call.moved) for call in found.programs)
    assert found.seconds == pytest.approx(found.batches * whole) and found.batches == -(-found.items // 4)


def test_rows_that_start_late_compute_less(place: Path, weightless: Path) -> None:
    plans_of = [
        planned(BeliefSwap, place, weightless, batch_size=4, layers=layers, max_new_tokens=0) for layers in ("0", "1")
    ]
    early, late = (next(call for call in one.programs if call.name == "rerun") for one in plans_of)
    assert early.flops == pytest.approx(2 * late.flops) and late.flops > 0  # two blocks of three, and one


def test_generation_counts_every_token(place: Path, weightless: Path) -> None:
    short, long = (
        planned(BeliefSwap, place, weightless, batch_size=4, layers="1", max_new_tokens=tokens) for tokens in (4, 16)
    )
    assert {"rerun before generation", "generation"} <= {call.name for call in short.programs}
    last = [[call for call in one.programs if call.name == "generation"][-1] for one in (short, long)]
    assert last[1].flops == pytest.approx(4 * last[0].flops, rel=0.2) and last[1].temporary > last[0].temporary


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("kind", "options"),
    [(BeliefSwap, {"max_new_tokens": 0}), (MirrorSwap, {}), (Occlusion, {})],
    ids=["belief-swap", "mirror-swap", "occlusion"],
)
def test_estimates_are_close_to_what_xla_says(
    kind: type[Any], options: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    """Of the shipped model, whose programs were measured by the compiler for this CPU."""
    ids = tmp_path / "ids.safetensors"
    shipped_ids().save(ids)
    given = {"model": "tiny-llava", "batch_size": 24} | options | ({"ids": ids} if kind is BeliefSwap else {})
    made = experiment(kind, place, "nothing", **given)
    estimated, measured = plan(made, CPU), plan(made, CPU, measure=True)
    assert measured.measured and [call.name for call in measured.programs] == [call.name for call in estimated.programs]
    for ours, theirs in zip(estimated.programs, measured.programs, strict=True):
        whole = theirs.memory + measured.weights
        assert abs(ours.memory - theirs.memory) <= MARGIN * whole, (ours, theirs)


def shipped_ids() -> Any:
    import run_data

    import jaxid

    model = jaxid.load("tiny-llava")
    values = np.random.default_rng(5).normal(size=(model.num_layers, 2, 1, 4, 4, model.width)).astype(np.float32)
    names = tuple(f"blocks.{layer}.resid_post" for layer in range(model.num_layers))
    return dataclasses.replace(run_data.ids(), values=values, layer_names=names, fingerprint=model.fingerprint)


# --- the batch ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Doubled:
    """A job of one small program, whose memory grows with the batch."""

    items: int
    per_item: int
    most: int
    weights: float = 1e4
    axes = ONE

    def batches(self, together: int) -> Iterator[tuple[int, Callable[[], object]]]:
        yield -(-self.items * self.per_item // together), lambda: double(np.ones((together, 1000), np.float32))


@Program
def double(x: Any) -> jax.Array:
    return 2 * x


def test_the_batch_follows_from_the_memory() -> None:
    job = Doubled(items=12, per_item=1, most=6)
    whole, one = plans.plan(job, H100), plans.plan(job, H100, together=1)
    assert whole.together == 6  # as many items as each axis has
    sizes = []
    for share in (1.0, 0.6, 0.3, 0.0):
        memory = one.peak + share * (whole.peak - one.peak)
        found = plans.plan(job, small(memory * 1.05 / plans.USABLE))
        assert found.fits and found.peak <= plans.USABLE * found.device.memory
        sizes.append(found.together)
    assert sizes[0] == whole.together and sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[1] < sizes[0]


def test_what_does_not_fit_is_said(place: Path, weightless: Path) -> None:
    options = {"layers": "0", "max_new_tokens": 0}
    peak = planned(BeliefSwap, place, weightless, batch_size=4, **options).peak
    found = planned(BeliefSwap, place, weightless, small(peak), batch_size=4, **options)
    assert not found.fits and found.together == 4 and "does not fit" in "\n".join(found.report())
    with pytest.raises(
        OutOfMemoryError, match=r"the weights of .* do not fit in the .* of a h100; use --dtype bfloat16"
    ):
        planned(BeliefSwap, place, weightless, small(found.weights), **options)


def with_batches_of(
    monkeypatch: pytest.MonkeyPatch, together: int, command: Command[Any], device: Device
) -> tuple[Any, int | None, Plan]:
    """A command's job, the batch that it asks for, and its plan with another one."""
    asked, made = [], plans.plan

    def noted(job: Any, device: Device, *, together: int | None, measure: bool) -> Plan:
        asked.append((job, together))
        return made(job, device, together=given, measure=measure)

    given = together
    with monkeypatch.context() as patch:
        patch.setattr(plans, "plan", noted)
        found = plan(command, device)
    ((job, wanted),) = asked
    return job, wanted, found


def test_items_of_many_prompts(place: Path, weightless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch holds whole items, unless not even one fits."""
    options = {"model": str(weightless), "batch_size": None}
    occlusion, blank = (
        experiment(Occlusion, place, "nothing", **options),
        experiment(BlankImage, place, "no", **options),
    )
    real, wanted, found = with_batches_of(monkeypatch, 2, occlusion, H100)
    assert (wanted, real.per_item, real.most) == (None, len(KINDS), ITEMS // 2)
    assert found.together == max(call.prompts for call in found.programs) == 2
    for per_item in (len(KINDS), BlankImage.prompts_per_item):
        job = Doubled(items=real.items, per_item=per_item, most=real.most)
        whole = plans.plan(job, H100)
        assert whole.together > 3 and whole.together % per_item == 0
    job = Doubled(items=real.items, per_item=len(KINDS), most=real.most)
    whole = plans.plan(job, H100)
    tight = small(1.001 * (whole.weights + (whole.peak - whole.weights) / whole.together * 3) / plans.USABLE)
    assert plans.plan(job, tight).together in (1, 2, 3)
    assert with_batches_of(monkeypatch, 4, blank, H100)[0].per_item == BlankImage.prompts_per_item


def test_a_cpu_keeps_its_choice(place: Path, weightless: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": None, "layers": "1", "max_new_tokens": 0}
    made = experiment(BeliefSwap, place, "nothing", model=str(weightless), **options)
    expected = plans.fitting(fixtures.model(CASE), "float32", 2, 1, CPU)
    several = [plans.fitting(fixtures.model(CASE), "float32", 2, 4, device) for device in (CPU, H100)]
    assert several == [expected // 4 * 4, expected * 4]  # a CPU's devices share its memory
    assert with_batches_of(monkeypatch, 4, made, CPU)[1] == expected == 32


def test_a_run_on_an_accelerator_chooses_the_planned_batch(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"layers": "1", "max_new_tokens": 0, "batch_size": None}
    made = experiment(BeliefSwap, place, tmp_path / "gpu", **options)
    most, few = (plan(dataclasses.replace(made, batch_size=size), H100) for size in (6, 2))
    device = small((few.peak + (most.peak - few.peak) / 2) / plans.USABLE)
    sizes, run, chosen, choose = [], session.jobs.run, [], session.plan

    class Stopped(BaseException):
        pass

    def spied(*arguments: Any, **settings: Any) -> Any:
        sizes.append(settings["chunk_size"])
        if len(sizes) == 1:
            raise Stopped
        return run(*arguments, **settings)

    def noted(*arguments: Any, **settings: Any) -> Plan:
        chosen.append(choose(*arguments, **settings))
        return chosen[-1]

    monkeypatch.setattr(session, "plan", noted)
    monkeypatch.setattr(session.jobs, "run", spied)
    with pytest.raises(Stopped):
        dataclasses.replace(made, out=tmp_path / "cpu").run()
    monkeypatch.setattr(session, "this", lambda: device)
    made.run()
    (found,) = chosen  # the first run did not ask
    assert sizes == [32, found.together] and 1 <= found.together < most.together
    assert found.fits and found.measured and found.peak <= plans.USABLE * device.memory
    assert len(set(columns(tmp_path / "gpu")["item"])) == ITEMS


# --- extraction, and the command line -------------------------------------------------------------------------------


def test_an_extraction(tmp_path: Path, weightless: Path) -> None:
    write_grid_folder(tmp_path / "grid", [("star", "fish")], picture_size=48, object_sizes=[56])
    command = ExtractIDs(data=tmp_path / "grid", out=tmp_path / "a.safetensors", model=str(weightless), batch_size=16)
    found = plan(command, H100)
    assert [call.name for call in found.programs] == ["trace at positions"] and found.together == 16
    assert found.batches == -(-found.items // 16) and found.flops > 0
    assert list(tmp_path.iterdir()) == [tmp_path / "grid"]


def test_an_extraction_from_clips(tmp_path: Path) -> None:
    """Both words of every clip are read."""
    frames = [(i, i % 7 + 1) for i in range(1, 6)]
    write_appear_folder(tmp_path / "clips", [("star", "fish")], frames=frames, picture_size=32)
    out = tmp_path / "a.safetensors"
    command = ExtractTemporalIDs(data=tmp_path / "clips", out=out, model="tiny-video", batch_size=4)
    found = plan(command, H100)
    assert [(call.name, call.prompts) for call in found.programs] == [("trace at positions", 4)] * 2
    assert (found.items, found.batches) == (5, 2) and found.flops == 2 * sum(call.flops for call in found.programs)
    assert list(tmp_path.iterdir()) == [tmp_path / "clips"]


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_the_command(
    place: Path, weightless: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given = ["mirror-swap", "--data", place / "data", "--model", weightless, "--layers", "1", "--batch-size", "4"]
    assert run("plan", *given, "--device", "v5e") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("v5e: 15.75 GiB of memory; peaks 197 TFLOP/s, 819 GB/s")
    assert any(line.startswith("batch") and line.endswith("prompts together: fits") for line in lines)
    assert "items in" in lines[-1] and "at least" in lines[-1]
    assert run("plan", "run", *given, "--out", "a", "--device=v5e", "--json", "--save", "plan.json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "plan.json").read_text())
    assert printed["device"]["name"] == "v5e" and printed["fits"] and printed["items"] == ITEMS // 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "options.yaml").write_text("layers: '1'\nbatch_size: 4\n")
    assert run("plan", *given[:-4], "--config", "options.yaml", "--device", "v5e") == 0
    assert "             4  prompts together" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["belief-swap", "--device", "h99"], "'h99' is not known"),
        (["demo", "--device", "h100"], "plan needs a `jaxid run`, `jaxid ids`"),
        (["nonsense"], "nonsense"),
        (["mirror-swap", "--device", "h100"], "--data"),
    ],
)
def test_what_cannot_be_planned(arguments: list[str], message: str, capsys: Any) -> None:
    assert run("plan", *arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_results_that_are_no_longer_held_are_not_counted() -> None:
    double = Program(lambda x: 2 * x)
    array = np.ones(1000, np.float32)

    def keep() -> Any:
        first = double(array)
        second = double(first)
        return first, second, double(array)

    def drop() -> None:
        for _ in range(3):
            double(array)

    assert [call.held for call in dry_run(keep, H100)] == [4000, 4000, 12000]
    assert [call.held for call in dry_run(drop, H100)] == [4000, 4000, 4000]
    assert H100.memory > GIB
