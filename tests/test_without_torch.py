"""Tests that need no PyTorch can be run without it."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch_users import TESTS, WITHOUT_TORCH, imports_torch


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("fixtures.py", True),
        ("families/__init__.py", True),
        ("test_interventions.py", True),  # itself
        ("test_sweep.py", True),  # by way of fixtures
        ("conftest.py", False),
        ("test_jobs.py", False),
        ("models/test_registry.py", False),  # `jaxid.families` is not `families`
    ],
)
def test_files_that_import_torch_are_known(name: str, uses: bool) -> None:
    assert imports_torch(TESTS / name) is uses


def test_marked_by_file(request: pytest.FixtureRequest) -> None:
    assert request.node.get_closest_marker("torch") is None


@pytest.mark.slow
def test_collected_without_torch(tmp_path: Path) -> None:
    code = f"""{WITHOUT_TORCH}
import pytest
raise SystemExit(pytest.main(["-n0", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "not torch"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    collected = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert "tests/test_jobs.py" in collected and "tests/test_sweep.py" not in collected
