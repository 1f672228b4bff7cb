"""Long jobs that may be killed at any moment: finished chunks stay on disk, and the job resumes from them.

Several processes may share a job: process 0 begins it, each computes and stores its part of the chunks, and process 0
joins them. A shard of a job is a job of its own, on a slice of the items.
"""

import contextlib
import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxid import io, pipeline
from jaxid.errors import DataError, InputError, JaxidError, OutOfMemoryError, PromptError
from jaxid.halving import Batches, Exhausted, Halving
from jaxid.parts import (
    METADATA,
    Part,
    Skipped,
    all_parts,
    begin,
    compared,
    joint_schema,
    merged,
    of_job,
    one_line,
    part_name,
    part_sizes,
    table_of,
    versions,
)
from jaxid.processes import ALONE, PATIENCE_SECONDS, Team

if TYPE_CHECKING:
    import pyarrow

Item = TypeVar("Item")
Columns = Mapping[str, Any]

ITEM_ERRORS = (InputError, PromptError, DataError)
"""Errors that a single item may cause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """All that a job computed, in this process and before.

    Attributes:
        table: the rows of all items, in the order of the items.
        skipped: items that were skipped, in their order.
        resumed: how many items were done when the job began, those skipped included.
        settings: as they are stored, in the types that JSON has.
        notes: what `note` gave in every process that stored parts.
    """

    table: "pyarrow.Table"
    skipped: tuple[Skipped, ...]
    resumed: int
    settings: dict[str, Any]
    notes: list[Any] = dataclasses.field(default_factory=list)


def run(
    out: Path,
    *,
    settings: Mapping[str, Any],
    items: Sequence[Item],
    key: Callable[[Item], str],
    compute: Callable[[Any], Columns | Callable[[], Columns]],
    chunk_size: int,
    read: Callable[[list[Item]], Any] = list,
    halving: Halving | None = None,
    restart: bool = False,
    skip_bad: bool = False,
    progress: bool = True,
    unit: str = "item",
    first: str = "",
    shard: Mapping[str, Any] | None = None,
    team: Team = ALONE,
    note: Callable[[], Any] = lambda: None,
) -> Finished:
    """Computes the rows of all items, chunk by chunk; resumes the job that the folder holds, if there is one.

    While a chunk is computed, the next ones are read, and the rows of the one before are stored. If the device runs out
    of memory, chunks are computed in halves from then on.

    The folder holds `settings.json`, and in `parts/` one Parquet file for each finished chunk.

    Args:
        out: the job's folder.
        settings: everything that the rows depend on besides the items (model and its fingerprint, layers, seed ...), as
            JSON can hold it. A job resumes only with the same settings and items.
        items: what to compute.
        key: gives an item's name, which must be unique.
        compute: gives the columns of what `read` gave of some items, any number of rows for each; or a function that
            gives them when it is called, in the background, while the next chunk is computed. The rows of an item
            should not depend on the other items.
        chunk_size: items computed together. A resumed job keeps the size it began with.
        read: opens some items; called in background threads. By default `compute` gets the items themselves.
        halving: how many items of a chunk are computed together; all by default.
        restart: discard the job in the folder and begin anew.
        skip_bad: skip items for which `read` or `compute` raises InputError, PromptError or DataError.
        progress: show a progress bar, on terminals only.
        unit: what the progress bar calls an item.
        first: text of the progress bar until the first chunk is done, such as "compiling".
        shard: what is stored of the job of which these items are a slice, see `jaxid.parts.Shard`.
        team: the processes that share the job. The settings and items must be those of all of them, and so must the
            folder. Process 0's chunk size counts.
        note: called when this process's chunks are done, for `Finished.notes`; gives types that JSON has.

    Returns:
        The rows, and the items that were skipped; in process 0 only.

    Raises:
        InputError: if there are no items, two have one key, the chunk size is not positive, or columns do not fit.
        OutputError: if the folder holds another job, a damaged one, is in use by another process, or cannot be
            written to.
        OutOfMemoryError: if the device's memory does not suffice for a single item.
        JaxidError: what `read` or `compute` raised, naming the item if it fails alone as well; or if another process
            stopped before its items were done.
        Elsewhere: in processes other than 0, when their items are done.
    """
    from tqdm import tqdm

    if chunk_size < 1:
        raise InputError(f"a chunk needs at least one item, not {chunk_size}.")
    keys = _checked_keys(items, key)
    now = of_job(settings, keys, chunk_size, shard)
    _require_agreement(team, now)
    with contextlib.ExitStack() as stack:
        if team.first:
            io.ensure_output_folder(out / "parts")
            stack.enter_context(io.locked(out))
        stored, missing = _shared(out, now, restart, team, stack)
        parts = all_parts(out / "parts", keys, stored)
        left, own = set(missing), set(team.share(missing))
        finished = [part for index, part in enumerate(parts) if index not in left]
        pending = [part for index, part in enumerate(parts) if index in own]
        schema = None
        for part in finished if team.first else ():
            schema = joint_schema(schema, part.read()[0], part)
        resumed = sum(len(part.keys) for part in finished)
        halving = halving or Halving(stored["chunk_size"], unit=unit)
        together = team.exchange(halving.together)
        if team.spans:  # what the processes of a worker compute together has one shape
            halving.together = min(together)
        batches, done = Batches(halving, read, compute, io.joined), 0

        def items_of(part: Part) -> list[Item]:
            return list(items[part.start : part.start + len(part.keys)])

        def store(part: Part, columns: Columns, skipped: tuple[Skipped, ...] = ()) -> None:
            nonlocal schema, done
            table = table_of(columns, part)
            schema = joint_schema(schema, table, part)
            if team.leads:
                part.write(table, skipped)
                done += len(part.keys)
            bar.set_description(refresh=False)
            show()

        def show() -> None:
            others = 0
            if team.link is not None:
                team.link.report(done)
                others = team.link.items()
            bar.update(resumed + done + others - bar.n)

        def fetch(part: Part, found: Callable[[], Columns]) -> Exception | None:
            columns = found()
            try:
                store(part, columns)
            except Exception as error:  # no item's fault, whatever its class
                return error

        hidden = None if progress and team.first else True
        with (
            tqdm(total=len(keys), initial=resumed, unit=unit, disable=hidden, desc=first if pending else None) as bar,
            pipeline.overlapped(pending, lambda part: batches.read(items_of(part)), batches.compute, fetch) as results,
        ):
            for part, result in results:
                team.require_first()
                failed, found = None, None
                try:
                    try:
                        failed = result.result()
                    except Exhausted as shortage:
                        if team.spans:
                            raise OutOfMemoryError(
                                f"the devices' memory does not suffice for {shortage.size} {halving.unit}s together, "
                                f"and processes that share a model do not try fewer; give --batch-size: {shortage}."
                            ) from shortage
                        found = batches.again(items_of(part), shortage), ()
                except ITEM_ERRORS as error:
                    found = _without_bad(items_of(part), part.keys, error, batches.at_once, skip_bad)
                if failed is not None:
                    raise failed
                if found is not None:
                    store(part, *found)
            notes, stopped = team.finished(note() if team.leads else None, show)
        there = sum(len(part.keys) for part in parts if part.path.exists()) if stopped else len(keys)
        if there < len(keys):
            one, reason = next(iter(stopped.items()))
            raise JaxidError(
                f"process {one} stopped before its items were done: {there} of {len(keys)} items are finished; run the "
                f"same command again ({reason.rstrip('.')})."
            )
        if team.link is not None:
            _await_parts(parts)
        table, skipped = merged(parts)
    told = [one for one in notes if one is not None]
    return Finished(table=table, skipped=skipped, resumed=resumed, settings=stored["settings"], notes=told)


def check(
    out: Path,
    *,
    settings: Mapping[str, Any],
    items: Sequence[Item],
    key: Callable[[Item], str],
    restart: bool,
    shard: Mapping[str, Any] | None = None,
    team: Team = ALONE,
) -> None:
    """Raises early the errors that `run` would raise for a folder, before anything slow is done.

    Args:
        out: the job's folder.
        settings: the settings known so far; others are not compared.
        items: as `run` takes them.
        key: as in `run`.
        restart: as in `run`.
        shard: as in `run`.
        team: as in `run`.

    Raises:
        InputError: if there are no items, or two have one key.
        OutputError: if the folder holds another job, a damaged one, is in use by another process, or cannot be
            written to.
    """
    now = of_job(settings, _checked_keys(items, key), 0, shard)
    _require_agreement(team, now)
    if team.first:
        io.ensure_output_folder(out)
        with io.locked(out):
            if not restart:
                compared(out, now, only=settings)
    team.exchange(None)  # the others wait for what process 0 finds


def write_merged(out: Path, finished: Finished) -> Path:
    """Writes the rows of a finished job as one file, `table.parquet`; the skipped items are in its metadata.

    Args:
        out: the job's folder.
        finished: what `run` returned.

    Returns:
        The file.

    Raises:
        OutputError: if the file cannot be written, or another process is working in the folder.
    """
    io.ensure_output_folder(out)
    with io.locked(out):
        note = {"skipped": [dataclasses.asdict(skipped) for skipped in finished.skipped]}
        return io.write_table(out / "table.parquet", finished.table, metadata={METADATA: json.dumps(note)})


def _checked_keys(items: Sequence[Item], key: Callable[[Item], str]) -> list[str]:
    keys = [key(item) for item in items]
    if not keys:
        raise InputError("there are no items to work on.")
    seen = set()
    for name in keys:
        if name in seen:
            raise InputError(f"two items have the key {name!r}; every item needs its own.")
        seen.add(name)
    return keys


def write_empty(out: Path, *, settings: Mapping[str, Any], shard: Mapping[str, Any], restart: bool) -> None:
    """Writes the folder of a shard that has no items; it is finished.

    Raises:
        OutputError: as `run` does.
    """
    io.ensure_output_folder(out / "parts")
    with io.locked(out):
        begin(out, of_job(settings, [], 1, shard), restart)


def _require_agreement(team: Team, now: Mapping[str, Any]) -> None:
    """Checks that all processes of a team have the same job and versions.

    Raises:
        InputError: in all of them, if not.
    """
    of_all = team.exchange({**{name: now[name] for name in ("settings", "items")}, "versions": versions()})
    for process, other in enumerate(of_all):
        for kind in ("versions", "settings", "items"):
            if other[kind] != of_all[0][kind]:
                told = io.differences(of_all[0][kind], other[kind], "is {} in process 0, {} in process " + str(process))
                raise InputError(
                    f"the processes do not agree on {kind}: {'; '.join(told)}; start all of them with the same options."
                )


def _shared(
    out: Path, now: dict[str, Any], restart: bool, team: Team, stack: contextlib.ExitStack
) -> tuple[dict[str, Any], list[int]]:
    """What `settings.json` holds, and the indices of the parts that are missing, as process 0 finds them.

    Raises:
        OutputError: as `run` does.
        JaxidError: in all processes, if one of them does not see the folder of process 0.
    """
    begun = None
    mark = out / f".{uuid.uuid4().hex}.0.tmp"  # removed as `io.remove_temporary` does if this process is killed
    if team.first:
        stored = begin(out, now, restart)
        io.remove_temporary(out / "parts")
        count = len(part_sizes(stored))
        names = {path.name for path in (out / "parts").glob("*.parquet")}
        missing = [index for index in range(count) if part_name(index) not in names]
        begun = {"stored": stored, "missing": missing, "mark": mark.name}
        if team.link is not None:
            io.write_text(mark, "")
            stack.callback(mark.unlink, missing_ok=True)
    found = team.exchange(begun)[0]
    seen = team.exchange(_appears(out / found["mark"]) if team.link is not None else True)
    if not all(seen):
        blind = seen.index(False)
        raise JaxidError(
            f"process {blind} does not see the files that process 0 writes to {out}; give --out a folder that all "
            "processes share, or run the items in slices, --shard 1/N to N/N, and join them with jaxid merge."
        )
    return found["stored"], found["missing"]


def _appears(path: Path, seconds: float = 10.0) -> bool:
    """Whether a file that another machine wrote is seen here soon; network file systems take a while."""
    end = time.monotonic() + min(seconds, PATIENCE_SECONDS)
    while path.name not in _names(path.parent):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _await_parts(parts: list[Part]) -> None:
    """Waits until the parts of other machines are seen here; those that are not are errors when they are read."""
    for part in parts:
        if not _appears(part.path, 60.0):
            return


def _without_bad(
    chunk: list[Item],
    keys: tuple[str, ...],
    error: JaxidError,
    computed: Callable[[list[Item]], Columns],
    skip_bad: bool,
) -> tuple[Columns, tuple[Skipped, ...]]:
    """The columns of the good items of a chunk that failed with an error, and the items that had to be skipped."""
    bad = {0: error} if len(chunk) == 1 else _bad_items(chunk, computed, first_only=not skip_bad)
    if not bad:
        raise error
    if not skip_bad:
        index, error = next(iter(bad.items()))
        raise bad_item(keys[index], error) from error
    good = [item for index, item in enumerate(chunk) if index not in bad]
    skipped = tuple(Skipped(key=keys[index], reason=one_line(error)) for index, error in bad.items())
    return (computed(good) if good else {}), skipped


def bad_item(key: str, error: JaxidError) -> JaxidError:
    """The error of an item, naming it."""
    return type(error)(f"item {key!r}: {one_line(error)}; --skip-bad skips such items.")


def _bad_items(
    chunk: list[Item], computed: Callable[[list[Item]], Columns], *, first_only: bool
) -> dict[int, JaxidError]:
    """The items that fail by themselves: their indices and errors."""
    bad = {}
    for index, item in enumerate(chunk):
        try:
            computed([item])
        except ITEM_ERRORS as error:
            bad[index] = error
            if first_only:
                break
    return bad
