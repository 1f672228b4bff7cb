"""The small trained models that ship with jaxid, and the recipes that made them."""

from importlib import resources
from pathlib import Path

RECIPES = ("tiny-llava", "tiny-clip", "tiny-video")
"""Models that `jaxid zoo train` makes."""

SHIPPED = (*RECIPES, "tiny-llava-weak")
"""Names of the models whose weights are part of the package; the weak one is tiny-llava, trained less."""


def folder(name: str) -> Path:
    """Path of a shipped model's checkpoint folder (Hugging Face layout)."""
    return Path(str(resources.files(__name__))) / name
