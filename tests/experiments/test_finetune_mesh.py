"""Fine-tuning on a mesh of eight devices: the numbers of one device, and where its state lies."""

import dataclasses
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fixtures
import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import Child
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_finetune import CASE, QUICK, command, ids, items, write_data
from test_finetune_refused import refused
from test_training_processes import free_port

from jaxid import meshes
from jaxid.checkpoints.loading import open_checkpoint
from jaxid.checkpoints.tensors import TensorFolder
from jaxid.cli import main
from jaxid.experiments import finetune
from jaxid.experiments.finetune import FinetuneConfig
from jaxid.families.base import Model
from jaxid.interp.programs import program
from jaxid.train import loop as training
from jaxid.train.gradients import mean
from jaxid.train.placement import placement

COLUMNS = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")
CONFIG = dataclasses.replace(QUICK, steps=4, groups=4, train="vision-mlp,projector,lm-attention,lm-mlp", budget=1.0)
ONE, BOTH = meshes.Axes(), meshes.Axes(4, 2)


def assert_mean(loss: Any, start: Any, batch: Any, constants: Any, cases: Sequence[tuple[int, int]]) -> None:
    """For cases of so many small batches on so many devices: the mean of the gradients and metrics."""

    def gradients(values: Any, own: Any, constants: Any) -> Any:
        return jax.grad(lambda values: loss(values, {**own, **constants}), has_aux=True)(values)

    with jax.numpy_dtype_promotion("standard"):
        alone = jax.jit(gradients)
        rows = [jax.tree.map(lambda leaf, row=row: leaf[row], batch) for row in range(8)]
        single = [jax.tree.map(np.asarray, alone(start, row, constants)) for row in rows]
        for count, devices in cases:
            where = placement(meshes.mesh(devices), None, start)
            part = where.batch(jax.tree.map(lambda leaf, count=count: leaf[:count], batch), ())
            assert where.divides(part) == (count == 8)
            averaged = program()(mean(gradients, where))
            found, metrics = averaged(meshes.replicated(meshes.mesh(devices), start), part, constants)
            expected, means = jax.tree.map(lambda *leaves, count=count: sum(leaves) / count, *single[:count])
            for name, leaf in expected.items():
                np.testing.assert_allclose(found[name], leaf, atol=1e-5 * np.abs(leaf).max() + 1e-8)
            np.testing.assert_allclose(metrics["loss"], means["loss"], rtol=1e-5)


def test_accumulated_gradients_are_the_mean() -> None:
    """Of the whole loss, which every device adds up over two small batches."""
    task = finetune.task(fixtures.model(CASE), items(), ids(), dataclasses.replace(QUICK, groups=8))
    stage, start = task.stage(), task.selection.split(fixtures.model(CASE).parameters)
    assert_mean(stage.loss, start, stage.batch(0), stage.constants, [(8, 4)])


def test_accumulated_gradients_however_many() -> None:
    """Small batches that the devices share, each one or several, or of which every device computes all."""
    rng = np.random.default_rng(4)
    start = {name: rng.standard_normal(shape, np.float32) for name, shape in (("kernel", (5, 16)), ("bias", (16,)))}
    batch = {"given": rng.standard_normal((8, 3, 5), np.float32)}

    def loss(values: Any, own: Any) -> Any:
        found = jnp.square(own["given"] @ values["kernel"] + values["bias"] - own["wanted"]).mean()
        return found, {"loss": found}

    wanted = {"wanted": rng.standard_normal(16).astype(np.float32)}
    assert_mean(loss, start, batch, wanted, [(8, 8), (8, 4), (5, 8), (5, 1)])


@functools.cache
def on(axes: meshes.Axes) -> tuple[Mesh, Model]:
    """The tiny model on a mesh."""
    mesh = meshes.mesh(*axes)
    return mesh, open_checkpoint(fixtures.folder(CASE)).on(mesh).load()


def fitted(folder: Path, axes: meshes.Axes, config: FinetuneConfig = CONFIG, **further: Any) -> Any:
    mesh, own = on(axes)
    task = finetune.task(own, items(), dataclasses.replace(ids(), fingerprint=own.fingerprint), config)
    options: dict[str, Any] = {"columns": COLUMNS, "save_every": 2, "record_every": 1, "progress": False} | further
    # optax is not written for strict promotion
    with jax.numpy_dtype_promotion("standard"), training.begun(folder, {"groups": config.groups}):
        return training.fit(folder, task.initial(), [task.stage()], mesh=mesh, layout=task.layout, **options)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The run on one device."""
    folder = tmp_path_factory.mktemp("one")
    return folder, fitted(folder, ONE)


def assert_same(folder: Path, found: Any, other: tuple[Path, Any]) -> None:
    rows, expected = (training.read_metrics(path / "metrics.csv") for path in (folder, other[0]))
    assert len(rows) == len(expected) > 0
    for ours, theirs in zip(rows, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)  # they are rounded to 1e-4
    for name, leaf in other[1].items():
        assert isinstance(found[name], np.ndarray)
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-5 * float(np.abs(leaf).max()), err_msg=name)


class Stopped(BaseException):
    """As good as a kill: nothing catches it."""


def test_the_numbers_of_one_device(one: tuple[Path, Any], tmp_path: Path) -> None:
    """Four small batches, of which each of eight copies computes all."""
    assert_same(tmp_path, fitted(tmp_path, meshes.Axes(8, 1)), one)


def test_where_the_state_lies_and_a_run_resumes_on_another_mesh(
    one: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four small batches, which four copies share, and then two; together they leave the numbers of one device."""
    made, seen = training._step_function, []

    def noted(*arguments: Any) -> Any:
        step = made(*arguments)

        def function(state: Any, *others: Any) -> Any:
            found = step(state, *others)
            seen.append([jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state, found[0], found[1])])
            return found

        return function

    def stop(step: int, _: Any) -> None:
        if step == 3:
            raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(training, "_step_function", noted)
        fitted(tmp_path, BOTH, check=stop, check_every=1)
    rows, theirs = (training.read_metrics(folder / "metrics.csv") for folder in (tmp_path, one[0]))
    assert len(rows) == 3 and all(
        row == pytest.approx(other, abs=2e-4) for row, other in zip(rows, theirs[:3], strict=True)
    )
    steps: list[int] = []
    found = fitted(tmp_path, meshes.Axes(2, 2), log=lambda row: steps.append(row["step"]))
    assert steps == [3, 4]
    assert_same(tmp_path, found, one)
    mesh, own = on(BOTH)
    layout, shapes = finetune.shardings(own.parameters), one[1]
    expected = {
        "decoder.layers.mlp.up.kernel": (P(None, None, "model"), P(None, "data", "model")),
        "decoder.layers.mlp.down.kernel": (P(None, "model", None), P(None, "model", "data")),
        "decoder.layers.attention.query": (P(None, None, "model"), P(None, "data", "model")),
        "decoder.layers.attention.out": (P(None, "model", None), P(None, "model", "data")),
    }
    assert len(seen) == 3
    for given, state, metrics in seen:
        assert jax.tree.leaves(given) == jax.tree.leaves(state)  # nothing is placed or compiled anew
        assert all(sharding.is_fully_replicated for sharding in jax.tree.leaves(metrics))
        adam = state["optimizer"].inner_state[1][0]
        for name, leaf in shapes.items():
            parameter, mean, square = state["parameters"][name], adam.mu[name], adam.nu[name]
            assert parameter.is_equivalent_to(layout[name], leaf.ndim) and mean == square
            shares = [leaf.size // np.prod(place.shard_shape(leaf.shape)) for place in (parameter, mean)]
            assert shares[1] == 4 * shares[0] or name.endswith("bias"), name  # whose longest axis is taken
        for name, (parameter, mean) in expected.items():
            assert state["parameters"][name].is_equivalent_to(NamedSharding(mesh, parameter), 3), name
            assert adam.mu[name].is_equivalent_to(NamedSharding(mesh, mean), 3), name
        assert adam.count.is_fully_replicated


def assert_same_export(found: Path, expected: Path) -> None:
    """Exported models that differ from the one they began with, but not from each other."""
    ours, theirs, start = (TensorFolder(folder) for folder in (found, expected, fixtures.folder(CASE)))
    moved = 0
    for name in theirs.entries:
        values = np.asarray(theirs.read(name))
        np.testing.assert_allclose(ours.read(name), values, rtol=0, atol=1e-5 * float(np.abs(values).max()))
        moved += not np.array_equal(values, start.read(name))
    assert moved


FURTHER = ["--groups", "4", "--record-every", "1", "--check-every", "3"]


def ran(folder: Path, out: str, mesh: str) -> Path:
    """The folder of a run of the command in this process."""
    with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as ended:
        main(command(folder, out, "--mesh", mesh, *FURTHER))
    assert ended.value.code == 0
    return folder / out


def begin(folder: Path, out: str, process: int, port: int) -> Child:
    """One of two processes with four devices each."""
    place = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    return forked.begin(
        forked.command,
        command(folder, out, "--mesh", "data=4,model=2", *FURTHER, *place),
        told=folder / f"told-{process}",
        environment={"XLA_FLAGS": flags, "JAX_NUMPY_DTYPE_PROMOTION": "standard"},
        patience=6,
    )


@pytest.mark.slow
def test_two_processes_and_the_end_of_one(tmp_path: Path) -> None:
    """The command in two processes leaves what it does on a device, also if one is killed and a mesh of one resumes."""
    folder = write_data(tmp_path)
    ran(folder, "one", "data=1")
    for out, death in (("two", False), ("killed", True)):
        port = free_port()
        begun = [begin(folder, out, process, port) for process in range(2)]
        if death:
            while not any(path.name == "2" for path in (folder / out).glob("state/*")):
                assert all(process.poll() is None for process in begun)
                time.sleep(0.01)
            begun[1].kill()
        codes, errors = [process.wait() for process in begun], begun[0].err.read_text()
        if death:
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert codes == [2, -9] and len(lines) == 1 and lines[0].startswith("error: process 1 stopped: "), errors
            ran(folder, out, "data=2,model=2")
        else:
            assert codes == [0, 0], errors
            assert "parameters trained" in begun[0].out.read_text()
            assert not begun[1].out.read_text()
        assert_same_export(folder / out / "model", folder / "one" / "model")
        for name in ("metrics", "evaluations"):
            rows = [training.read_metrics(folder / run / f"{name}.csv") for run in (out, "one")]
            for ours, theirs in zip(*rows, strict=True):
                assert ours == pytest.approx(theirs, abs=2e-4)
            steps = range(1, 7) if name == "metrics" else (0, 3, 6)
            assert [row["step"] for row in rows[0]] == list(steps)


@pytest.mark.parametrize(
    ("mesh", "line"),
    [
        ("data=16", r"error: the mesh data=16,model=1 has 16 devices, but JAX sees 8; choose smaller axes, or"),
        ("model=7", r"error: model=7 divides none of the decoder's"),
        ("heads=2", r"error: a mesh is given as data=4,model=2, or as auto; not as 'heads=2'."),
    ],
)
def test_a_mesh_that_cannot_be(mesh: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_data(tmp_path)
    assert refused(capsys, command(folder, "run", "--mesh", mesh)).startswith(line)
    assert not (folder / "run" / "run.json").exists()
