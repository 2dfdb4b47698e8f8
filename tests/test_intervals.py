"""Intervals cover what they promise, tests reject as often as they say, curves are fitted as scikit-learn fits them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t

from guardkit.metrics import intervals
from guardkit.metrics.draws import GroupDraws


def mean_draws(values, groups, *, n_resamples, seed=0):
    """(s, 1 + b) means of every row, as the units are and on redraws of their groups."""
    draws, units = GroupDraws(groups, n_resamples=n_resamples, seed=seed), np.arange(len(groups))
    totals = draws.totals(np.concatenate([values, np.ones((1, len(groups)))]), units)
    return totals[:-1] / totals[-1]


def two_way(values, groups, *, n_resamples, seed=0):
    """Interval of a grand mean over seeds and groups of units."""
    found = mean_draws(values, groups, n_resamples=n_resamples, seed=seed)
    return intervals.percentile_interval(intervals.over_seeds(found[:, 1:], seed=seed), found[:, 0].mean())


def students(values):
    """Student's t interval of a mean."""
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean() - half, values.mean() + half


def test_groups_vary_together():
    rng = np.random.default_rng(0)
    effect = rng.normal(size=60)
    values, groups = np.repeat(effect, 5) + 0.01 * rng.normal(size=300), np.repeat(np.arange(60), 5)
    widths = []
    for units in (groups.tolist(), list(range(300))):
        found = mean_draws(values[None], units, n_resamples=500)[0]
        assert found[0] == pytest.approx(values.mean())
        interval = intervals.percentile_interval(found[1:], found[0])
        widths.append(interval.high - interval.low)
    assert widths[0] / widths[1] == pytest.approx(5**0.5, rel=0.15)
    assert widths[0] == pytest.approx(2 * 1.96 * effect.std() / 60**0.5, rel=0.15)


def test_draws_where_a_figure_is_undefined_are_left_out():
    found = intervals.percentile_interval(np.array([np.nan, 1.0, 2.0, 3.0, np.nan]), 2.0)
    assert (found.low, found.estimate, found.high) == (1.0, 2.0, 3.0)
    assert np.isnan(intervals.percentile_interval(np.array([np.nan]), 2.0).low)


def test_the_same_seed_and_groups_give_the_same_draws_in_parts_too():
    groups = ["a", "b", "a", "c", "c", "c"]
    units = np.arange(6)
    counts = GroupDraws(groups, n_resamples=20, seed=5).weights(units).T
    again = GroupDraws(groups, n_resamples=20, seed=5)
    np.testing.assert_array_equal(np.concatenate([part.weights(units) for part in again.parts(1 << 20)], axis=1), counts.T)
    assert len(list(again.parts(1 << 20))) > 1
    assert (counts[0] == 1).all()
    assert (counts[:, 0] == counts[:, 2]).all()
    assert (counts[:, [0, 1, 3]].sum(axis=1) == 3).all()
    values = np.random.default_rng(0).normal(size=(2, 6))
    np.testing.assert_allclose(again.totals(values, units), values @ counts.T, atol=1e-12)


@pytest.mark.parametrize(("seed_sd", "unit_sd", "noise"), [(1.0, 0.0, 0.0), (0.0, 1.0, 1.0), (1.0, 3.0, 1.0)])
def test_two_way_interval_covers_the_truth(seed_sd, unit_sd, noise):
    """Of 200 experiments whose true mean is 0, at least 91 % of the intervals hold it, with eight seeds only."""
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        groups = np.repeat(np.arange(40), 2)
        values = seed_sd * rng.normal(size=(8, 1)) + unit_sd * rng.normal(size=(1, 40))[:, groups] + noise * rng.normal(size=(8, 80))
        found = two_way(values, groups.tolist(), n_resamples=300, seed=trial)
        hits += found.low <= 0 <= found.high
    assert hits >= 182


def test_with_seeds_alone_the_two_way_interval_is_students():
    values = np.repeat(np.random.default_rng(2).normal(size=(6, 1)), 10, axis=1)
    found, (low, high) = two_way(values, list(range(10)), n_resamples=20_000), students(values[:, 0])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.15 * (high - low))


def test_one_seed_leaves_the_doubt_of_the_test_units():
    values = np.random.default_rng(3).integers(0, 2, (1, 400)).astype(float)
    found = two_way(values, list(range(400)), n_resamples=2000)
    assert found.high - found.low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)


def test_bootstrap_p_value_agrees_with_the_t_test():
    from scipy.stats import ttest_1samp

    values = np.random.default_rng(6).normal(0.25, 1, 100)
    draws = mean_draws(values[None], list(range(100)), n_resamples=4000)[0, 1:]
    assert intervals.bootstrap_p_value(values.mean(), draws) == pytest.approx(ttest_1samp(values, 0).pvalue, abs=0.01)


def test_holm_by_hand():
    np.testing.assert_allclose(intervals.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    found = intervals.holm([0.2, np.nan, 0.9])
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2]], [0.4, 0.9])
    assert len(intervals.holm([])) == 0


def test_isotonic_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    rng = np.random.default_rng(7)
    curves = rng.normal(size=(50, 9)) + 0.2 * np.arange(9)
    reference = np.array([IsotonicRegression().fit_transform(np.arange(9), curve) for curve in curves])
    np.testing.assert_allclose(intervals.isotonic(curves), reference, atol=1e-12)
    np.testing.assert_allclose(intervals.isotonic(np.array([3.0, 1.0, 2.0])), [2, 2, 2])


def test_size_at_which_a_curve_reaches_a_target():
    sizes = (4, 16, 64)
    curves = np.array([[0.5, 0.6, 0.8], [0.5, 0.5, 0.5], [0.9, 0.9, 0.9]])
    # halfway between 16 and 64 on the log axis is 32
    np.testing.assert_allclose(intervals.reached_at(sizes, curves, 0.7), [32, np.inf, 4])
    np.testing.assert_allclose(intervals.reached_at(sizes, curves, np.array([0.6, 0.5, 0.95])), [16, 4, np.inf])


def test_an_interval_may_end_at_infinity():
    draws = np.array([*np.arange(90.0), *[np.inf] * 10])
    found = intervals.percentile_interval(draws, 40.0)
    assert found.low < 3
    assert np.isinf(found.high)
