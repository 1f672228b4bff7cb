"""The config.json files of the published checkpoints, from `benchmarks/published_configs.py`."""

import importlib.util
from pathlib import Path

from jaxid.nn.fields import Json

_PATH = Path(__file__).parents[1] / "benchmarks" / "published_configs.py"
_SPEC = importlib.util.spec_from_file_location(_PATH.stem, _PATH)
assert _SPEC is not None and _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

CONFIGS: dict[str, Json] = _MODULE.CONFIGS
"""Parsed files by alias; make a deep copy before changing one."""
