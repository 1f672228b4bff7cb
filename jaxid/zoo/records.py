"""What a training run records about itself: when, for how long, and on what it ran.

The record says nothing that decides the outcome; that is in `run.json`.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxid import __version__
from jaxid.errors import OutputError
from jaxid.io import read_json, write_json

RECORD_FILE = "record.json"
"""Name of the record in a run's folder."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
"""The packages whose versions are recorded, beside jaxid's and Python's."""

UPDATE_EVERY = 30.0
"""Seconds between updates: a run that is killed loses at most as many from its record."""


@contextlib.contextmanager
def recorded(folder: Path, *, update_every: float = UPDATE_EVERY) -> Iterator[None]:
    """Keeps a run's record while the run is at work; call it inside `begun`.

    `record.json` holds "sessions", one for every time that the run was begun or resumed, and whether the run is
    "finished". A session has its start and end (UTC), its seconds, the last step that was saved when it started, and
    what it ran on. The record of a finished run stays as it is.

    Args:
        folder: folder of the run.
        update_every: seconds between updates.

    Raises:
        OutputError: if the record is damaged or cannot be written.
    """
    path = folder / RECORD_FILE
    record: dict[str, Any] = read_json(path, OutputError, missing={"finished": False, "sessions": []})
    if record.get("finished"):
        yield
        return
    begun, clock = datetime.now(UTC), time.monotonic()
    session = {"start": _text(begun), "first_step": _saved_step(folder), **_surroundings()}
    record.setdefault("sessions", []).append(session)

    def update(*, finished: bool = False) -> None:
        session.update(end=_text(datetime.now(UTC)), seconds=round(time.monotonic() - clock, 1))
        write_json(path, record | {"finished": finished})

    def keep() -> None:
        while not stopped.wait(update_every):
            with contextlib.suppress(OutputError):  # the next update, or the last one, says that it is impossible
                update()

    update()
    stopped = threading.Event()
    keeper = threading.Thread(target=keep, name="record", daemon=True)
    keeper.start()
    try:
        yield
    except BaseException:
        _stop(keeper, stopped)
        with contextlib.suppress(OutputError):  # what went wrong first is what matters
            update()
        raise
    _stop(keeper, stopped)
    update(finished=True)


def _stop(keeper: threading.Thread, stopped: threading.Event) -> None:
    stopped.set()
    keeper.join()


def read_record(folder: Path) -> dict[str, Any] | None:
    """What a run recorded about itself, summed up over its sessions; None without a record.

    Returns:
        The first session's "start" and the last one's "end", the "seconds" of all, how often the run was "resumed",
        the "first_step" that is recorded, whether it is "finished", and what the last session ran on: "versions",
        "cores", "machine" and "device".

    Raises:
        OutputError: if the record is damaged.
    """
    record = read_json(folder / RECORD_FILE, OutputError, missing={})
    sessions = record.get("sessions")
    if not sessions:
        return None
    try:
        return sessions[-1] | {
            "start": sessions[0]["start"],
            "first_step": sessions[0]["first_step"],
            "seconds": sum(session["seconds"] for session in sessions),
            "resumed": len(sessions) - 1,
            "finished": record["finished"],
        }
    except (KeyError, TypeError) as error:
        raise OutputError(f"{folder / RECORD_FILE} is damaged: a session is incomplete; repeat the run.") from error


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _saved_step(folder: Path) -> int:
    return max((int(path.name) for path in (folder / "state").glob("*") if path.name.isdecimal()), default=0)


def _surroundings() -> dict[str, Any]:
    versions = {"jaxid": __version__, **{name: _version(name) for name in PACKAGES}}
    return {
        "versions": versions | {"python": platform.python_version()},
        "cores": _cores(),
        "machine": platform.machine(),
        "device": jax.devices()[0].device_kind,
    }


def _version(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return "unknown"


def _cores() -> int:
    """The number of processor cores that this process may use."""
    with contextlib.suppress(AttributeError):  # not on every system
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
