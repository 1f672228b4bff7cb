"""Tables, summaries and intervals, and what happens when they cannot be written."""

import contextlib
import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxid import results
from jaxid.errors import DataError, InputError, OutputError


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Writes of more than 512 bytes fail, as on a full disk; theirs alone, or pytest's own output would fail too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_tidy_worked_example() -> None:
    columns = results.tidy([[1, 2], [3, 4]], {"layer": [6, 7], "word": ["left", "right"]})
    assert {name: values.tolist() for name, values in columns.items()} == {
        "layer": [6, 6, 7, 7],
        "word": ["left", "right", "left", "right"],
        "value": [1, 2, 3, 4],
    }


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4))
def test_tidy_rows_say_where_each_value_stood(shape: list[int]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    axes = {f"axis{number}": range(10, 10 + size) for number, size in enumerate(shape)}
    columns = results.tidy(values, axes)
    assert {len(column) for column in columns.values()} == {values.size}
    for row in range(values.size):
        place = tuple(int(columns[axis][row]) - 10 for axis in axes)
        assert columns["value"][row] == values[place]


@pytest.mark.parametrize(
    "axes", [{}, {"layer": [0]}, {"layer": [0, 1, 2]}, {"value": [0, 1]}, {"layer": [(0, 1), (2, 3)]}]
)
def test_tidy_refuses_axes_that_do_not_fit(axes: dict) -> None:
    with pytest.raises(InputError, match=r"axes|axis|flat list"):
        results.tidy(np.zeros(2), axes)


def test_table_comes_back_as_written(tmp_path: Path) -> None:
    columns = {
        "layer": np.arange(3),
        "word": ["left", "right", "left"],
        "wide": jnp.asarray([0.1, 0.2, 0.3], jnp.float32),
        "brain": jnp.asarray([0.5, 1.5, 2.5], jnp.bfloat16),
    }
    assert results.write_table(tmp_path / "new" / "part.parquet", columns) == tmp_path / "new" / "part.parquet"
    table = results.read_table(tmp_path / "new" / "part.parquet")
    assert table.to_pydict() == {
        "layer": [0, 1, 2],
        "word": ["left", "right", "left"],
        "wide": [np.float32(0.1), np.float32(0.2), np.float32(0.3)],
        "brain": [0.5, 1.5, 2.5],
    }
    assert table.schema.field("brain").type == pyarrow.float32()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["part.parquet"]


def test_table_with_metadata_comes_back_as_written(tmp_path: Path) -> None:
    table = results.as_table({"layer": [0, 1]}, "layers").replace_schema_metadata({"unit": "blocks"})
    results.write_table(tmp_path / "a.parquet", table, metadata={"word": "größer"})
    stored = results.read_table(tmp_path / "a.parquet")
    assert stored.equals(table)
    assert stored.schema.metadata == {b"unit": b"blocks", b"word": "größer".encode()}


def test_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    results.write_table(tmp_path / "b.parquet", {"layer": [2], "value": [0.5]})
    results.write_table(tmp_path / "a.parquet", {"layer": [0, 1]})
    (tmp_path / "notes.txt").write_text("not a part")
    assert results.read_table(tmp_path).to_pydict() == {"layer": [0, 1, 2], "value": [None, None, 0.5]}


def test_unreadable_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        results.read_table(tmp_path)
    with pytest.raises(DataError, match=r"there is no table at .*gone\.parquet"):
        results.read_table(tmp_path / "gone.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"broken\.parquet is not a readable Parquet file"):
        results.read_table(tmp_path)


def test_parts_of_different_types_do_not_fit(tmp_path: Path) -> None:
    results.write_table(tmp_path / "a.parquet", {"layer": [0]})
    results.write_table(tmp_path / "b.parquet", {"layer": ["zero"]})
    with pytest.raises(DataError, match="do not fit together"):
        results.read_table(tmp_path)


def test_table_refuses_ragged_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'layer': 2, 'value': 1"):
        results.write_table(tmp_path / "a.parquet", {"layer": [0, 1], "value": [0.5]})
    with pytest.raises(InputError, match="no columns"):
        results.write_table(tmp_path / "a.parquet", {})
    assert list(tmp_path.iterdir()) == []


@dataclasses.dataclass
class Share:
    value: float
    count: int


def test_json_takes_numpy_jax_and_dataclasses(tmp_path: Path) -> None:
    value = {
        "share": Share(0.5, 2),
        "numpy": [np.float32(0.25), np.int64(3), np.bool_(True), np.arange(2)],
        "jax": jnp.asarray([[1.5, jnp.nan]]),
        "text": "größer",
        3: (Path("a") / "b", None, float("inf")),
    }
    results.write_json(tmp_path / "summary.json", value)
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    assert json.loads(text) == {
        "share": {"value": 0.5, "count": 2},
        "numpy": [0.25, 3, True, [0, 1]],
        "jax": [[1.5, None]],
        "text": "größer",
        "3": [str(Path("a") / "b"), None, None],
    }
    assert "größer" in text and text.endswith("}\n")


def test_json_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of type complex has no JSON form"):
        results.write_json(tmp_path / "summary.json", {"roots": [1j]})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    results.write_text(path, "old")
    for write in (
        lambda: results.write_table(path, {"value": np.random.default_rng(0).normal(size=1000)}),
        lambda: results.write_json(path, list(range(1000))),
    ):
        with pytest.raises(OutputError, match=r"cannot write .*table\.parquet: .*; free some") as raised, full_disk():
            write()
        assert "\n" not in str(raised.value)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), results.whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_output_folder_is_made_or_refused_in_one_line(tmp_path: Path) -> None:
    assert results.ensure_output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/jaxid")):
        with pytest.raises(OutputError, match=f"cannot write results to {path}: .+; choose another") as raised:
            results.ensure_output_folder(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(OutputError, match="a folder is in the way"):
        results.write_text(tmp_path / "a", "text")


@settings(deadline=None)  # the first call imports SciPy
@given(st.integers(0, 40), st.integers(1, 40))
def test_confidence_interval_is_wilsons(successes: int, count: int) -> None:
    successes = min(successes, count)
    share, z = successes / count, 1.959963984540054
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    np.testing.assert_allclose(
        results.confidence_interval(successes, count),
        (max(middle - half, 0), min(middle + half, 1)),
        atol=1e-12,
    )


@pytest.mark.parametrize(("successes", "count"), [(-1, 3), (4, 3), (0, 0)])
def test_confidence_interval_refuses_impossible_counts(successes: int, count: int) -> None:
    with pytest.raises(InputError, match="no confidence interval"):
        results.confidence_interval(successes, count)


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    low, high = results.bootstrap_interval(values.reshape(20, 20), seed=1)
    half = 1.96 * values.std() / 20  # the normal approximation, close at 400 values
    np.testing.assert_allclose((low, high), (values.mean() - half, values.mean() + half), atol=0.02)
    assert results.bootstrap_interval(values, seed=1) == (low, high)
    assert results.bootstrap_interval(values, seed=2) != (low, high)
    assert results.bootstrap_interval([2.0, 2.0, 2.0], seed=0) == (2.0, 2.0)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan"), 2.0]])
def test_bootstrap_refuses_what_has_no_interval(values: list[float]) -> None:
    with pytest.raises(InputError, match="two or more values, all finite"):
        results.bootstrap_interval(values, seed=0)
