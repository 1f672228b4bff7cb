"""The config.json files of the published checkpoints, which the benchmarks keep."""

import importlib.util
from pathlib import Path
from typing import Any

_PATH = Path(__file__).parents[1] / "benchmarks" / "published_configs.py"
_SPEC = importlib.util.spec_from_file_location(_PATH.stem, _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

CONFIGS: dict[str, dict[str, Any]] = _MODULE.CONFIGS
"""Parsed files by alias; copy one deeply before changing it."""
