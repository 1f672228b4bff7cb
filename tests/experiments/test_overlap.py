"""Runs read ahead and store behind, and write what a plain loop writes."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_data import ITEMS, experiment
from run_data import place as place
from test_pipeline import happens, in_turn

from jaxid import pipeline
from jaxid.errors import InputError
from jaxid.experiments import belief_swap
from jaxid.experiments.activation_swap import MirrorSwap
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.deviation import Deviation
from jaxid.experiments.steering import Steer
from jaxid.io import read_table

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")  # of the tiny vocabulary

BATCH = 4
OPTIONS: dict[type[Any], dict[str, Any]] = {
    BeliefSwap: {"layers": "1", "strength": 2.0, "max_new_tokens": 0},
    MirrorSwap: {"layers": "1"},
    Steer: {"layers": "1"},
    Deviation: {"layers": "1"},
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxid.plots.save", lambda *_, **__: None)


def test_prompts_are_prepared_and_rows_stored_while_a_batch_is_computed(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chunks = ITEMS // BATCH
    reading, begun = ([threading.Event() for _ in range(chunks)] for _ in range(2))
    prepare, compute, table_of = BeliefSwap.prepare, BeliefSwap.compute, belief_swap.table_of
    index: dict[str, int] = {}

    def prepared(self: BeliefSwap, session: Any, items: Any) -> Any:
        index.update(session.index)
        if threading.current_thread().name.startswith("jaxid-read"):
            reading[index[items[0].key] // BATCH].set()
        return prepare(self, session, items)

    def computed(self: BeliefSwap, session: Any, items: Any, batch: Any) -> Any:
        chunk = index[items[0].key] // BATCH
        begun[chunk].set()
        if chunk + 1 < chunks:
            happens(reading[chunk + 1])
        return compute(self, session, items, batch)

    def tabulated(found: Any, items: Any, *more: Any) -> Any:
        assert threading.current_thread().name.startswith("jaxid-fetch")
        chunk = index[items[0].key] // BATCH
        if chunk + 1 < chunks:
            happens(begun[chunk + 1])
        return table_of(found, items, *more)

    monkeypatch.setattr(BeliefSwap, "prepare", prepared)
    monkeypatch.setattr(BeliefSwap, "compute", computed)
    monkeypatch.setattr(belief_swap, "table_of", tabulated)
    assert experiment(BeliefSwap, place, tmp_path, **OPTIONS[BeliefSwap]).run().items == ITEMS
    assert all(event.is_set() for event in (*reading, *begun))


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_run_writes_what_a_plain_loop_writes(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: type[Any]
) -> None:
    used: list[str] = []

    def run(name: str, loop: Callable[..., Any]) -> Any:
        def noted(*arguments: Any, **more: Any) -> Any:
            used.append(name)
            return loop(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "overlapped", noted)
            return experiment(kind, place, tmp_path / name, **OPTIONS[kind]).run()

    plain, found = run("plain", in_turn), run("found", pipeline.overlapped)
    assert used == ["plain", "found"]
    assert (plain.words_of_several_tokens, plain.unknown_words) == (found.words_of_several_tokens, found.unknown_words)
    names = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")}
    assert names == {path.relative_to(tmp_path / "found") for path in (tmp_path / "found").rglob("*")}
    for path in [name for name in names if name.suffix == ".parquet"]:
        assert (tmp_path / "plain" / path).read_bytes() == (tmp_path / "found" / path).read_bytes()


def test_a_picture_that_is_torn_later_is_named_after_what_came_before_was_stored(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swap, prepare, torn = experiment(BeliefSwap, place, tmp_path, **OPTIONS[BeliefSwap]), BeliefSwap.prepare, []

    def prepared(self: BeliefSwap, session: Any, items: Any) -> Any:
        torn[:] = [list(session.index)[2 * BATCH + 1]]
        if torn[0] in [item.key for item in items]:
            raise InputError("its picture is torn.")
        return prepare(self, session, items)

    monkeypatch.setattr(BeliefSwap, "prepare", prepared)
    with pytest.raises(InputError) as raised:
        swap.run()
    assert str(raised.value) == f"item {torn[0]!r}: its picture is torn; --skip-bad skips such items."
    assert sorted(path.stem for path in (tmp_path / "parts").iterdir()) == ["00000", "00001"]
    monkeypatch.setattr(BeliefSwap, "prepare", prepare)
    assert swap.run().resumed_items == 2 * BATCH
    assert len(set(read_table(tmp_path / "table.parquet")["item"].to_pylist())) == ITEMS
