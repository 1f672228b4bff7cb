"""The benchmark of overlap: what it counts as hidden, and a run of it."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from benchmark_files import Modules


@pytest.fixture
def overlap(modules: Modules) -> ModuleType:
    return modules("overlap")


def test_times_are_counted_once(overlap: ModuleType) -> None:
    assert overlap.union([(3.0, 4.0), (0.0, 1.0), (0.5, 2.0), (4.0, 5.0)]) == [(0.0, 2.0), (3.0, 5.0)]
    assert overlap.union([]) == [] and overlap.length([]) == 0.0
    assert overlap.length([(0.0, 2.0), (3.0, 5.0)]) == 4.0


def test_what_two_spans_share_is_what_a_count_of_moments_finds(overlap: ModuleType) -> None:
    rng, moments = np.random.default_rng(0), np.arange(1000) + 0.5
    for _ in range(20):
        some, others = (
            overlap.union([(float(start), float(start + rng.integers(1, 40))) for start in rng.integers(0, 900, 12)])
            for _ in range(2)
        )
        covered = [
            np.logical_or.reduce([(moments > start) & (moments < end) for start, end in own]) for own in (some, others)
        ]
        assert overlap.common(some, others) == pytest.approx((covered[0] & covered[1]).sum())


@pytest.mark.slow
def test_reading_is_hidden_in_a_profiled_run(
    overlap: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["overlap.py", "--out", str(tmp_path), "--items", "64", "--side", "400"])
    overlap.main()
    found = json.loads((tmp_path / "overlap.json").read_text())
    assert found["in turn"]["hidden"] == pytest.approx(0, abs=0.02)
    assert found["overlapped"]["of_shorter"] > 0.1  # how much more depends on what else the machine does
    assert capsys.readouterr().out.count("\n| ") == 4
