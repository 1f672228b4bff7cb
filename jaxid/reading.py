"""Reading what others wrote: the one place that turns a foreign library's complaint about a file into an error."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxid.errors import CheckpointError, JaxidError

_RUST_PANIC = "PanicException"
"""What extensions in Rust (tokenizers, safetensors) raise when they fail; not an `Exception`."""

_LONGEST = 400
"""Characters of a foreign library's message that are shown; some list all that they know."""


@contextlib.contextmanager
def reading(path: str | Path, what: str, error: type[JaxidError] = CheckpointError) -> Iterator[None]:
    """Turns whatever is raised inside into a one-line error that names the file.

    Only the foreign call and the access to what it returned belong inside, so that a fault of our own is not mistaken
    for a fault of the file.

    Args:
        path: the file or folder that is being read.
        what: what it should be, with its article, such as "a tokenizer".
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
    """Turns whatever a foreign library raises inside into a one-line error.

    Args:
        message: what could not be done; the library's own words follow.
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
    missing: Any = None,
) -> Any:
    """The value in a JSON file, with or without a byte-order mark.

    Args:
        path: the file.
        error: the kind of error to raise.
        expected: `dict` for a file that must hold an object, `list` for an array, None for any value.
        missing: what to return if there is no such file; by default that is an error.

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


def redacted(text: str) -> str:
    """A text without the passwords of its URLs and without access tokens of Hugging Face."""
    return re.sub(r"\bhf_\w{8,}", "hf_...", re.sub(r"(?<=://)[^/\s]+@", "", text))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut and without its full stop, or its kind if it has none."""
    if isinstance(error, KeyError):
        return f"it has no {error}"
    lines = redacted(str(error)).strip().splitlines()
    return f"{lines[0].strip():.{_LONGEST}}".rstrip(".") if lines else type(error).__name__


def _refuse(constant: str) -> Any:
    raise ValueError(f"it holds {constant}, which JSON does not have")
