"""All families by their `model_type`, and the short names of published checkpoints."""

from collections.abc import Mapping

from jaxid.errors import CheckpointError
from jaxid.families import (
    blip,
    clip,
    coca,
    flava,
    gemma3,
    internvl,
    llava,
    llava_video,
    mllama,
    openclip,
    qwen_vl,
    siglip,
)
from jaxid.families.base import Checkpoint, Family
from jaxid.nn.fields import Json

_MODELS = (
    llava.FAMILY,
    qwen_vl.FAMILY,
    mllama.FAMILY,
    internvl.FAMILY,
    gemma3.FAMILY,
    llava_video.ORIGINAL,
    llava_video.ONEVISION,
)
_ENCODERS = (clip.FAMILY, siglip.FAMILY, blip.FAMILY, flava.FAMILY, openclip.FAMILY, coca.FAMILY)

FAMILIES: Mapping[str, Family] = {name: family for family in _MODELS for name in family.model_types}
"""Vision-language models by the `model_type` of their config.json."""

ENCODERS: Mapping[str, Family] = {name: family for family in _ENCODERS for name in family.model_types}
"""CLIP-like models by the `model_type` of their config.json, and OpenCLIP's two kinds."""

_CHECKPOINTS = {alias: found for family in (*_MODELS, *_ENCODERS) for alias, found in family.checkpoints.items()}

ALIASES: Mapping[str, str] = {alias: found.repository for alias, found in _CHECKPOINTS.items()}
"""Hugging Face ids of published checkpoints by their short names."""


def kind_of(fields: Json) -> str:
    """The `model_type` under which the family of a parsed config.json is registered here.

    Some files of LLaVA-NeXT say "llava" too; they differ from Hugging Face's by naming their tower.
    """
    kind = fields.get("model_type")
    return "llava_qwen" if kind == "llava" and "mm_vision_tower" in fields else str(kind)


def family(model_type: str, where: str, known: Mapping[str, Family] = FAMILIES) -> Family:
    """The family of a checkpoint.

    Args:
        model_type: as `kind_of` returns it.
        where: the file that names it, for the error.
        known: the families to choose from, `FAMILIES` or `ENCODERS`.

    Raises:
        CheckpointError: if it is none of them.
    """
    if model_type not in known:
        what = "vision-language" if known is FAMILIES else "CLIP-like"
        kinds = ", ".join(sorted(known))
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not a supported {what} model; supported: {kinds}."
        )
    return known[model_type]


def published(name: str) -> Checkpoint:
    """The published checkpoint of an alias or Hugging Face id; for any other name, one that names no layers."""
    return next((found for alias, found in _CHECKPOINTS.items() if name in (alias, found.repository)), Checkpoint(name))
