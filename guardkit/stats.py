"""How sure we are of a number: intervals, paired tests, corrections for many tests, monotone learning curves. NumPy and SciPy only.

Two things vary when a guard is measured: which images it was trained on (seeds) and which it was tested on (test units).
Test units come in groups, a pair or near-duplicates, that are drawn together or not at all. `grouped_bootstrap` redraws
the groups of test units for one classifier; `two_way_bootstrap` redraws seeds and groups for a mean over training runs.
Everything random has a seed and is repeatable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm, t

LEVEL = 0.95
N_RESAMPLES = 2000
_CHUNK_BYTES = 64 << 20


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


def t_interval(values: np.ndarray, *, level: float = LEVEL) -> Interval:
    """Student's t interval of a mean.

    Args:
        values: (n,) independent, for instance one figure per seed.
        level: of confidence, in (0, 1).
    Returns:
        The mean and its interval; the ends are NaN for fewer than two values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    if len(values) < 2:
        return Interval(float(values.mean()), float("nan"), float("nan"))
    half = float(t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half)


def percentile_interval(draws: np.ndarray, estimate: float, *, level: float = LEVEL) -> Interval:
    """The interval between two percentiles of bootstrap draws; draws that are NaN (undefined there) are left out.

    Infinite draws count as larger (or smaller) than any number, and an end that falls on one is infinite.
    """
    draws = np.asarray(draws, float)
    draws = np.sort(draws[~np.isnan(draws)])
    if not len(draws):
        return Interval(estimate, float("nan"), float("nan"))
    tail = (1 - level) / 2
    # whole ranks: interpolation between a number and infinity would be meaningless
    low = draws[int(np.floor(tail * (len(draws) - 1)))]
    high = draws[int(np.ceil((1 - tail) * (len(draws) - 1)))]
    return Interval(estimate, float(low), float(high))


class GroupDraws:
    """Redraws of test units, whole groups at a time, with replacement and as many groups as there are.

    Args:
        groups: (n,) the group of each unit.
        n_resamples: how many redraws.
        seed: the same seed and groups give the same redraws, so what is measured on them may be compared draw by draw.
    """

    def __init__(self, groups: Sequence[object], *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> None:
        self._group_of = _numbered(groups)
        n_groups = int(self._group_of.max()) + 1 if len(self._group_of) else 0
        rng = np.random.default_rng([seed, 31])
        self._drawn = np.zeros((n_resamples, n_groups), np.uint16)
        for row in self._drawn:
            row += np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups).astype(np.uint16)

    @classmethod
    def as_is(cls, n: int) -> GroupDraws:
        """n units, at least one, each once: what is measured on that is the estimate itself."""
        draws = cls([0] * n, n_resamples=0)
        draws._drawn = np.ones((1, 1), np.uint16)
        return draws

    def __len__(self) -> int:
        return len(self._drawn)

    def totals(self, values: np.ndarray, units: np.ndarray | None = None) -> np.ndarray:
        """Sums of values in every redraw. Bounded memory.

        Args:
            values: (k, m).
            units: (m,) the unit that each column belongs to; None: they are the units in order.
        Returns:
            (k, n_resamples).
        """
        group_of = self._group_of if units is None else self._group_of[units]
        n_groups = self._drawn.shape[1]
        by_group = np.array([np.bincount(group_of, weights=row, minlength=n_groups) for row in values])
        sums = np.empty((len(values), len(self)))
        step = max(1, _CHUNK_BYTES // (8 * max(1, n_groups)))
        for start in range(0, len(self), step):
            sums[:, start : start + step] = by_group @ self._drawn[start : start + step].T.astype(float)
        return sums

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Slices of the redraws, and (redraws, n) float64: how often each unit is drawn. Bounded memory."""
        step = max(1, _CHUNK_BYTES // (8 * max(1, len(self._group_of))))
        for start in range(0, len(self._drawn), step):
            part = slice(start, start + step)
            yield part, self._drawn[part][:, self._group_of].astype(float)


def grouped_bootstrap(
    statistic: Callable[[np.ndarray], float | None],
    groups: Sequence[object],
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Percentile interval of any statistic, by drawing whole groups of units with replacement.

    Args:
        statistic: called with an int array of unit rows (some repeated, some missing); None or NaN where undefined.
        groups: (n,) the group of each unit.
        n_resamples: draws.
        seed: of the draws; the same seed and groups give the same draws, so that two classifiers are compared on them.
        level: of confidence.
    Returns:
        The statistic of all units with its interval; NaN throughout where it is undefined on all of them.
    Source: Field and Welsh, 2007, "Bootstrapping clustered data".
    """
    rows = np.arange(len(groups))
    estimate = _number(statistic(rows)) if len(rows) else float("nan")
    if np.isnan(estimate):
        return Interval(estimate, float("nan"), float("nan"))
    return percentile_interval(
        bootstrap_draws(lambda chosen: _number(statistic(chosen)), groups, n_resamples=n_resamples, seed=seed), estimate, level=level
    )


def bootstrap_draws(
    statistic: Callable[[np.ndarray], float | np.ndarray], groups: Sequence[object], *, n_resamples: int = N_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """(n_resamples, ...) values of a statistic on redrawn groups; the statistic may give several numbers at once."""
    number = _numbered(groups)
    order = np.argsort(number, kind="stable")
    starts = np.searchsorted(number[order], np.arange(int(number.max()) + 2))
    rng = np.random.default_rng([seed, 31])
    n_groups = len(starts) - 1
    draws = []
    for _ in range(n_resamples):
        drawn = rng.integers(n_groups, size=n_groups)
        lengths = starts[drawn + 1] - starts[drawn]
        # the members of every drawn group, one group after the other
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        draws.append(statistic(order[np.repeat(starts[drawn], lengths) + inside]))
    return np.asarray(draws, float)


def seed_weights(n_seeds: int, *, n_resamples: int = N_RESAMPLES, seed: int = 0, level: float = LEVEL) -> np.ndarray:
    """Weights of the seeds in redrawn means, stretched for their small number.

    A plain bootstrap of s values gives intervals that are too short by sqrt((s - 1) / s), and by the difference between
    the normal and Student's t; the deviation of each weight from 1 / s is stretched by both, so that without any other
    source of doubt the interval is Student's. (Hesterberg, 2015, "What teachers should know about the bootstrap",
    section 3.2, stretches percentiles for the same reasons.)

    Returns:
        (n_resamples, n_seeds), each row with sum 1; weights may be negative. One seed has the weight 1 always.
    """
    if n_seeds == 1:
        return np.ones((n_resamples, 1))
    rng = np.random.default_rng([seed, 32])
    plain = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=n_resamples) / n_seeds
    tail = (1 + level) / 2
    stretch = t.ppf(tail, n_seeds - 1) / norm.ppf(tail) * (n_seeds / (n_seeds - 1)) ** 0.5
    return 1 / n_seeds + stretch * (plain - 1 / n_seeds)


def two_way_draws(values: np.ndarray, groups: Sequence[object], *, n_resamples: int = N_RESAMPLES, seed: int = 0) -> np.ndarray:
    """Redrawn grand means of a table of training runs by test units.

    Args:
        values: (s, u) one row per seed, one column per test unit.
        groups: (u,) the group of each test unit.
    Returns:
        (n_resamples,) means over redrawn seeds and redrawn groups of test units. The same seed, number of seeds and
        groups give the same draws for every table, so differences of tables may be taken draw by draw.
    """
    values = np.asarray(values, float)
    if values.ndim != 2 or values.shape[1] != len(groups):
        raise ValueError(f"values must be (seeds, {len(groups)} test units), got shape {values.shape}")
    draws = GroupDraws(groups, n_resamples=n_resamples, seed=seed)
    return over_seeds(draws.totals(values) / draws.totals(np.ones((1, len(groups)))), seed=seed)


def over_seeds(by_seed: np.ndarray, *, seed: int = 0, level: float = LEVEL) -> np.ndarray:
    """(..., s, b) figures of s seeds in b redraws of the test units -> (..., b) means over redrawn seeds."""
    n_seeds, n_resamples = by_seed.shape[-2:]
    return np.einsum("bs,...sb->...b", seed_weights(n_seeds, n_resamples=n_resamples, seed=seed, level=level), by_seed)


def two_way_bootstrap(
    values: np.ndarray, groups: Sequence[object], *, n_resamples: int = N_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Interval of a grand mean over training seeds and grouped test units.

    Both ways are redrawn at once, which counts their interaction twice and so errs on the wide side (Owen, 2007, "The
    pigeonhole bootstrap"). With one seed the interval is over test units only.
    """
    estimate = float(np.asarray(values, float).mean())
    return percentile_interval(two_way_draws(values, groups, n_resamples=n_resamples, seed=seed), estimate, level=level)


def bootstrap_p_value(estimate: float, draws: np.ndarray) -> float:
    """Two-sided p value of "the true value is 0" from bootstrap draws of an estimate.

    The draws, moved to have their centre at 0, stand for what chance does; counted is how often they lie as far out as
    the estimate (Davison and Hinkley, 1997, section 4.4). Draws that are NaN are left out. At least 1 / (draws + 1).
    """
    draws = np.asarray(draws, float)
    draws = draws[~np.isnan(draws)]
    return float((1 + (np.abs(draws - estimate) >= abs(estimate) - 1e-12).sum()) / (len(draws) + 1))


def paired_test(
    first: np.ndarray, second: np.ndarray, groups: Sequence[object] | None = None, *, n_permutations: int = 10_000, seed: int = 0
) -> float:
    """Two-sided permutation test of equal means of two paired samples, such as two classifiers on the same images.

    Which of the two gave which value is swapped at random, for all units of a group together.

    Args:
        first, second: (n,) values of the same units, for instance 1 for a right decision and 0 for a wrong one.
        groups: (n,) the group of each unit; None: each is its own.
        n_permutations: random swaps; all of them are tried where there are no more than that.
    Returns:
        The p value, in (0, 1].
    Source: Good, 2005, "Permutation, parametric and bootstrap tests of hypotheses", section 3.
    """
    differences = np.asarray(first, float) - np.asarray(second, float)
    if differences.ndim != 1 or not len(differences):
        raise ValueError(f"paired samples must be (n,) arrays of one length, at least 1, got shape {differences.shape}")
    sums = differences if groups is None else np.bincount(_numbered(groups), weights=differences)
    sums = sums[sums != 0]  # a swap changes nothing there
    observed = abs(sums.sum())
    if not len(sums):
        return 1.0
    tolerance = 1e-9 * np.abs(sums).sum()
    if len(sums) < 63 and 2 ** len(sums) <= n_permutations:
        signs = 1 - 2.0 * ((np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1)
        return float((np.abs(signs @ sums) >= observed - tolerance).mean())
    rng = np.random.default_rng([seed, 33])
    hits, step = 0, max(1, _CHUNK_BYTES // (8 * len(sums)))
    for start in range(0, n_permutations, step):
        signs = rng.integers(0, 2, (min(step, n_permutations - start), len(sums))) * 2.0 - 1
        hits += int((np.abs(signs @ sums) >= observed - tolerance).sum())
    return (1 + hits) / (1 + n_permutations)


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


def clopper_pearson(hits: float, n: int, *, level: float = LEVEL) -> tuple[float, float]:
    """Interval of a share, hits of n independent units; one that a share of 0 or 1 does not collapse (Clopper and Pearson, 1934).

    Args:
        hits: in [0, n]; need not be whole, where a share of images stands for that many groups.
        n: at least 1.
    """
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


def _numbered(groups: Sequence[object]) -> np.ndarray:
    """(n,) groups as numbers from 0, in order of appearance."""
    seen: dict[object, int] = {}
    return np.array([seen.setdefault(group, len(seen)) for group in groups], int)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
