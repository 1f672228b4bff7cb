"""Changed pictures: mirrored, and recoloured in hue alone."""

import numpy as np
from matplotlib.colors import rgb_to_hsv

from jaxid.data.pictures import SATURATION, mirrored, recoloured


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)


def test_mirrored_twice_is_the_picture() -> None:
    once = mirrored(picture())
    np.testing.assert_array_equal(once[:, 0], picture()[:, -1])
    np.testing.assert_array_equal(mirrored(once), picture())


def test_recoloured_changes_hues_and_keeps_values() -> None:
    shown = recoloured(picture(), np.random.default_rng(1))
    np.testing.assert_array_equal(shown, recoloured(picture(), np.random.default_rng(1)))
    assert (shown != recoloured(picture(), np.random.default_rng(2))).any()
    before, after = rgb_to_hsv(picture() / 255.0), rgb_to_hsv(shown / 255.0)
    np.testing.assert_allclose(after[..., 2], before[..., 2], atol=1 / 255)
    clear = before[..., 2] > 0.5
    expected = np.minimum(SATURATION * before[..., 1], 1)
    np.testing.assert_allclose(after[clear, 1], expected[clear], atol=0.02)
    way = (after[..., 0] - before[..., 0] + 0.5) % 1 - 0.5
    assert np.abs(way[clear & (before[..., 1] > 0.3)]).mean() > 0.1


def test_a_rainbow_of_one_hue_runs_over_the_picture() -> None:
    red = np.zeros((40, 40, 3), np.uint8)
    red[..., 0] = 200
    hues = rgb_to_hsv(recoloured(red, np.random.default_rng(3)) / 255.0)[..., 0]
    assert len(np.unique(np.round(hues, 2))) > 20


def test_grey_stays_grey() -> None:
    grey = np.repeat(picture()[..., :1], 3, axis=-1)
    np.testing.assert_array_equal(recoloured(grey, np.random.default_rng(1)), grey)
