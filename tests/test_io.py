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
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from jaxid import io
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
    columns = io.tidy([[1, 2], [3, 4]], {"layer": [6, 7], "word": ["left", "right"]})
    assert {name: values.tolist() for name, values in columns.items()} == {
        "layer": [6, 6, 7, 7],
        "word": ["left", "right", "left", "right"],
        "value": [1, 2, 3, 4],
    }


@given(st.lists(st.integers(0, 4), min_size=0, max_size=4))
def test_tidy_rows_say_where_each_value_stood(shape: list[int]) -> None:
    values = np.random.default_rng(0).normal(size=shape)
    axes = {f"axis{number}": range(10, 10 + size) for number, size in enumerate(shape)}
    columns = io.tidy(values, axes)
    assert {len(column) for column in columns.values()} == {values.size}
    for row in range(values.size):
        place = tuple(int(columns[axis][row]) - 10 for axis in axes)
        assert columns["value"][row] == values[place]


@pytest.mark.parametrize(
    "axes", [{}, {"layer": [0]}, {"layer": [0, 1, 2]}, {"value": [0, 1]}, {"layer": [(0, 1), (2, 3)]}]
)
def test_tidy_refuses_axes_that_do_not_fit(axes: dict) -> None:
    with pytest.raises(InputError, match=r"axes|axis|flat list"):
        io.tidy(np.zeros(2), axes)


def test_table_comes_back_as_written(tmp_path: Path) -> None:
    columns = {
        "layer": np.arange(3),
        "word": ["left", "right", "left"],
        "wide": jnp.asarray([0.1, 0.2, 0.3], jnp.float32),
        "brain": jnp.asarray([0.5, 1.5, 2.5], jnp.bfloat16),
    }
    assert io.write_table(tmp_path / "new" / "part.parquet", columns) == tmp_path / "new" / "part.parquet"
    table = io.read_table(tmp_path / "new" / "part.parquet")
    assert table.to_pydict() == {
        "layer": [0, 1, 2],
        "word": ["left", "right", "left"],
        "wide": [np.float32(0.1), np.float32(0.2), np.float32(0.3)],
        "brain": [0.5, 1.5, 2.5],
    }
    assert table.schema.field("brain").type == pyarrow.float32()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["part.parquet"]


def test_table_with_metadata_comes_back_as_written(tmp_path: Path) -> None:
    table = io.as_table({"layer": [0, 1]}, "layers").replace_schema_metadata({"unit": "blocks"})
    io.write_table(tmp_path / "a.parquet", table, metadata={"word": "größer"})
    stored = io.read_table(tmp_path / "a.parquet")
    assert stored.equals(table)
    assert stored.schema.metadata == {b"unit": b"blocks", b"word": "größer".encode()}


def test_folder_of_parts_is_one_table(tmp_path: Path) -> None:
    io.write_table(tmp_path / "b.parquet", {"layer": [2], "value": [0.5]})
    io.write_table(tmp_path / "a.parquet", {"layer": [0, 1]})
    (tmp_path / "notes.txt").write_text("not a part")
    assert io.read_table(tmp_path).to_pydict() == {"layer": [0, 1, 2], "value": [None, None, 0.5]}


def test_unreadable_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.parquet file"):
        io.read_table(tmp_path)
    with pytest.raises(DataError, match=r"gone\.parquet does not exist"):
        io.read_table(tmp_path / "gone.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"broken\.parquet is not a readable Parquet file"):
        io.read_table(tmp_path)


def test_parts_of_different_types_do_not_fit(tmp_path: Path) -> None:
    io.write_table(tmp_path / "a.parquet", {"layer": [0]})
    io.write_table(tmp_path / "b.parquet", {"layer": ["zero"]})
    with pytest.raises(DataError, match="do not fit together"):
        io.read_table(tmp_path)


def test_table_refuses_ragged_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'layer': 2, 'value': 1"):
        io.write_table(tmp_path / "a.parquet", {"layer": [0, 1], "value": [0.5]})
    with pytest.raises(InputError, match="no columns"):
        io.write_table(tmp_path / "a.parquet", {})
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
    io.write_json(tmp_path / "summary.json", value)
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
        io.write_json(tmp_path / "summary.json", {"roots": [1j]})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    io.write_text(path, "old")
    for write in (
        lambda: io.write_table(path, {"value": np.random.default_rng(0).normal(size=1000)}),
        lambda: io.write_json(path, list(range(1000))),
    ):
        with pytest.raises(OutputError, match=r"cannot write .*table\.parquet: .*; free some") as raised, full_disk():
            write()
        assert "\n" not in str(raised.value)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), io.whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    """Also those of safetensors, which only their owner could read otherwise."""
    with io.whole_file(tmp_path / "a.safetensors") as temporary:
        save_file({"x": np.zeros(3, np.float32)}, temporary)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_output_folder_is_made_or_refused_in_one_line(tmp_path: Path) -> None:
    assert io.ensure_output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/jaxid")):
        with pytest.raises(OutputError, match=f"cannot write results to {path}: .+; choose another") as raised:
            io.ensure_output_folder(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(OutputError, match="a folder is in the way"):
        io.write_text(tmp_path / "a", "text")
