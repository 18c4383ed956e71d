"""Intervals: no figure without one."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv, fdtrc, stdtr, stdtrit

from mechunlearn.errors import MechunlearnError

Worlds = Iterable[Iterable[float | ArrayLike]]
EXPECTED = "Expected worlds, each a sequence of seeds, each a number or a sequence of numbers, and none of them empty."


def bootstrap_interval(values: ArrayLike, seed: int = 0, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, resampling facts.

    Values that are all equal give an interval of width zero, and few values one that is too narrow: for a share use
    `mean_interval`, which is exact.

    Args:
        values: A number a fact.
        seed: Draws the resamples.
        resamples: How many there are.

    >>> low, high = bootstrap_interval([0.0, 1.0] * 50)
    >>> 0.38 < low < 0.45 < 0.55 < high < 0.62
    True
    """
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = data[rng.integers(0, len(data), (resamples, len(data)))].mean(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def share_interval(right: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a share (Clopper and Pearson, 1934): at least `level` of such intervals hold the truth.

    Args:
        right: How many there are; between two whole numbers for a mean of values from 0 to 1.
        n: Of how many.
        level: The share of intervals that hold the truth. One end alone holds at (1 + level) / 2.

    >>> [round(end, 3) for end in share_interval(0, 8)], [round(end, 3) for end in share_interval(5, 8)]
    ([0.0, 0.369], [0.245, 0.915])
    """
    tail = (1 - level) / 2
    low = float(betaincinv(right, n - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, n - right, 1 - tail)) if right < n else 1.0
    return low, high


def mean_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a share of facts: the exact one where each is 0 or 1, else the bootstrap's.

    Not for other numbers, of which some happen to be 0: a drift of 0 on every text is not a share.

    Args:
        values: A number a fact.
        seed: Draws the resamples of the bootstrap.

    >>> [round(end, 2) for end in mean_interval([1.0] * 8)]
    [0.63, 1.0]
    """
    data = np.asarray(values, dtype=float)
    if len(data) and np.isin(data, (0.0, 1.0)).all():
        return share_interval(int(data.sum()), len(data))
    return bootstrap_interval(data, seed)


def holm(p: ArrayLike) -> NDArray[Any]:
    """Return p-values that are corrected for their number (Holm, 1979): one at .05 or below is right in 95 % of families.

    Args:
        p: One p-value a test.

    >>> holm([0.01, 0.04, 0.03]).round(2).tolist()
    [0.03, 0.06, 0.06]
    """
    given = np.asarray(p, dtype=float)
    order = np.argsort(given)
    found = np.empty(len(given))
    found[order] = np.minimum(np.maximum.accumulate(given[order] * (len(given) - np.arange(len(given)))), 1.0)
    return found


def paired_interval(a: ArrayLike, b: ArrayLike, seed: int = 0, resamples: int = 2000) -> tuple[float, float, float]:
    """Return how much larger a is than b.

    The mean of a - b over pairs (seeds or facts), and its 95 % bootstrap interval.

    Pairs are resampled, so what both sides share (a hard fact, a lucky seed) cancels. Few pairs make it too narrow: it
    misses the truth in about .16 of cases with five pairs of normal noise, in about .1 with eight.

    Args:
        a: A number a seed or fact.
        b: The other side of each pair.
        seed: Draws the resamples.
        resamples: How many there are.

    Raises:
        MechunlearnError: If there are no pairs, or not one b for each a.

    >>> paired_interval([1.5, 2.5, 7.5], [1.0, 2.0, 7.0])
    (0.5, 0.5, 0.5)
    """
    left, right = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if left.ndim != 1 or left.shape != right.shape or not len(left):
        raise MechunlearnError(
            f"Values of shapes {left.shape} and {right.shape} are no pairs. Expected two lists of the same length: "
            "give both sides for the same seeds or facts, in the same order."
        )
    return float((left - right).mean()), *bootstrap_interval(left - right, seed, resamples)


class Estimate(NamedTuple):
    """A mean, its 95 % interval by Student's t, and the degrees of freedom of that."""

    mean: float
    low: float
    high: float
    df: float

    @property
    def error(self) -> float:
        """The standard error."""
        return (self.high - self.low) / 2 / float(stdtrit(self.df, 0.975)) if self.df > 0 else math.nan

    @property
    def p(self) -> float:
        """The p-value of the mean being 0, two-sided."""
        if not self.df > 0:
            return math.nan
        return float(2 * stdtr(self.df, -abs(self.mean) / self.error)) if self.error > 0 else float(self.mean == 0)

    def within(self, size: float) -> bool:
        """Return whether the mean is equivalent to 0: both one-sided tests at .05 (TOST) exclude a mean of this size.

        Args:
            size: The smallest mean that matters.
        """
        half = self.error * float(stdtrit(self.df, 0.95)) if self.df > 0 else math.nan
        return abs(self.mean) + half < size

    @property
    def detectable(self) -> float:
        """The smallest mean that would be told from 0 in 80 of 100 repetitions."""
        both = sum(float(stdtrit(self.df, share)) for share in (0.975, 0.8)) if self.df > 0 else math.nan
        return self.error * both


def over_worlds(values: Worlds) -> Estimate:
    """Return the mean of world means, with the interval of Student's t over worlds.

    The world is the unit: m worlds are m numbers, however many seeds and facts each has. One world has the interval
    over its seeds, and speaks of that world alone; a single number has none (NaN). Its 95 % intervals miss in .05 of
    draws of 2 to 12 worlds (`benchmarks/intervals.py`), where a bootstrap of world means misses in .1 to .5.

    Args:
        values: Worlds of seeds (of facts).

    Raises:
        MechunlearnError: If a level is empty, or not nested like this.

    >>> [round(number, 2) for number in over_worlds([[1.0, 2.0], [3.0], [2.5]])]
    [2.33, 0.44, 4.23, 2]
    """
    worlds = [[float(facts.mean()) for facts in seeds] for seeds in _nested(values)]
    units = np.array([np.mean(seeds) for seeds in worlds] if len(worlds) > 1 else worlds[0])
    return _by_t(
        float(units.mean()), float(units.var(ddof=1)) / len(units) if len(units) > 1 else math.nan, len(units) - 1
    )


def over_crossed(table: ArrayLike) -> Estimate:
    """Return the mean of a full table of two crossed factors, such as codebooks by topics, both drawn at random.

    A factor counts if its F test against the rest has p of at most .05 + .6 / df; one of two levels always does, as its test
    sees next to nothing (preliminary tests: Bancroft, 1944). Then, with mean squares MS:

    - both count: var = (MS of rows + MS of columns - MS of the rest) / cells, and at least what one of them gives; 1 / df
      is the mean of both factors' 1 / df, weighted by their MS (as Cochran and Cox, 1950, weigh quantiles of t);
    - one counts: Student's t over its means;
    - none counts: Student's t over all cells.

    The level and the weights were chosen by simulation, on other sizes and seeds than those that are shown. 95 %
    intervals miss in .03 to .07 of draws (`benchmarks/intervals.py`; `docs/intervals.md`).

    Args:
        table: A number a cell, no cell missing.

    Raises:
        MechunlearnError: If it is no table of two rows and two columns or more.

    >>> [round(number, 2) for number in over_crossed([[1.0, 2.0, 3.0], [2.0, 3.5, 4.0]])]
    [2.58, -3.32, 8.49, 1.33]
    """
    data = np.asarray(table, dtype=float)
    if data.ndim != 2 or min(data.shape) < 2 or not np.isfinite(data).all():
        raise MechunlearnError(
            f"A table of shape {data.shape} is not crossed. Expected two or more rows and columns, and no cell missing."
        )
    means = data.mean(1), data.mean(0)
    mean, freedom = float(data.mean()), [len(each) - 1 for each in means]
    squares = [data.size / len(each) * float(each.var(ddof=1)) for each in means]
    rest_df = freedom[0] * freedom[1]
    rest = float(((data - means[0][:, None] - means[1] + mean) ** 2).sum()) / rest_df
    kept = [
        (ms, df) for ms, df in zip(squares, freedom) if df == 1 or _f_test(ms, rest, df, rest_df) <= 0.05 + 0.6 / df
    ]
    if not kept:
        return _by_t(mean, float(data.var(ddof=1)) / data.size, data.size - 1)
    total = sum(ms for ms, _ in kept)
    variance = max(total - rest * (len(kept) - 1), *squares) if len(kept) == 2 else total
    df = total / sum(ms / df for ms, df in kept) if total > 0 else min(freedom)
    return _by_t(mean, variance / data.size, df)


def _f_test(square: float, rest: float, df: int, rest_df: int) -> float:
    """Return the p-value of a mean square being no larger than the rest's."""
    return float(fdtrc(df, rest_df, square / rest)) if rest > 0 else float(square <= 0)


def _by_t(mean: float, variance: float, df: float) -> Estimate:
    half = math.sqrt(variance) * float(stdtrit(df, 0.975)) if df > 0 else math.nan
    return Estimate(mean, mean - half, mean + half, df)


def _nested(values: Worlds) -> list[list[NDArray[Any]]]:
    """Worlds of seeds, each an array of facts: one fact where a number was given."""
    try:
        worlds = [[np.atleast_1d(np.asarray(facts, dtype=float)) for facts in seeds] for seeds in values]
    except (TypeError, ValueError) as error:
        raise MechunlearnError(f"The values are not nested as expected ({error}). {EXPECTED}") from None
    if not worlds or any(not seeds or any(x.ndim != 1 or not len(x) for x in seeds) for seeds in worlds):
        shapes = [[x.shape for x in seeds] for seeds in worlds]
        raise MechunlearnError(f"The shapes of the values by world and seed are {shapes}. {EXPECTED}")
    return worlds
