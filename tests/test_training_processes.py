"""Training in two processes: the numbers of one; what remains when one of them is killed, and where it is resumed."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxid.train import loop as training

CHILD = """
import contextlib, os, pathlib, signal, sys

import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxid import meshes, processes
from jaxid.errors import JaxidError
from jaxid.places import Place
from jaxid.train import loop
from jaxid.train.placement import shared

folder, port, count, index, data, model, seed, death = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:])

def batch(step):
    x = np.random.default_rng((3, step)).standard_normal((4, 8, 8)).astype(np.float32)
    return {"x": x, "y": x[..., ::-1] ** 2}

def loss(parameters, batch):
    hidden = jnp.tanh(batch["x"] @ parameters["up.kernel"])
    value = ((hidden @ parameters["down.kernel"] + parameters["bias"] - batch["y"]) ** 2).mean()
    return value, {"loss": value}

def check(step, parameters):
    if step == death and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)

rng = np.random.default_rng(0)
start = {"up.kernel": rng.standard_normal((8, 16)), "down.kernel": rng.standard_normal((16, 8)), "bias": np.zeros(8)}
start = {name: leaf.astype(np.float32) for name, leaf in start.items()}
joined = contextlib.nullcontext() if count == 1 else processes.joined(Place(f"127.0.0.1:{port}", count, index))
try:
    with joined, loop.begun(folder, {"seed": seed}):
        mesh = shared(meshes.Axes(data, model))
        specs = {"up.kernel": P(None, "model"), "down.kernel": P("model", None)}
        layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        stage = loop.Stage("one", 0, 8, loss, batch, optax.adam(0.01), accumulate=True)
        found = loop.fit(
            folder, start, [stage], columns=("step", "stage", "loss"), save_every=2, record_every=1, progress=False,
            check=check, check_every=1, mesh=mesh, layout=layout,
        )
        if loop.leads():
            np.savez(folder / "found.npz", **found)
except JaxidError as error:
    sys.exit(f"error: {error}")
"""

Made = list[tuple[int, str]]
"""Of every process, its exit code and its errors."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ran(folder: Path, count: int, data: int, model: int, *, seeds: tuple[int, ...] = (3, 3), death: int = 0) -> Made:
    """Processes with eight devices in all, until they end."""
    folder.parent.mkdir(exist_ok=True)
    script, port = folder.parent / "child.py", free_port()
    script.write_text(CHILD)
    flags = f"--xla_force_host_platform_device_count={8 // count}"
    patience = {"JAXID_PATIENCE_SECONDS": "5", "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    begun = []
    for index in range(count):
        words = [folder, port, count, index, data, model, seeds[index], death]
        with (folder.parent / f"errors-{index}.txt").open("w") as errors:
            begun.append(
                subprocess.Popen(
                    [sys.executable, str(script), *map(str, words)],
                    env=os.environ | patience | {"XLA_FLAGS": flags},
                    stderr=errors,
                    stdout=subprocess.DEVNULL,
                )
            )
    codes = [process.wait(120) for process in begun]
    texts = [(folder.parent / f"errors-{index}.txt").read_text() for index in range(count)]
    lines = ["\n".join(line for line in text.splitlines() if line.startswith("error: ")) or text for text in texts]
    return list(zip(codes, lines, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (made,) = ran(folder, 1, 1, 1)
    assert made[0] == 0, made[1]
    return folder


def assert_same(folder: Path, alone: Path) -> None:
    rows = [training.read_metrics(path / "metrics.csv") for path in (folder, alone)]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4)
    with np.load(folder / "found.npz") as ours, np.load(alone / "found.npz") as theirs:
        for name in theirs.files:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5 * np.abs(theirs[name]).max())


@pytest.mark.slow
def test_a_process_is_killed_and_the_run_resumes_with_parameters_across_processes(alone: Path, tmp_path: Path) -> None:
    folder, start = tmp_path / "run", time.monotonic()
    (code, line), (killed, _) = ran(folder, 2, 4, 2, death=5)
    assert killed == -9 and time.monotonic() - start < 100
    assert code != 0 and line.startswith("error: ") and "process" in line and "\n" not in line, line
    saved = sorted(int(path.name) for path in (folder / "state").iterdir() if path.name.isdecimal())
    assert saved[-1] in (2, 4) and not (folder / "found.npz").exists()
    ended = ran(folder, 2, 1, 8)
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same(folder, alone)


@pytest.mark.slow
def test_settings_that_differ_between_processes(tmp_path: Path) -> None:
    (_, first), (code, second) = ran(tmp_path / "run", 2, 8, 1, seeds=(3, 4))
    assert code != 0 and "seed" in second and "\n" not in second, second
    assert first.startswith("error: process 1 stopped: ") and "seed" in first, first
    assert not (tmp_path / "run" / "metrics.csv").exists()
