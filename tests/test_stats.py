"""Confidence intervals of shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxid.errors import InputError
from jaxid.stats import confidence_interval


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
