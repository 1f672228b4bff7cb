"""LLaVA-1.5: one token for every patch (HF LlavaProcessor)."""

from jaxid.prompts.base import PictureSide


class LlavaSide(PictureSide):
    """Pictures of one size; answers begin with a capital."""

    case = "capital"
