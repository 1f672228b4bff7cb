"""The comparison on a GPU, at small shapes on CPU: both frameworks hold the same model, and results survive a stop."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmark_files import BENCHMARKS, Modules

from jaxid.interp.interventions import add
from jaxid.interp.trace import rerun, residuals_at, trace


@pytest.mark.parametrize(
    "name", ["llava-7b", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen-7b", "gemma-12b"))]
)
def test_both_frameworks_hold_the_same_model(modules: Modules, name: str) -> None:
    models, works = modules("gpu_models"), modules("gpu_torch")
    setting = models.make(name, torch.device("cpu"), tiny=True)
    answers, word = (11, 12), setting.geometry.tokens - 24
    recorded = trace(setting.model, setting.prompts)
    expected = works.control(setting, answers).numpy()
    np.testing.assert_allclose(recorded.logprobs(np.array(answers)), expected, atol=1e-4)
    np.testing.assert_allclose(works.control_one_by_one(setting, answers, [1, 2]), expected[1:3], atol=1e-4)
    states = np.asarray(residuals_at(setting.model, setting.prompts, np.full((8, 1), word)))[:, :, 0]
    theirs = works.extract(setting, word).numpy()
    np.testing.assert_allclose(states.swapaxes(0, 1), theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(works.extract(setting, word, [5]), theirs[5:6], atol=1e-4 * np.abs(theirs).max())
    pushes = (
        8 * np.abs(theirs).max() * np.random.default_rng(3).standard_normal((2, 1, setting.model.width), np.float32)
    )
    edits = [works.Edit(layer=layer, positions=[word], vectors=torch.from_numpy(pushes[layer])) for layer in range(2)]
    push = add(layer=np.arange(2), positions=np.full((8, 1), word), vector=pushes[:, None])
    found = np.asarray(rerun(setting.model, recorded, push).logprobs(np.array(answers)))
    batched = works.batched(setting, answers, edits).numpy()
    assert np.abs(batched - expected).max() > 0.1
    np.testing.assert_allclose(found, batched, atol=1e-3)
    np.testing.assert_allclose(works.one_by_one(setting, answers, edits, [0, 3]), batched[:, [0, 3]], atol=1e-4)


def test_no_warm_call_before_the_deadline(modules: Modules) -> None:
    parts = modules("gpu_parts")
    clock = parts.Clock(time.monotonic() + 60)
    calls: list[int] = []
    assert clock.median(lambda: calls.append(1) or len(calls))[2] == len(calls) == 1 + parts.ROUNDS
    with pytest.raises(TimeoutError, match=r"deadline"):
        parts.Clock(time.monotonic() - 1).median(lambda: None)


def test_every_part_is_written_at_once(modules: Modules, tmp_path: Path) -> None:
    gpu = modules("gpu")
    report, seen = gpu.Report(tmp_path), []

    def late() -> dict[str, float]:
        seen.append(gpu.collect(tmp_path))
        raise modules("gpu_parts").NoTime("the deadline passed")

    def broken() -> dict[str, float]:
        raise ValueError("no such layer")

    found = {"jaxid_ms": 2.0, "batched_ms": 6.0, "difference": 1e-5}
    gpu.run_parts("llava-7b", {"trace": lambda: found, "steering": late, "finetune": broken}, report, gpu.Memory(False))
    assert seen == [{f"llava-7b/trace/{name}": value for name, value in found.items()}]
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [set(line) - {"model", "part"} for line in lines] == [set(found), {"skipped"}, {"failed"}]
    gpu.collect(tmp_path)
    table = (tmp_path / "gpu.md").read_text()
    assert "6 (3x)" in table and "the deadline passed" in table and "ValueError: no such layer" in table


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    # As a user calls it, without the settings of tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_NUMPY")}
    done = subprocess.run([*command, "--models", "llava-7b,dcsm"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    for part in ("trace", "steering", "belief_swap", "extraction", "finetune"):
        assert found[f"llava-7b/{part}/difference"] < 1e-3
        assert found[f"llava-7b/{part}/jaxid_ms"] > 0 and found[f"llava-7b/{part}/batched_ms"] > 0
    assert found["dcsm/dcsm/difference"] < 1e-4
