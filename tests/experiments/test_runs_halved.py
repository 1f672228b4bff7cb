"""Experiments on a device that runs out of memory: smaller batches, the same table."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from run_data import columns, experiment, ids

from jaxid import halving
from jaxid.data.coco_spatial import write_coco_spatial
from jaxid.data.scenes import sample_free
from jaxid.errors import OutOfMemoryError
from jaxid.experiments.belief_swap import BeliefSwap
from jaxid.experiments.occlusion import Occlusion
from jaxid.interp import forward, trace

pytestmark = pytest.mark.filterwarnings("ignore::jaxid.errors.UnknownWordsWarning")

EXACT = 1e-5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few items, and IDs of the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    write_coco_spatial(folder / "data", sample_free(np.random.default_rng(1), 6, num_objects=(2, 2)), 48)
    ids().save(folder / "ids.safetensors")
    return folder


def small_device(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, most: int) -> list[int]:
    """A program that has memory for so many prompts; returns the list of the numbers that it was given."""
    program, given = getattr(module, name), []

    def limited(definition: Any, parameters: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        given.append(len(inputs.token_ids))
        if given[-1] > most:
            raise JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
        return program(definition, parameters, inputs, *rest, **options)

    monkeypatch.setattr(module, name, limited)
    return given


CASES = {
    "belief swap": (BeliefSwap, trace, "_record", {"layers": "1", "max_new_tokens": 0, "batch_size": 4}),
    "occlusion": (Occlusion, forward, "_run", {"batch_size": 26}),
}


@pytest.mark.parametrize("name", CASES)
def test_an_experiment_with_too_large_batches(
    name: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of the table is that of an undisturbed run."""
    kind, module, program, options = CASES[name]
    whole = experiment(kind, place, tmp_path / "whole", **options)
    halved = experiment(kind, place, tmp_path / "halved", **options)
    whole.run()
    given, said = small_device(monkeypatch, module, program, 3), []
    # Pictures are read in threads, and Python's filters of warnings belong to all of them.
    told = SimpleNamespace(warn=lambda text, *_, **__: said.append(text))
    monkeypatch.setattr(halving, "warnings", told)
    halved.run()
    assert len(said) == 1 and f"did not suffice for {options['batch_size']} prompts together" in said[0]
    assert max(given) > 3 and min(given) <= 3
    ours, theirs = columns(tmp_path / "halved"), columns(tmp_path / "whole")
    assert list(ours) == list(theirs)
    for column, values in theirs.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(ours[column], values, atol=EXACT)
        else:
            assert ours[column].tolist() == values.tolist()


def test_an_experiment_whose_single_prompt_does_not_fit(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_device(monkeypatch, trace, "_record", 0)
    with pytest.raises(OutOfMemoryError, match=r"for one prompt; .jaxid plan belief-swap. tells what fits"):
        experiment(BeliefSwap, place, tmp_path, layers="1", max_new_tokens=0).run()
