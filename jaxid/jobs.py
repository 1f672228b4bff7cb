"""Long jobs that may be killed at any moment: finished chunks stay on disk, and the job resumes from them."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxid import io, pipeline
from jaxid.errors import DataError, InputError, JaxidError, OutputError, PromptError
from jaxid.halving import Batches, Exhausted, Halving

if TYPE_CHECKING:
    import pyarrow

Item = TypeVar("Item")
Columns = Mapping[str, Any]

ITEM_ERRORS = (InputError, PromptError, DataError)
"""Errors that a single item may cause."""

_METADATA = "jaxid"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """An item that was skipped.

    Attributes:
        key: the item's.
        reason: what was wrong with it, one line.
    """

    key: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
    """All that a job computed, in this process and before.

    Attributes:
        table: the rows of all items, in the order of the items.
        skipped: items that were skipped, in their order.
        resumed: how many items were done when the job began, those skipped included.
        settings: as they are stored, in the types that JSON has.
    """

    table: "pyarrow.Table"
    skipped: tuple[Skipped, ...]
    resumed: int
    settings: dict[str, Any]


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

    Returns:
        The rows, and the items that were skipped.

    Raises:
        InputError: if there are no items, two have one key, the chunk size is not positive, or columns do not fit.
        OutputError: if the folder holds another job, a damaged one, is in use by another process, or cannot be
            written to.
        OutOfMemoryError: if the device's memory does not suffice for a single item.
        JaxidError: what `read` or `compute` raised, naming the item if it fails alone as well.
    """
    from tqdm import tqdm

    if chunk_size < 1:
        raise InputError(f"a chunk needs at least one item, not {chunk_size}.")
    keys = _checked_keys(items, key)
    io.ensure_output_folder(out / "parts")
    with io.locked(out):
        stored = _begin(out, settings, keys, chunk_size, restart)
        parts = _parts(out / "parts", keys, stored["chunk_size"])
        finished = [part for part in parts if part.path.exists()]
        pending = [part for part in parts if not part.path.exists()]
        schema = None
        for part in finished:
            schema = _joint_schema(schema, part.read()[0], part)
        resumed = sum(len(part.keys) for part in finished)
        batches = Batches(halving or Halving(stored["chunk_size"], unit=unit), read, compute, io.joined)

        def items_of(part: _Part) -> list[Item]:
            return list(items[part.start : part.start + len(part.keys)])

        def store(part: _Part, columns: Columns, skipped: tuple[Skipped, ...] = ()) -> None:
            nonlocal schema
            table = _part_table(columns, part)
            schema = _joint_schema(schema, table, part)
            part.write(table, skipped)
            bar.set_description(refresh=False)
            bar.update(len(part.keys))

        def fetch(part: _Part, found: Callable[[], Columns]) -> Exception | None:
            columns = found()
            try:
                store(part, columns)
            except Exception as error:  # no item's fault, whatever its class
                return error

        hidden = None if progress else True
        with (
            tqdm(total=len(keys), initial=resumed, unit=unit, disable=hidden, desc=first if pending else None) as bar,
            pipeline.overlapped(pending, lambda part: batches.read(items_of(part)), batches.compute, fetch) as results,
        ):
            for part, result in results:
                failed, found = None, None
                try:
                    try:
                        failed = result.result()
                    except Exhausted as shortage:
                        found = batches.again(items_of(part), shortage), ()
                except ITEM_ERRORS as error:
                    found = _without_bad(items_of(part), part.keys, error, batches.at_once, skip_bad)
                if failed is not None:
                    raise failed
                if found is not None:
                    store(part, *found)
        table, skipped = _merged(parts)
    return Finished(table=table, skipped=skipped, resumed=resumed, settings=stored["settings"])


def check(
    out: Path, *, settings: Mapping[str, Any], items: Sequence[Item], key: Callable[[Item], str], restart: bool
) -> None:
    """Raises early the errors that `run` would raise for a folder, before anything slow is done.

    Args:
        out: the job's folder.
        settings: the settings known so far; others are not compared.
        items: as `run` takes them.
        key: as in `run`.
        restart: as in `run`.

    Raises:
        InputError: if there are no items, or two have one key.
        OutputError: if the folder holds another job, a damaged one, is in use by another process, or cannot be
            written to.
    """
    keys = _checked_keys(items, key)
    io.ensure_output_folder(out)
    with io.locked(out):
        if not restart:
            _compared(out, _described(settings, keys, 0), only=settings)


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
        return io.write_table(out / "table.parquet", finished.table, metadata={_METADATA: json.dumps(note)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Part:
    """One chunk's place: its items, and the file that holds their rows once they are computed."""

    start: int
    keys: tuple[str, ...]
    path: Path

    def write(self, table: "pyarrow.Table", skipped: tuple[Skipped, ...]) -> None:
        """Stores rows and skipped items in one file, so that one rename makes both durable."""
        note = {"items": self.keys, "skipped": [dataclasses.asdict(one) for one in skipped]}
        io.write_table(self.path, table, metadata={_METADATA: json.dumps(note)})

    def read(self) -> tuple["pyarrow.Table", tuple[Skipped, ...]]:
        """The rows and the skipped items."""
        try:
            table = io.read_table(self.path)
            note = json.loads((table.schema.metadata or {})[_METADATA.encode()])
            if note["items"] != list(self.keys):
                raise ValueError("other items")
            skipped = tuple(Skipped(key=one["key"], reason=one["reason"]) for one in note["skipped"])
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"{self.path} is damaged, or not a part of this run; delete it, and its items are computed again."
            ) from error
        return table.replace_schema_metadata(None), skipped

    def __str__(self) -> str:
        return f"items {self.keys[0]!r} to {self.keys[-1]!r}"


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


def _begin(out: Path, settings: Mapping[str, Any], keys: list[str], chunk_size: int, restart: bool) -> dict[str, Any]:
    """Writes `settings.json`, or reads and compares the one that is there."""
    io.remove_temporary(out)
    if restart:
        # The settings last: until all parts are gone, they say whose parts these are.
        for path in [*(out / "parts").glob("*.parquet"), out / "table.parquet", out / "settings.json"]:
            path.unlink(missing_ok=True)
    now = _described(settings, keys, chunk_size)
    then = _compared(out, now)
    if then is None:
        io.write_json(out / "settings.json", now)
    return then or now


def _described(settings: Mapping[str, Any], keys: list[str], chunk_size: int) -> dict[str, Any]:
    """What `settings.json` holds."""
    # Escaped by JSON, as file names may hold bytes that UTF-8 cannot.
    digest = hashlib.sha256(json.dumps(keys).encode()).hexdigest()
    now = {"settings": settings, "chunk_size": chunk_size, "items": {"count": len(keys), "digest": digest}}
    return json.loads(io.to_json(now))


def _compared(out: Path, now: dict[str, Any], only: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The folder's `settings.json`, None if there is none; of its settings, `only` some are compared."""
    path = out / "settings.json"
    if not path.exists():
        if any((out / "parts").glob("*.parquet")):
            raise OutputError(
                f"{out} holds parts of a run whose {path.name} is gone; give --restart to begin anew, or another --out."
            )
        return None
    then = _read_settings(path)
    old = (
        then["settings"]
        if only is None
        else {name: then["settings"][name] for name in only if name in then["settings"]}
    )
    count, digest = now["items"]["count"], now["items"]["digest"]
    further = []
    if then["items"]["count"] != count:
        further = [f"items were {then['items']['count']}, are now {count}"]
    elif then["items"]["digest"] != digest:
        further = [f"items are {count} as before, but other ones or in another order"]
    io.refuse_other_settings(out, old, now["settings"], further)
    return then


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        stored = io.read_json(path, OutputError)
    except OutputError as error:
        raise OutputError(
            f"{_one_line(error)}: it is damaged; give --restart to begin anew, or another --out."
        ) from error
    items, size = stored.get("items"), stored.get("chunk_size")
    whole = (
        isinstance(items, dict)
        and isinstance(items.get("count"), int)
        and isinstance(items.get("digest"), str)
        and isinstance(stored.get("settings"), dict)
        and isinstance(size, int)
        and size >= 1
    )
    if not whole:
        raise OutputError(f"{path} is damaged; give --restart to begin anew, or another --out.")
    return stored


def _parts(folder: Path, keys: list[str], chunk_size: int) -> list[_Part]:
    """All chunks' parts, in order; what a killed process left half written is removed."""
    io.remove_temporary(folder)
    return [
        _Part(start=start, keys=tuple(keys[start : start + chunk_size]), path=folder / f"{index:05d}.parquet")
        for index, start in enumerate(range(0, len(keys), chunk_size))
    ]


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
    skipped = tuple(Skipped(key=keys[index], reason=_one_line(error)) for index, error in bad.items())
    return (computed(good) if good else {}), skipped


def bad_item(key: str, error: JaxidError) -> JaxidError:
    """The error of an item, naming it."""
    return type(error)(f"item {key!r}: {_one_line(error)}; --skip-bad skips such items.")


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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


def _part_table(columns: Mapping[str, Any], part: _Part) -> "pyarrow.Table":
    """The columns as a table; empty ones fit every type, as there is no telling what they would hold."""
    import pyarrow

    table = io.as_table(columns, part.path)
    return table if table.num_rows else pyarrow.table({name: pyarrow.nulls(0) for name in table.column_names})


def _joint_schema(schema: "pyarrow.Schema | None", table: "pyarrow.Table", part: _Part) -> "pyarrow.Schema":
    """The columns so far and a part's together, so that parts which do not fit are found before the end."""
    import pyarrow

    if schema is None:
        return table.schema
    try:
        return pyarrow.unify_schemas([schema, table.schema], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise InputError(f"the columns of {part} do not fit those of other items: {_one_line(error)}.") from error


def _merged(parts: list[_Part]) -> tuple["pyarrow.Table", tuple[Skipped, ...]]:
    """All parts' rows as one table, and all skipped items."""
    import pyarrow

    contents = [part.read() for part in parts]
    table = pyarrow.concat_tables([rows for rows, _ in contents], promote_options="permissive")
    return table, tuple(one for _, skipped in contents for one in skipped)
