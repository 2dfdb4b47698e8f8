"""How sure we are of a number: intervals, p values, corrections for many tests, monotone learning curves.

Two things vary when a guard is measured: which images it was trained on (seeds) and which it was tested on (test units,
redrawn by `guardkit.metrics.draws`). Everything random has a seed and is repeatable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm, t

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        estimate: from the data as they are.
        low, high: ends of the interval; NaN where it cannot be given.
    """

    estimate: float
    low: float
    high: float


def percentile_interval(draws: np.ndarray, estimate: float) -> Interval:
    """The 95 % interval between two percentiles of bootstrap draws; draws that are NaN (undefined there) are left out.

    Infinite draws count as larger (or smaller) than any number, and an end that falls on one is infinite.
    """
    draws = np.asarray(draws, float)
    draws = np.sort(draws[~np.isnan(draws)])
    if not len(draws):
        return Interval(estimate, float("nan"), float("nan"))
    tail = (1 - LEVEL) / 2
    # whole ranks: interpolation between a number and infinity would be meaningless
    low = draws[int(np.floor(tail * (len(draws) - 1)))]
    high = draws[int(np.ceil((1 - tail) * (len(draws) - 1)))]
    return Interval(estimate, float(low), float(high))


def over_seeds(by_seed: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """Means over redrawn seeds, whose weights are stretched for their small number.

    A plain bootstrap of s values gives intervals that are too short by sqrt((s - 1) / s), and by the difference between
    the normal and Student's t; the deviation of each weight from 1 / s is stretched by both, so that without any other
    source of doubt the interval is Student's. (Hesterberg, 2015, "What teachers should know about the bootstrap",
    section 3.2, stretches percentiles for the same reasons.) Where the test units are redrawn too, their interaction
    counts twice, which errs on the wide side (Owen, 2007, "The pigeonhole bootstrap").

    Args:
        by_seed: (..., s, b) figures of s seeds in b redraws of the test units.
        seed: of the redraws; with the same seed, s and b, figures may be compared draw by draw.
    Returns:
        (..., b); with one seed the figures themselves.
    """
    n_seeds, n_resamples = by_seed.shape[-2:]
    if n_seeds == 1:
        weights = np.ones((n_resamples, 1))
    else:
        rng = np.random.default_rng([seed, 32])
        plain = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds
        tail = (1 + LEVEL) / 2
        stretch = t.ppf(tail, n_seeds - 1) / norm.ppf(tail) * (n_seeds / (n_seeds - 1)) ** 0.5
        weights = 1 / n_seeds + stretch * (plain - 1 / n_seeds)
    return np.einsum("bs,...sb->...b", weights, by_seed)


def bootstrap_p_value(estimate: float, draws: np.ndarray) -> float:
    """Two-sided p value of "the true value is 0" from bootstrap draws of an estimate.

    The draws, moved to have their centre at 0, stand for what chance does; counted is how often they lie as far out as
    the estimate (Davison and Hinkley, 1997, section 4.4). Draws that are NaN are left out. At least 1 / (draws + 1).
    """
    draws = np.asarray(draws, float)
    draws = draws[~np.isnan(draws)]
    return float((1 + (np.abs(draws - estimate) >= abs(estimate) - 1e-12).sum()) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p values corrected for their number (Holm, 1979): reject those below alpha, and the chance of one wrong rejection is at most alpha.

    Args:
        p_values: (m,) in [0, 1]; NaN (a test that could not be made) stays NaN and is not counted.
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(len(p), np.nan)
    order = np.argsort(p, kind="stable")[: int((~np.isnan(p)).sum())]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return adjusted


def isotonic(values: np.ndarray) -> np.ndarray:
    """The nearest non-decreasing sequence in least squares, along the last axis (pool adjacent violators).

    Args:
        values: (..., n) without NaN.
    """
    values = np.asarray(values, float)
    n = values.shape[-1]
    # max over starts of the min over ends of block means: for short curves quicker than pooling, and for all rows at once
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    fitted = np.full(values.shape, -np.inf)
    for start in range(n):
        means = (sums[..., start + 1 :] - sums[..., start : start + 1]) / np.arange(1, n - start + 1)
        lowest = np.minimum.accumulate(means[..., ::-1], axis=-1)[..., ::-1]  # over all ends at or after each position
        fitted[..., start:] = np.maximum(fitted[..., start:], lowest)
    return fitted


def reached_at(sizes: Sequence[float], fitted: np.ndarray, target: float | np.ndarray) -> np.ndarray:
    """The smallest size at which non-decreasing curves reach a target, between sizes by a straight line over log size.

    Args:
        sizes: (n,) rising, above 0.
        fitted: (..., n) non-decreasing along the last axis.
        target: one for all curves, or one for each.
    Returns:
        (...): the size; the smallest one where the target is reached from the start; infinity where it never is. Nothing
        is extrapolated.
    """
    fitted = np.asarray(fitted, float)
    logs = np.log(np.asarray(sizes, float))
    goal = np.broadcast_to(np.asarray(target, float), fitted.shape[:-1])[..., None]
    there = fitted >= goal - 1e-12
    first = there.argmax(axis=-1)[..., None]
    before = np.maximum(first - 1, 0)
    high, low = np.take_along_axis(fitted, first, -1), np.take_along_axis(fitted, before, -1)
    rise = np.where(high > low, high - low, 1.0)
    share = np.where(first > before, np.clip((goal - low) / rise, 0, 1), 1.0)
    where = np.exp(logs[before] + share * (logs[first] - logs[before]))
    return np.where(there.any(axis=-1), where[..., 0], np.inf)


def clopper_pearson(hits: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share, hits of n independent units; one that a share of 0 or 1 does not collapse (Clopper and Pearson, 1934).

    Args:
        hits: in [0, n]; need not be whole, where a share of images stands for that many groups.
        n: at least 1.
        level: how often it holds the true share, at least.
    """
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high
