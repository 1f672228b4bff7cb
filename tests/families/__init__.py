"""Tiny random models of every family: each test of a contract that holds for all families runs over `EVERY`."""

import importlib
import pkgutil

from families.base import LLAMA3, VOCABULARY, Case
from families.llava import CASES, llava_config

__all__ = ["CASES", "EVERY", "LLAMA3", "VOCABULARY", "Case", "llava_config"]

EVERY: tuple[Case, ...] = tuple(
    case
    for module in sorted(found.name for found in pkgutil.iter_modules(__path__) if found.name != "base")
    for case in importlib.import_module(f"families.{module}").EVERY
)
"""All tiny models of all families: a module here is a family, and lists its models as `EVERY`."""
