"""The small trained models that ship with jaxid, and the recipes that made them."""

from importlib import resources
from pathlib import Path

SHIPPED = ("tiny-llava", "tiny-clip")
"""Names of the models whose weights are part of the package."""


def folder(name: str) -> Path:
    """Path of a shipped model's checkpoint folder (Hugging Face layout)."""
    return Path(str(resources.files(__name__))) / name
