"""Files: atomic writes, reads with one-line errors, tidy tables (Parquet) and summaries (JSON)."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from jaxid.errors import CheckpointError, DataError, InputError, InUseError, JaxidError, OutputError

if TYPE_CHECKING:
    import pyarrow

_RUST_PANIC = "PanicException"
"""What extensions in Rust (tokenizers, safetensors) raise when they fail; not an `Exception`."""

_LONGEST = 400
"""Characters shown of a third-party library's message; some libraries list every value they know."""

_TEMPORARY = re.compile(r"\..+\.[0-9]+\.tmp")
"""Names that `whole_file` gives to what is not complete yet."""


@contextlib.contextmanager
def reading(path: str | Path, what: str, error: type[JaxidError] = CheckpointError) -> Iterator[None]:
    """Turns any error raised inside into a one-line error that names the file.

    Put only the library call and the access to its result inside, so that a bug of ours is not reported as a fault of
    the file.

    Args:
        path: the file or folder that is being read.
        what: what it should be, with an article, such as "a tokenizer".
        error: the kind of error to raise.

    Raises:
        JaxidError: of the given kind; one that is raised inside passes unchanged.
    """
    with reporting(f"{path} cannot be read as {what}", error):
        try:
            yield
        except FileNotFoundError as problem:
            raise error(f"{path} is missing; expected {what} there.") from problem


@contextlib.contextmanager
def reporting(message: str, error: type[JaxidError]) -> Iterator[None]:
    """Turns any error of a third-party library raised inside into a one-line error.

    Args:
        message: what could not be done; the library's own message follows.
        error: the kind of error to raise.

    Raises:
        JaxidError: of the given kind; one that is raised inside passes unchanged.
    """
    try:
        yield
    except JaxidError:
        raise
    except BaseException as problem:
        if not isinstance(problem, Exception) and type(problem).__name__ != _RUST_PANIC:
            raise
        raise error(f"{message}: {first_line(problem)}.") from problem


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Keeps transformers, while it is imported for the first time, from advising PyTorch, which nothing here needs."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("PyTorch was not found")

    logger = logging.getLogger("transformers")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def read_json(
    path: str | Path,
    error: type[JaxidError] = CheckpointError,
    *,
    expected: type[dict] | type[list] | None = dict,
    missing: object = None,
) -> Any:
    """The value in a JSON file, with or without a byte-order mark.

    Args:
        path: the file.
        error: the kind of error to raise.
        expected: `dict` for a file that must hold an object, `list` for an array, None for any value.
        missing: what to return if the file does not exist; by default that is an error.

    Raises:
        JaxidError: of the given kind, if the file is missing, unreadable, not JSON, nested too deeply, holds NaN or
            infinity, or another kind of value.
    """
    path = Path(path)
    if missing is not None and not path.exists():
        return missing
    with reading(path, "a JSON file", error):
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse)
    if expected is not None and not isinstance(value, expected):
        names = {dict: "a JSON object", list: "a JSON array"}
        raise error(f"{path} holds {type(value).__name__} where {names[expected]} is expected.")
    return value


def digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256.

    Raises:
        DataError: if it cannot be read.
    """
    with reading(path, "a file", DataError):
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def redacted(text: str) -> str:
    """A text without the passwords of its URLs and without access tokens of Hugging Face."""
    return re.sub(r"\bhf_\w{8,}", "hf_...", re.sub(r"(?<=://)[^/\s]+@", "", text))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut and without its full stop, or its kind if it has none."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    lines = redacted(str(error)).strip().splitlines()
    return f"{lines[0].strip():.{_LONGEST}}".rstrip(".") if lines else type(error).__name__


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}, which JSON does not have")


def ensure_output_folder(path: str | Path) -> Path:
    """Makes a folder for results and checks that files can be written there.

    Args:
        path: the folder; its parents are made too.

    Returns:
        The folder.

    Raises:
        OutputError: if a file is in the way, or the folder cannot be made or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError(
            f"cannot write results to {folder}: {_reason(error)}; choose another output folder."
        ) from error
    return folder


@contextlib.contextmanager
def whole_file(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields a temporary name to write to, which is renamed to `path` only if nothing goes wrong.

    Args:
        path: the file to write or replace; its folder is made if need be.
        durable: wait until the file is on the disk, so that it survives a power cut; slow for thousands of files.

    Yields:
        A path in the same folder.

    Raises:
        OutputError: if the file cannot be written, for instance because the disk is full.
    """
    path = Path(path)
    if path.is_dir():
        raise OutputError(f"cannot write {path}: a folder is in the way; choose another name.")
    try:
        folder = ensure_output_folder(path.parent)
    except OutputError as error:
        raise OutputError(f"cannot write {path}: {error}") from error
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # safetensors writes files that only their owner may read
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if durable:
            _flush_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {_reason(error)}; free some space or choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a job's folder; the system frees the lock of a process that dies.

    Args:
        folder: an existing folder; the lock is its file `.lock`.

    Raises:
        InUseError: if another process holds the lock.
        OutputError: if the folder cannot be written to.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(
            f"cannot write {folder / '.lock'}: {_reason(error)}; choose another output folder."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InUseError(
                f"another process is working in {folder}; wait until it is done, or give another --out."
            ) from error
        except OSError:  # a network file system without locks
            pass
        yield


def refuse_other_settings(
    folder: Path, then: Mapping[str, object], now: Mapping[str, object], further: Sequence[str] = ()
) -> None:
    """Refuses to resume a run with other settings.

    Args:
        folder: of the run.
        then: the settings with which it began, as stored.
        now: the settings with which it would be resumed, as JSON types.
        further: descriptions of other differences.

    Raises:
        OutputError: naming each setting that differs, with both values.
    """
    found = differences(then, now, "was {}, is now {}")
    if found or further:
        raise OutputError(
            f"{folder} holds a run with other settings: {'; '.join([*found, *further])}. "
            f"Repeat those to resume it, give --restart to begin anew, or another --out."
        )


def differences(first: Mapping[str, object], second: Mapping[str, object], words: str) -> list[str]:
    """What differs between two mappings of JSON types, a text for each name; `words` is such as "was {}, is now {}"."""

    def shown(values: Mapping[str, object], name: str) -> str:
        return json.dumps(values[name], ensure_ascii=False) if name in values else "not set"

    return [
        f"{name.replace('_', ' ')} {words.format(shown(first, name), shown(second, name))}"
        for name in {**first, **second}
        if (name in first) != (name in second) or first.get(name) != second.get(name)
    ]


def remove_temporary(folder: Path) -> None:
    """Removes what `whole_file` left in a folder when its process was killed; to be called under the folder's lock.

    Args:
        folder: the folder; those inside it are left alone.
    """
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def as_table(columns: Mapping[str, np.ndarray | Sequence[Any]], name: str | Path) -> "pyarrow.Table":
    """Makes a table of columns.

    Args:
        columns: column name -> one value per row, all of one length; bfloat16 becomes float32.
        name: the table's name in error messages.

    Raises:
        InputError: if the columns' lengths differ, or a column is not one-dimensional.
    """
    import pyarrow

    arrays = {column: _column(column, values) for column, values in columns.items()}
    lengths = {column: len(array) for column, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the columns for {name} have different lengths: {lengths}.")
    return pyarrow.table(arrays)


def write_table(
    path: str | Path,
    columns: "Mapping[str, np.ndarray | Sequence[Any]] | pyarrow.Table",
    *,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes one tidy table as a Parquet file.

    Args:
        path: the file; an existing one is replaced.
        columns: a table, or its columns as `as_table` takes them, at least one.
        metadata: name -> text, kept in the file's schema.

    Returns:
        The path.

    Raises:
        InputError: if there are no columns, their lengths differ, or one is not one-dimensional.
        OutputError: if the file cannot be written.
    """
    from pyarrow import parquet

    if isinstance(columns, Mapping):
        if not columns:
            raise InputError(f"the table for {path} has no columns.")
        table = as_table(columns, path)
    else:
        table = columns
    if metadata is not None:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    with whole_file(path, durable=True) as temporary:
        parquet.write_table(table, temporary, write_page_checksum=True)
    return Path(path)


def read_table(path: str | Path) -> "pyarrow.Table":
    """Reads a table, or all parts (`*.parquet`) of a folder as one table, in the order of their names.

    Args:
        path: a Parquet file or a folder of them. A column that some parts lack is null there.

    Returns:
        The table.

    Raises:
        DataError: if nothing is there, a file is not Parquet, or two parts disagree on a column's type.
    """
    import pyarrow
    from pyarrow import parquet

    path = Path(path)
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .parquet file; was the experiment run with this output folder?")
    tables: list[pyarrow.Table] = []
    for file in files:
        try:
            with parquet.ParquetFile(file, page_checksum_verification=True) as part:
                tables.append(part.read())
        except FileNotFoundError as error:
            raise DataError(f"{file} does not exist.") from error
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file} is not a readable Parquet file: {_reason(error)}.") from error
    try:
        return pyarrow.concat_tables(tables, promote_options="default")
    except pyarrow.ArrowException as error:
        raise DataError(f"the parts in {path} do not fit together: {_reason(error)}.") from error


def write_text(path: str | Path, text: str) -> Path:
    """Writes a text file in UTF-8.

    An existing file is replaced.

    Raises:
        OutputError: if the file cannot be written.
    """
    with whole_file(path, durable=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: object) -> Path:
    """Writes a value as JSON, indented by two spaces.

    Args:
        path: the file; an existing one is replaced.
        value: mappings, sequences, dataclasses, strings, numbers, paths and arrays, nested at will. NaN and
            infinities, which JSON does not have, become null.

    Returns:
        The path.

    Raises:
        InputError: if part of the value has no JSON form.
        OutputError: if the file cannot be written.
    """
    return write_text(path, to_json(value) + "\n")


def to_json(value: object) -> str:
    """The text that `write_json` writes, without the final newline.

    Raises:
        InputError: if part of the value has no JSON form.
    """
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def tidy(values: Any, axes: Mapping[str, Sequence[Any]], name: str = "value") -> dict[str, np.ndarray]:
    """Unrolls an array with named axes into columns of one row per entry.

    A worked example: `tidy([[1, 2], [3, 4]], {"layer": [6, 7], "word": ["left", "right"]})` gives::

        layer 6     6      7     7
        word  left  right  left  right
        value 1     2      3     4

    Args:
        values: array of any number of dimensions, NumPy or JAX.
        axes: axis name -> labels along that axis, in the order of the dimensions.
        name: of the column that holds the values.

    Returns:
        Column name -> one-dimensional array; the last axis runs fastest.

    Raises:
        InputError: if axes and dimensions do not match, or two columns would have one name.
    """
    array = np.asarray(values)
    if name in axes:
        raise InputError(f"{name!r} names both an axis and the values.")
    labels = {axis: _column(axis, marks) for axis, marks in axes.items()}
    expected = {axis: len(marks) for axis, marks in labels.items()}
    if array.shape != tuple(expected.values()):
        raise InputError(f"values of shape {array.shape} do not fit the axes {expected}.")
    grids = np.indices(array.shape)
    columns = {axis: marks[grid.ravel()] for (axis, marks), grid in zip(labels.items(), grids, strict=True)}
    return {**columns, name: array.ravel()}


def joined(parts: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Concatenates tables with the same columns."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _flush_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _column(name: str, values: Any) -> np.ndarray:
    """A one-dimensional array that Parquet can hold."""
    array = np.asarray(values)
    if array.ndim != 1:
        raise InputError(f"column {name!r} must be a flat list of plain entries, not of shape {array.shape}.")
    # NumPy sees the extended float types of JAX (bfloat16 and smaller) as opaque bytes.
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _plain(value: Any) -> Any:
    """The value in the types that JSON has."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(type(value)):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    raise InputError(f"{value!r} of type {type(value).__name__} has no JSON form.")
