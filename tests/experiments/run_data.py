"""What the tests of runs share: a drawn data set, IDs of the tiny model, options, and the table of a run."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import fixtures
import numpy as np
import oracle
import pytest

from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.io import read_table

CASE = oracle.CASE
ITEMS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set in COCO's layout, and IDs of the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(1), ITEMS, num_objects=(2, 2)), 48)
    ids().save(folder / "ids.safetensors")
    return folder


@functools.cache
def ids() -> Any:
    return dataclasses.replace(oracle.ids(), fingerprint=fixtures.model(CASE).fingerprint)


def experiment(kind: type[Any], place: Path, out: str | Path, **changed: Any) -> Any:
    """An experiment (with the IDs, if it works with any) on the data set; further options as given."""
    given = {
        "model": str(fixtures.folder(CASE)),
        "data": place / "data",
        "ids": place / "ids.safetensors",
        "out": place / out,
        "batch_size": 4,
        "prompt": "{query}",
        "progress": False,
    }
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in given.items() if name in names} | changed)


def columns(out: Path) -> dict[str, np.ndarray]:
    """The table of a run."""
    table = read_table(out / "table.parquet")
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
