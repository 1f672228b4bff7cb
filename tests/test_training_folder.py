"""A training run's folder: damaged states, full disks, two processes, gradients that are not finite."""

import asyncio
import contextlib
import gc
import json
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxid.errors import CheckpointError, InputError, JaxidWarning, OutputError
from jaxid.train import loop as training
from jaxid.train.folder import States
from jaxid.train.loop import Stage

SETTINGS = {"seed": 3, "rates": (0.1, 0.2)}
START = {"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)}


def batch(step: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng((3, step)).standard_normal((8, 3)).astype(np.float32)
    return {"x": x, "y": x[:, :2] - 2 * x[:, 1:] + 1}


def loss(parameters: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    value = ((batch["x"] @ parameters["w"] + parameters["b"] - batch["y"]) ** 2).mean()
    return value, {"loss": value}


def stages(draw: Callable[[int], Any] = batch, *, rate: float = 0.1, steps: int = 6) -> list[Stage]:
    """Two stages of equal length with rules of their own."""
    optimizers = (optax.adam(rate), optax.adam(rate / 2))
    return [
        Stage(name=f"stage {number}", first=number * steps, steps=steps, loss=loss, batch=draw, optimizer=rule)
        for number, rule in enumerate(optimizers)
    ]


def run(folder: Path, made: list[Stage] | None = None, **options: Any) -> Any:
    options = {"columns": ("step", "stage", "loss"), "save_every": 2, "record_every": 1, "progress": False} | options
    restart = options.pop("restart", False)
    # optax is not written for strict promotion
    with jax.numpy_dtype_promotion("standard"), training.begun(folder, SETTINGS, restart=restart, made=["extra*"]):
        return training.fit(folder, START, made or stages(), **options)


class Stopped(BaseException):
    """As good as a kill: nothing catches it."""


def stopped(folder: Path, step: int) -> Path:
    """A run that ended after some steps, between two saves."""

    def stop(done: int, _: Any) -> None:
        if done == step:
            raise Stopped

    with pytest.raises(Stopped):
        run(folder, check=stop, check_every=1)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    np.savez(folder.parent / "whole.npz", **run(folder))
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped in the second stage, with states of steps 6 and 8."""
    folder = stopped(tmp_path_factory.mktemp("runs") / "killed", 9)
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["6", "8"]
    return folder


def assert_like(found: Any, whole: Path, folder: Path) -> None:
    with np.load(whole.parent / "whole.npz") as expected:
        for name in START:
            np.testing.assert_array_equal(found[name], expected[name])
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["10", "12"]


# --- damaged states --------------------------------------------------------------------------------------------------


def damages(rng: np.random.Generator, path: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways of damaging a file."""
    data = bytearray(path.read_bytes())
    yield "missing", path.unlink
    yield "empty", lambda: path.write_bytes(b"")
    yield "cut", lambda: path.write_bytes(data[: len(data) // 2])
    if data:
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    yield "flipped", lambda: path.write_bytes(data)


@pytest.mark.slow
def test_a_damaged_state_is_never_taken_for_a_whole_one(
    killed: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whatever kind of file of the last state: what is read is that state or the one before, bit for bit."""
    rng, fallen_back = np.random.default_rng(0), set()
    folder, restore = tmp_path / "run", States.restore
    shapes: dict[int, Any] = {}
    saved: dict[int, Any] = {}

    def spy(states: States, abstract: Callable[[int], Any]) -> tuple[int, Any]:
        shapes.update({step: abstract(step) for step in (6, 8)})
        return restore(states, abstract)

    shutil.copytree(killed, folder)
    with monkeypatch.context() as patch:
        patch.setattr(States, "restore", spy)
        assert_like(run(folder), whole, folder)
    for step in (8, 6):
        shutil.rmtree(folder)
        shutil.copytree(killed, folder)
        if step == 6:
            shutil.rmtree(folder / "state" / "8")
        with States(folder / "state") as states:
            found, saved[step] = states.restore(shapes.get)
        assert found == step
    files = sorted(path.relative_to(killed) for path in (killed / "state" / "8").rglob("*") if path.is_file())
    # Orbax merges the numbers of every process; what it merged stays, in files of one kind that it does not read again.
    merged = [name for name in files if name.match("ocdbt.process_*/d/*")]
    numbers = [name for name in files if name.match("d/*") and name not in merged]
    for name in (name for name in files if name not in merged[1:]):
        kinds = [kind for kind, _ in damages(rng, killed / name)]
        for kind in kinds if name in numbers else [kinds[rng.integers(len(kinds))]]:
            shutil.rmtree(folder)
            shutil.copytree(killed, folder)
            dict(damages(rng, folder / name))[kind]()
            with warnings.catch_warnings(record=True) as told, States(folder / "state") as states:
                warnings.simplefilter("always", JaxidWarning)
                step, found = states.restore(shapes.get)
            assert jax.tree.all(jax.tree.map(np.array_equal, found, saved[step]))
            lines = [str(one.message) for one in told if issubclass(one.category, JaxidWarning)]
            assert all("state/8" in line and "resumes from step 6" in line for line in lines)
            assert step == (6 if lines else 8)
            if lines and name in numbers:
                fallen_back.add(kind)
    assert fallen_back == {"missing", "empty", "cut", "flipped"}


def test_numbers_that_are_not_those_of_the_checksum_are_damaged(killed: Path, whole: Path, tmp_path: Path) -> None:
    """Orbax reads such a state without complaint."""
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    path = folder / "state" / "8" / "_CHECKPOINT_METADATA"
    noted = json.loads(path.read_text())
    noted["custom_metadata"]["checksum"] ^= 1
    path.write_text(json.dumps(noted))
    with pytest.warns(JaxidWarning, match=r"state/8 is damaged: its checksum is wrong; training resumes from step 6"):
        assert_like(run(folder), whole, folder)


def test_reads_that_orbax_gave_up_are_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector closes their coroutines, which raise once more; others' are reported."""
    source = """
async def read():
    try:
        await asyncio.sleep(1)
    except GeneratorExit as error:
        raise OSError("cannot read") from error
"""
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    loop = asyncio.new_event_loop()
    with States(tmp_path):
        for file, told in (("orbax/serialization.py", 0), ("elsewhere.py", 1)):
            names: dict[str, Any] = {"asyncio": asyncio}
            exec(compile(source, file, "exec"), names)
            coroutine = names["read"]()
            asyncio.events._set_running_loop(loop)
            coroutine.send(None)
            asyncio.events._set_running_loop(None)
            del coroutine
            gc.collect()
            assert len(reported) == told
    loop.close()


def empty(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


def of_another_tree(step: Path) -> None:
    import orbax.checkpoint as ocp

    shutil.rmtree(step)
    with ocp.CheckpointManager(step.parent.absolute()) as manager:
        manager.save(int(step.name), args=ocp.args.StandardSave({"parameters": jnp.ones(3)}), force=True)


@pytest.mark.parametrize("damage", [empty, of_another_tree, lambda step: step.rename(step.with_name("999"))])
def test_the_last_whole_state_is_resumed(
    damage: Callable[[Path], Any], killed: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damage(folder / "state" / "8")
    with pytest.warns(JaxidWarning, match="training resumes from step 6"):
        found = run(folder)
    assert_like(found, whole, folder)


def test_without_a_whole_state_nothing_is_touched(killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for step in (folder / "state").iterdir():
        empty(step)
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"state/8 cannot be read.*no earlier state is whole.*give --restart"):
        run(folder)
    assert [path for path in sorted(folder.rglob("*")) if path.name != ".lock"] == [
        path for path in before if path.name != ".lock"
    ]


# --- settings and metrics --------------------------------------------------------------------------------------------

ODD = [b"", b"[]", b"null", b"7", b'{"seed": 3', b"\xff\xfe\x00", b"[" * 100_000, b'{"seed": NaN}']


@pytest.mark.parametrize("content", ODD, ids=range(len(ODD)))
def test_a_damaged_record_of_settings(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(OutputError, match=r"run.json .*; give --restart to begin anew, or another --out") as caught:
        run(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "run.json").read_bytes() == content


def test_settings_with_a_byte_order_mark_and_other_ones(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(SETTINGS), encoding="utf-8-sig")
    run(tmp_path, stages(steps=1))
    (tmp_path / "run.json").write_text(json.dumps({"seed": 4, "rates": [0.1, 0.2]}))
    with pytest.raises(OutputError, match=r"other settings: seed was 4, is now 3\. Repeat those to resume it"):
        run(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(OutputError, match=r"whose run\.json is gone"):
        run(tmp_path)


def test_restart_discards_the_run_and_nothing_else(killed: Path, whole: Path, tmp_path: Path) -> None:
    """Of other settings, with a damaged record or without one."""
    for number, record in enumerate(('{"seed": 4}', "{", None)):
        folder = tmp_path / str(number)
        shutil.copytree(killed, folder)
        for name in ("extra.csv", "mine.csv"):
            (folder / name).write_text("old")
        if record is None:
            (folder / "run.json").unlink()
        else:
            (folder / "run.json").write_text(record)
        with pytest.raises(OutputError, match="--restart to begin anew"):
            run(folder)
        if number == 0:
            assert_like(run(folder, restart=True), whole, folder)
        else:
            with training.begun(folder, SETTINGS, restart=True, made=["extra*"]):
                assert not (folder / "state").exists() and not (folder / "metrics.csv").exists()
        assert not (folder / "extra.csv").exists() and (folder / "mine.csv").read_text() == "old"
        assert json.loads((folder / "run.json").read_text()) == {"seed": 3, "rates": [0.1, 0.2]}


HEAD = b"step,stage,loss,skipped\n"


def test_damaged_metrics(killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for content in (
        b"\xff\x00",
        b"a,b\n1,2\n",
        b"step,gain\n1,2\n",
        HEAD + b"2,stage 0\n",
        HEAD + b"2,stage 0,1.0,0,5\n",
        HEAD + b"two,stage 0,1.0,0\n",
        HEAD + "²,stage 0,1.0,0\n".encode(),
        HEAD + b"2,stage 0,1.x,0\n",
        HEAD + b'2,"stage 0\n',
    ):
        (folder / "metrics.csv").write_bytes(content)
        with pytest.raises(
            OutputError, match=r"metrics.csv cannot be read.*; delete it to resume without its rows"
        ) as caught:
            run(folder)
        assert "\n" not in str(caught.value), content
        assert (folder / "metrics.csv").read_bytes() == content
    (folder / "metrics.csv").unlink()
    run(folder)
    assert [row["step"] for row in training.read_metrics(folder / "metrics.csv")] == [9, 10, 11, 12]


# --- leftovers, full disks, two processes ----------------------------------------------------------------------------


def test_what_a_killed_run_left_half_written_is_removed(killed: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    (folder / "model").mkdir()
    left = [".metrics.csv.77.tmp", ".run.json.8.tmp", "model/.config.json.9.tmp"]
    for name in left:
        (folder / name).write_text("half")
    shutil.copytree(folder / "state" / "8", folder / "state" / "10.orbax-checkpoint-tmp")
    (folder / ".mine.tmp").write_text("not jaxid's")
    assert_like(run(folder), whole, folder)
    assert not any((folder / name).exists() for name in left)
    assert (folder / ".mine.tmp").exists()


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What Orbax has begun in threads of its own finds its event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up(killed: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    # States hold larger files than metrics and settings.
    with largest_file(450), pytest.raises(OutputError, match=r"cannot write the training state.*resumes") as caught:
        run(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "state" / "8" / "_CHECKPOINT_METADATA").exists()
    assert_like(run(folder), whole, folder)


def slow(step: int) -> dict[str, np.ndarray]:
    time.sleep(0.5)
    return batch(step)


def trained_slowly(folder: Path) -> None:
    run(folder, stages(slow, steps=200))


@pytest.mark.slow
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    first = forked.begin(trained_slowly, tmp_path, told=tmp_path, environment={"XLA_FLAGS": ""})
    try:
        while not (tmp_path / "metrics.csv").exists():
            assert first.poll() is None, first.err.read_text()
            time.sleep(0.02)
        before = (tmp_path / "run.json").stat().st_mtime_ns
        with pytest.raises(OutputError, match="another process is working in"):
            run(tmp_path)
        assert (tmp_path / "run.json").stat().st_mtime_ns == before
    finally:
        first.kill()
        first.wait()
    run(tmp_path, stages(steps=20), save_every=20)  # the lock of a dead process is free


# --- what is not finite ----------------------------------------------------------------------------------------------


def bad_at(*steps: int) -> Callable[[int], Any]:
    """Batches with a NaN at even ones of these steps, and with infinity at odd ones."""

    def draw(step: int) -> dict[str, np.ndarray]:
        drawn = batch(step)
        if step in steps:
            drawn["y"][3, 1] = np.inf if step % 2 else np.nan
        return drawn

    return draw


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    seen = {}

    def keep(step: int, parameters: Any) -> None:
        seen[step] = jax.device_get(parameters)

    with pytest.warns(JaxidWarning, match="2 of the 6 steps of stage 0 had a gradient that is NaN or infinite"):
        run(tmp_path, stages(bad_at(2, 3)), check=keep, check_every=1)
    assert [row["skipped"] for row in training.read_metrics(tmp_path / "metrics.csv")] == [0, 0, 1, 2, 2, 2] + [0] * 6
    for name, leaf in seen[2].items():
        np.testing.assert_array_equal(seen[3][name], leaf)
        np.testing.assert_array_equal(seen[4][name], leaf)
        assert (seen[5][name] != leaf).any()


@pytest.mark.parametrize(
    ("draw", "steps", "message"),
    [
        (bad_at(*range(6, 12)), 6, r"all of the steps 7 to 12 \(stage 1\)"),
        (bad_at(*range(5, 60)), 60, r"all of the steps 6 to 25 \(stage 0\)"),
    ],
)
def test_a_run_without_finite_gradients_ends(draw: Any, steps: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"diverges: in {message} the gradient is NaN or infinite; lower the"):
        run(tmp_path, stages(draw, steps=steps))


def test_parameters_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    huge = {"w": np.full((3, 2), -3e38, np.float32)}
    stage = Stage(
        name="one",
        first=0,
        steps=4,
        loss=lambda parameters, batch: (parameters["w"].sum(), {}),
        batch=batch,
        optimizer=optax.sgd(1e38),
    )
    with pytest.raises(InputError, match=r"after step 2 \(one\) parameters are NaN or infinite"):
        training.fit(tmp_path, huge, [stage], columns=("step", "stage"), save_every=2, progress=False)
    assert not list((tmp_path / "state").glob("*[0-9]"))
