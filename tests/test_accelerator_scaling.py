"""Scaling over devices: the ideal line and the efficiency by hand, and a run with this machine as the accelerators."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest
from benchmark_files import importable
from test_accelerator import TINY

with importable() as load:
    targets: Any = load("accelerator_targets")
    programs: Any = load("accelerator_programs")
    scaling: Any = load("accelerator_scaling")
    accelerator: Any = load("accelerator")


def measured(target: Any, alias: str, work: str) -> Mapping[str, Mapping[str, float]]:
    """A work of 60 ms that divides over the model axis, with collectives that do not shrink; a rerun takes a half."""
    share = 0.5 if work == "rerun" else 1.0
    sent = 0.0 if target.model == 1 else 4.5 * share
    figures = {
        "fits": float(target.model > 1),
        "tflop": 6.0 * share / target.model,
        "hbm_gb": 2.0,
        "collective_gb_model": sent,
        "collective_gb_data": 0.0,
        "collectives": 0.0 if target.model == 1 else 10.0,
        "collective_ms": 1e3 * sent / 450,
        "roofline_ms": 60.0 * share / target.model,
    }
    return {work: figures}


def rows(case: Any) -> dict[str, dict[str, float]]:
    """All rows of a case."""
    found: dict[str, dict[str, float]] = {}
    for some in scaling.scaled([case], measured, lambda row, error: pytest.fail(f"{row}: {error}")):
        found |= some
    return found


def test_along_model_a_device_does_its_share() -> None:
    """90 ms of work; on two devices 45 ms and 15 ms of collectives."""
    found = rows(scaling.Case("h100", "llava-7b", "model", (1, 2, 4)))
    names = ("devices", "bound_ms", "ideal_ms", "efficiency", "collectives", "fits")
    assert [[one[name] for name in names] for one in found.values()] == [
        [1, 90, 90, 1, 0, 0],
        [2, 60, 45, 0.75, 20, 1],
        [4, 37.5, 22.5, 0.6, 20, 1],
    ]
    assert [*found][1] == "h100/llava-7b/model/data=1,model=2"
    reached = [value >= least for _, value, least in scaling.bounds(found)]
    assert reached == [True, True, False]


def test_without_room_for_one_device_the_ideal_has_no_collectives() -> None:
    found = rows(scaling.Case("h100", "llava-7b", "model", (2, 8)))
    assert [one["ideal_ms"] for one in found.values()] == [45, 11.25]
    assert len(scaling.bounds(found)) == 1  # the aim is for up to four devices


def test_along_data_a_copy_does_as_much_as_one() -> None:
    """Its own collectives are part of what one copy takes."""
    found = rows(scaling.Case("h100", "llava-7b", "data", (1, 64), other=2))
    assert [(one["devices"], one["efficiency"]) for one in found.values()] == [(2, 1), (128, 1)]


def test_a_mesh_that_fails_leaves_the_others() -> None:
    def refused(target: Any, alias: str, work: str) -> Any:
        if target.model == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return measured(target, alias, work)

    failures: list[str] = []
    case = scaling.Case("h100", "llava-7b", "model", (1, 2, 4))
    found = [*scaling.scaled([case], refused, lambda row, error: failures.append(f"{row}: {error}"))]
    assert [*found[-1]] == ["h100/llava-7b/model/data=1,model=1", "h100/llava-7b/model/data=1,model=4"]
    assert failures == ["h100/llava-7b/model/data=1,model=2: RESOURCE_EXHAUSTED"]


@pytest.mark.slow
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A resumed run compiles nothing that is known, and writes the same table."""
    monkeypatch.setattr(targets, "devices", lambda name, chips: jax.devices()[:chips])
    monkeypatch.setitem(targets._OPTIONS, "gpu", {})
    monkeypatch.setitem(programs.CONFIGS, "llava-7b", TINY)
    cases = (scaling.Case("h100", "llava-7b", "data", (1, 4)), scaling.Case("h100", "llava-7b", "model", (1, 2)))
    monkeypatch.setattr(scaling, "CASES", cases)
    arguments = ["--scaling", "--out", str(tmp_path)]
    assert accelerator.main(arguments) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    one, four = (f"h100/llava-7b/data/data={size},model=1" for size in (1, 4))
    # On CPUs, attention runs over prompts in a loop, which devices do not share.
    assert found[f"{one}/tflop"] < found[f"{four}/tflop"] < 2 * found[f"{one}/tflop"]
    assert found["h100/llava-7b/model/data=1,model=2/collectives"] > 0
    assert {key.rpartition("/")[2] for key in found} == {*scaling.SHOWN}
    assert "h100/llava-7b/data/data=4,model=1/efficiency" in capsys.readouterr().out

    def never(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(accelerator, "measure_on", never)
    assert accelerator.main([*arguments, "--resume"]) == 0
    assert json.loads((tmp_path / "scaling.json").read_text()) == found
