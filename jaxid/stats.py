"""What samples are summed up by: medians and quartiles, means, and confidence intervals."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxid.errors import InputError


def centre_and_spread(values: Any, axis: int = 0, *, robust: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a sample is summed up by, in summaries and figures alike.

    Args:
        values: the sample.
        axis: along which it lies.
        robust: the median and the quartiles; else the mean and one standard deviation to each side.

    Returns:
        Centre, lower and upper bound, without that axis.
    """
    if robust:
        low, centre, high = np.quantile(values, [0.25, 0.5, 0.75], axis=axis)
        return centre, low, high
    mean, deviation = np.mean(values, axis=axis), np.std(values, axis=axis)
    return mean, mean - deviation, mean + deviation


def mean_interval(values: Any, axis: int = 0) -> np.ndarray:
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


def moments(values: Float[np.ndarray, "N"]) -> dict[str, Any]:
    """Count, mean and median of a sample; None where it is empty."""
    some = len(values) > 0
    return {
        "count": len(values),
        "mean": float(values.mean()) if some else None,
        "median": float(np.median(values)) if some else None,
    }


def rank_test(first: Float[np.ndarray, "N"], second: Float[np.ndarray, "M"]) -> dict[str, Any]:
    """Mann-Whitney U of two samples: are values of the first the larger ones?

    Returns:
        "u", the number of pairs in which the first sample's value is larger (ties count half); "auc", their share;
        and the p-values "p_two_sided", "p_greater" (the first is larger) and "p_less". All None where a sample is
        empty.
    """
    if not len(first) or not len(second):
        return dict.fromkeys(("u", "auc", "p_two_sided", "p_greater", "p_less"))
    from scipy import stats

    # In float32, scipy rounds the p-values too.
    first, second = first.astype(np.float64), second.astype(np.float64)
    found = {side: stats.mannwhitneyu(first, second, alternative=side) for side in ("two-sided", "greater", "less")}
    u = float(found["two-sided"].statistic)
    values = {f"p_{side.replace('-', '_')}": float(result.pvalue) for side, result in found.items()}
    return {"u": u, "auc": u / (len(first) * len(second)), **values}
