"""The files of `benchmarks/`, imported from their own folder, as the scripts import each other."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

Modules = Callable[[str], ModuleType]
"""Imports a file of the benchmarks by its name."""


@contextlib.contextmanager
def importable() -> Iterator[Modules]:
    """Gives the function that imports them; no longer than needed, as some have the names of folders of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module
