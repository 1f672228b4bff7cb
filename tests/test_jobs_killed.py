"""A job whose process is killed at any moment loses no finished chunk, and ends with the same rows."""

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxid import io as results
from jaxid import jobs
from jaxid.errors import InputError, OutputError


def work(out: Path, log: Path, attempt: int, pause: float, moment: str, number: int) -> None:
    """The job, in a process of its own, which dies at the chosen rename, before or after it."""
    rename, renames = Path.replace, 0

    def fatal_rename(path: Path, target: Path) -> Path:
        nonlocal renames
        renames += 1
        if (moment, number) == ("before", renames):
            os.kill(os.getpid(), signal.SIGKILL)
        renamed = rename(path, target)
        if (moment, number) == ("after", renames):
            os.kill(os.getpid(), signal.SIGKILL)
        return renamed

    def compute(items: list[int]) -> dict[str, list[Any]]:
        for item in items:
            with log.open("a") as file:
                file.write(f"{attempt} {item}\n")
            time.sleep(pause)
            if item in (4, 9, 10, 11):
                raise InputError("a bad one.")
        rows = [item for item in items for _ in range(item % 3 + 1)]
        return {"item": rows, "third": [row / 3 for row in rows], "word": [f"item {row}" for row in rows]}

    Path.replace = fatal_rename  # type: ignore[method-assign]
    settings = {"model": "none"}
    finished = jobs.run(out, settings=settings, items=range(120), key=str, compute=compute, chunk_size=3, skip_bad=True)
    jobs.write_merged(out, finished)


def ended(process: ForkServerProcess) -> int | None:
    """The exit code of a process."""
    process.join(30)
    return process.exitcode


def test_a_job_killed_again_and_again_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    log, out = tmp_path / "log.txt", tmp_path / "killed"
    log.touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["joint_job"])
    deaths = 0

    def begin(
        attempt: int, pause: float = 0.0, moment: str = "never", number: int = 0, folder: Path = out
    ) -> ForkServerProcess:
        process = context.Process(target=work, args=(folder, log, attempt, pause, moment, number))
        process.start()
        return process

    def asked(attempt: int) -> set[int]:
        whole_lines = log.read_text().rpartition("\n")[0].splitlines()
        lines = [line.split() for line in whole_lines]
        return {int(item) for tried, item in lines if int(tried) == attempt}

    def done() -> set[int]:
        stored = [int(path.stem) for path in (out / "parts").glob("[0-9]*.parquet")]
        return {3 * part + item for part in stored for item in range(3)}

    # At the settings, at the first part, and at the third part of an attempt.
    for moment, number in (("before", 1), ("after", 1), ("before", 1), ("after", 1), ("before", 3)):
        before = done()
        assert ended(begin(deaths, moment=moment, number=number)) == -signal.SIGKILL
        assert asked(deaths).isdisjoint(before)
        deaths += 1
    assert done() == set(range(9))
    assert len(list((out / "parts").glob(".*.tmp"))) == 1

    random = np.random.default_rng(0)
    for _ in range(4):
        before = done()
        child = begin(deaths, pause=0.02)
        while not asked(deaths) and child.exitcode is None:
            time.sleep(0.002)
        with pytest.raises(OutputError, match=f"another process is working in {out}; wait until"):
            jobs.run(out, settings={}, items=range(120), key=str, compute=lambda _: {}, chunk_size=3)
        time.sleep(random.uniform(0.0, 0.25))
        child.kill()
        assert ended(child) == -signal.SIGKILL
        assert asked(deaths).isdisjoint(before)
        deaths += 1

    before = done()
    assert set(range(9)) < before < set(range(120))
    assert ended(begin(deaths)) == 0
    assert asked(deaths) == set(range(120)) - before
    assert sorted(path.name for path in (out / "parts").iterdir()) == [f"{number:05d}.parquet" for number in range(40)]
    assert sorted(path.name for path in out.iterdir()) == [".lock", "parts", "settings.json", "table.parquet"]

    assert ended(begin(0, folder=tmp_path / "undisturbed")) == 0
    table, undisturbed = (results.read_table(tmp_path / name / "table.parquet") for name in ("killed", "undisturbed"))
    assert table.equals(undisturbed, check_metadata=True)
    rows = [item for item in range(120) for _ in range(item % 3 + 1) if item not in (4, 9, 10, 11)]
    assert table["item"].to_pylist() == rows
    assert [one["key"] for one in json.loads(table.schema.metadata[b"jaxid"])["skipped"]] == ["4", "9", "10", "11"]
