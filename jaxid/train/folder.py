"""The folder of a training run: its lock, its settings, its saved states and its tables of metrics."""

import contextlib
import csv
import gc
import inspect
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxid import processes
from jaxid.errors import CheckpointError, JaxidWarning, OutputError
from jaxid.io import (
    ensure_output_folder,
    first_line,
    locked,
    read_json,
    reading,
    refuse_other_settings,
    remove_temporary,
    to_json,
    whole_file,
    write_json,
)

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

Row = dict[str, float | str]
"""One row of a table of metrics: "step", "stage", and numbers by name."""


@contextlib.contextmanager
def begun(
    folder: Path, settings: Mapping[str, object], *, restart: bool = False, made: Sequence[str] = ()
) -> Iterator[None]:
    """Locks a run's folder for this process, and removes files that a killed process left half written.

    Of several processes that train together, all call this; the first one does it while the others wait.

    Args:
        folder: folder of the run, created if necessary. Its `run.json` holds the settings.
        settings: every setting that affects the outcome.
        restart: discard the run in the folder and begin anew.
        made: glob patterns of further files of a run, which are discarded together with state and metrics.

    Raises:
        OutputError: if the folder holds a run with other settings, is in use by another process, or cannot be written
            to, or if its `run.json` is damaged or missing.
    """
    with contextlib.ExitStack() as stack:
        if leads():
            check_folder(folder, settings, restart=restart)
            stack.enter_context(locked(folder))
            _prepare(folder, settings, restart=restart, made=made)
        meet()
        if not leads():
            if not (folder / "run.json").exists():
                raise OutputError(
                    f"process {jax.process_index()} does not see what process 0 wrote to {folder}; all processes need "
                    "one folder that they share."
                )
            _compare(folder, settings)
        yield


def _prepare(folder: Path, settings: Mapping[str, object], *, restart: bool, made: Sequence[str]) -> None:
    """Clears a folder that is locked of what does not belong to the run, and writes the settings."""
    if restart:
        # The settings go last: until then they tell which run the remaining files belong to.
        for pattern in ("state", "metrics.csv", *made, "run.json"):
            for path in folder.glob(pattern):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    _compare(folder, settings)  # another process may have written to it since
    for inner in (folder, *folder.iterdir()):
        remove_temporary(inner)
    for half in folder.glob("state/*.orbax-checkpoint-tmp*"):
        shutil.rmtree(half, ignore_errors=True)
    write_json(folder / "run.json", settings)


def leads() -> bool:
    """Whether this process writes; of several that train together, the first one does."""
    return jax.process_index() == 0


def agreed(problem: str | None) -> str | None:
    """The first problem that any of the processes has; all of them call this."""
    link = processes.link()
    found = [problem] if link is None else link.exchange(problem)
    return next((text for text in found if text is not None), None)


def meet() -> None:
    """Waits for the other processes, if there are any."""
    agreed(None)


def check_folder(folder: Path, settings: Mapping[str, object], *, restart: bool = False, part: bool = False) -> None:
    """Raises the errors that `begun` would raise, without locking the folder.

    Args:
        folder: as in `begun`.
        settings: as in `begun`.
        restart: as in `begun`.
        part: only some of the settings are given; the others are not compared.

    Raises:
        OutputError: as `begun`.
    """
    ensure_output_folder(folder)
    if not restart:
        _compare(folder, settings, part=part)


def _compare(folder: Path, settings: Mapping[str, object], *, part: bool = False) -> None:
    """Refuses a folder that holds a run whose settings differ or are unknown."""
    record, now = folder / "run.json", json.loads(to_json(settings))
    advice = "give --restart to begin anew, or another --out"
    if not record.exists():
        if (folder / "state").exists():
            raise OutputError(f"{folder} holds the state of a run whose run.json is gone; {advice}.")
        return
    try:
        then = read_json(record, OutputError)
    except OutputError as error:
        raise OutputError(f"{str(error).rstrip('.')}; {advice}.") from error
    refuse_other_settings(folder, {name: then[name] for name in then if not part or name in now}, now)


class States:
    """The saved states of a run. Each has a checksum, as Orbax does not notice flipped bits."""

    def __init__(self, folder: Path):
        self.folder = folder.absolute()
        self.manager: ocp.CheckpointManager | None = None

    def __enter__(self) -> "States":
        self._quiet = _orbax_silenced()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if self.manager is not None:
                with self._writing() if kind is None else contextlib.suppress(Exception):
                    self.manager.wait_until_finished()
                with contextlib.suppress(Exception):
                    self.manager.close()
        finally:
            self._quiet.__exit__(None, None, None)

    def save(self, step: int, state: PyTree) -> None:
        """Writes a state in the background, after the previous one is written; the last two are kept."""
        import orbax.checkpoint as ocp

        checksum = int(_checksum(state))
        with self._writing():
            if self.manager is None:
                options = ocp.CheckpointManagerOptions(max_to_keep=2)
                self.manager = ocp.CheckpointManager(self.folder, options=options)
            self.manager.save(step, args=ocp.args.StandardSave(state), custom_metadata={"checksum": checksum})

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as problem:
            raise OutputError(
                f"cannot write the training state to {self.folder}: {first_line(problem)}; free some space or "
                f"check the folder, then run again: training resumes from the last saved step."
            ) from problem

    def restore(self, abstract: Callable[[int], PyTree]) -> tuple[int, PyTree]:
        """The last saved step whose state is intact, and that state; (0, None) if none was saved.

        Args:
            abstract: maps a step to the shapes of its state, or to None if the run has no such step.

        Raises:
            CheckpointError: if states were saved, but none is intact.
        """
        damaged: list[tuple[Path, str]] = []
        steps = [path for path in self.folder.glob("*") if path.name.isdecimal()]
        for path in sorted(steps, key=lambda path: -int(path.name)):
            try:
                state = self._read(path, abstract(int(path.name)))
            except CheckpointError as error:
                damaged.append((path, first_line(error)))
                continue
            for worse, reason in damaged if leads() else ():
                warnings.warn(f"{reason}; training resumes from step {path.name}.", JaxidWarning, stacklevel=2)
                with self._writing():
                    shutil.rmtree(worse) if worse.is_dir() else worse.unlink()
            return int(path.name), state
        if damaged:
            raise CheckpointError(
                f"{damaged[0][1]}, and no earlier state is whole; give --restart to begin anew, or another --out."
            )
        return 0, None

    def _read(self, path: Path, expected: PyTree) -> PyTree:
        import orbax.checkpoint as ocp

        if expected is None:
            raise CheckpointError(f"{path} is not a state of this run, which has no such step.")
        if not (path / "default").is_dir():
            raise CheckpointError(f"{path} cannot be read as a training state: its folder `default` is missing.")
        state, noted, problem = None, {}, None
        try:
            with reading(path, "a training state"):
                state = ocp.StandardCheckpointer().restore(path / "default", expected)
                noted = read_json(path / "_CHECKPOINT_METADATA")["custom_metadata"] or {}
        except CheckpointError as error:
            problem = error
        if (reason := agreed(None if problem is None else str(problem))) is not None:
            raise CheckpointError(reason) from problem
        if noted.get("checksum") not in (None, int(_checksum(state))):
            raise CheckpointError(f"{path} is damaged: its checksum is wrong.")
        return state


@contextlib.contextmanager
def _orbax_silenced() -> Iterator[None]:
    """Suppresses the tracebacks that Orbax and its threads print for failures that are also raised as errors."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook

    def wanted(record: logging.LogRecord) -> bool:
        return "orbax" not in record.pathname

    def report(problem: Any) -> None:
        # A read or write that was given up is closed by the garbage collector, and complains once more.
        abandoned = inspect.iscoroutine(problem.object) and "orbax" in problem.object.cr_code.co_filename
        if not abandoned and str(problem.exc_value) != "Event loop is closed":
            hook(problem)

    logger.addFilter(wanted)
    sys.unraisablehook = report
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(wanted)


@jax.jit
def _checksum(tree: PyTree) -> Array:
    """A checksum that any flipped bit changes: the sum of the words, each times an odd number given by its position."""
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        words = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}").astype(jnp.uint32)
        weight = jnp.ones(words.shape, jnp.uint32)
        for axis in range(words.ndim):
            weight += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(
                2 * 40_503 ** (axis + 1) % 2**32
            )
        total = total * np.uint32(31) + (words * weight).sum(dtype=jnp.uint32)
    return total


def append_metrics(path: Path, columns: Sequence[str], row: Mapping[str, float | str]) -> None:
    """Appends a row, after dropping the rows of later steps, which belong to a run that was killed.

    Raises:
        OutputError: if the file is damaged or cannot be written.
    """
    rows = [old for old in metrics_rows(path, columns) if int(old["step"]) < int(row["step"])]
    with whole_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows([*rows, row])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a table of metrics, numbers as numbers.

    Raises:
        OutputError: if the file is damaged.
    """
    return [{name: _value(name, text) for name, text in row.items() if text} for row in metrics_rows(path)]


def metrics_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows of a table of metrics as text; none if the file does not exist.

    Args:
        path: the file.
        columns: the columns that it may have; any by default.

    Raises:
        OutputError: if the file is damaged.
    """
    if not path.exists():
        return []
    try:
        with reading(path, "a table of metrics", OutputError), path.open(newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
            for row in rows:
                if None in row or None in row.values() or not row["step"].isdecimal():
                    raise ValueError("a line is incomplete")
                if columns is not None and not set(row) <= set(columns):
                    raise ValueError(f"it has other columns than {', '.join(columns)}")
                for name, text in row.items():
                    _value(name, text)
    except OutputError as error:
        raise OutputError(f"{first_line(error)}; delete it to resume without its rows.") from error
    return rows


def _value(name: str, text: str) -> float | str:
    return text if name == "stage" or not text else float(text)
