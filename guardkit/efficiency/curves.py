"""Learning curves with their doubt: how a metric rises with the label budget, and how many labels a score takes.

Intervals are over seeds and test images at once: groups of test images (`guardkit.metrics.draws`) and seeds are redrawn,
and the same redraws serve every arm and size, so arms are compared draw by draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from guardkit.data.datamodule import TestSet
from guardkit.efficiency.engine import FittedCell
from guardkit.metrics import intervals
from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.figures import METRICS, Images, Pairs, weighted

# curves rise towards a better guard, and heads here give logits
SWEPT = tuple(name for name, metric in METRICS.items() if metric.better == "higher" and not metric.needs_probabilities)


class Yardstick:
    """A metric on the test set, or a part of it, and on redraws of it.

    Args:
        metric: one of `SWEPT`.
        test: images and pairs.
        draws: of the test images by their groups; a pair goes with its unsafe image. None: there are no redraws.
        images: (n,) bool, the images that count; None: all. Pairs count with their unsafe image.
    """

    def __init__(self, metric: str, test: TestSet, draws: GroupDraws | None = None, images: np.ndarray | None = None) -> None:
        self._metric = METRICS[metric]
        labels = np.array([record.label for record in test.records])
        images = np.ones(len(labels), bool) if images is None else images
        self._images = np.flatnonzero(images)
        self._labels = labels[self._images]
        self._pairs = np.flatnonzero(images[test.pair_rows])
        self._pair_rows = test.pair_rows[self._pairs]
        self._as_is = GroupDraws.as_is(len(labels))
        self._draws = self._as_is if draws is None else draws

    @property
    def n(self) -> int:
        """Pairs, or images, that count."""
        return len(self._pairs if self._metric.of == "pairs" else self._images)

    def reason_against(self) -> str | None:
        """Why the metric is undefined on this test set, or None."""
        if self._metric.of == "pairs":
            return None if len(self._pairs) else "there is no test pair"
        n_unsafe = int((self._labels == 1).sum())
        if n_unsafe in (0, self.n):
            return f"the test set has {n_unsafe} unsafe and {self.n - n_unsafe} safe images"
        return None

    def values(self, fitted: Sequence[FittedCell], thresholds: Sequence[float]) -> np.ndarray:
        """(c,) values of c cells, each flagging what has at least its threshold, in logits; NaN where undefined."""
        if not fitted or self.reason_against():
            return np.full(len(fitted), np.nan)
        return self._on(fitted, thresholds, self._as_is)[:, 0]

    def curve(self, size: int, fitted: Sequence[FittedCell], thresholds: Sequence[float]) -> Curve | None:
        """One label budget of a curve, of cells that differ in their seed, in the order of their seeds; None where it is undefined."""
        if not fitted or self.reason_against():
            return None
        found = self._on(fitted, thresholds, self._draws)
        draws = intervals.over_seeds(np.ascontiguousarray(found[:, 1:]))
        return Curve((size,), np.array([found[:, 0].mean()]), draws[None], (len(fitted),))

    def _on(self, fitted: Sequence[FittedCell], thresholds: Sequence[float], draws: GroupDraws) -> np.ndarray:
        """(c, b) values of c cells on every draw."""
        at = np.array(thresholds)
        of: Images | Pairs
        if self._metric.of == "pairs":
            unsafe = np.array([one.logits[self._pair_rows] for one in fitted])
            safe = np.array([one.counterfactual_logits[self._pairs] for one in fitted])
            of = Pairs(unsafe, safe, at, draws, self._pair_rows)
        else:
            of = Images(self._labels, np.array([one.logits[self._images] for one in fitted]), at, draws, self._images)
        return weighted([self._metric.name], of)[self._metric.name]


@dataclass(frozen=True)
class Curve:
    """One arm's learning curve.

    Attributes:
        sizes: (k,) label budgets at which it is known.
        values: (k,) means over seeds.
        draws: (k, b) of them.
        n_seeds: (k,) seeds behind each.
    """

    sizes: tuple[int, ...]
    values: np.ndarray
    draws: np.ndarray
    n_seeds: tuple[int, ...]

    @classmethod
    def joined(cls, parts: Sequence[Curve]) -> Curve:
        """The curve through parts of it, at least one; a size with fewer seeds than the others has redraws of its own."""
        parts = sorted(parts, key=lambda part: part.sizes)
        sizes, n_seeds = (tuple(one for part in parts for one in getattr(part, name)) for name in ("sizes", "n_seeds"))
        return cls(sizes, np.concatenate([part.values for part in parts]), np.concatenate([part.draws for part in parts]), n_seeds)

    def interval(self, size: int) -> intervals.Interval:
        """At a label budget; the ends lie within the metric's range."""
        i = self.sizes.index(size)
        found = intervals.percentile_interval(self.draws[i], float(self.values[i]))
        return intervals.Interval(found.estimate, float(np.clip(found.low, 0, 1)), float(np.clip(found.high, 0, 1)))


def samples_to_target(
    known: Mapping[str, Curve], baseline: str, target_sizes: Sequence[int], scores: Sequence[float]
) -> list[dict[str, Any]]:
    """How many labelled unsafe images each arm needs for the same score, and the ratio to the baseline.

    Curves are made monotone (isotonic regression) and read between sizes over the logarithm of the size. A target is the
    score of the baseline's curve at a size, in every redraw its own; or a fixed score. Nothing is extrapolated: an arm
    that never gets there has no n, and in redraws it counts with the ratio 0; one that is there from the start has the
    smallest size as an upper bound of its n.

    Returns:
        One row per target and arm, as the contract has it, with `target_size`, `bound` and `reason` besides.
    """
    rows: list[dict[str, Any]] = []
    if baseline not in known:
        return rows
    base = known[baseline]
    fitted = {arm: (intervals.isotonic(one.values), intervals.isotonic(one.draws.T)) for arm, one in known.items()}
    goals: list[tuple[int | None, float, np.ndarray | float]] = []
    for size in target_sizes:
        if size in base.sizes:
            i = base.sizes.index(size)
            goals.append((size, float(fitted[baseline][0][i]), fitted[baseline][1][:, i]))
    goals += [(None, float(score), float(score)) for score in scores]
    for target_size, score, drawn_score in goals:
        base_n = float(intervals.reached_at(base.sizes, fitted[baseline][0], score))
        base_drawn = intervals.reached_at(base.sizes, fitted[baseline][1], drawn_score)
        for arm, one in known.items():
            n = float(intervals.reached_at(one.sizes, fitted[arm][0], score))
            drawn = intervals.reached_at(one.sizes, fitted[arm][1], drawn_score)
            with np.errstate(invalid="ignore"):
                ratio = intervals.percentile_interval(base_drawn / drawn, base_n / n if np.isfinite(n) else float("nan"))
            reasons = []
            if not np.isfinite(n):
                reasons.append(f"the curve of {arm} does not reach it with {one.sizes[-1]} labels (it ends at {fitted[arm][0][-1]:.3f})")
            if not np.isfinite(base_n):
                reasons.append(f"the curve of {baseline} does not reach it with {base.sizes[-1]} labels")
            if np.isinf(ratio.high):
                reasons.append(f"in more than 2.5 % of the redraws {baseline} never reaches it, so the ratio has no upper end")
            at_once = np.isfinite(n) and fitted[arm][0][0] >= score
            rows.append(
                {
                    "target": score,
                    "target_size": target_size,
                    "arm": arm,
                    "n": _finite(n),
                    "baseline_n": _finite(base_n),
                    "ratio": _finite(ratio.estimate),
                    "ratio_ci": [_finite(ratio.low), _finite(ratio.high)],
                    "bound": f"reached with the smallest budget: n is at most {one.sizes[0]}, the ratio at least this" if at_once else None,
                    "reason": "; ".join(reasons) or None,
                }
            )
    return rows


def compare(known: Mapping[str, Curve], baseline: str) -> dict[str, list[dict[str, Any]]]:
    """Paired tests between arms, corrected for their number (Holm), from the common redraws of seeds and test images.

    Returns:
        "by_size": every arm against the baseline at every size; "overall": every two arms on the mean of their curves over
        the sizes that both have. Each row: arms, difference, its interval, p and p_holm.
    """
    by_size, overall = [], []
    for arm, one in known.items():
        if arm == baseline or baseline not in known:
            continue
        for size in one.sizes:
            if size in known[baseline].sizes:
                by_size.append({"arm": arm, "against": baseline, "size": size, **_difference(one, known[baseline], [size])})
    for first, second in combinations(known, 2):
        shared = [size for size in known[first].sizes if size in known[second].sizes]
        if shared:
            overall.append({"arm": first, "against": second, "sizes": shared, **_difference(known[first], known[second], shared)})
    for rows in (by_size, overall):
        for row, corrected in zip(rows, intervals.holm([row["p"] for row in rows]), strict=True):
            row["p_holm"] = float(corrected)
    return {"by_size": by_size, "overall": overall}


def difference(first: Curve, second: Curve, size: int) -> intervals.Interval:
    """First minus second at a label budget."""
    found = _difference(first, second, [size])
    return intervals.Interval(found["difference"], *found["ci"])


def _difference(first: Curve, second: Curve, sizes: Sequence[int]) -> dict[str, Any]:
    mine, theirs = ([one.sizes.index(size) for size in sizes] for one in (first, second))
    estimate = float(first.values[mine].mean() - second.values[theirs].mean())
    draws = first.draws[mine].mean(axis=0) - second.draws[theirs].mean(axis=0)
    found = intervals.percentile_interval(draws, estimate)
    return {"difference": estimate, "ci": [found.low, found.high], "p": intervals.bootstrap_p_value(estimate, draws)}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
