import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxid.dcsm import augment

HEIGHT, WIDTH = 40, 56
CORNERS = np.array([[0, 0], [WIDTH - 1, 0], [WIDTH - 1, HEIGHT - 1], [0, HEIGHT - 1]], np.float32)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing changes; tests turn single changes on again."""
    for name in ("PERSPECTIVE_SHARE", "DEGREES", "NOISE"):
        monkeypatch.setattr(augment, name, 0.0)
    return monkeypatch


def changed_by(key: jax.Array, pictures: jax.Array) -> jax.Array:
    """`augment`, compiled anew for other strengths, since a compiled program keeps those that it was made with."""
    return compiled(augment.PERSPECTIVE_SHARE, augment.DISTORTION, augment.DEGREES, augment.NOISE)(key, pictures)


@functools.cache
def compiled(*strengths: float) -> Callable[[jax.Array, jax.Array], jax.Array]:
    del strengths
    return jax.jit(lambda *given: augment.augment(*given))


def noisy(count: int = 3) -> np.ndarray:
    """Pictures without any symmetry."""
    return np.random.default_rng(5).random((count, HEIGHT, WIDTH, 3), np.float32)


def smooth() -> np.ndarray:
    """One picture of waves, in which a bilinear reading is near the truth."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 9.0
    return np.stack([np.sin(x + 2 * y), np.cos(2 * x), np.sin(y - x)], axis=-1).astype(np.float32) / 2 + 0.5


def read_by_pil(picture: np.ndarray, source: np.ndarray) -> np.ndarray:
    """PIL's perspective reading; its places count from a pixel's corner, not from its middle."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = half @ np.asarray(source, np.float64) @ np.linalg.inv(half)
    numbers = (matrix / matrix[2, 2]).ravel()[:8].tolist()
    channels = [
        Image.fromarray(channel).transform(
            (WIDTH, HEIGHT), Image.Transform.PERSPECTIVE, numbers, Image.Resampling.BILINEAR
        )
        for channel in np.moveaxis(picture, -1, 0)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1)


def inside(margin: int = 8) -> tuple[slice, slice]:
    return slice(margin, HEIGHT - margin), slice(margin, WIDTH - margin)


def test_without_any_change_pictures_stay_as_they_are(still: pytest.MonkeyPatch) -> None:
    pictures = noisy()
    np.testing.assert_allclose(changed_by(jax.random.key(0), jnp.asarray(pictures)), pictures, atol=2e-5)


def test_published_strengths() -> None:
    strengths = (augment.DISTORTION, augment.PERSPECTIVE_SHARE, augment.DEGREES, augment.NOISE)
    assert strengths == (0.05, 0.2, 4.0, 0.02)


def test_shape_kind_and_range() -> None:
    changed = changed_by(jax.random.key(1), jnp.asarray(noisy()))
    assert changed.shape == (3, HEIGHT, WIDTH, 3) and changed.dtype == jnp.float32
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1 + 1e-6


def test_a_key_decides_and_every_picture_is_changed_in_its_own_way() -> None:
    one = jnp.asarray(np.repeat(noisy(1), 3, axis=0))
    first = changed_by(jax.random.key(2), one)
    np.testing.assert_array_equal(first, changed_by(jax.random.key(2), one))
    assert float(jnp.abs(first - changed_by(jax.random.key(3), one)).max()) > 0.1
    assert float(jnp.abs(first[0] - first[1]).max()) > 0.1


def test_a_picture_does_not_depend_on_those_beside_it() -> None:
    pictures, others = jnp.asarray(noisy()), jnp.asarray(noisy()).at[1:].set(0.25)
    key = jax.random.key(4)
    np.testing.assert_allclose(changed_by(key, pictures)[0], changed_by(key, others)[0], rtol=0, atol=1e-6)


def test_homography_takes_corners_where_told_and_keeps_lines_straight() -> None:
    end = CORNERS + np.array([[3, 1.5], [-2, 4], [-5, -0.5], [1, -3]], np.float32)
    matrix = np.asarray(augment.homography(jnp.asarray(CORNERS), jnp.asarray(end)), np.float64)

    def map_points(points: np.ndarray) -> np.ndarray:
        mapped = np.column_stack([points, np.ones(len(points))]) @ matrix.T
        return mapped[:, :2] / mapped[:, 2:]

    np.testing.assert_allclose(map_points(CORNERS), end, atol=1e-4)
    # Both diagonals stay straight, so their crossing goes to the crossing of the new diagonals.
    along, beside = end[2] - end[0], end[1] - end[3]
    share = np.linalg.solve(np.column_stack([along, -beside]), end[3] - end[0])[0]
    np.testing.assert_allclose(map_points(CORNERS.mean(axis=0)[None])[0], end[0] + share * along, atol=1e-4)


def test_warp_reads_as_pil_does() -> None:
    end = CORNERS + np.array([[3, 1.5], [-2, 4], [-5, -0.5], [1, -3]], np.float32)
    source = augment.homography(jnp.asarray(CORNERS), jnp.asarray(end))
    ours = np.asarray(augment.warp(jnp.asarray(smooth()), source))
    np.testing.assert_allclose(ours[inside()], read_by_pil(smooth(), np.asarray(source))[inside()], atol=2e-4)


def test_warp_is_black_outside() -> None:
    shift = jnp.array([[1.0, 0.0, 4.0], [0.0, 1.0, -2.0], [0.0, 0.0, 1.0]])
    ours = np.asarray(augment.warp(jnp.asarray(noisy(1)[0]), shift))
    expected = np.zeros_like(ours)
    expected[2:, :-4] = noisy(1)[0][:-2, 4:]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("degrees", [-4.0, 3.0])
def test_a_turn_is_clockwise_about_the_centre(degrees: float) -> None:
    angle = jnp.deg2rad(degrees)
    ours = np.asarray(augment.warp(jnp.asarray(smooth()), augment.rotation(-angle, HEIGHT, WIDTH)))
    turned = [
        np.asarray(Image.fromarray(channel).rotate(-degrees, Image.Resampling.BILINEAR))  # PIL: counterclockwise
        for channel in np.moveaxis(smooth(), -1, 0)
    ]
    np.testing.assert_allclose(ours[inside()], np.stack(turned, axis=-1)[inside()], atol=2e-4)


def test_angles_are_spread_evenly_up_to_the_limit(still: pytest.MonkeyPatch) -> None:
    still.setattr(augment, "DEGREES", 4.0)
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    ramps = np.repeat(np.stack([x, y, x], axis=-1)[None] / WIDTH, 200, axis=0)
    changed = np.asarray(changed_by(jax.random.key(6), jnp.asarray(ramps)))[:, *inside()] * WIDTH
    down, across = np.gradient(changed[..., 0], axis=1).mean((1, 2)), np.gradient(changed[..., 0], axis=2).mean((1, 2))
    degrees = np.rad2deg(np.arctan2(down, across))
    assert np.abs(degrees).max() <= 4.001
    assert degrees.min() < -3.8 and degrees.max() > 3.8
    np.testing.assert_allclose([degrees.mean(), degrees.std()], [0, 8 / 12**0.5], atol=0.5)


def test_perspective_pulls_corners_inwards_up_to_the_limit(still: pytest.MonkeyPatch) -> None:
    still.setattr(augment, "PERSPECTIVE_SHARE", 1.0)
    still.setattr(augment, "DISTORTION", 0.4)  # so that whole pixels tell
    white = jnp.ones((40, HEIGHT, WIDTH, 3))
    changed = np.asarray(changed_by(jax.random.key(7), white))[..., 0]
    down, right = round(0.2 * HEIGHT), round(0.2 * WIDTH)
    np.testing.assert_allclose(changed[:, down:-down, right:-right], 1, atol=1e-5)
    for corner in (changed[:, 0, 0], changed[:, 0, -1], changed[:, -1, 0], changed[:, -1, -1]):
        assert (corner < 0.5).mean() > 0.8
    near = changed[:, down // 2, WIDTH // 2]  # half way to the limit: some pictures reach it, some do not
    assert 0 < (near < 0.5).mean() < 1


def test_a_fifth_of_the_pictures_is_tilted(still: pytest.MonkeyPatch) -> None:
    still.setattr(augment, "PERSPECTIVE_SHARE", 0.2)
    pictures = np.repeat(noisy(1), 400, axis=0)
    changed = np.asarray(changed_by(jax.random.key(8), jnp.asarray(pictures)))
    share = (np.abs(changed - pictures).max((1, 2, 3)) > 1e-3).mean()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / 400) ** 0.5


def test_salt_and_pepper(still: pytest.MonkeyPatch) -> None:
    still.setattr(augment, "NOISE", 0.02)
    grey = jnp.full((20, HEIGHT, WIDTH, 3), 0.5)
    changed = np.asarray(changed_by(jax.random.key(9), grey))
    assert set(np.unique(changed).tolist()) == {0.0, 0.5, 1.0}
    assert (changed == changed[..., :1]).all(), "a pixel's channels change together"
    hit = changed[..., 0] != 0.5
    assert abs(hit.mean() - 0.02) < 5 * (0.02 * 0.98 / hit.size) ** 0.5
    assert abs(changed[..., 0][hit].mean() - 0.5) < 5 * 0.5 / hit.sum() ** 0.5
