"""Flags of XLA that not every release has; it ends the process on one that it does not know."""

import importlib.metadata

OLDER_EMITTERS = (
    "--xla_cpu_use_fusion_emitters=false" if int(importlib.metadata.version("jaxlib").split(".")[1]) <= 10 else ""
)
"""The older CPU emitters, which compile small programs more than twice as fast, where there still are any."""
