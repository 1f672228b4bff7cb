"""Training on a device that runs out of memory: the same numbers with less memory, from a state that is still whole."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from test_training_folder import START, loss, run, stages

from jaxid.errors import JaxidWarning, OutOfMemoryError
from jaxid.train import loop as training
from jaxid.train.loop import Stage

STEPS = 8
"""Of both stages; every second one is saved."""

MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes.\nMore lines."


def thrifty(parameters: Any, batch: Any) -> Any:
    """The same loss, as another function."""
    return loss(parameters, batch)


def short() -> list[Stage]:
    return stages(steps=STEPS // 2)


def with_thrift() -> list[Stage]:
    return [stage._replace(sparing=thrifty) for stage in short()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    np.savez(folder.parent / "whole.npz", **run(folder, short()))
    return folder


def failing(
    monkeypatch: pytest.MonkeyPatch, at: int, *, fails: Callable[[Stage], bool], lost: bool = False
) -> list[str]:
    """From the call of this number on, steps with such a stage run out of memory; returns the names of the losses."""
    made, given = training._step_function, []

    def limited(stage: Stage, placement: Any) -> Any:
        step = made(stage, placement)

        def function(state: Any, *arguments: Any) -> Any:
            given.append(getattr(stage.loss, "__name__", ""))
            if len(given) >= at and fails(stage):
                if lost:
                    step(state, *arguments)
                    assert any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
                raise JaxRuntimeError(MESSAGE)
            return step(state, *arguments)

        return function

    monkeypatch.setattr(training, "_step_function", limited)
    return given


def plain(stage: Stage) -> bool:
    return stage.loss is loss


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in caught if issubclass(one.category, JaxidWarning)]


def assert_undisturbed(found: Any, whole: Path, folder: Path, logged: list[int]) -> None:
    with np.load(whole.parent / "whole.npz") as expected:
        for name in START:
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6)
    assert (folder / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert logged == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (folder / "state").iterdir()) == ["6", "8"]


@pytest.mark.parametrize(
    ("at", "lost", "steps", "checked"),
    [
        (3, False, STEPS, list(range(1, 9))),  # the state is still there
        (8, True, STEPS + 1, [*range(1, 8), *range(7, 9)]),  # step 6 is saved
        (2, True, STEPS + 1, [1, *range(1, 9)]),  # nothing is saved
        (5, True, STEPS, list(range(1, 9))),  # a stage ended with the saved step
    ],
    ids=["state kept", "state lost", "nothing saved", "second stage"],
)
def test_a_step_without_memory_is_computed_again_with_less(
    at: int, lost: bool, steps: int, checked: list[int], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, logged, seen = failing(monkeypatch, at, fails=plain, lost=lost), [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", JaxidWarning)
        found = run(
            tmp_path,
            with_thrift(),
            log=lambda row: logged.append(row["step"]),
            check=lambda step, _: seen.append(step),
            check_every=1,
        )
    assert_undisturbed(found, whole, tmp_path, logged)
    assert len(told(caught)) == 1 and f"did not suffice for training step {at}; from here on" in told(caught)[0]
    assert given == ["loss"] * at + ["thrifty"] * (steps + 1 - at) and seen == checked


def test_an_error_that_comes_when_numbers_are_fetched(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that is still at work says later that it had no memory; what was computed since is lost."""
    check, logged = training._check_health, []

    def late(health: Any, stage: Stage, step: int) -> int:
        if step == 7 and stage.loss is loss and not late_once:
            late_once.append(step)
            raise JaxRuntimeError(MESSAGE)
        return check(health, stage, step)

    late_once: list[int] = []
    monkeypatch.setattr(training, "_check_health", late)
    with pytest.warns(JaxidWarning, match=r"did not suffice for training step 8; from here on"):
        found = run(tmp_path, with_thrift(), log=lambda row: logged.append(row["step"]))
    assert late_once == [7]
    assert_undisturbed(found, whole, tmp_path, logged)


def test_what_does_not_fit_is_said_and_the_saved_step_is_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", JaxidWarning)
        given = failing(patch, 4, fails=lambda _: True, lost=True)
        for made, step, even in ((short(), 4, ""), (with_thrift(), 3, ", even with --recompute all")):
            with pytest.raises(
                OutOfMemoryError,
                match=rf"does not suffice for training step {step}{even}; the same command resumes from step 2; use a "
                r"larger device: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5368709120 bytes\.$",
            ):
                run(tmp_path, made)
        assert given == ["loss"] * 5 + ["thrifty"]
    logged: list[int] = [1, 2]
    assert_undisturbed(run(tmp_path, short(), log=lambda row: logged.append(row["step"])), whole, tmp_path, logged)


def test_nothing_is_saved_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, 1, fails=lambda _: True)
    with pytest.raises(OutOfMemoryError, match=r"training step 1; no step is saved yet; buy a larger one: "):
        run(tmp_path, advice="buy a larger one")


def test_other_errors_are_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise JaxRuntimeError("INTERNAL: CUDA error")

    monkeypatch.setattr(training, "_step_function", lambda *_: broken)
    with pytest.raises(JaxRuntimeError, match="INTERNAL"):
        run(tmp_path, with_thrift())
