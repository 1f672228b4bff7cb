"""Confidence intervals of shares and means; centres and spreads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxid.errors import InputError
from jaxid.stats import centre_and_spread, confidence_interval, mean_interval


@settings(deadline=None)  # the first call imports SciPy
@given(st.integers(0, 40), st.integers(1, 40))
def test_confidence_interval_is_wilsons(successes: int, count: int) -> None:
    successes = min(successes, count)
    share, z = successes / count, 1.959963984540054
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    np.testing.assert_allclose(
        confidence_interval(successes, count),
        (max(middle - half, 0), min(middle + half, 1)),
        atol=1e-12,
    )


@pytest.mark.parametrize(("successes", "count"), [(-1, 3), (4, 3), (0, 0)])
def test_confidence_interval_refuses_impossible_counts(successes: int, count: int) -> None:
    with pytest.raises(InputError, match="no confidence interval"):
        confidence_interval(successes, count)


def test_mean_interval_is_students() -> None:
    values = np.random.default_rng(0).normal(2, 3, (5, 7))
    found = mean_interval(values, axis=1)
    assert found.shape == (5,)
    expected = stats.ttest_1samp(values, 0.0, axis=1).confidence_interval(0.95)
    np.testing.assert_allclose(values.mean(axis=1) - found, expected.low, rtol=1e-12)
    np.testing.assert_allclose(values.mean(axis=1) + found, expected.high, rtol=1e-12)
    assert np.isnan(mean_interval(values[:1])).all()
    assert mean_interval(np.full(4, 0.5)) == 0


def test_centre_and_spread() -> None:
    values = np.array([[1.0, 2.0, 3.0, 4.0, 10.0]])
    assert [float(part[0]) for part in centre_and_spread(values, 1)] == [3.0, 2.0, 4.0]
    assert [float(part[0]) for part in centre_and_spread(values, 1, robust=False)] == pytest.approx(
        [4.0, 4.0 - 12.5**0.5, 4.0 + 12.5**0.5]
    )
