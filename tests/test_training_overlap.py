"""Training draws batches ahead, and fetches a step's numbers while the next one is computed."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_pipeline import happens
from test_training_folder import START, batch, run, stages

from jaxid.train import loop as training
from jaxid.train.loop import Stage

STEPS = 6
"""Of both stages."""


def short(draw: Callable[[int], Any] = batch) -> list[Stage]:
    return stages(draw, steps=STEPS // 2)


def test_batches_are_drawn_while_a_step_is_at_work(tmp_path: Path) -> None:
    drawn = [threading.Event() for _ in range(STEPS)]

    def draw(step: int) -> dict[str, np.ndarray]:
        assert threading.current_thread().name.startswith("jaxid-read")
        drawn[step].set()
        return batch(step)

    def check(done: int, _: Any) -> None:
        if done % (STEPS // 2):  # within a stage
            happens(drawn[done])

    run(tmp_path, short(draw), save_every=STEPS, check=check, check_every=1)
    assert all(event.is_set() for event in drawn)


def test_a_step_is_reported_once_the_next_one_has_begun_unless_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, reported, made = [0], [], training._step_function

    def counted(*arguments: Any) -> Any:
        step = made(*arguments)

        def function(*given: Any) -> Any:
            begun[0] += 1
            return step(*given)

        return function

    monkeypatch.setattr(training, "_step_function", counted)
    found = run(tmp_path / "late", short(), save_every=2, log=lambda row: reported.append((row["step"], begun[0])))
    saved = (2, 3, 4, 6)  # a stage's last step as well
    assert reported == [(step, step if step in saved else step + 1) for step in range(1, STEPS + 1)]
    monkeypatch.undo()
    every = run(tmp_path / "at once", short(), save_every=1)
    for name in START:
        np.testing.assert_array_equal(found[name], every[name])
    assert (tmp_path / "late" / "metrics.csv").read_text() == (tmp_path / "at once" / "metrics.csv").read_text()


def test_a_batch_that_cannot_be_drawn_ends_the_run_at_its_step(tmp_path: Path) -> None:
    done: list[int] = []

    def draw(step: int) -> dict[str, np.ndarray]:
        if step == 2:
            raise ValueError("step 2 has no batch")
        return batch(step)

    with pytest.raises(ValueError, match="step 2 has no batch"):
        run(tmp_path, short(draw), check=lambda step, _: done.append(step), check_every=1)
    assert done == [1, 2]
    run(tmp_path, short(), check=lambda step, _: done.append(step), check_every=1)
    assert done == [1, 2, *range(3, STEPS + 1)]
