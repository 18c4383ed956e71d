"""Intervals: they cover the truth as often as they say, by simulation, and are right where the answer is known."""

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, t, ttest_1samp

from mechunlearn import MechunlearnError
from mechunlearn.metrics.stats import (
    bootstrap_interval,
    hierarchical_interval,
    hierarchical_paired,
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
        assert hierarchical_interval([a, b], seed=1) == hierarchical_interval([a, b], seed=1)
        assert hierarchical_interval([a, b], seed=1) != hierarchical_interval([a, b], seed=2)

    @pytest.mark.parametrize(
        "a, b", [([1.0, 2.0], [1.0]), ([], []), ([[1.0], [2.0]], [[1.0], [2.0]]), (np.array(1.0), np.array(1.0))]
    )
    def test_what_is_not_paired_is_refused(self, a, b):
        with pytest.raises(MechunlearnError, match="are no pairs"):
            paired_interval(a, b)


class TestHierarchical:
    @pytest.mark.parametrize("worlds, seeds, facts", [(10, 3, 0), (12, 2, 10)])
    def test_the_interval_covers_the_truth(self, worlds, seeds, facts):
        def draw(rng, seed):
            by_seed = 0.7 + rng.normal(0, 1, (worlds, 1)) + rng.normal(0, 0.5, (worlds, seeds))
            values = by_seed[..., None] + rng.normal(0, 1, (worlds, seeds, facts)) if facts else by_seed
            return hierarchical_interval(values, seed, 200)

        assert 0.88 <= covered(draw, 0.7) <= 0.99
        assert covered(draw, 0.0) < 0.6

    @pytest.mark.parametrize("worlds, share", [(3, 0.76), (5, 0.87), (10, 0.91)])
    def test_few_worlds_cover_less(self, worlds, share):
        """As often as the docstring says."""

        def draw(rng, seed):
            return hierarchical_interval(rng.normal(0, 1, (worlds, 1)) + rng.normal(0, 0.5, (worlds, 5)), seed, 200)

        assert covered(draw, 0.0) == pytest.approx(share, abs=0.07)

    def test_seeds_of_few_worlds_do_not_stand_in_for_worlds(self):
        """Ten seeds in each of four worlds: taken as 40 runs they say far more than four worlds can."""

        def worlds(rng):
            return rng.normal(0, 1, (4, 1)) + rng.normal(0, 0.3, (4, 10))

        def pooled(rng, seed):
            return 0.0, *bootstrap_interval(worlds(rng).ravel(), seed, 300)

        assert covered(pooled, 0.0) < 0.5
        assert covered(lambda rng, seed: hierarchical_interval(worlds(rng), seed, 200), 0.0) > 0.7

    def test_it_is_wider_than_a_pooled_bootstrap_where_worlds_differ(self):
        values = [[0.0, 0.1, 0.0, 0.1], [1.0, 1.1, 1.0, 1.1], [2.0, 2.1, 2.0, 2.1]]
        mean, low, high = hierarchical_interval(values)
        narrow_low, narrow_high = bootstrap_interval(np.ravel(values))
        assert mean == pytest.approx(1.05)
        assert high - low > 1.5 * (narrow_high - narrow_low)
        assert low <= 0.1 and high >= 2.0, "one in 27 resamples is a single world"

    def test_the_spread_is_that_of_the_levels_added(self):
        """The variance of a resampled mean: that of world means, plus what seeds and facts add when drawn again."""
        rng = np.random.default_rng(0)
        values = rng.normal(0, 1, (6, 1, 1)) + rng.normal(0, 1, (6, 5, 1)) + rng.normal(0, 1, (6, 5, 8))
        by_seed, by_world = values.mean(2), values.mean((1, 2))
        variance = by_world.var() / 6 + by_seed.var(1).mean() / (6 * 5) + values.var(2).mean() / (6 * 5 * 8)
        _, low, high = hierarchical_interval(values, resamples=20000)
        assert high - low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.03)

    def test_no_variance_gives_no_width(self):
        assert hierarchical_interval([[2.0, 2.0], [2.0], [[2.0, 2.0]]]) == (2.0, 2.0, 2.0)

    def test_each_world_and_each_seed_weighs_the_same(self):
        assert hierarchical_interval([[0.0] * 9, [1.0]])[0] == 0.5
        assert hierarchical_interval([[[0.0] * 9, [1.0]]])[0] == 0.5
        _, low, high = hierarchical_interval([[0.0] * 9, [1.0]], resamples=4000)
        assert (low, high) == (0.0, 1.0), "a quarter of the resamples draw one world twice"

    def test_a_single_world_varies_by_its_seeds_alone(self):
        seeds = [0.0, 1.0, 3.0, 4.0, 9.0]
        mean, low, high = hierarchical_interval([seeds], resamples=20000)
        assert mean == pytest.approx(3.4)
        assert (low, high) == pytest.approx(bootstrap_interval(seeds, resamples=20000), abs=0.2)

    def test_facts_within_seeds_are_resampled(self):
        one_seed_each = [[[0.0, 1.0] * 20]]
        _, low, high = hierarchical_interval(one_seed_each, resamples=8000)
        assert (low, high) == pytest.approx(bootstrap_interval(one_seed_each[0][0], resamples=8000), abs=0.03)
        assert hierarchical_interval([[0.5]]) == (0.5, 0.5, 0.5)

    def test_ragged_worlds_arrays_and_tensors_are_the_same(self):
        ragged = [[1.0, 2.0, 3.0], [4.0], [[5.0, 6.0], 7.0]]
        arrays = [np.array([1.0, 2.0, 3.0]), torch.tensor([4.0]), [torch.tensor([5.0, 6.0]), 7]]
        assert hierarchical_interval(ragged) == hierarchical_interval(arrays)
        assert hierarchical_interval(ragged)[0] == pytest.approx((2 + 4 + (5.5 + 7) / 2) / 3)

    @pytest.mark.parametrize(
        "values",
        [[], [[]], [[1.0], []], [[[]]], iter([1.0, 2.0]), np.ones((2, 2, 2, 2)), [[["a"]]], [[1.0, [[1.0], [2.0]]]]],
    )
    def test_what_is_not_nested_is_refused(self, values):
        with pytest.raises(MechunlearnError, match="Expected worlds, each a sequence of seeds"):
            hierarchical_interval(values)


class TestHierarchicalPaired:
    def test_it_is_the_interval_of_the_differences(self):
        a, b = [[1.0, 2.0], [[3.0, 5.0]]], [[0.5, 2.5], [[1.0, 1.0]]]
        by_hand = [[0.5, -0.5], [[2.0, 4.0]]]
        assert hierarchical_paired(a, b, seed=4) == hierarchical_interval(by_hand, seed=4)
        assert hierarchical_paired(a, b)[0] == pytest.approx(1.5)

    def test_pairing_removes_what_worlds_share(self):
        rng = np.random.default_rng(0)
        shared = rng.normal(0, 3, (5, 1)) + rng.normal(0, 1, (5, 4))
        a, b = shared + 0.3 + rng.normal(0, 0.05, (5, 4)), shared + rng.normal(0, 0.05, (5, 4))
        difference, low, high = hierarchical_paired(a, b)
        _, low_a, high_a = hierarchical_interval(a)
        assert 0.2 < low < difference < high < 0.4
        assert high - low < 0.1 * (high_a - low_a)

    @pytest.mark.parametrize("b", [[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]], [[1.0, 2.0], [[3.0, 4.0]]]])
    def test_other_worlds_seeds_or_facts_are_refused(self, b):
        with pytest.raises(MechunlearnError, match=r"\[\[1, 1\], \[1\]\] in a and"):
            hierarchical_paired([[1.0, 2.0], [3.0]], b)


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
    def test_columns_that_differ_are_no_repetitions(self):
        """Of nine topics that differ, five codebooks say little more than one does."""
        rng = np.random.default_rng(0)
        made = [rng.normal(size=(1, 9)) + 0.5 * rng.normal(size=(5, 9)) for _ in range(600)]
        crossed, over_rows = (
            np.mean([not low <= 0 <= high for _, low, high, _ in map(how, made)]) for how in (over_crossed, over_worlds)
        )
        assert 0.02 < crossed < 0.08 and over_rows > 0.3

    def test_it_is_the_mean_square_formula(self):
        data = np.array([[1.0, 2.0, 4.0], [2.0, 5.0, 4.5]])
        mean, by_row, by_column = data.mean(), data.mean(1), data.mean(0)
        rest = data - by_row[:, None] - by_column + mean
        squares = [3 * by_row.var(ddof=1), 2 * by_column.var(ddof=1), (rest**2).sum() / 2]
        variance = (squares[0] + squares[1] - squares[2]) / 6
        assert squares[2] < squares[0] + squares[1] - squares[2]
        assert over_crossed(data).error == pytest.approx(variance**0.5)

    @pytest.mark.parametrize("wrong", [[[1.0, 2.0]], [[1.0], [2.0]], [[1.0, np.nan], [1.0, 2.0]], [1.0, 2.0]])
    def test_what_is_no_full_table_is_refused(self, wrong):
        with pytest.raises(MechunlearnError, match="is not crossed"):
            over_crossed(wrong)
