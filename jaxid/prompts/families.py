"""Which family reads pictures how."""

from collections.abc import Mapping

from jaxid.prompts.base import PictureSide
from jaxid.prompts.gemma3 import Gemma3Side
from jaxid.prompts.internvl import InternVLSide
from jaxid.prompts.llava import LlavaSide
from jaxid.prompts.llava_video import OnevisionSide, VideoSide
from jaxid.prompts.mllama import MllamaSide
from jaxid.prompts.qwen_vl import QwenVLSide

SIDES: Mapping[str, type[PictureSide]] = {
    "gemma3": Gemma3Side,
    "internvl": InternVLSide,
    "llava": LlavaSide,
    "llava_onevision": OnevisionSide,
    "llava_qwen": VideoSide,
    "mllama": MllamaSide,
    "qwen2_vl": QwenVLSide,
    "qwen2_5_vl": QwenVLSide,
}
"""What a family does with pictures on the host, by the `model_type` of its config.json."""
