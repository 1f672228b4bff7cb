"""Which family reads pictures how."""

from collections.abc import Mapping

from jaxid.processing.base import PictureSide
from jaxid.processing.llava import LlavaSide

SIDES: Mapping[str, type[PictureSide]] = {
    "llava": LlavaSide,
}
"""What a family does with pictures on the host, by the `model_type` of its config.json."""
