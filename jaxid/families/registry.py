"""Which families there are, and the aliases of published checkpoints."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from jaxid.errors import CheckpointError
from jaxid.families import gemma3, internvl, llava, llava_video, mllama, qwen_vl
from jaxid.nn.keys import ROTARY, Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What the loader needs to know of one model family."""

    config: Callable[[dict[str, Any]], Any]  # from the parsed config.json
    network: Callable[..., nnx.Module]  # (config, rngs=...) -> module
    keys: Callable[[Any], list[Key]]  # key table of a config
    renames: tuple[tuple[str, str], ...]  # other spellings of keys -> the table's
    unused: tuple[str, ...]  # patterns of tensors that hold nothing learned


FAMILIES: Mapping[str, Family] = {
    "gemma3": Family(
        config=gemma3.Gemma3Config.from_hf,
        network=gemma3.Gemma3,
        keys=gemma3.gemma3_keys,
        renames=llava.RENAMES,
        unused=llava.UNUSED,
    ),
    "internvl": Family(
        config=internvl.InternVLConfig.from_hf,
        network=internvl.InternVL,
        keys=internvl.internvl_keys,
        renames=internvl.RENAMES,
        unused=ROTARY,
    ),
    "llava": Family(
        config=llava.LlavaConfig.from_hf,
        network=llava.Llava,
        keys=llava.llava_keys,
        renames=llava.RENAMES,
        unused=llava.UNUSED,
    ),
    "llava_onevision": Family(
        config=llava_video.LlavaVideoConfig.from_hf,
        network=llava_video.LlavaVideo,
        keys=llava_video.onevision_keys,
        renames=llava_video.ONEVISION_RENAMES,
        unused=llava.UNUSED,
    ),
    "llava_qwen": Family(
        config=llava_video.LlavaVideoConfig.from_original,
        network=llava_video.LlavaVideo,
        keys=llava_video.original_keys,
        renames=(),
        unused=llava.UNUSED,
    ),
    "mllama": Family(
        config=mllama.MllamaConfig.from_hf,
        network=mllama.Mllama,
        keys=mllama.mllama_keys,
        renames=mllama.RENAMES,
        unused=ROTARY,
    ),
    **{
        name: Family(
            config=qwen_vl.QwenVLConfig.from_hf,
            network=qwen_vl.QwenVL,
            keys=qwen_vl.qwen_vl_keys,
            renames=qwen_vl.RENAMES,
            unused=ROTARY,
        )
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
}
"""Families by the `model_type` of their config.json."""

ALIASES: Mapping[str, str] = {
    "llava-7b": "llava-hf/llava-1.5-7b-hf",
    "llava-13b": "llava-hf/llava-1.5-13b-hf",
    "qwen2-2b": "Qwen/Qwen2-VL-2B-Instruct",
    "qwen-3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "qwen-7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "llama-11b": "meta-llama/Llama-3.2-11B-Vision-Instruct",
    "llava-cot": "Xkev/Llama-3.2V-11B-cot",
    "internvl-1b": "OpenGVLab/InternVL3-1B-hf",
    "internvl-2b": "OpenGVLab/InternVL3-2B-hf",
    "internvl-8b": "OpenGVLab/InternVL3-8B-hf",
    "internvl-14b": "OpenGVLab/InternVL3-14B-hf",
    "gemma-4b": "google/gemma-3-4b-it",
    "gemma-12b": "google/gemma-3-12b-it",
    "llava-video": "lmms-lab/LLaVA-Video-7B-Qwen2",
}
"""Short names of published checkpoints."""


def kind_of(fields: Mapping[str, Any]) -> str:
    """The `model_type` by which a parsed config.json is looked up here.

    LLaVA-NeXT wrote "llava" into some of its own files too, which are told from Hugging Face's by their tower's name.
    """
    kind = fields.get("model_type")
    return "llava_qwen" if kind == "llava" and "mm_vision_tower" in fields else str(kind)


def family(model_type: str, where: str) -> Family:
    """The family of a checkpoint.

    Raises:
        CheckpointError: if it is none of those implemented.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]
