"""The rainbow of recoloured pictures: how far hues go towards it, and how often it turns."""

import colorsys

import numpy as np
import pytest

from jaxid.data import pictures
from jaxid.data.pictures import recoloured

PICTURE = np.random.default_rng(0).integers(0, 256, size=(30, 44, 3), dtype=np.uint8)


def hues(picture: np.ndarray) -> np.ndarray:
    """Hue, saturation, value by Python's own conversion."""
    flat = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in picture.reshape(-1, 3).astype(float)]
    return np.array(flat).reshape(picture.shape)


def round_trip(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The shorter way round the colour circle, -0.5 to 0.5."""
    return (second - first + 0.5) % 1 - 0.5


def test_recoloured_saturates_a_little_more():
    bright = np.clip(PICTURE.astype(int) // 4 + [150, 60, 60], 0, 255).astype(np.uint8)
    before, after = hues(bright)[..., 1], hues(recoloured(bright, np.random.default_rng(3)))[..., 1]
    np.testing.assert_allclose(after, np.minimum(1.1 * before, 1), atol=0.01)
    full = np.zeros((8, 8, 3), np.uint8)
    full[..., 1] = 200
    assert recoloured(full, np.random.default_rng(0)).min(-1).max() == 0


def test_recoloured_mixes_three_quarters_of_one_rainbow_by_the_shorter_way(monkeypatch: pytest.MonkeyPatch):
    """Two pictures of one hue each, under the same rainbow, show both which it is and how far hues go towards it."""
    found = {}
    for name, channels in {"red": (255, 0, 0), "cyan": (0, 255, 255)}.items():
        plain = np.broadcast_to(np.array(channels, np.uint8), (40, 60, 3))
        found[name] = hues(recoloured(plain, np.random.default_rng(5)))[..., 0]
    monkeypatch.setattr(pictures, "MIX", 1.0)
    rainbow = hues(recoloured(np.broadcast_to(np.array([255, 0, 0], np.uint8), (40, 60, 3)), np.random.default_rng(5)))
    for name, hue in {"red": 0.0, "cyan": 0.5}.items():
        way = round_trip(np.full((40, 60), hue), rainbow[..., 0])
        clear = np.abs(way) < 0.48  # opposite hues are as far one way as the other
        apart = round_trip((hue + 0.75 * way) % 1, found[name])[clear]
        assert np.abs(apart).max() < 0.005


@pytest.mark.parametrize("shape", [(64, 64), (40, 90)])
def test_rainbow_turns_as_often_as_it_says_in_every_direction(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MIX", 1.0)
    red = np.zeros((*shape, 3), np.uint8)
    red[..., 0] = 255
    turns, slopes = [], []
    for seed in range(40):
        hue = hues(recoloured(red, np.random.default_rng(seed)))[..., 0]
        steps = [np.median(round_trip(hue[:, :-1], hue[:, 1:])), np.median(round_trip(hue[:-1], hue[1:]))]
        across, down = steps[0] * shape[1], steps[1] * shape[0]
        turns.append(abs(across) + abs(down))  # from corner to corner
        slopes.append(np.arctan2(down, across))
    assert min(turns) > 0.8 - 0.1 and max(turns) < 2.5 + 0.1
    assert np.ptp(turns) > 1
    assert len(np.unique(np.digitize(slopes, [-np.pi / 2, 0, np.pi / 2]))) == 4  # all quadrants
