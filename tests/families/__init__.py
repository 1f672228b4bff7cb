"""Tiny random models of every family: each test of a contract that holds for all families runs over `EVERY`."""

import importlib
import pkgutil

import pytest

from families.base import LLAMA3, VOCABULARY, Case
from families.llava import CASES, llava_config

__all__ = ["CASES", "EVERY", "LLAMA3", "QUICK", "UNLIKE", "VOCABULARY", "Case", "llava_config", "over"]

EVERY: tuple[Case, ...] = tuple(
    case
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")
    for case in importlib.import_module(f"families.{module}").EVERY
)
"""All tiny models of all families: a module here is a family, and lists its models as `EVERY`."""

QUICK = ("gemma3", "internvl", "mllama", "qwen2.5-vl-windows", "video-grid")
"""One model of each family; LLaVA's are tested in depth elsewhere."""

UNLIKE = ("gemma3", "mllama", "qwen2.5-vl-windows")
"""Those of them whose decoders differ from LLaVA's."""


def over(*names: str) -> pytest.MarkDecorator:
    """Runs a test over all models: those named here always, the rest with the slow tests."""
    assert set(names) <= {case.name for case in EVERY}
    cases = [pytest.param(case, id=case.name, marks=[] if case.name in names else pytest.mark.slow) for case in EVERY]
    return pytest.mark.parametrize("case", cases)
