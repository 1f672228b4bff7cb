"""The folder of a job: its settings, and one Parquet file for each chunk that is finished."""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from jaxid import io
from jaxid.errors import DataError, InputError, OutputError

if TYPE_CHECKING:
    import pyarrow

Item = TypeVar("Item")

METADATA = "jaxid"
"""The name under which a file's items and skipped items are noted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """An item that was skipped.

    Attributes:
        key: the item's.
        reason: what was wrong with it, one line.
    """

    key: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of several slices of a job's items, which is a job of its own.

    Attributes:
        index: 1 is the first.
        of: how many there are.
    """

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """The shard that a text such as 3/16 names.

        Raises:
            InputError: if it names none.
        """
        match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard is given as 3/16, the third of sixteen, not as {text!r}.")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        """As in a command."""
        return f"{self.index}/{self.of}"

    def part(self, items: Sequence[Item]) -> list[Item]:
        """Its items; the shards' numbers of items differ by one at most."""
        return list(items[len(items) * (self.index - 1) // self.of : len(items) * self.index // self.of])

    def record(self, keys: Sequence[str]) -> dict[str, Any]:
        """What `settings.json` holds of it: its place among the shards, and all items' number and digest."""
        return {"index": self.index, "of": self.of, "items": summary_of(keys), "versions": versions()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One chunk's place: its items, and the file that holds their rows once they are computed."""

    start: int
    keys: tuple[str, ...]
    path: Path

    def write(self, table: "pyarrow.Table", skipped: tuple[Skipped, ...]) -> None:
        """Stores rows and skipped items in one file, so that one rename makes both durable."""
        note = {"items": self.keys, "skipped": [dataclasses.asdict(one) for one in skipped]}
        io.write_table(self.path, table, metadata={METADATA: json.dumps(note)})

    def read(self) -> tuple["pyarrow.Table", tuple[Skipped, ...]]:
        """The rows and the skipped items."""
        try:
            table = io.read_table(self.path)
            note = noted(table)
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


def noted(table: "pyarrow.Table") -> Any:
    """What is noted in a part's file: its items and those that were skipped."""
    return json.loads((table.schema.metadata or {})[METADATA.encode()])


def begin(out: Path, now: dict[str, Any], restart: bool) -> dict[str, Any]:
    """Writes `settings.json`, or reads and compares the one that is there."""
    io.remove_temporary(out)
    if restart:
        # The settings last: until all parts are gone, they say whose parts these are.
        for path in [*(out / "parts").glob("*.parquet"), out / "table.parquet", out / "settings.json"]:
            path.unlink(missing_ok=True)
    then = compared(out, now)
    if then is None:
        io.write_json(out / "settings.json", now)
    return then or now


def of_job(
    settings: Mapping[str, Any], keys: list[str], chunk_size: int, shard: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `settings.json` holds."""
    now = {"settings": settings, "chunk_size": chunk_size, "items": summary_of(keys)}
    return json.loads(io.to_json(now if shard is None else {**now, "shard": shard}))


def versions() -> dict[str, str]:
    """Of the packages that all parts of a job must have been made with."""
    return {name: importlib.metadata.version(name) for name in ("jaxid-vlm", "jax", "jaxlib")}


def summary_of(keys: Sequence[str]) -> dict[str, Any]:
    """The number of items, and a digest of their keys in order."""
    # Escaped by JSON, as file names may hold bytes that UTF-8 cannot.
    return {"count": len(keys), "digest": hashlib.sha256(json.dumps(list(keys)).encode()).hexdigest()}


def compared(out: Path, now: dict[str, Any], only: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The folder's `settings.json`, None if there is none; of its settings, `only` some are compared."""
    path = out / "settings.json"
    if not path.exists():
        if any((out / "parts").glob("*.parquet")):
            raise OutputError(
                f"{out} holds parts of a run whose {path.name} is gone; give --restart to begin anew, or another --out."
            )
        return None
    then = read_settings(path)
    old = (
        then["settings"]
        if only is None
        else {name: then["settings"][name] for name in only if name in then["settings"]}
    )
    count, digest = now["items"]["count"], now["items"]["digest"]
    further = []
    slices = [shard and f"{shard['index']}/{shard['of']}" for shard in (then.get("shard"), now.get("shard"))]
    if slices[0] != slices[1]:
        further = [f"shard was {slices[0]}, is now {slices[1]}"]
    elif then["items"]["count"] != count:
        further = [f"items were {then['items']['count']}, are now {count}"]
    elif then["items"]["digest"] != digest:
        further = [f"items are {count} as before, but other ones or in another order"]
    io.refuse_other_settings(out, old, now["settings"], further)
    return then


def read_settings(path: Path) -> dict[str, Any]:
    """What the `settings.json` of a job holds.

    Raises:
        OutputError: if it is missing or damaged.
    """
    try:
        stored = io.read_json(path, OutputError)
    except OutputError as error:
        raise OutputError(
            f"{one_line(error)}: it is damaged; give --restart to begin anew, or another --out."
        ) from error
    items, size = stored.get("items"), stored.get("chunk_size")
    whole = (
        isinstance(items, dict)
        and isinstance(items.get("count"), int)
        and isinstance(items.get("digest"), str)
        and isinstance(stored.get("settings"), dict)
        and isinstance(size, int)
        and size >= 1
        and all(isinstance(chunk, int) for chunk in stored.get("chunks", ()))
        and sum(stored.get("chunks", ())) in (0, items["count"])
    )
    if not whole:
        raise OutputError(f"{path} is damaged; give --restart to begin anew, or another --out.")
    return stored


def part_sizes(stored: Mapping[str, Any]) -> list[int]:
    """The number of items of every part: the chunk size, but where parts of shards were joined."""
    size, count = stored["chunk_size"], stored["items"]["count"]
    chunks = stored.get("chunks", ())
    return list(chunks) or [min(size, count - start) for start in range(0, count, size)]


def part_name(index: int) -> str:
    """The name of a part's file."""
    return f"{index:05d}.parquet"


def all_parts(folder: Path, keys: Sequence[str], stored: Mapping[str, Any]) -> list[Part]:
    """All chunks' parts, in order."""
    sizes = part_sizes(stored)
    starts = itertools.accumulate(sizes[:-1], initial=0)
    return [
        Part(start=start, keys=tuple(keys[start : start + size]), path=folder / part_name(index))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def table_of(columns: Mapping[str, Any], part: Part) -> "pyarrow.Table":
    """The columns as a table; empty ones fit every type, as there is no telling what they would hold."""
    import pyarrow

    table = io.as_table(columns, part.path)
    return table if table.num_rows else pyarrow.table({name: pyarrow.nulls(0) for name in table.column_names})


def joint_schema(schema: "pyarrow.Schema | None", table: "pyarrow.Table", part: Part) -> "pyarrow.Schema":
    """The columns so far and a part's together, so that parts which do not fit are found before the end."""
    import pyarrow

    if schema is None:
        return table.schema
    try:
        return pyarrow.unify_schemas([schema, table.schema], promote_options="permissive")
    except pyarrow.ArrowException as error:
        raise InputError(f"the columns of {part} do not fit those of other items: {one_line(error)}.") from error


def merged(parts: list[Part]) -> tuple["pyarrow.Table", tuple[Skipped, ...]]:
    """All parts' rows as one table, and all skipped items."""
    import pyarrow

    contents = [part.read() for part in parts]
    table = pyarrow.concat_tables([rows for rows, _ in contents], promote_options="permissive")
    return table, tuple(one for _, skipped in contents for one in skipped)


def one_line(error: Exception) -> str:
    """An error's message in one line, without its full stop."""
    return " ".join(str(error).split()).rstrip(".")
