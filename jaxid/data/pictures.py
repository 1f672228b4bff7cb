"""Altered pictures for activation swaps: mirrored, or recoloured by a rainbow ([ID] arXiv 2601.12626, Figure 4)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

CYCLES = (0.8, 2.5)
"""Least and most cycles of the rainbow across the picture."""

MIX = 0.75
"""Weight of the rainbow's hue in the new hue."""

SATURATION = 1.1
"""Factor by which saturation grows."""


def mirrored(picture: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture reversed left to right."""
    return np.ascontiguousarray(picture[:, ::-1])


Recolouring = Callable[[UInt8[np.ndarray, "Y X 3"], np.random.Generator], UInt8[np.ndarray, "Y X 3"]]
"""A picture in other hues, which the generator draws."""


def recoloured(picture: UInt8[np.ndarray, "Y X 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture in the hues of a rainbow of random direction, number of cycles and phase.

    Hues are blended along the shorter arc of the colour circle. Lightness is kept, and grey pixels stay grey.
    """
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    height, width = picture.shape[:2]
    angle, cycles, phase = rng.uniform(0, 2 * np.pi), rng.uniform(*CYCLES), rng.uniform()
    y, x = np.mgrid[:height, :width]
    # Normalised by its range over the picture, so that every direction shows the same number of cycles.
    along = np.cos(angle) * (x + 0.5) / width + np.sin(angle) * (y + 0.5) / height
    along /= abs(np.cos(angle)) + abs(np.sin(angle))
    rainbow = (cycles * along + phase) % 1.0
    hue, saturation, value = np.moveaxis(rgb_to_hsv(picture / 255.0), -1, 0)  # 0 to 1 each
    way = (rainbow - hue + 0.5) % 1.0 - 0.5
    mixed = np.stack([(hue + MIX * way) % 1.0, np.minimum(SATURATION * saturation, 1.0), value], axis=-1)
    return np.rint(255 * hsv_to_rgb(mixed)).astype(np.uint8)


def recoloured_linearly(picture: UInt8[np.ndarray, "Y X 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture in the hues of a rainbow as the published code blends them: as numbers, in Pillow's 256 hues.

    Two reds on either side of hue 0 can become a green. The number of cycles depends on the direction.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    angle, cycles, phase = rng.uniform(0, 2 * np.pi), rng.uniform(*CYCLES), rng.uniform()
    x, y = np.linspace(0, 1, width, dtype=np.float32), np.linspace(0, 1, height, dtype=np.float32)
    rainbow = ((np.cos(angle) * x + np.sin(angle) * y[:, None]) * cycles + phase) % 1.0
    levels = np.asarray(Image.fromarray(picture).convert("HSV"), np.float32) / 255
    mixed = (1 - MIX) * levels[..., 0] + MIX * rainbow, SATURATION * levels[..., 1], levels[..., 2]
    stored = (255 * np.clip(np.stack(mixed, axis=-1), 0, 1)).astype(np.uint8)
    bands = [Image.fromarray(band) for band in np.moveaxis(stored, -1, 0)]
    return np.asarray(Image.merge("HSV", bands).convert("RGB"))
