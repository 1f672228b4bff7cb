"""Runs that several real processes share, on loopback, each with four devices: the same table as of one process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import fixtures
import forked
import numpy as np
import pytest
from forked import Child
from joint_job import together
from run_data import CASE, columns, experiment
from run_data import place as place

from jaxid.experiments.belief_swap import BeliefSwap

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")

MAIN = "from jaxid.cli import main; main()"


FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"


def words(place: Path, out: str, *options: str, batch: int = 4) -> list[str]:
    """The command of a belief swap."""
    given = ["run", "belief-swap", "--model", fixtures.folder(CASE), "--data", place / "data", "--out", place / out]
    given += ["--ids", place / "ids.safetensors", "--prompt", "{query}", "--layers", "0-1", "--max-new-tokens", "0"]
    return [*map(str, given), "--batch-size", str(batch), *options]


def begin(place: Path, out: str, count: int, *options: str, batch: int = 4) -> list[Child]:
    """Several processes of a belief swap."""
    command = words(place, out, *options, batch=batch)
    return [
        forked.begin(
            forked.command, command + own, told=place / f"{out}-{index}", environment={"XLA_FLAGS": FLAGS}, patience=6
        )
        for index, own in enumerate(together(count))
    ]


def ended(running: Sequence[Child]) -> list[tuple[int, str, list[str]]]:
    """The code of each process, what it printed, and its lines on stderr but for the warnings of process 0."""
    return [(child.wait(), child.out.read_text(), told(child.err.read_text())) for child in running]


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("warning: ")]


@pytest.fixture(scope="module")
def alone(place: Path) -> Path:
    """The run of one process."""
    experiment(BeliefSwap, place, "alone", layers="0-1", max_new_tokens=0).run()
    return place / "alone"


def assert_same_table(out: Path, alone: Path) -> None:
    one, many = columns(alone), columns(out)
    assert one.keys() == many.keys()
    for name, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(many[name], values, atol=1e-5)
        else:
            np.testing.assert_array_equal(many[name], values)


@pytest.mark.slow
def test_two_processes_make_the_table_of_one(place: Path, alone: Path) -> None:
    """Started as a user starts them."""
    out = place / "two"
    settings = {"XLA_FLAGS": FLAGS, "JAXID_JOIN_SECONDS": "120"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MAIN, *words(place, "two", "--mesh", "data=8"), *own],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | settings,
        )
        for own in together(2)
    ]
    printed = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert printed[0][0].splitlines()[-1] == str(out / "summary.json") and told(printed[0][1]) == []
    assert printed[1] == ("", "")
    assert_same_table(out, alone)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in alone.iterdir())


@pytest.mark.slow
def test_a_model_over_the_devices_of_two_processes(place: Path, alone: Path) -> None:
    first, second = ended(begin(place, "over", 2, "--mesh", "model=4"))
    assert (first[0], first[2], second[0], second[2]) == (0, [], 0, [])
    assert_same_table(place / "over", alone)


def assert_same_rows(out: Path, alone: Path) -> None:
    """The same table, but for the order of the rows, which depends on the size of a chunk."""
    one, resumed = columns(alone), columns(out)
    rows = [np.lexsort((table["layer"], table["condition"], table["item"])) for table in (one, resumed)]
    for column, values in one.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(resumed[column][rows[1]], values[rows[0]], atol=1e-5)
        else:
            np.testing.assert_array_equal(resumed[column][rows[1]], values[rows[0]])


@pytest.mark.slow
def test_a_killed_run_is_resumed(place: Path, alone: Path) -> None:
    running = begin(place, "killed", 2, batch=1)
    while not list((place / "killed" / "parts").glob("0*.parquet")) and running[0].poll() is None:
        time.sleep(0.02)
    running[0].kill()
    found = ended(running)
    if found[0][0]:
        assert found[0][0] == -signal.SIGKILL and found[1][0] in (2, -signal.SIGABRT)
        assert len(found[1][2]) == 1 and found[1][2][0].startswith("error: process ")
    assert [code for code, _, _ in ended(begin(place, "killed", 3, batch=1))] == [0] * 3
    assert_same_rows(place / "killed", alone)


@pytest.mark.slow
def test_one_of_two_that_share_a_model_is_killed(place: Path, alone: Path) -> None:
    running = begin(place, "torn", 2, "--mesh", "model=4", batch=1)
    while not list((place / "torn" / "parts").glob("0*.parquet")) and running[1].poll() is None:
        time.sleep(0.02)
    running[1].kill()
    begun = time.monotonic()
    first = ended(running)[0]
    assert first[0] == 2 and time.monotonic() - begun < 60
    assert len(first[2]) == 1 and first[2][0].startswith("error: process 1 stopped: it was not heard of for")
    assert ended(begin(place, "torn", 1, batch=1))[0][0] == 0
    assert_same_rows(place / "torn", alone)


def test_what_processes_cannot_share(place: Path) -> None:
    for words in (["ids", "extract", "--data", "x", "--out", "y.safetensors"], ["run", "compare", "x"], ["demo"]):
        refused = subprocess.run(
            [sys.executable, "-c", MAIN, *words, *together(2)[0]], capture_output=True, text=True, timeout=60
        )
        assert refused.returncode == 2 and refused.stderr == (
            f"error: `jaxid {' '.join(words[:2])}` runs in one process; several share the experiments of `jaxid run`, "
            "and `jaxid finetune`.\n"
        )


@pytest.mark.slow
def test_a_mesh_that_does_not_divide_among_processes(place: Path) -> None:
    for options, message in (
        (["--mesh", "data=3"], "the mesh data=3,model=1 cannot be divided among 2 processes"),
        (["--mesh", "data=16"], "16"),
        (["--limit", "0"], "limit"),
    ):
        for code, _, lines in ended(begin(place, "refused", 2, *options)):
            assert (code, len(lines)) == (2, 1), lines
            assert lines[0].startswith("error: ") and message in lines[0]
