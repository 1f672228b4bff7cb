"""Options in files, as `--config` reads them and every run writes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cyclopts import App, CycloptsError
from cyclopts.config import Dict, Json, Toml, Yaml

from jaxid.errors import InputError
from jaxid.io import reading

CONFIGS = {".yaml": Yaml, ".yml": Yaml, ".toml": Toml, ".json": Json}

Made = TypeVar("Made")


def check_options_file(path: Path) -> None:
    """Checks that a file may hold options.

    Raises:
        InputError: if it does not exist, or its name does not say in which format it is.
    """
    if path.suffix not in CONFIGS:
        raise InputError(f"{path} cannot hold options: its name must end in {', '.join(CONFIGS)}.")
    if not path.is_file():
        raise InputError(f"--config {path}: the file does not exist.")


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file, by name.

    Raises:
        InputError: if it cannot be read.
    """
    with reading(path, "a file of options", InputError):
        return CONFIGS[path.suffix](path, must_exist=True).config


def made_from(kind: Callable[..., Made], path: Path) -> Made:
    """A command with the options in a file.

    Args:
        kind: its dataclass of options.
        path: the file.

    Raises:
        InputError: if the file does not hold its options.
    """
    check_options_file(path)
    app = App(config=Dict({"run": read_options(path)}, source=str(path)))
    app.command(kind, name="run")
    try:
        command, given, _ = app.parse_args(["run"], exit_on_error=False, print_error=False, help_on_error=False)
    except CycloptsError as error:
        raise InputError(f"{path} does not hold its options: {' '.join(str(error).split())}") from error
    return command(*given.args, **given.kwargs)
