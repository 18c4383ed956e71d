"""Intervals: they cover the truth as often as they say, by simulation, and are right where the answer is known."""

import numpy as np
import pytest
from scipy.stats import binomtest, f, t, ttest_1samp

from mechunlearn import MechunlearnError
from mechunlearn.metrics.stats import (
    bootstrap_interval,
    holm,
    mean_interval,
    over_crossed,
    over_worlds,
    paired_interval,
    share_interval,
)

DRAWS = 200


def covered(draw, truth: float) -> float:
    """The share of simulated experiments whose interval holds the truth."""
    found = [draw(np.random.default_rng(i), i) for i in range(DRAWS)]
    return sum(low <= truth <= high for _, low, high in found) / DRAWS


class TestPaired:
    def test_the_interval_covers_the_truth(self):
        def draw(rng, seed):
            shared = rng.normal(0, 5, 30)
            return paired_interval(shared + rng.normal(0.4, 1, 30), shared + rng.normal(0, 1, 30), seed, 400)

        assert 0.88 <= covered(draw, 0.4) <= 0.99
        assert covered(draw, 0.0) < 0.88, "it does not cover everything"

    def test_it_is_the_interval_of_the_differences(self):
        a, b = np.array([1.0, 5.0, 2.0, 9.0]), np.array([2.0, 1.0, 2.5, 3.0])
        assert paired_interval(a, b, seed=3) == (pytest.approx(2.125), *bootstrap_interval(a - b, seed=3))
        assert paired_interval(b, a, seed=3)[0] == pytest.approx(-2.125)

    def test_pairing_removes_what_both_sides_share(self):
        rng = np.random.default_rng(0)
        hard = rng.normal(0, 3, 60)
        a, b = hard + 0.5 + rng.normal(0, 0.1, 60), hard + rng.normal(0, 0.1, 60)
        _, low, high = paired_interval(a, b)
        _, low_shuffled, high_shuffled = paired_interval(a, rng.permutation(b))
        assert high - low < 0.1 * (high_shuffled - low_shuffled)
        assert 0 < low < 0.5 < high and low_shuffled < 0

    def test_no_variance_gives_no_width(self):
        assert paired_interval([1.5, 4.0], [1.0, 3.5]) == (0.5, 0.5, 0.5)

    def test_seeds_are_reproducible(self):
        a, b = np.random.default_rng(0).normal(size=(2, 12))
        assert paired_interval(a, b, seed=1) == paired_interval(a, b, seed=1) != paired_interval(a, b, seed=2)

    @pytest.mark.parametrize(
        "a, b", [([1.0, 2.0], [1.0]), ([], []), ([[1.0], [2.0]], [[1.0], [2.0]]), (np.array(1.0), np.array(1.0))]
    )
    def test_what_is_not_paired_is_refused(self, a, b):
        with pytest.raises(MechunlearnError, match="are no pairs"):
            paired_interval(a, b)


class TestShares:
    @pytest.mark.parametrize(("right", "n"), [(0, 8), (3, 8), (8, 8), (1, 1), (180, 1000)])
    def test_they_are_scipys_exact_intervals(self, right, n):
        expected = binomtest(right, n).proportion_ci(0.95, "exact")
        assert share_interval(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert mean_interval([1.0] * right + [0.0] * (n - right)) == share_interval(right, n)

    def test_anything_but_0_and_1_is_resampled(self):
        values = [0.0, 1.0, 0.5]
        assert mean_interval(values, seed=3) == bootstrap_interval(values, seed=3)

    def test_holm_is_the_step_down_by_hand(self):
        p = [0.01, 0.04, 0.03, 0.005]
        assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
        assert holm([0.9, 0.8]).tolist() == [1.0, 1.0] and holm([]).tolist() == []


class TestOverWorlds:
    def test_it_is_scipys_t_interval_of_the_world_means(self):
        worlds = [[1.0, 2.0], [4.0], [[1.0, 5.0], [2.0]]]
        means = [1.5, 4.0, 2.5]
        found = over_worlds(worlds)
        expected = ttest_1samp(means, 0.0)
        interval = expected.confidence_interval(0.95)
        assert (found.mean, found.low, found.high, found.df) == pytest.approx(
            (np.mean(means), interval.low, interval.high, 2)
        )
        assert found.p == pytest.approx(expected.pvalue)
        assert found.error == pytest.approx(np.std(means, ddof=1) / 3**0.5)

    def test_one_world_speaks_of_its_seeds_and_one_number_of_nothing(self):
        interval = ttest_1samp([1.0, 2.0, 4.0], 0.0).confidence_interval(0.95)
        assert over_worlds([[1.0, 2.0, 4.0]])[1:3] == pytest.approx((interval.low, interval.high))
        alone = over_worlds([[0.5]])
        assert alone.mean == 0.5 and np.isnan([alone.low, alone.p, alone.detectable]).all() and not alone.within(9)

    @pytest.mark.parametrize(
        "values",
        [[], [[]], [[1.0], []], [[[]]], iter([1.0, 2.0]), np.ones((2, 2, 2, 2)), [[["a"]]], [[1.0, [[1.0], [2.0]]]]],
    )
    def test_what_is_not_nested_is_refused(self, values):
        with pytest.raises(MechunlearnError, match="Expected worlds, each a sequence of seeds"):
            over_worlds(values)

    def test_equivalence_is_two_one_sided_tests(self):
        values = [0.02, -0.01, 0.03, 0.0]
        low, high = (
            ttest_1samp(values, edge, alternative=way).pvalue for edge, way in ((-0.1, "greater"), (0.1, "less"))
        )
        assert max(low, high) < 0.05 and over_worlds([[v] for v in values]).within(0.1)
        wide = over_worlds([[v] for v in (0.2, -0.1, 0.05)])
        assert not wide.within(0.1) and wide.p > 0.05, "neither different nor equal"

    def test_what_could_be_seen_is_seen_in_four_of_five(self):
        rng = np.random.default_rng(0)
        detectable = 1.0 / 6**0.5 * sum(t.ppf(share, 5) for share in (0.975, 0.8))
        seen = [over_worlds([[v] for v in rng.normal(detectable, 1, 6)]).p <= 0.05 for _ in range(600)]
        assert 0.72 < np.mean(seen) < 0.88

    @pytest.mark.parametrize("worlds", [2, 3, 5, 12])
    def test_its_intervals_miss_at_their_rate(self, worlds):
        rng = np.random.default_rng(worlds)
        made = (3 * rng.normal(size=(worlds, 1)) + rng.normal(size=(worlds, 5)) for _ in range(1000))
        missed = [not low <= 0 <= high for _, low, high, _ in (over_worlds(list(each)) for each in made)]
        assert 0.03 < np.mean(missed) < 0.07


class TestCrossed:
    def made(self, rng, shape, by_row, by_column):
        rows, columns = by_row * rng.normal(size=(shape[0], 1)), by_column * rng.normal(size=(1, shape[1]))
        return rows + columns + rng.normal(size=shape)

    def test_columns_that_differ_are_no_repetitions(self):
        """Of nine topics that differ, five codebooks say little more than one does."""
        rng = np.random.default_rng(0)
        made = [self.made(rng, (5, 9), 0, 2) for _ in range(600)]
        crossed, over_rows = (
            np.mean([not low <= 0 <= high for _, low, high, _ in map(how, made)]) for how in (over_crossed, over_worlds)
        )
        assert 0.02 < crossed < 0.08 and over_rows > 0.3

    @pytest.mark.parametrize("by", [(0, 0), (0, 1), (1, 0), (1, 1), (0.3, 0.3)])
    @pytest.mark.parametrize("shape", [(2, 9), (5, 9), (8, 12)])
    def test_its_intervals_miss_at_their_rate(self, shape, by):
        """.03 to .07 in the long run (`benchmarks/intervals.py`); here with the noise of 1,000 draws."""
        rng = np.random.default_rng(1)
        found = [over_crossed(self.made(rng, shape, *by)) for _ in range(1000)]
        assert 0.02 < np.mean([not low <= 0 <= high for _, low, high, _ in found]) < 0.085

    def test_a_factor_counts_where_its_test_says_so(self):
        rng = np.random.default_rng(3)
        noise = rng.normal(size=(5, 9))
        noise -= noise.mean(1, keepdims=True) + noise.mean(0) - noise.mean()
        rows, columns = np.linspace(-3, 3, 5)[:, None], np.linspace(-3, 3, 9)

        def interval(values):
            return ttest_1samp(np.ravel(values), 0.0).confidence_interval(0.95)

        for data, units in ((noise, noise), (noise + rows, rows), (noise + columns, columns)):
            found = over_crossed(data)
            assert found[1:3] == pytest.approx((interval(units).low, interval(units).high))
            assert found.df == np.size(units) - 1

    def test_two_factors_that_count_are_the_mean_square_formula(self):
        rng = np.random.default_rng(3)
        data = rng.normal(size=(4, 6)) + 3 * rng.normal(size=(4, 1)) + 3 * rng.normal(size=6)
        mean, by_row, by_column = data.mean(), data.mean(1), data.mean(0)
        rest = ((data - by_row[:, None] - by_column + mean) ** 2).sum() / 15
        rows, columns = 6 * by_row.var(ddof=1), 4 * by_column.var(ddof=1)
        assert f.sf(rows / rest, 3, 15) < 0.25 and f.sf(columns / rest, 5, 15) < 0.17
        found = over_crossed(data)
        assert found.error == pytest.approx(((rows + columns - rest) / 24) ** 0.5)
        assert found.df == pytest.approx((rows + columns) / (rows / 3 + columns / 5))

    def test_tables_that_do_not_vary_have_no_width(self):
        assert over_crossed(np.ones((3, 4)))[:3] == (1, 1, 1) == over_crossed(np.ones((2, 2)))[:3]
        alike = over_crossed(np.tile([1.0, 2.0, 4.0], (5, 1)))
        interval = ttest_1samp([1.0, 2.0, 4.0], 0.0).confidence_interval(0.95)
        assert alike[1:3] == pytest.approx((interval.low, interval.high)), "five copies of three topics are three"

    @pytest.mark.parametrize("wrong", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, np.nan], [1.0, 2.0]], [1.0, 2.0]])
    def test_what_is_no_full_table_is_refused(self, wrong):
        with pytest.raises(MechunlearnError, match="is not crossed"):
            over_crossed(wrong)
