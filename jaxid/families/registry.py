"""Which families there are, and the short names of published checkpoints."""

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
from jaxid.families.base import Family, Published
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
"""CLIP-like models by the `model_type` of their config.json, and OpenCLIP's two."""

ALIASES: Mapping[str, str] = {
    alias: repository for family in (*_MODELS, *_ENCODERS) for alias, repository in family.aliases.items()
}
"""Short names of published checkpoints, and their Hugging Face ids."""


def kind_of(fields: Json) -> str:
    """The `model_type` by which a parsed config.json is looked up here.

    LLaVA-NeXT wrote "llava" into some of its own files too, which are told from Hugging Face's by their tower's name.
    """
    kind = fields.get("model_type")
    return "llava_qwen" if kind == "llava" and "mm_vision_tower" in fields else str(kind)


def family(model_type: str, where: str, known: Mapping[str, Family] = FAMILIES) -> Family:
    """The family of a checkpoint.

    Args:
        model_type: as `kind_of` gives it.
        where: the file that names it.
        known: the families to choose from, `FAMILIES` or `ENCODERS`.

    Raises:
        CheckpointError: if it is none of them.
    """
    if model_type not in known:
        what = "vision-language" if known is FAMILIES else "CLIP-like"
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is no {what} model that is supported; "
            f"supported: {', '.join(sorted(known))}."
        )
    return known[model_type]


def published(name: str) -> Published:
    """The layers of published experiments in a checkpoint; none for one that was not published with them.

    Args:
        name: its alias or Hugging Face id.
    """
    for one in _MODELS:
        for alias, layers in one.published.items():
            if name in (alias, one.aliases[alias]):
                return layers
    return Published()
