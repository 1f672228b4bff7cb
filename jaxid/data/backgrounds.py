"""Backgrounds of the drawn scenes."""

from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int

BACKGROUNDS: tuple[str, ...] = ("white", "plain", "gradient", "noise", "texture", "ground")
"""Kinds of background; `Scenes.background_kinds` indexes this tuple."""

HORIZONS = (0.15, 0.4)
"""The highest and the lowest horizon of a ground, in fractions of the picture counted from above."""

_TILE = 256  # side of the periodic noise tiles behind the "noise" and "texture" backgrounds
_STRIPES, _BANDS = 0.55, 0.9  # a ground's stripes and bands per unit of length


def draw_backgrounds(
    kinds: Int[np.ndarray, "N"],
    colors: Float[np.ndarray, "N 2 3"],
    seeds: Int[np.ndarray, "N"],
    size: int,
) -> Float[np.ndarray, "N size size 3"]:
    """Draws pictures without objects, values in 0..1.

    Args:
        kinds: indices into `BACKGROUNDS`.
        colors: the two colours that each background blends pixel by pixel; plain ones show the first, and so does the
            sky above a ground.
        seeds: choose a gradient's direction, the part of the noise or texture that is shown, or a ground's horizon
            and pattern.
        size: rows and columns.
    """
    noise, texture = _tiles()
    levels = horizons(seeds)
    weights = np.zeros((len(kinds), size, size), np.float32)
    blended = np.flatnonzero(kinds > BACKGROUNDS.index("plain"))
    ticks = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    for index in blended:
        seed, kind = int(seeds[index]), BACKGROUNDS[kinds[index]]
        across, down = seed % _TILE, seed // _TILE % _TILE
        if kind == "gradient":
            turn = 2 * np.pi * across / _TILE
            # The direction's largest projection over the unit square, so that weights span 0..1.
            reach = abs(np.cos(turn)) + abs(np.sin(turn))
            weights[index] = np.cos(turn) / reach * (ticks - 0.5) + np.sin(turn) / reach * (ticks - 0.5)[:, None]
            weights[index] += 0.5
        elif kind == "ground":
            weights[index] = _ground(seed, levels[index], size)
        else:
            # Noise keeps its grain in pixels; a texture keeps its place in the picture at every size.
            steps = np.arange(size) if kind == "noise" else np.arange(size) * 128 // size
            tile = noise if kind == "noise" else texture
            weights[index] = tile[np.ix_((steps + down) % _TILE, (steps + across) % _TILE)]
    first, second = np.moveaxis(colors.astype(np.float32), 1, 0)
    canvas = np.empty((len(kinds), size, size, 3), np.float32)
    canvas[:] = first[:, None, None]
    canvas[blended] += weights[blended, ..., None] * (second - first)[blended, None, None]
    return canvas


def horizons(seeds: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
    """Where the grounds drawn with these seeds meet the sky, in fractions of the picture counted from above."""
    highest, lowest = HORIZONS
    return highest + (lowest - highest) * (seeds % _TILE) / (_TILE - 1)


def _ground(seed: int, horizon: float, size: int) -> Float[np.ndarray, "size size"]:
    """Weights of the second colour of a ground plane in perspective: 0 in the sky, 0.4..1 on the ground.

    The plane bears stripes across, which get denser towards the horizon, or bands along, which converge to a vanishing
    point, or both as a chequerboard. The same places look the same at every size.
    """
    choice, start = seed // _TILE**2 % _TILE, seed // _TILE % _TILE / _TILE
    ticks = (np.arange(size) + 0.5) / size
    from_horizon = ticks - horizon
    below = np.maximum(from_horizon, 1e-3)[:, None]
    aside = ticks - start
    stripes = (2 * np.pi * (_STRIPES / below + start), below**2 / _STRIPES)
    bands = (2 * np.pi * _BANDS * aside / below, below**2 / (_BANDS * np.hypot(below, aside)))
    shown = ((stripes,), (bands,), (stripes, bands))[choice % 3]
    # Phases with the lengths of their waves in the picture. Where these are short, the pattern fades: it would flicker.
    wave = np.prod([np.broadcast_to(np.cos(phase), (size, size)) for phase, _ in shown], axis=0)
    shortest = np.min([np.broadcast_to(length, (size, size)) for _, length in shown], axis=0)
    pattern = np.clip(0.5 + np.minimum(4, 8 * shortest) * wave, 0, 1)
    return np.clip(from_horizon * size + 0.5, 0, 1)[:, None] * (0.4 + 0.6 * pattern)


@lru_cache
def _tiles() -> tuple[Float[np.ndarray, "T T"], Float[np.ndarray, "T T"]]:
    """A fixed tile of white noise and one of smooth, cloudy noise, both periodic and in 0..1."""
    rng = np.random.default_rng(20_260_126)
    noise = rng.random((_TILE, _TILE), dtype=np.float32)
    frequency = np.hypot(np.fft.fftfreq(_TILE)[:, None], np.fft.rfftfreq(_TILE)[None]) * _TILE
    # Wavelengths from 1/16 of the tile up, every octave equally strong: clouds without fine grain.
    spectrum = np.where((frequency > 1.5) & (frequency < 16), 1 / np.maximum(frequency, 1), 0)
    cloud = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((_TILE, _TILE))) * spectrum, s=(_TILE, _TILE))
    cloud = np.clip(0.5 + 0.25 * cloud / cloud.std(), 0, 1).astype(np.float32)
    return noise, cloud
