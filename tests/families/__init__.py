"""Tiny random models of every family: each test of a contract that holds for all families runs over `EVERY`."""

import importlib
import pkgutil
from collections.abc import Sequence

import pytest

from families.base import LLAMA3, VOCABULARY, Case
from families.llava import CASES, llava_config

__all__ = ["CASES", "EACH", "EVERY", "LLAMA3", "QUICK", "UNLIKE", "VOCABULARY", "Case", "llava_config", "over"]

EVERY: tuple[Case, ...] = tuple(
    case
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")
    for case in importlib.import_module(f"families.{module}").EVERY
)
"""All tiny models of all families: a module here is a family, and lists its models as `EVERY`."""

QUICK = ("gemma3", "internvl", "mllama", "qwen2.5-vl-windows", "video-grid")
"""One model of each family; LLaVA's are tested in depth elsewhere."""

EACH = (*QUICK, "llava-plain", "qwen2-vl", "onevision-pictures-shrunk")
"""One model of every way to read pictures."""

UNLIKE = ("gemma3", "mllama", "qwen2.5-vl-windows")
"""Those of them whose decoders differ from LLaVA's."""


def over(quick: Sequence[str], among: Sequence[str] | None = None) -> pytest.MarkDecorator:
    """Runs a test over all models, or some: those that are quick always, the rest with the slow tests."""
    chosen = [case for case in EVERY if among is None or case.name in among]
    assert {*quick, *(among or ())} <= {case.name for case in chosen}
    cases = [pytest.param(case, id=case.name, marks=[] if case.name in quick else pytest.mark.slow) for case in chosen]
    return pytest.mark.parametrize("case", cases)
