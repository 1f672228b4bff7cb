"""Fine-tuning and its evaluations on a device that runs out of memory."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from test_finetune import QUICK, command, ids, items, model, write_data
from test_finetune_refused import refused

from jaxid import halving
from jaxid.errors import OutOfMemoryError
from jaxid.experiments import finetune, finetune_evaluation
from jaxid.nn.layers import Recompute
from jaxid.train import loop as training

COLUMNS = ("step", "stage", "loss", "answer_loss", "id_loss", "accuracy")


def fitted(folder: Path, recompute: Recompute = "cheap") -> Any:
    task = finetune.task(model(), items(), ids(), dataclasses.replace(QUICK, steps=4, recompute=recompute))
    assert (task.sparing is None) == (recompute == "all")
    start = task.selection.split(model().parameters)
    options: dict[str, Any] = {"columns": COLUMNS, "save_every": 2, "record_every": 1, "progress": False}
    with jax.numpy_dtype_promotion("standard"), training.begun(folder, {"recompute": recompute}):
        return training.fit(folder, start, [task.stage()], **options)


def warned(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[str]:
    """What a module warns of; pictures are read in threads, and Python's filters of warnings belong to all of them."""
    said: list[str] = []
    monkeypatch.setattr(module, "warnings", SimpleNamespace(warn=lambda text, *_, **__: said.append(text)))
    return said


def fits_only_if_recomputed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only blocks of which everything is recomputed find the memory; returns what steps recompute."""
    made, given = training._step_function, []

    def limited(stage: Any, placement: Any) -> Any:
        step, (definition,) = made(stage, placement), stage.loss.args
        sparing = any(learning.recompute == "all" for learning in learnings(definition))

        def function(*arguments: Any) -> Any:
            given.append("all" if sparing else "less")
            if not sparing:
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
            return step(*arguments)

        return function

    monkeypatch.setattr(training, "_step_function", limited)
    return given


def learnings(definition: Any) -> list[Any]:
    from flax import nnx

    network = nnx.merge(definition, nnx.State(model().parameters))
    return [network.tower.layers.learning, network.decoder.layers.learning]


def test_the_same_step_is_computed_with_everything_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fitted(tmp_path / "whole")
    given, said = fits_only_if_recomputed(monkeypatch), warned(monkeypatch, training)
    found = fitted(tmp_path / "short")
    assert len(said) == 1 and "training step 1; from here on" in said[0] and "as with --recompute all" in said[0]
    assert given == ["less"] + ["all"] * 4
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-6)
    rows = [training.read_metrics(tmp_path / name / "metrics.csv") for name in ("whole", "short")]
    for ours, theirs in zip(*rows, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-4) and ours["step"] == theirs["step"]


def test_a_step_that_never_fits_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, begun = write_data(tmp_path), []

    def limited(*_: Any) -> Any:
        def function(state: Any, *_: Any) -> Any:
            begun.append(len(begun) + 1)
            if begun[-1] > 3:
                jax.tree.map(lambda leaf: leaf.delete(), state)  # as a step does that was given its memory
                raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
            return state, dict.fromkeys(COLUMNS[2:], 0.0)

        return function

    with jax.numpy_dtype_promotion("standard"), monkeypatch.context() as patched:
        patched.setattr(training, "_step_function", limited)
        line = refused(capsys, command(folder, "run", "--recompute", "all"))
        assert line == (
            "error: the device's memory does not suffice for training step 4; the same command resumes from step 2; "
            "use a larger device, or begin anew with a smaller --batch-size or --dtype bfloat16; `jaxid plan finetune` "
            "tells what fits: RESOURCE_EXHAUSTED: Out of memory."
        )
    assert [row["step"] for row in training.read_metrics(folder / "run" / "evaluations.csv")] == [0, 2]


def test_an_evaluation_asks_fewer_questions_together(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, program, given = finetune_evaluation.spatial_items(items())[:16], finetune_evaluation.forward, []
    expected = finetune_evaluation.evaluate(model(), questions, batch_size=8)

    def limited(own: Any, prompts: Any) -> Any:
        given.append(len(prompts.inputs.token_ids))
        if given[-1] > most:
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
        return program(own, prompts)

    monkeypatch.setattr(finetune_evaluation, "forward", limited)
    most = 2
    said = warned(monkeypatch, halving)
    assert finetune_evaluation.evaluate(model(), questions, batch_size=8) == expected
    assert said == [
        "the device's memory did not suffice for 8 questions together; from here on it computes 2 together, and "
        "nothing is lost."
    ]
    assert max(given) == 8 and given[-1] == 2
    most = 0
    with pytest.raises(OutOfMemoryError, match=r"for one question; use --dtype bfloat16"):
        finetune_evaluation.evaluate(model(), questions, batch_size=1)
