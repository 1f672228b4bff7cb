"""Training in two processes: the numbers of one; what remains when one of them is killed, and where it is resumed."""

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import forked
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxid import meshes, processes
from jaxid.errors import JaxidError
from jaxid.places import Place
from jaxid.train import loop as training
from jaxid.train.placement import shared


def batch(step: int) -> dict[str, np.ndarray]:
    x = np.random.default_rng((3, step)).standard_normal((4, 8, 8)).astype(np.float32)
    return {"x": x, "y": x[..., ::-1] ** 2}


def loss(parameters: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    hidden = jnp.tanh(batch["x"] @ parameters["up.kernel"])
    value = ((hidden @ parameters["down.kernel"] + parameters["bias"] - batch["y"]) ** 2).mean()
    return value, {"loss": value}


def train(folder: Path, place: Place | None, axes: meshes.Axes, seed: int, death: int) -> None:
    """What each process does; at the step `death`, process 1 is killed."""

    def check(step: int, _: Any) -> None:
        if step == death and place is not None and place.process == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    rng = np.random.default_rng(0)
    drawn = {
        "up.kernel": rng.standard_normal((8, 16)),
        "down.kernel": rng.standard_normal((16, 8)),
        "bias": np.zeros(8),
    }
    start = {name: leaf.astype(np.float32) for name, leaf in drawn.items()}
    try:
        joined = contextlib.nullcontext() if place is None else processes.joined(place)
        with joined, training.begun(folder, {"seed": seed}):
            mesh = shared(axes)
            specs = {"up.kernel": P(None, "model"), "down.kernel": P("model", None)}
            layout = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
            stage = training.Stage("one", 0, 8, loss, batch, optax.adam(0.01), accumulate=True)
            found = training.fit(
                folder,
                start,
                [stage],
                columns=("step", "stage", "loss"),
                save_every=2,
                record_every=1,
                progress=False,
                check=check,
                check_every=1,
                mesh=mesh,
                layout=layout,
            )
            if training.leads():
                np.savez(folder / "found.npz", **found)
    except JaxidError as error:
        raise SystemExit(f"error: {error}") from None


Made = list[tuple[int, str]]
"""Of every process, its exit code and its errors."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ran(folder: Path, count: int, axes: meshes.Axes, *, seeds: tuple[int, ...] = (3, 3), death: int = 0) -> Made:
    """Processes with eight devices in all, until they end."""
    folder.parent.mkdir(exist_ok=True)
    port, flags = free_port(), f"--xla_force_host_platform_device_count={8 // count}"
    begun = [
        forked.begin(
            train,
            folder,
            None if count == 1 else Place(f"127.0.0.1:{port}", count, index),
            axes,
            seeds[index],
            death,
            told=folder.parent / f"told-{index}",
            environment={"XLA_FLAGS": flags, "JAX_NUMPY_DTYPE_PROMOTION": "standard"},
            patience=5,
        )
        for index in range(count)
    ]
    codes = [child.wait(120) for child in begun]
    texts = [child.err.read_text() for child in begun]
    lines = ["\n".join(line for line in text.splitlines() if line.startswith("error: ")) or text for text in texts]
    return list(zip(codes, lines, strict=True))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process on one device."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    (made,) = ran(folder, 1, meshes.ONE)
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
    (code, line), (killed, _) = ran(folder, 2, meshes.Axes(4, 2), death=5)
    assert killed == -9 and time.monotonic() - start < 100
    assert code != 0 and line.startswith("error: ") and "process" in line and "\n" not in line, line
    saved = sorted(int(path.name) for path in (folder / "state").iterdir() if path.name.isdecimal())
    assert saved[-1] in (2, 4) and not (folder / "found.npz").exists()
    ended = ran(folder, 2, meshes.Axes(1, 8))
    assert [code for code, _ in ended] == [0, 0], ended
    assert_same(folder, alone)


@pytest.mark.slow
def test_settings_that_differ_between_processes(tmp_path: Path) -> None:
    (_, first), (code, second) = ran(tmp_path / "run", 2, meshes.Axes(8, 1), seeds=(3, 4))
    assert code != 0 and "seed" in second and "\n" not in second, second
    assert first.startswith("error: process 1 stopped: ") and "seed" in first, first
    assert not (tmp_path / "run" / "metrics.csv").exists()
