"""Intervals cover what they promise, tests reject as often as they say, curves are fitted as scikit-learn fits them."""

from __future__ import annotations

import numpy as np
import pytest

from guardkit import stats


def test_t_interval_by_hand():
    found = stats.t_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    # 2.7764 is the 97.5 % point of t with 4 degrees of freedom, sqrt(2.5 / 5) the standard error
    assert found.estimate == 3
    assert (found.low, found.high) == pytest.approx((3 - 2.7764 * 0.5**0.5, 3 + 2.7764 * 0.5**0.5), abs=1e-3)
    assert np.isnan(stats.t_interval(np.array([1.0])).low)
    with pytest.raises(ValueError, match="at least one value"):
        stats.t_interval(np.array([]))


def test_grouped_bootstrap_knows_that_groups_vary_together():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=60)
    values, groups = np.repeat(effect, 5) + 0.01 * rng.normal(size=300), np.repeat(np.arange(60), 5)
    grouped = stats.grouped_bootstrap(lambda rows: values[rows].mean(), groups.tolist(), n_resamples=500)
    alone = stats.grouped_bootstrap(lambda rows: values[rows].mean(), list(range(300)), n_resamples=500)
    assert grouped.estimate == alone.estimate == pytest.approx(values.mean())
    assert (grouped.high - grouped.low) / (alone.high - alone.low) == pytest.approx(5**0.5, rel=0.15)
    assert (grouped.high - grouped.low) == pytest.approx(2 * 1.96 * effect.std() / 60**0.5, rel=0.15)


def test_a_statistic_that_is_undefined_in_some_draws():
    labels = np.array([1, 0, 0, 0])

    def share(rows):
        return float(rows.mean()) if labels[rows].any() else None

    found = stats.grouped_bootstrap(share, [0, 1, 2, 3], n_resamples=200)
    assert found.low < found.estimate < found.high
    assert np.isnan(stats.grouped_bootstrap(lambda rows: None, [0, 1]).low)


def test_counts_and_rows_are_the_same_draws():
    groups = ["a", "b", "a", "c", "c", "c"]
    counts = np.concatenate([part for _, part in stats.GroupDraws(groups, n_resamples=20, seed=5).chunks()])
    rows = stats.bootstrap_draws(lambda chosen: np.bincount(chosen, minlength=6), groups, n_resamples=20, seed=5)
    np.testing.assert_array_equal(counts, rows)
    assert (counts[:, 0] == counts[:, 2]).all()


@pytest.mark.parametrize(("seed_sd", "unit_sd", "noise"), [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 3.0, 1.0)])
def test_two_way_interval_covers_the_truth(seed_sd, unit_sd, noise):
    """Of 200 experiments whose true mean is 0, at least 91 % of the intervals hold it, with eight seeds only."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        groups = np.repeat(np.arange(40), 2)
        values = seed_sd * rng.normal(size=(8, 1)) + unit_sd * rng.normal(size=(1, 40))[:, groups] + noise * rng.normal(size=(8, 80))
        found = stats.two_way_bootstrap(values, groups.tolist(), n_resamples=300, seed=trial)
        hits += found.low <= 0 <= found.high
    assert hits >= 182


def test_with_seeds_alone_the_two_way_interval_is_students():
    values = np.repeat(np.random.default_rng(2).normal(size=(6, 1)), 10, axis=1)
    found, students = stats.two_way_bootstrap(values, list(range(10)), n_resamples=20_000), stats.t_interval(values[:, 0])
    assert (found.low, found.high) == pytest.approx((students.low, students.high), abs=0.15 * (students.high - students.low))


def test_one_seed_leaves_the_doubt_of_the_test_units():
    values = np.random.default_rng(3).integers(0, 2, (1, 400)).astype(float)
    found = stats.two_way_bootstrap(values, list(range(400)))
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    with pytest.raises(ValueError, match="test units"):
        stats.two_way_draws(values, [0, 1])


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(4)
    p = [stats.paired_test(rng.normal(size=30), rng.normal(size=30), n_permutations=400, seed=i) for i in range(300)]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.085
    assert 0.4 < np.mean(p) < 0.6


def test_permutation_test_by_hand_and_against_scipy():
    # 4 differences of one sign: 2 of 16 sign patterns lie as far out
    assert stats.paired_test(np.array([2, 3, 4, 5]), np.array([1, 1, 1, 1])) == pytest.approx(2 / 16)
    assert stats.paired_test(np.ones(5), np.ones(5)) == 1
    # the same four values in two groups: 2 of 4
    assert stats.paired_test(np.array([2, 3, 4, 5]), np.ones(4), ["a", "a", "b", "b"]) == pytest.approx(2 / 4)
    from scipy.stats import permutation_test

    rng = np.random.default_rng(5)
    first, second = rng.normal(0.35, 1, 40), rng.normal(size=40)
    reference = permutation_test((first, second), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=9999, rng=0)
    assert stats.paired_test(first, second) == pytest.approx(reference.pvalue, abs=0.02)


def test_bootstrap_p_value_agrees_with_the_t_test():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(6).normal(0.25, 1, 100)
    draws = stats.bootstrap_draws(lambda rows: values[rows].mean(), list(range(100)), n_resamples=4000)
    assert stats.bootstrap_p_value(values.mean(), draws) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.01)


def test_holm_by_hand():
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    found = stats.holm([0.2, np.nan, 0.9])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], [0.4, 0.9])
    assert len(stats.holm([])) == 0


def test_isotonic_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(7)
    curves = rng.normal(size=(50, 9)) + 0.2 * np.arange(9)
    reference = np.array([IsotonicRegression().fit_transform(np.arange(9), curve) for curve in curves])
    np.testing.assert_allclose(stats.isotonic(curves), reference, atol=1e-12)
    np.testing.assert_allclose(stats.isotonic(np.array([3.0, 1.0, 2.0])), [2, 2, 2])


def test_size_at_which_a_curve_reaches_a_target():
    sizes = (4, 16, 64)
    curves = np.array([[0.5, 0.6, 0.8], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]])
    # halfway between 16 and 64 on the log axis is 32
    np.testing.assert_allclose(stats.reached_at(sizes, curves, 0.7), [32, np.inf, 4])
    np.testing.assert_allclose(stats.reached_at(sizes, curves, np.array([0.6, 0.5, 0.95])), [16, 4, np.inf])


def test_an_interval_may_end_at_infinity():
    draws = np.array([*np.arange(90.0), *[np.inf] * 10])
    found = stats.percentile_interval(draws, 40.0)
    assert found.low < 3
    assert np.isinf(found.high)
