"""Three-object data: what is in between, and the folder's way to disk and back."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxid.data.relations import is_between
from jaxid.data.scenes import sample_free
from jaxid.data.three_objects import FILE, read_three_objects, write_three_objects
from jaxid.errors import DataError, InputError


@pytest.mark.parametrize(
    ("c", "answer"),
    [
        ((0.5, 0.5), True),
        ((0.5, 0.58), True),
        ((0.5, 0.95), False),
        ((1.0, 0.5), False),
        ((0.5, 0.7), None),
        ((0.85, 0.5), None),
    ],
)
def test_between(c: tuple[float, float], answer: bool | None) -> None:
    assert is_between(np.array([(0.1, 0.5), (0.9, 0.5), c])) is answer
    assert is_between(np.array([(0.9, 0.5), (0.1, 0.5), c])) is answer


def test_objects_that_touch_have_nothing_in_between() -> None:
    assert is_between(np.array([(0.4, 0.5), (0.6, 0.5), (0.5, 0.5)])) is None


def test_written_folder_reads_back(tmp_path: Path) -> None:
    scenes = sample_free(np.random.default_rng(0), 30, num_objects=(3, 3))
    written = write_three_objects(tmp_path, scenes, 32)
    assert read_three_objects(tmp_path) == written
    answers = [item.between for item in written]
    assert any(answers) and not all(answers)
    assert len({item.key for item in written}) == len(written)


def test_two_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="3 different objects"):
        write_three_objects(tmp_path, sample_free(np.random.default_rng(0), 2, num_objects=(2, 2)), 32)


@pytest.mark.parametrize(
    "row", [[1, "a", "b", "c"], [1, "a", "b", "a", "yes"], [1, "a", "b", "c", "maybe"], "x", [999, "a", "b", "c", "no"]]
)
def test_bad_rows_are_named_or_noted(tmp_path: Path, row: Any) -> None:
    good = write_three_objects(tmp_path, sample_free(np.random.default_rng(0), 10, num_objects=(3, 3)), 32)
    path = tmp_path / FILE
    path.write_text(json.dumps([row, *json.loads(path.read_text())]))
    with pytest.raises(DataError, match="row 0"):
        read_three_objects(tmp_path)
    bad: list[tuple[str, DataError]] = []
    assert [item.key[6:] for item in read_three_objects(tmp_path, bad=bad)] == [item.key[6:] for item in good]
    assert [key for key, _ in bad] == ["row 0"]
