"""Long jobs: going on after a stop, settings that differ, items that are bad, folders that are damaged or in use."""

import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from jaxid import io as results
from jaxid import jobs
from jaxid.errors import CheckpointError, DataError, InputError, JaxidError, OutputError, PromptError

SETTINGS = {"experiment": "squares", "model_fingerprint": "1f2e", "layers": [0, 1], "factor": 5.0}


def squares(items: list[int]) -> dict[str, Any]:
    return {"item": items, "square": [item**2 for item in items]}


class Compute:
    """Squares of the items, and a record of what was asked for; some items raise an error."""

    def __init__(self, bad: dict[int, BaseException] | None = None) -> None:
        self.bad = bad or {}
        self.calls: list[list[int]] = []

    def __call__(self, items: list[int]) -> dict[str, Any]:
        self.calls.append(items)
        for item in items:
            if item in self.bad:
                raise self.bad[item]
        return squares(items)


def start(out: Path, compute: Callable[[list[int]], Any] = squares, **options: Any) -> jobs.Finished:
    given = {"settings": SETTINGS, "items": range(7), "key": str, "chunk_size": 3, "progress": False}
    return jobs.run(out, compute=compute, **{**given, **options})


def parts(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "parts").iterdir())


def test_rows_come_in_the_order_of_the_items(tmp_path: Path) -> None:
    compute = Compute()
    finished = start(tmp_path / "new" / "job", compute, items=[6, 0, 5, 2, 4, 1, 3])
    assert compute.calls == [[6, 0, 5], [2, 4, 1], [3]]
    assert finished.table.to_pydict() == squares([6, 0, 5, 2, 4, 1, 3])
    assert (finished.skipped, finished.resumed, finished.settings) == ((), 0, SETTINGS)
    assert parts(tmp_path / "new" / "job") == ["00000.parquet", "00001.parquet", "00002.parquet"]
    stored = json.loads((tmp_path / "new" / "job" / "settings.json").read_text())
    assert (stored["settings"], stored["chunk_size"], stored["items"]["count"]) == (SETTINGS, 3, 7)


def test_columns_keep_their_types_and_items_may_have_many_rows_or_none(tmp_path: Path) -> None:
    def compute(items: list[int]) -> dict[str, Any]:
        rows = np.repeat(items, items)
        return {
            "count": rows,
            "narrow": rows.astype(np.int16),
            "word": [f"größe {row}" for row in rows],
            "score": jnp.asarray(rows, jnp.float32) / 4,
            "brain": jnp.asarray(rows, jnp.bfloat16),
            "even": rows % 2 == 0,
            "note": [None if row < 4 else "big" for row in rows],
        }

    table = start(tmp_path, compute, items=[0, 1, 2, 4], chunk_size=1).table
    assert table["count"].to_pylist() == [1, 2, 2, 4, 4, 4, 4]
    assert table["word"].to_pylist()[:2] == ["größe 1", "größe 2"]
    assert table["score"].to_pylist()[:2] == [0.25, 0.5]
    assert table["note"].to_pylist() == [None] * 3 + ["big"] * 4
    assert {field.name: str(field.type) for field in table.schema} == {
        "count": "int64",
        "narrow": "int16",
        "word": "string",
        "score": "float",
        "brain": "float",
        "even": "bool",
        "note": "string",
    }


def test_resume_computes_only_what_is_missing(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole").table
    out = tmp_path / "broken"
    with pytest.raises(RuntimeError, match="out of memory"):
        start(out, Compute({4: RuntimeError("out of memory")}))
    assert parts(out) == ["00000.parquet"]

    compute = Compute()
    finished = start(out, compute, chunk_size=100)
    assert compute.calls == [[3, 4, 5], [6]]
    assert finished.resumed == 3
    assert finished.table.equals(whole, check_metadata=True)

    (out / "parts" / "00001.parquet").unlink()
    compute = Compute()
    finished = start(out, compute)
    assert compute.calls == [[3, 4, 5]]
    assert finished.resumed == 4
    assert finished.table.equals(whole, check_metadata=True)

    assert start(out, Compute({0: RuntimeError("asked again")})).table.equals(whole)


def test_interrupt_keeps_what_is_finished(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, Compute({5: KeyboardInterrupt()}), skip_bad=True)
    assert parts(tmp_path) == ["00000.parquet"]
    assert start(tmp_path).resumed == 3


def test_restart_discards_what_the_folder_holds(tmp_path: Path) -> None:
    first = start(tmp_path, settings={**SETTINGS, "seed": 1})
    jobs.write_merged(tmp_path, first)
    (tmp_path / "notes.txt").write_text("mine")
    compute = Compute()
    again = start(tmp_path, compute, restart=True, items=range(4))
    assert compute.calls == [[0, 1, 2], [3]] and (again.resumed, again.settings) == (0, SETTINGS)
    assert parts(tmp_path) == ["00000.parquet", "00001.parquet"]
    assert not (tmp_path / "table.parquet").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert start(tmp_path, items=range(4)).resumed == 4
    (tmp_path / "settings.json").write_text("{")
    assert start(tmp_path, restart=True).resumed == 0


def test_a_restart_that_is_killed_leaves_parts_that_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = start(tmp_path)
    unlink = Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        if path.name == "00001.parquet":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, restart=True)
    monkeypatch.undo()
    assert start(tmp_path).table.equals(whole.table)


def test_each_setting_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    start(tmp_path, settings={**SETTINGS, "limit": None, "data": Path("coco")})
    settings = {"seed": 1, "experiment": "squares", "model_fingerprint": "9a", "layers": (0, 2), "factor": 5}
    with pytest.raises(OutputError) as raised:
        start(tmp_path, settings=settings, items=range(6))
    assert str(raised.value) == (
        f"{tmp_path} holds a run with other settings: "
        'model fingerprint was "1f2e", is now "9a"; layers was [0, 1], is now [0, 2]; limit was null, is now not set; '
        'data was "coco", is now not set; seed was not set, is now 1; items were 7, are now 6. '
        "Repeat those to resume it, give --restart to begin anew, or another --out."
    )
    same = {"limit": None, "data": "coco", **SETTINGS, "layers": np.arange(2)}
    assert start(tmp_path, settings=same).resumed == 7
    with pytest.raises(OutputError, match=r"factor was 5\.0, is now 6"):
        start(tmp_path, settings={**same, "factor": 6})


@pytest.mark.parametrize("items", [[0, 1, 2, 3, 4, 6, 5], [0, 1, 2, 3, 4, 5, 7]])
def test_other_items_or_another_order_are_refused(tmp_path: Path, items: list[int]) -> None:
    start(tmp_path)
    with pytest.raises(OutputError, match="items are 7 as before, but other ones or in another order"):
        start(tmp_path, items=items)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"chunk_size": 3', '"chunk_size": "three"'),
        lambda text: text.replace('"chunk_size": 3', '"chunk_size": 0'),
        lambda text: text.replace('"chunk_size": 3', '"chunk_size": 3.5'),
        lambda text: text.replace('"digest"', '"dig"'),
        lambda text: text.replace('"settings"', '"setting"'),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, damage: Callable[[str], str]) -> None:
    start(tmp_path)
    path = tmp_path / "settings.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(OutputError, match=r"settings\.json .*damaged; give --restart to begin anew, or another --out"):
        start(tmp_path)


def test_parts_without_settings_are_refused(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(
        OutputError, match=r"holds parts of a run whose settings\.json is gone; give --restart to begin"
    ):
        start(tmp_path)
    assert not (tmp_path / "settings.json").exists()


def flip_a_byte_of_data(path: Path) -> None:
    """Changes a number in the first column's dictionary, which is only noticed by its checksum."""
    with parquet.ParquetFile(path) as file:
        end_of_dictionary = file.metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[end_of_dictionary - 1] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        flip_a_byte_of_data,
        lambda path: results.write_table(path, squares([3, 4, 5])),
        lambda path: path.write_bytes(path.with_name("00000.parquet").read_bytes()),
        lambda path: results.write_table(path, squares([3]), metadata={"jaxid": '{"items": ["3", "4", "5"]}'}),
        lambda path: results.write_table(path, squares([3]), metadata={"jaxid": "{"}),
    ],
)
def test_a_damaged_part_is_named_before_anything_is_computed(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    whole = start(tmp_path).table
    path = tmp_path / "parts" / "00001.parquet"
    damage(path)
    (tmp_path / "parts" / "00000.parquet").unlink()
    compute = Compute()
    with pytest.raises(OutputError, match=f"{path} is damaged.*; delete it, and its items are comp"):
        start(tmp_path, compute)
    assert compute.calls == []
    path.unlink()
    assert start(tmp_path).table.equals(whole)


def test_only_temporary_files_of_a_killed_job_are_removed(tmp_path: Path) -> None:
    start(tmp_path)
    stale = [
        tmp_path / ".settings.json.123.tmp",
        tmp_path / "parts" / ".00001.parquet.123.tmp",
        tmp_path / "parts" / ".00099.parquet.4.tmp",
    ]
    stale += [tmp_path / f".{name}.77.tmp" for name in ("table.parquet", "summary.json", "figure.png")]
    mine = [tmp_path / ".notes.tmp", tmp_path / "parts" / "notes.tmp", tmp_path / "summary.json.5.tmp"]
    mine += [tmp_path / ".x.tmp", tmp_path / ".notes.2.tmp~", tmp_path / ".notes.2b.tmp"]
    for path in (*stale, *mine):
        path.write_text("half")
    start(tmp_path)
    assert [path.exists() for path in (*stale, *mine)] == [False] * 6 + [True] * 6


def test_a_part_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, flush = Path.replace, os.fsync

    def record_rename(path: Path, target: Path) -> Path:
        events.append(f"name {target.name}")
        return rename(path, target)

    def record_flush(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        events.append(f"flush {name.replace(str(os.getpid()), 'process')}")
        flush(descriptor)

    monkeypatch.setattr(Path, "replace", record_rename)
    monkeypatch.setattr(os, "fsync", record_flush)
    start(tmp_path / "job", items=[0])
    assert events == [
        "flush .settings.json.process.tmp",
        "name settings.json",
        "flush job",
        "flush .00000.parquet.process.tmp",
        "name 00000.parquet",
        "flush parts",
    ]


@pytest.mark.parametrize("kind", [InputError, PromptError, DataError])
def test_a_bad_item_is_named(tmp_path: Path, kind: type[JaxidError]) -> None:
    compute = Compute({4: kind("no word\n'star' in the prompt."), 5: kind("another.")})
    with pytest.raises(JaxidError) as raised:
        start(tmp_path, compute)
    assert type(raised.value) is kind
    assert str(raised.value) == "item '4': no word 'star' in the prompt; --skip-bad skips such items."
    assert compute.calls == [[0, 1, 2], [3, 4, 5], [3], [4]]
    assert parts(tmp_path) == ["00000.parquet"]


def test_a_bad_item_alone_in_its_chunk_is_computed_once(tmp_path: Path) -> None:
    compute = Compute({6: InputError("bad.")})
    with pytest.raises(InputError, match="item '6': bad; --skip-bad"):
        start(tmp_path, compute)
    assert compute.calls[2:] == [[6]]


@pytest.mark.parametrize("error", [CheckpointError("no weights."), OutputError("full."), ZeroDivisionError("0")])
def test_errors_that_are_no_items_fault_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    compute = Compute({4: error})
    with pytest.raises(type(error)) as raised:
        start(tmp_path, compute, skip_bad=True)
    assert raised.value is error
    assert compute.calls == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("skip_bad", [False, True])
def test_items_that_fail_only_together_raise_the_first_error(tmp_path: Path, skip_bad: bool) -> None:
    error = InputError("two sizes of picture.")

    def compute(items: list[int]) -> dict[str, Any]:
        if len(items) > 1:
            raise error
        return squares(items)

    with pytest.raises(InputError) as raised:
        start(tmp_path, compute, skip_bad=skip_bad)
    assert raised.value is error
    assert parts(tmp_path) == []


def test_skipped_items_are_recorded_and_the_others_computed_together(tmp_path: Path) -> None:
    bad: dict[int, BaseException] = {1: PromptError("no\nword."), 3: InputError("blank."), 5: DataError("torn.")}
    compute = Compute(bad)
    finished = start(tmp_path, compute, skip_bad=True)
    assert compute.calls == [[0, 1, 2], [0], [1], [2], [0, 2], [3, 4, 5], [3], [4], [5], [4], [6]]
    skipped = (
        jobs.Skipped(key="1", reason="no word"),
        jobs.Skipped(key="3", reason="blank"),
        jobs.Skipped(key="5", reason="torn"),
    )
    assert finished.skipped == skipped
    assert finished.table.to_pydict() == squares([0, 2, 4, 6])

    (tmp_path / "parts" / "00000.parquet").unlink()
    again = start(tmp_path)
    assert again.resumed == 4
    assert again.skipped == skipped[1:]
    assert again.table.to_pydict() == squares([0, 1, 2, 4, 6])


def test_a_failed_job_goes_on_with_skip_bad(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        start(tmp_path, Compute({4: InputError("bad.")}))
    finished = start(tmp_path, Compute({4: InputError("bad.")}), skip_bad=True)
    assert finished.resumed == 3
    assert finished.table.to_pydict() == squares([0, 1, 2, 3, 5, 6])


@pytest.mark.parametrize("empty", [{0, 1, 2}, {3, 4, 5}, {6}])
@pytest.mark.parametrize("how", ["bad", "no rows", "no columns"])
def test_parts_without_rows_fit_all_others(tmp_path: Path, empty: set[int], how: str) -> None:
    def compute(items: list[int]) -> dict[str, Any]:
        if how == "bad" and not empty.isdisjoint(items):
            raise InputError("bad.")
        if how == "no columns" and not empty.isdisjoint(items):
            return {}
        rows = [item for item in items if item not in empty]
        return {"item": rows, "word": [str(row) for row in rows]}

    finished = start(tmp_path, compute, skip_bad=True)
    rows = sorted(set(range(7)) - empty)
    assert finished.table.to_pydict() == {"item": rows, "word": [str(row) for row in rows]}
    assert finished.table.schema == pyarrow.schema({"item": pyarrow.int64(), "word": pyarrow.string()})
    assert len(finished.skipped) == (len(empty) if how == "bad" else 0)
    assert start(tmp_path, compute).table.equals(finished.table)


def test_a_job_whose_items_are_all_bad_has_no_rows(tmp_path: Path) -> None:
    compute = Compute({item: InputError("bad.") for item in range(7)})
    finished = start(tmp_path, compute, skip_bad=True)
    assert (finished.table.num_rows, len(finished.skipped)) == (0, 7)
    jobs.write_merged(tmp_path, finished)
    assert results.read_table(tmp_path / "table.parquet").num_rows == 0
    assert start(tmp_path).resumed == 7


def test_chunks_may_widen_types_and_lack_columns(tmp_path: Path) -> None:
    answers = [{"value": [1]}, {"value": [0.5], "late": ["x"]}, {"value": np.array([2.0], np.float32)}]
    finished = start(tmp_path, lambda items: answers[items[0]], items=range(3), chunk_size=1)
    assert finished.table.to_pydict() == {"value": [1.0, 0.5, 2.0], "late": [None, "x", None]}
    assert finished.table.schema.field("value").type == pyarrow.float64()


def test_columns_that_do_not_fit_stop_the_job_at_once(tmp_path: Path) -> None:
    def compute(items: list[int]) -> dict[str, Any]:
        return {"value": items if items[0] == 0 else ["word"] * len(items)}

    with pytest.raises(InputError, match=r"columns of items '3' to '5' do not fit .*value") as raised:
        start(tmp_path, compute)
    assert "\n" not in str(raised.value) and parts(tmp_path) == ["00000.parquet"]
    with pytest.raises(InputError, match=r"00001\.parquet have different lengths"):
        start(tmp_path, lambda items: {"value": items, "other": [0]}, skip_bad=True)


def test_a_folder_in_use_is_refused_until_its_job_ends(tmp_path: Path) -> None:
    refusals: list[str] = []

    def compute(items: list[int]) -> dict[str, Any]:
        with pytest.raises(OutputError) as raised:
            start(tmp_path)
        refusals.append(str(raised.value))
        return squares(items)

    finished = start(tmp_path, compute)
    expected = f"another process is working in {tmp_path}; wait until it is done, or give another --out."
    assert refusals == [expected] * 3
    assert start(tmp_path).table.equals(finished.table)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_begins_where_it_resumes_and_ends_before_the_error(tmp_path: Path, monkeypatch: Any) -> None:
    def shown(terminal: io.StringIO, **options: Any) -> str:
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(InputError):
            start(tmp_path, Compute({5: InputError("bad.")}), progress=True, **options)
        return terminal.getvalue()

    first = shown(Terminal(), unit="picture")
    assert "| 0/7 [" in first and "| 3/7 [" in first and "picture" in first
    assert first.endswith("\n")
    second = shown(Terminal())
    assert "| 0/7 [" not in second and "| 3/7 [" in second
    assert shown(io.StringIO()) == ""
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert start(tmp_path, progress=True).resumed == 3
    assert "| 7/7 [" in sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    start(tmp_path / "quiet", progress=False)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("items", "chunk_size", "message"),
    [
        ([], 3, "there are no items to work on"),
        (["a", "b", "a"], 3, "two items have the key 'a'"),
        (["a"], 0, "at least one item, not 0"),
    ],
)
def test_impossible_jobs_leave_no_folder(tmp_path: Path, items: Sequence[str], chunk_size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(tmp_path / "out", items=items, chunk_size=chunk_size)
    assert not (tmp_path / "out").exists()


def test_an_unusable_folder_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write results to"):
        start(tmp_path / "file")
    (tmp_path / "job" / ".lock").mkdir(parents=True)
    with pytest.raises(OutputError, match=r"cannot write .*\.lock: .*; choose another"):
        start(tmp_path / "job")


def test_keys_may_hold_any_text(tmp_path: Path) -> None:
    keys = ["größe/ä.png", "torn\udcff.png", 'quoted "name"\n']
    compute = Compute({1: InputError("bad.")})
    options: dict[str, Any] = {"items": range(3), "key": keys.__getitem__, "skip_bad": True}
    assert start(tmp_path, compute, **options).skipped == (jobs.Skipped(key=keys[1], reason="bad"),)
    assert start(tmp_path, **options).resumed == 3


def test_merged_table_holds_the_rows_and_what_was_left_out(tmp_path: Path) -> None:
    finished = start(tmp_path, Compute({2: InputError("bad.")}), skip_bad=True)
    assert jobs.write_merged(tmp_path, finished) == tmp_path / "table.parquet"
    table = results.read_table(tmp_path / "table.parquet")
    assert table.equals(finished.table)
    assert json.loads(table.schema.metadata[b"jaxid"]) == {"skipped": [{"key": "2", "reason": "bad"}]}
    assert results.read_table(tmp_path / "parts").equals(finished.table)


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    import resource

    def rows(chunk: list[int]) -> dict[str, Any]:
        size = 2000 if 3 in chunk else 1
        return {"item": np.repeat(chunk, size), "value": np.random.default_rng(chunk[0]).random(size * len(chunk))}

    def go(out: Path, **more: Any) -> jobs.Finished:
        return jobs.run(out, settings={}, items=range(6), key=str, compute=rows, chunk_size=3, progress=False, **more)

    whole, soft = go(tmp_path / "whole"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, soft[1]))
    try:
        with pytest.raises(OutputError, match=r"00001\.parquet: .*File too large; free some space"):
            go(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft)
    assert parts(tmp_path / "run") == ["00000.parquet"]  # nothing half written
    resumed = go(tmp_path / "run")
    assert resumed.resumed == 3 and resumed.table.equals(whole.table)
