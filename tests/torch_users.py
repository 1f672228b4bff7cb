"""Which test files import PyTorch, found without importing any of them; and programs that run without it."""

import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent

WITHOUT_TORCH = """
import importlib.machinery
import sys
class WithoutTorch(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *place):
        return None if name.split(".")[0] in ("torch", "torchvision") else super().find_spec(name, *place)
WithoutTorch.__name__ = "PathFinder"  # by which jaxtyping finds it
sys.meta_path[:] = [WithoutTorch if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
"""
"""First lines of a program that runs as if neither torch nor torchvision were installed."""

IMPORT = re.compile(r"^\s*(?:from|import)\s+(\w+)((?:\.\w+)*)", re.MULTILINE)


@functools.cache
def imports_torch(path: Path) -> bool:
    """Whether a file of `tests/` imports PyTorch anywhere, itself or by way of other files there."""
    reached, left = set[Path](), [path]
    while left:
        reached.add(here := left.pop())
        names = _imports(here)
        if "torch" in names:
            return True
        left += {_modules()[name] for name in names & _modules().keys()} - reached
    return False


@functools.cache
def _imports(path: Path) -> set[str]:
    """The modules that a file imports, and the packages that they lie in."""
    found = IMPORT.findall(path.read_text(encoding="utf-8"))
    return {first for first, _ in found} | {first + rest for first, rest in found}


@functools.cache
def _modules() -> dict[str, Path]:
    """The files of `tests/` by the names under which others import them: packages there lie in no package."""
    found = {}
    for path in TESTS.rglob("*.py"):
        package = [path.parent.name] if (path.parent / "__init__.py").exists() else []
        found[".".join([*package, *([] if path.name == "__init__.py" else [path.stem])])] = path
    return found
