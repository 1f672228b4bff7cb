"""A device that runs out of memory: batches are halved for the rest of a run, whose rows are those of any other."""

import functools
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from families import CASES
from jax.errors import JaxRuntimeError

from jaxid import halving, jobs
from jaxid.checkpoints.encoders import load_encoder
from jaxid.data.grid import write_grid_folder
from jaxid.dcsm import embedding, own_scorers, scoring
from jaxid.errors import InputError, JaxidWarning, OutOfMemoryError
from jaxid.halving import Exhausted, Halving, out_of_memory
from jaxid.ids import extract

EXACT = 1e-5


def shortage() -> Exception:
    return JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes.\nMore lines.")


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The library's warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", JaxidWarning)
        texts: list[str] = []
        yield texts
        texts.extend(str(one.message) for one in found)


class Device:
    """Squares of items, for at most so many at a time; records the sizes for which the memory sufficed."""

    def __init__(self, most: int, moment: str = "compute") -> None:
        self.most, self.moment, self.done, self.refused = most, moment, [], []

    def __call__(self, items: list[int]) -> Any:
        def rows() -> dict[str, Any]:
            self.check(items, "fetch")
            self.done.append(len(items))
            return {"item": items, "square": [item**2 for item in items]}

        self.check(items, "compute")
        return rows

    def check(self, items: list[int], moment: str) -> None:
        if moment == self.moment and len(items) > self.most:
            self.refused.append(len(items))
            raise shortage()


def run(out: Path, compute: Callable[..., Any], **options: Any) -> jobs.Finished:
    given = {"settings": {}, "items": range(21), "key": str, "chunk_size": 8, "progress": False}
    return jobs.run(out, compute=compute, **given | options)


SQUARES = {"item": list(range(21)), "square": [item**2 for item in range(21)]}


# --- what counts as too little memory -------------------------------------------------------------------------------


def test_only_a_lack_of_memory_counts() -> None:
    assert out_of_memory(shortage())
    for error in (JaxRuntimeError("INTERNAL: CUDA error"), ValueError("RESOURCE_EXHAUSTED"), MemoryError()):
        assert not out_of_memory(error)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        Halving(4).tried(lambda: (_ for _ in ()).throw(JaxRuntimeError("INTERNAL: CUDA error")))


def test_numbers_are_halved_down_to_one() -> None:
    numbers, sizes = Halving(12, unit="prompt", per_item=3, advice="try another"), []
    while numbers.together > 1:
        numbers.halve("too little")
        sizes.append((numbers.together, numbers.size))
    assert sizes == [(6, 2), (3, 1), (1, 1)]
    with pytest.raises(OutOfMemoryError, match=r"does not suffice for one prompt; try another: too little\.$"):
        numbers.halve("too little")


def test_what_failed_is_freed_before_it_is_tried_again() -> None:
    class Buffer:
        pass

    alive: list[weakref.ref[Buffer]] = []

    def compute() -> int:
        if len(alive) < 2:
            buffer = Buffer()
            alive.append(weakref.ref(buffer))
            raise shortage()
        gc.collect()
        return sum(one() is not None for one in alive)

    with pytest.warns(JaxidWarning, match="from here on it computes 2 together"):
        assert Halving(8).tried(compute) == 0


# --- jobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["compute", "fetch"])
@pytest.mark.parametrize("most", [1, 3, 5, 8])
def test_rows_are_those_of_an_undisturbed_run(tmp_path: Path, moment: str, most: int, told: list[str]) -> None:
    device = Device(most, moment)
    assert run(tmp_path, device).table.to_pydict() == SQUARES
    assert max(device.done) <= most and sum(device.done) == 21
    # Batches that were read or begun before the first halving may be refused once more, at the old size only.
    size = {1: 1, 3: 2, 5: 4, 8: 8}[most]
    assert device.refused.count(2 * size) == (most < 8) or device.refused.count(2 * size) == 1 + (2 * size == 8)
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == [f"{part:05d}.parquet" for part in range(3)]


@pytest.mark.parametrize(("most", "final"), [(5, 4), (1, 1)])
def test_it_is_said_once(tmp_path: Path, most: int, final: int) -> None:
    with pytest.warns(JaxidWarning) as found:
        run(tmp_path, Device(most))
    (warning,) = found
    assert f"did not suffice for 8 items together; from here on it computes {final} together" in str(warning.message)


def test_one_item_that_does_not_fit_is_an_error_whatever_is_skipped(tmp_path: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"does not suffice for one item: RESOURCE_EXHAUSTED: Out of memory"):
        run(tmp_path, Device(0), skip_bad=True)


def test_a_run_that_is_killed_after_a_halving_is_resumed(tmp_path: Path, told: list[str]) -> None:
    class Killed(BaseException):
        pass

    device, calls = Device(4), []

    def fatal(items: list[int]) -> Any:
        calls.append(items)
        if 16 in items:
            raise Killed
        return device(items)

    with pytest.raises(Killed):
        run(tmp_path, fatal)
    done = len(list((tmp_path / "parts").glob("*.parquet")))
    assert done >= 1
    again = Device(4)
    finished = run(tmp_path, again, halving=Halving(4))  # a resumed run knows a better size, but keeps its parts
    assert finished.table.to_pydict() == SQUARES and finished.resumed == 8 * done
    assert again.refused == [] and sum(again.done) == 21 - 8 * done


def test_bad_items_are_found_among_halves(tmp_path: Path, told: list[str]) -> None:
    device = Device(2)

    def compute(items: list[int]) -> Any:
        rows = device(items)
        if 5 in items:
            raise InputError("five.")
        return rows

    finished = run(tmp_path, compute, skip_bad=True)
    assert [one.key for one in finished.skipped] == ["5"]
    assert finished.table["item"].to_pylist() == [item for item in range(21) if item != 5]
    with pytest.raises(InputError, match="item '5': five"):
        run(tmp_path / "other", compute)


def test_what_was_read_ahead_at_the_old_size_is_read_again(tmp_path: Path, told: list[str]) -> None:
    """What `read` makes may depend on the size, as padding does; nothing of an old size is computed after a halving."""
    halving, read, mixed, lock = Halving(8), [], [], threading.Lock()

    def padded(items: list[int]) -> tuple[list[int], int]:
        with lock:
            read.append(len(items))
        return items, halving.size

    def compute(opened: tuple[list[int], int]) -> Any:
        items, size = opened
        if size != halving.size:
            mixed.append(size)
        if size > 2:
            raise shortage()
        return {"item": items, "square": [item**2 for item in items]}

    assert run(tmp_path, compute, read=padded, halving=halving).table.to_pydict() == SQUARES
    assert mixed == [] and halving.together == 2


# --- encoders -------------------------------------------------------------------------------------------------------


def test_pictures_and_captions_are_encoded_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pictures = load_encoder("tiny-clip"), [*fixtures.pictures()] * 5
    captions = [f"a {one} left of a {two}" for one in ("star", "fish", "key") for two in ("star", "fish", "key")]
    whole = embedding.embed_images(encoder, pictures), embedding.embed_texts(encoder, captions)
    programs, given = {name: getattr(embedding, name) for name in ("_image", "_text")}, []

    def limited(name: str) -> Callable[..., Any]:
        def program(encoder: Any, *arrays: jax.Array) -> Any:
            given.append(len(arrays[0]))
            if len(arrays[0]) > 4:
                raise shortage()
            return programs[name](encoder, *arrays)

        return program

    halving = Halving(8, unit="input")
    monkeypatch.setattr(embedding, "_together", lambda copies: halving)
    for name in programs:
        monkeypatch.setattr(embedding, name, limited(name))
    with pytest.warns(JaxidWarning, match="did not suffice for 8 inputs together"):
        halves = embedding.embed_images(encoder, pictures), embedding.embed_texts(encoder, captions)
    assert given == [8, 4, 4, 2, 4, 4, 1]
    for ours, theirs in zip(halves, whole, strict=True):
        np.testing.assert_allclose(ours.tokens, theirs.tokens, atol=EXACT)
        np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=EXACT)


@functools.cache
def embedded() -> tuple[Any, Any, Any]:
    """A scorer, three pictures and three captions."""
    encoder, scorer = load_encoder("tiny-clip"), own_scorers.find_scorer("tiny-clip")
    pictures = embedding.embed_images(encoder, [*fixtures.pictures(), fixtures.pictures()[0][::-1]])
    texts = embedding.embed_texts(encoder, ["a star left of a fish", "a fish", "a key"], scorer.map_shape[1])
    return scorer, pictures, texts


@pytest.mark.parametrize("group", ["call", "row", "pair"])
def test_pictures_are_scored_in_halves(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standardised over all pictures of the call, whatever is computed together."""
    scorer, pictures, texts = embedded()
    whole = scoring.score(scorer, pictures, texts, group=group)

    def exhausted(*_: Any) -> Any:
        raise shortage()

    monkeypatch.setattr(scoring, "score_tokens", exhausted)
    with pytest.warns(JaxidWarning, match="did not suffice for 3 pictures together; from here on it computes 1"):
        halves = scoring.score(scorer, pictures, texts, group=group)
    np.testing.assert_allclose(halves, whole, atol=1e-4)


def test_identifiers_are_extracted_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write_grid_folder(tmp_path, [("star", "fish")], picture_size=48, object_sizes=[56])
    model, told = fixtures.model(CASES[0]), []
    options: Any = {"pairs": [("star", "fish")], "sizes": sorted({item.size for item in items}), "batch_size": 8}
    whole = extract.extract_spatial(model, items, **options)
    compute, given = extract._activations, []

    def limited(model: Any, prompts: Any, positions: np.ndarray) -> Any:
        given.append(len(prompts))
        if len(prompts) > 3:
            raise shortage()
        return compute(model, prompts, positions)

    monkeypatch.setattr(extract, "_activations", limited)
    # Pictures are read in threads, and Python's filters of warnings belong to all of them.
    monkeypatch.setattr(halving, "warnings", SimpleNamespace(warn=lambda text, *_, **__: told.append(text)))
    halves = extract.extract_spatial(model, items, **options)
    assert len(told) == 1 and "did not suffice for 8 items together; from here on it computes 2" in told[0]
    assert set(given) == {8, 4, 2} and given.count(8) + given.count(4) <= 4  # two batches are read ahead
    assert np.array_equal(halves.counts, whole.counts)
    np.testing.assert_allclose(halves.values, whole.values, atol=EXACT)


def test_slices_cover_everything_once() -> None:
    halving, seen = Halving(8), []

    def compute(rows: slice) -> range:
        if rows.stop - rows.start > 3:
            raise shortage()
        return range(rows.start, rows.stop)

    with pytest.warns(JaxidWarning, match="computes 2 together"):
        for rows, found in halving.slices(7, compute):
            assert list(found) == list(range(rows.start, rows.stop))
            seen.extend(found)
    assert seen == list(range(7)) and [halving.together, halving.size] == [2, 2]
    with pytest.raises(Exhausted):
        Halving(1).guarded(lambda: compute(slice(0, 4)))
