"""OpenCLIP's preparation of pictures (`open_clip.image_transform` without augmentation)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxid.errors import CheckpointError
from jaxid.prompts.base import check_settings

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class OpenCLIPImages:
    """Shortest side resized, centre cropped, normalised; used like an image processor of transformers."""

    def __init__(self, side: int, settings: Mapping[str, Any]):
        """Reads a `preprocess_cfg`.

        Args:
            side: of the tower's pictures, pixels.
            settings: mean, std, interpolation and resize mode; OpenAI's where it is silent.

        Raises:
            CheckpointError: for a way of resizing that is not implemented, or for settings of another kind.
        """
        from PIL import Image

        size = settings.get("size", side)
        if not size or any(one != side for one in (size if isinstance(size, list | tuple) else [size])):
            raise CheckpointError(f"preprocess_cfg.size {size} is not the tower's {side}.")
        ways = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        way, mode = settings.get("interpolation") or "bicubic", settings.get("resize_mode") or "shortest"
        if str(way) not in ways or mode != "shortest":
            raise CheckpointError(f"preprocess_cfg resizes by {way!r}, {mode!r}, which is not implemented.")
        self.side, self.way = side, ways[way]
        self.image_mean, self.image_std = settings.get("mean") or MEAN, settings.get("std") or STD
        check_settings({"image_mean": self.image_mean, "image_std": self.image_std}, "preprocess_cfg")

    def __call__(self, pictures: Sequence[Any], return_tensors: str = "np") -> dict[str, Float[np.ndarray, "N 3 Y X"]]:
        """PIL pictures as pixels."""
        del return_tensors
        return {"pixel_values": np.stack([self._prepared(picture) for picture in pictures])}

    def _prepared(self, picture: Any) -> Float[np.ndarray, "3 Y X"]:
        width, height = picture.size
        shortest = min(width, height)
        size = (int(self.side * width / shortest), int(self.side * height / shortest))
        resized = picture.resize(size, self.way)
        # Python rounds half to even, as the published code does.
        left, top = (round((length - self.side) / 2) for length in size)
        cropped = resized.crop((left, top, left + self.side, top + self.side))
        values = np.asarray(cropped, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.asarray(value, np.float32)[:, None, None] for value in (self.image_mean, self.image_std))
        return (values - mean) / std
