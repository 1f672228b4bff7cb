"""Summary statistics: medians and quartiles, means, confidence intervals and rank tests."""

from typing import TypedDict

import numpy as np
from jaxtyping import Float

from jaxid.errors import InputError


def centre_and_spread(
    values: np.ndarray, axis: int = 0, *, robust: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centre and spread of a sample, for summaries and figures alike.

    Args:
        values: the sample.
        axis: the axis of the sample.
        robust: the median and the quartiles; else the mean and one unbiased standard deviation to each side (0 of a
            single value).

    Returns:
        Centre, lower and upper bound, without that axis.
    """
    if robust:
        low, centre, high = np.quantile(values, [0.25, 0.5, 0.75], axis=axis)
        return centre, low, high
    mean, deviation = np.mean(values, axis=axis), np.std(values, axis=axis, ddof=min(1, values.shape[axis] - 1))
    return mean, mean - deviation, mean + deviation


def mean_interval(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Half of Student's 95 % interval of a mean along an axis; NaN for a single value."""
    from scipy import stats

    sample = np.asarray(values, np.float64)
    count = sample.shape[axis]
    if count < 2:
        return np.full(sample.mean(axis=axis).shape, np.nan)
    return np.asarray(stats.t.ppf(0.975, count - 1) * stats.sem(sample, axis=axis))


def confidence_interval(successes: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        successes: how many of `count`.
        count: number of trials, at least 1.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        InputError: unless 0 <= successes <= count and count >= 1.
    """
    from scipy import stats

    if not 0 <= successes <= count or count < 1:
        raise InputError(f"{successes} successes of {count} trials have no confidence interval.")
    interval = stats.binomtest(int(successes), int(count)).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


class Moments(TypedDict):
    """Count, mean and median of a sample; the last two are None where it is empty."""

    count: int
    mean: float | None
    median: float | None


def moments(values: Float[np.ndarray, "N"]) -> Moments:
    """Count, mean and median of a sample."""
    if not len(values):
        return Moments(count=0, mean=None, median=None)
    return Moments(count=len(values), mean=float(values.mean()), median=float(np.median(values)))


class RankTest(TypedDict):
    """A Mann-Whitney U test of two samples; all values are None where a sample is empty.

    `u` is the number of pairs in which the first sample's value is larger (ties count half), `auc` the share of those
    pairs. `p_greater` is for the first sample having the larger values.
    """

    u: float | None
    auc: float | None
    p_two_sided: float | None
    p_greater: float | None
    p_less: float | None


def rank_test(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "M"]) -> RankTest:
    """Mann-Whitney U of two samples: are values of the first the larger ones?"""
    if not len(first) or not len(second):
        return RankTest(u=None, auc=None, p_two_sided=None, p_greater=None, p_less=None)
    from scipy import stats

    # In float32, scipy rounds the p-values too.
    first, second = first.astype(np.float64), second.astype(np.float64)
    both, greater, less = (
        stats.mannwhitneyu(first, second, alternative=side) for side in ("two-sided", "greater", "less")
    )
    return RankTest(
        u=float(both.statistic),
        auc=float(both.statistic) / (len(first) * len(second)),
        p_two_sided=float(both.pvalue),
        p_greater=float(greater.pvalue),
        p_less=float(less.pvalue),
    )


class Correlation(TypedDict):
    """Spearman's rank correlation over some items; None where it is undefined."""

    items: int
    spearman: float | None
    p: float | None


def correlation(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "N"]) -> Correlation:
    """Rank correlation over the items whose second value is not NaN."""
    known = np.isfinite(second)
    count = int(known.sum())
    # Constant values have no ranks to compare.
    if count < 3 or np.ptp(second[known]) == 0 or np.ptp(first[known]) == 0:
        return Correlation(items=count, spearman=None, p=None)
    from scipy import stats

    rho, p = np.asarray(stats.spearmanr(second[known], first[known]))
    return Correlation(items=count, spearman=float(rho), p=float(p))
