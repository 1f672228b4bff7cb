"""Reading ahead and fetching behind: what overlaps, what is bounded, what keeps its order, whose errors are whose.

Steps wait for the events that must happen meanwhile, so that a step that is not overlapped fails, on any machine.
"""

import contextlib
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxid import jobs, pipeline
from jaxid.errors import DataError, InputError
from jaxid.prompts.pictures import open_picture

LONG = 30.0
"""Seconds that a step waits for what must happen; nothing takes so long."""


def happens(event: threading.Event) -> None:
    assert event.wait(LONG), "nothing went on meanwhile"


def events(count: int) -> list[threading.Event]:
    return [threading.Event() for _ in range(count)]


@contextlib.contextmanager
def in_turn(
    inputs: Iterable[Any], read: Any, compute: Any, fetch: Any, *, ahead: int = 0
) -> Iterator[Iterator[tuple[Any, "Future[Any]"]]]:
    """`pipeline.overlapped` as a plain loop."""

    def found() -> Iterator[tuple[Any, "Future[Any]"]]:
        for one in inputs:
            result: Future[Any] = Future()
            try:
                result.set_result(fetch(one, compute(read(one))))
            except Exception as error:
                result.set_exception(error)
            yield one, result

    yield found()


def results(count: int, read: Any = lambda one: one, compute: Any = lambda one: one, fetch: Any = None) -> list[Any]:
    fetch = fetch or (lambda one, begun: begun)
    with pipeline.overlapped(range(count), read, compute, fetch) as found:
        return [(one, result.result()) for one, result in found]


# --- what overlaps ---------------------------------------------------------------------------------------------------


def test_the_next_input_is_read_while_one_is_computed() -> None:
    reading = events(6)

    def read(one: int) -> int:
        reading[one].set()
        return one

    def compute(one: int) -> int:
        if one < 5:
            happens(reading[one + 1])
        return one

    assert results(6, read, compute) == [(one, one) for one in range(6)]


def test_one_is_computed_while_the_one_before_is_fetched() -> None:
    begun = events(6)

    def compute(one: int) -> int:
        begun[one].set()
        return one

    def fetch(one: int, value: int) -> int:
        assert threading.current_thread().name.startswith("jaxid-fetch")
        if one < 5:
            happens(begun[one + 1])
        return 10 * value

    assert results(6, compute=compute, fetch=fetch) == [(one, 10 * one) for one in range(6)]


def test_several_inputs_are_read_at_a_time() -> None:
    both = threading.Barrier(pipeline.AHEAD)

    def read(one: int) -> int:
        both.wait(LONG)
        return one

    assert results(2 * pipeline.AHEAD, read) == [(one, one) for one in range(2 * pipeline.AHEAD)]


def test_a_slow_reader_is_hidden_behind_a_slow_computation() -> None:
    spans: dict[str, list[tuple[float, float]]] = {"read": [], "compute": []}

    def slow(name: str) -> Callable[[int], int]:
        def step(one: int) -> int:
            start = time.perf_counter()
            time.sleep(0.05)
            spans[name].append((start, time.perf_counter()))
            return one

        return step

    results(10, slow("read"), slow("compute"))
    both = sum(max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans["read"] for b in spans["compute"])
    assert both > 0.6 * sum(end - start for start, end in spans["read"])  # one after the other: 0; nine tenths at best


# --- bounds and order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_no_more_is_read_than_the_bound(ahead: int) -> None:
    reading = events(13)

    def read(one: int) -> int:
        reading[one].set()
        return one

    with pipeline.read_ahead(read, range(12), ahead=ahead) as found:
        for one, future in found:
            assert future.result() == one
            if one + ahead < 12:
                happens(reading[one + ahead])  # the bound is reached ...
                time.sleep(0.02)
                assert not reading[one + ahead + 1].is_set()  # ... and not exceeded


def test_what_was_read_is_freed_once_its_computation_has_begun() -> None:
    """While the results of the one before are fetched, nobody holds its pictures."""

    class Pictures:
        def __init__(self, one: int) -> None:
            self.one = one

    held: dict[int, weakref.ref[Pictures]] = {}
    begun = events(5)

    def read(one: int) -> Pictures:
        pictures = Pictures(one)
        held[one] = weakref.ref(pictures)
        return pictures

    def compute(pictures: Pictures) -> int:
        begun[pictures.one].set()
        return pictures.one

    def fetch(one: int, value: int) -> int:
        if one < 4:
            happens(begun[one + 1])
            end = time.monotonic() + LONG
            while held[one + 1]() is not None:
                assert time.monotonic() < end, "still held"
                time.sleep(0.001)
        return value

    assert results(5, read, compute, fetch) == [(one, one) for one in range(5)]


def test_the_order_is_that_of_the_inputs() -> None:
    rng = np.random.default_rng(0)
    pauses = rng.uniform(0, 0.01, (3, 20))
    seen: list[list[int]] = [[], []]

    def paused(row: int, kept: list[int] | None = None) -> Callable[..., int]:
        def step(one: int, *_: int) -> int:
            time.sleep(pauses[row, one])
            if kept is not None:
                kept.append(one)
            return one

        return step

    found = results(20, paused(0), paused(1, seen[0]), paused(2, seen[1]))
    assert found == [(one, one) for one in range(20)] and seen == [list(range(20))] * 2


def test_lists_are_drawn_in_a_thread_and_errors_come_after_what_was_drawn() -> None:
    drawing = events(4)

    def files() -> Iterator[int]:
        for one in range(11):
            assert threading.current_thread().name.startswith("jaxid-read")
            drawing[one // 3].set()
            yield one
            if one == 9:
                raise DataError("torn.")

    found = []
    with pytest.raises(DataError, match=r"torn\."):
        for some in pipeline.drawn_ahead(files(), 3):
            happens(drawing[some[0] // 3 + 1])
            found.append(some)
    assert found == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(pipeline.drawn_ahead(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(pipeline.drawn_ahead([], 3)) == []


def test_an_iterable_that_fails_gives_first_what_it_had() -> None:
    def inputs() -> Iterator[int]:
        yield from range(4)
        raise DataError("torn.")

    found = []
    with (
        pytest.raises(DataError, match=r"torn\."),
        pipeline.overlapped(inputs(), lambda one: one, lambda one: one, lambda one, value: value) as made,
    ):
        for _, result in made:
            found.append(result.result())
    assert found == [0, 1, 2, 3]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["read", "compute", "fetch"])
def test_an_error_is_of_its_input_after_those_before_it(step: str) -> None:
    calls: dict[str, list[int]] = {"read": [], "compute": [], "fetch": []}

    def failing(name: str) -> Callable[..., int]:
        def run(one: int, *_: int) -> int:
            calls[name].append(one)
            if (name, one) == (step, 7):
                raise InputError("item 7 is bad.")
            return one

        return run

    found, order = [], []
    with pipeline.overlapped(range(10), *map(failing, ("read", "compute", "fetch"))) as made:
        for one, result in made:
            order.append(one)
            if one == 7:
                assert found == list(range(7))
                with pytest.raises(InputError, match="item 7 is bad"):
                    result.result()
                # What follows a failed computation is not begun before the failure was seen.
                assert max(calls["compute"]) == {"read": 6, "compute": 7, "fetch": 8}[step]
                assert max(calls["fetch"]) == {"read": 6, "compute": 6, "fetch": 7}[step]
            else:
                found.append(result.result())
    assert order == list(range(10)) and found == [0, 1, 2, 3, 4, 5, 6, 8, 9]


@pytest.mark.parametrize("step", ["read", "compute"])
def test_an_interrupt_ends_threads_and_completes_what_was_begun(step: str) -> None:
    fetched, reads = [], []

    def stopping(name: str) -> Callable[[int], int]:
        def run(one: int) -> int:
            if name == "read":
                reads.append(one)
                time.sleep(0.05 if one > 4 else 0.0)
            if (name, one) == (step, 4):
                raise KeyboardInterrupt
            return one

        return run

    def fetch(one: int, value: int) -> int:
        time.sleep(0.02)
        fetched.append(one)
        return value

    with (
        pytest.raises(KeyboardInterrupt),
        pipeline.overlapped(range(100), stopping("read"), stopping("compute"), fetch) as made,
    ):
        for _, result in made:
            result.result()
    assert fetched == [0, 1, 2, 3] and max(reads) <= 4 + pipeline.AHEAD + 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxid")]


def test_what_is_being_read_is_completed_before_the_block_ends() -> None:
    """No reader is left behind, with its files open, once the caller has gone on."""
    begun, leaving, ended = events(2), threading.Event(), []

    def read(one: int) -> int:
        begun[one].set()
        if one == 1:
            happens(leaving)
            time.sleep(0.1)
        ended.append(one)
        return one

    with pipeline.read_ahead(read, range(2)) as found:
        assert next(found)[0] == 0
        happens(begun[1])
        leaving.set()
    assert ended == [0, 1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxid")]


# --- jobs ------------------------------------------------------------------------------------------------------------


def job(out: Path, **steps: Any) -> jobs.Finished:
    given = {"settings": {}, "items": range(12), "key": str, "chunk_size": 2, "progress": False}
    return jobs.run(out, **{**given, **steps})


def columns(items: list[int]) -> dict[str, list[int]]:
    return {"item": items, "square": [item**2 for item in items]}


def test_a_job_reads_ahead_and_stores_behind(tmp_path: Path) -> None:
    reading, begun = events(7), events(7)

    def read(items: list[int]) -> list[int]:
        reading[items[0] // 2].set()
        return items

    def compute(items: list[int]) -> Callable[[], dict[str, list[int]]]:
        chunk = items[0] // 2
        begun[chunk].set()
        if chunk < 5:
            happens(reading[chunk + 1])

        def fetch() -> dict[str, list[int]]:
            assert not (tmp_path / "job" / "parts" / f"{chunk:05d}.parquet").exists()
            if chunk < 5:
                happens(begun[chunk + 1])
            return columns(items)

        return fetch

    found = job(tmp_path / "job", read=read, compute=compute)
    assert found.table.to_pydict() == columns(list(range(12)))
    plain = job(tmp_path / "plain", compute=columns)
    assert found.table.equals(plain.table, check_metadata=True)
    for part in sorted((tmp_path / "plain" / "parts").iterdir()):
        assert part.read_bytes() == (tmp_path / "job" / "parts" / part.name).read_bytes()


@pytest.mark.parametrize("step", ["read", "compute", "fetch"])
def test_bad_items_of_a_job_are_named_whatever_step_finds_them(tmp_path: Path, step: str) -> None:
    def checked(name: str, items: list[int]) -> list[int]:
        if name == step and 7 in items:
            raise DataError("torn.")
        return items

    def compute(items: list[int]) -> Callable[[], dict[str, list[int]]]:
        checked("compute", items)
        return lambda: columns(checked("fetch", items))

    steps = {"read": lambda items: checked("read", items), "compute": compute}
    with pytest.raises(DataError, match="item '7': torn; --skip-bad skips such items"):
        job(tmp_path, **steps)
    # What comes before is on the disk, and nothing after it.
    assert sorted(path.stem for path in (tmp_path / "parts").iterdir()) == ["00000", "00001", "00002"]
    found = job(tmp_path, **steps, skip_bad=True)
    assert found.resumed == 6 and found.skipped == (jobs.Skipped(key="7", reason="torn"),)
    assert found.table.to_pydict() == columns([0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11])


def test_an_interrupted_job_keeps_the_chunk_that_was_being_stored(tmp_path: Path) -> None:
    interrupted = threading.Event()

    def compute(items: list[int]) -> Callable[[], dict[str, list[int]]]:
        if items[0] == 6:
            interrupted.set()
            raise KeyboardInterrupt

        def fetch() -> dict[str, list[int]]:
            if items[0] == 4:
                happens(interrupted)
            return columns(items)

        return fetch

    with pytest.raises(KeyboardInterrupt):
        job(tmp_path, compute=compute)
    assert sorted(path.stem for path in (tmp_path / "parts").iterdir()) == ["00000", "00001", "00002"]
    assert job(tmp_path, compute=columns).resumed == 6


def test_warnings_of_reading_reach_the_user(tmp_path: Path) -> None:
    def read(items: list[int]) -> list[int]:
        if 7 in items:
            warnings.warn("item 7 is odd.", UserWarning, stacklevel=1)
        return items

    with pytest.warns(UserWarning, match=r"item 7 is odd\.") as told:
        job(tmp_path / "warned", read=read, compute=columns)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"item 7 is odd\."):
            job(tmp_path / "refused", read=read, compute=columns)


# --- pictures --------------------------------------------------------------------------------------------------------


def test_threads_that_open_pictures_leave_the_filters_of_warnings_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's filters are global: two threads that change and restore them in turn would mix them up."""
    Image.fromarray(np.full((4, 4, 3), 7, np.uint8)).save(tmp_path / "a.png")
    opened, inside, most = Image.open, [0], []

    def slow(path: Any) -> Any:
        inside[0] += 1
        time.sleep(0.01)
        most.append(inside[0])
        inside[0] -= 1
        return opened(path)

    monkeypatch.setattr(Image, "open", slow)
    before = list(warnings.filters)
    with pipeline.read_ahead(lambda _: np.asarray(open_picture(tmp_path / "a.png")), range(12), ahead=4) as found:
        assert all((future.result() == 7).all() for _, future in found)
    assert warnings.filters == before and set(most) == {1}
