"""Altered pictures for activation swaps: mirrored, or recoloured by a rainbow ([ID] arXiv 2601.12626, Figure 4)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, UInt8

CYCLES = (0.8, 2.5)
"""Least and most cycles of the rainbow across the picture."""

MIX = 0.75
"""Weight of the rainbow's hue in the new hue."""

SATURATION = 1.1
"""Factor by which saturation grows."""


def mirrored(picture: UInt8[np.ndarray, "Y X 3"]) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture reversed left to right."""
    return np.ascontiguousarray(picture[:, ::-1])


Blend = Callable[[Float[np.ndarray, "Y X"], Float[np.ndarray, "Y X"]], Float[np.ndarray, "Y X"]]
"""Blends a picture's hues with the rainbow's; all from 0 to 1."""


def shorter_way(hue: Float[np.ndarray, "Y X"], rainbow: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
    """Hues blended along the shorter arc of the colour circle."""
    return (hue + MIX * ((rainbow - hue + 0.5) % 1.0 - 0.5)) % 1.0


def linear(hue: Float[np.ndarray, "Y X"], rainbow: Float[np.ndarray, "Y X"]) -> Float[np.ndarray, "Y X"]:
    """Hues blended as numbers, as published: two reds at 0.02 and 0.98 become a green."""
    return (1 - MIX) * hue + MIX * rainbow


def recoloured(
    picture: UInt8[np.ndarray, "Y X 3"], rng: np.random.Generator, blend: Blend = shorter_way
) -> UInt8[np.ndarray, "Y X 3"]:
    """The picture in the hues of a rainbow of random direction, number of cycles and phase.

    Lightness is kept, and grey pixels stay grey.

    Args:
        picture: the picture.
        rng: draws the rainbow.
        blend: how hues are blended.
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
    mixed = np.stack([blend(hue, rainbow), np.minimum(SATURATION * saturation, 1.0), value], axis=-1)
    return np.rint(255 * hsv_to_rgb(mixed)).astype(np.uint8)
