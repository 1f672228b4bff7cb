"""A job without a model that several real processes share, for tests; each is forked from one that has imported JAX."""

import contextlib
import importlib.metadata
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

# As in tests/conftest.py, which the process that the others are forked from does not read.
os.environ["JAX_PLATFORMS"] = "cpu"

from jaxid.places import quieten

quieten()

from jaxid import jobs, places, processes  # noqa: E402 - JAX notices how quiet it is to be when it is imported
from jaxid.errors import InputError, JaxidError  # noqa: E402

ITEMS = 60
JOIN_SECONDS = 20.0
PATIENCE_SECONDS = 4.0


def port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def begin(out: Path, arguments: Sequence[str] = (), *, told: Path, **changes: Any) -> ForkServerProcess:
    """Begins a process of the job.

    Args:
        out: the job's folder.
        arguments: such as --coordinator, --processes, --process.
        told: file for what the process prints.
        changes: see `work`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["joint_job"])
    process = context.Process(target=work, args=(out, list(arguments), told, changes))
    process.start()
    return process


def together(count: int, place: str | None = None) -> list[list[str]]:
    """The arguments of each of several processes; of one, none."""
    at = place or f"127.0.0.1:{port()}"
    if count == 1:
        return [[]]
    return [["--coordinator", at, "--processes", str(count), "--process", str(index)] for index in range(count)]


def work(out: Path, arguments: list[str], told: Path, changes: dict[str, Any]) -> None:
    """The job, as `jaxid.cli` runs it; ends the process.

    Args:
        out: its folder.
        arguments: of the command line.
        told: file for what is printed.
        changes: `pause` seconds for each item, `model` of the settings, `jax`, a version, `join` and `patience` in
            seconds, `bad`, an item that cannot be used, and `log`, a file for the items that are computed.
    """
    descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    processes.JOIN_SECONDS = changes.get("join", JOIN_SECONDS)
    processes.PATIENCE_SECONDS = jobs.PATIENCE_SECONDS = changes.get("patience", PATIENCE_SECONDS)
    if "jax" in changes:
        version = importlib.metadata.version
        importlib.metadata.version = lambda name: changes["jax"] if name == "jax" else version(name)

    def compute(items: list[int]) -> dict[str, list[Any]]:
        for item in items:
            if "log" in changes:
                with changes["log"].open("a") as file:
                    file.write(f"{item}\n")
            time.sleep(changes.get("pause", 0.0))
            if item == changes.get("bad"):
                raise InputError("a bad one.")
        rows = [item for item in items for _ in range(item % 3 + 1)]
        return {"item": rows, "third": [row / 3 for row in rows], "word": [f"item {row}" for row in rows]}

    code = 0
    try:
        _, place = places.taken(arguments)
        with _joined(place):
            finished = jobs.run(
                out,
                settings={"model": changes.get("model", "none")},
                items=range(ITEMS),
                key=str,
                compute=compute,
                chunk_size=3,
                team=processes.team(),
                note=lambda: [0 if place is None else place.process],
            )
            jobs.write_merged(out, finished)
            print("resumed", finished.resumed, "notes", finished.notes)
    except processes.Elsewhere:
        pass
    except JaxidError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _joined(place: places.Place | None) -> Iterator[None]:
    if place is None:
        yield
        return
    with places.relayed() if place.process else contextlib.nullcontext(), processes.joined(place):
        yield
