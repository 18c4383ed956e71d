"""Intervals: no figure without one."""

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean, resampling facts.

    Values that are all equal give an interval of width zero: with n facts, a rate of exactly 0 or 1 is still only
    known to about 3/n, so read n beside it.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.38 < low < 0.45 < 0.55 < high < 0.62
    True
    """
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
