"""What each number is, once for `train`, `evaluate` and `sweep`: a new figure is a function and its entry in `METRICS`.

Every figure is measured on weighted copies of the test set: a bootstrap redraw is a weight per image, and the images as
they are have the weight 1 each. Labels: 1 = unsafe, 0 = safe. Scores: probability of unsafe in [0, 1]; NaN: the guard
abstained, which flags nothing; ranking and calibration are over the images it answered. Flagged: score >= threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from guardkit.metrics.draws import GroupDraws

N_CALIBRATION_BINS = 15
_MAX_FPR = 0.01
_WIDE = 128


class Ranked:
    """Weighted counts at every distinct score of the unsafe images, highest first: no other threshold is of interest.

    Args:
        labels, scores: (n,) of the images that one guard answered.
        weights: (n, b).

    Attributes:
        unsafe: (s, b) unsafe images with that score.
        below, not_above: (s, b) safe images with a lower score, and with that one or a lower one.
        n_unsafe, n_safe: (b,) of all.
    """

    def __init__(self, labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> None:
        unsafe, safe = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
        unsafe, safe = unsafe[np.argsort(-scores[unsafe], kind="stable")], safe[np.argsort(scores[safe], kind="stable")]
        distinct = np.flatnonzero(np.r_[True, np.diff(scores[unsafe]) != 0][: len(unsafe)])
        self.unsafe = weights[unsafe] if len(distinct) == len(unsafe) else np.add.reduceat(weights[unsafe], distinct, axis=0)
        first = np.searchsorted(scores[safe], scores[unsafe[distinct]], side="left")
        last = np.searchsorted(scores[safe], scores[unsafe[distinct]], side="right")
        so_far = _running_sums(weights[safe])
        self.below = so_far[first]
        self.not_above = self.below if (first == last).all() else so_far[last]
        self.n_unsafe, self.n_safe = self.unsafe.sum(axis=0), so_far[-1]

    @cached_property
    def tp(self) -> np.ndarray:
        """(s, b) unsafe images with at least that score."""
        return _running_sums(self.unsafe)[1:]

    @property
    def fp(self) -> np.ndarray:
        """(s, b) safe images with at least that score."""
        return self.n_safe - self.below

    def where_both(self, values: np.ndarray) -> np.ndarray:
        """(b,) values, NaN where a class is missing."""
        return np.where((self.n_unsafe > 0) & (self.n_safe > 0), values, np.nan)


def _running_sums(rows: np.ndarray) -> np.ndarray:
    """(n, b) -> (n + 1, b), from zeros on."""
    sums = np.zeros((len(rows) + 1, rows.shape[1]))
    if rows.shape[1] < _WIDE:
        np.cumsum(rows, axis=0, out=sums[1:])
    else:  # several times quicker there than NumPy's cumsum along the first axis
        for i, row in enumerate(rows):
            np.add(sums[i], row, out=sums[i + 1])
    return sums


@dataclass(frozen=True)
class Images:
    """Labelled images, what c guards say of them, and b weighted copies to measure on.

    Attributes:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (c, n) float, NaN: abstained.
        thresholds: (c,) flagged when score >= threshold.
        draws: the copies.
        units: (n,) the unit of the draws that each image is.
        prevalence: share of unsafe images to state precision for, in [0, 1]; None: it is not stated.
    """

    labels: np.ndarray
    scores: np.ndarray
    thresholds: np.ndarray
    draws: GroupDraws
    units: np.ndarray
    prevalence: float | None = None

    @cached_property
    def counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(c, b) unsafe and safe images that are flagged, (1, b) unsafe and safe images."""
        unsafe = self.labels == 1
        flagged = self.scores >= np.asarray(self.thresholds)[:, None]
        totals = self.draws.totals(np.concatenate([flagged & unsafe, flagged & ~unsafe, [unsafe], [~unsafe]]), self.units)
        c = len(flagged)
        return totals[:c], totals[c : 2 * c], totals[-2:-1], totals[-1:]

    @cached_property
    def weights(self) -> np.ndarray:
        """(n, b) how often each image is drawn."""
        return self.draws.weights(self.units)

    def ranked(self) -> Iterator[Ranked]:
        """One table a guard, of the images that it answered; one after the other, for they are large."""
        for scores in self.scores:
            there = ~np.isnan(scores)
            if there.all():
                yield Ranked(self.labels, scores, self.weights)
            else:
                yield Ranked(self.labels[there], scores[there], self.weights[there])


@dataclass(frozen=True)
class Pairs:
    """Unsafe images and their counterfactuals, what c guards say of both, and b weighted copies to measure on.

    Attributes:
        unsafe, safe: (c, p) scores of the two members; NaN: abstained. Such a pair is neither decided nor ranked
            rightly, and has no margin.
        thresholds, draws, units: as of `Images`, with p pairs; a pair is drawn with its unsafe image.
    """

    unsafe: np.ndarray
    safe: np.ndarray
    thresholds: np.ndarray
    draws: GroupDraws
    units: np.ndarray

    def share(self, right: np.ndarray) -> np.ndarray:
        """(c, p) bool -> (c, b) share of pairs."""
        totals = self.draws.totals(np.concatenate([right, np.ones((1, len(self.units)))]), self.units)
        return totals[:-1] / totals[-1]


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        name: in files and settings.
        title: in reports, as it stands within a sentence.
        values: (c, b) of c guards on b copies; NaN where it is undefined. Divisions by zero are its way to say so.
        of: "images" or "pairs": what it is measured on.
        better: "higher" or "lower", where a guard is better by this figure alone; None where flagging everything or
            nothing, or a constant, gives the best value.
        at_threshold: whether it depends on the threshold.
        needs_answers: it is over the images, or pairs, that a guard answered.
        needs_probabilities: logits will not do instead of scores.
        needs_prevalence: it is stated for a share of unsafe images.
        share_of: the "unsafe", "safe" or "flagged" images, or the "pairs", that it is a share of; None: it is no share.
    """

    name: str
    title: str
    values: Callable[[Any], np.ndarray]
    of: Literal["images", "pairs"] = "images"
    better: Literal["higher", "lower"] | None = None
    at_threshold: bool = True
    needs_answers: bool = False
    needs_probabilities: bool = False
    needs_prevalence: bool = False
    share_of: Literal["unsafe", "safe", "flagged", "pairs"] | None = None

    @property
    def heading(self) -> str:
        """The title, at the start of a line."""
        return self.title[0].upper() + self.title[1:]


def _f1(images: Images) -> np.ndarray:
    tp, fp, n_unsafe, _ = images.counts
    return 2 * tp / (tp + fp + n_unsafe)


def _precision(images: Images) -> np.ndarray:
    tp, fp, _, _ = images.counts
    return tp / (tp + fp)


def _recall(images: Images) -> np.ndarray:
    tp, _, n_unsafe, _ = images.counts
    return tp / n_unsafe


def _fpr(images: Images) -> np.ndarray:
    _, fp, _, n_safe = images.counts
    return fp / n_safe


def _balanced_accuracy(images: Images) -> np.ndarray:
    return (_recall(images) + 1 - _fpr(images)) / 2


def _precision_at_prevalence(images: Images) -> np.ndarray:
    """By Bayes' rule, in a population with another share of unsafe images."""
    assert images.prevalence is not None
    found, alarms = _recall(images) * images.prevalence, _fpr(images) * (1 - images.prevalence)
    return found / (found + alarms)


def _auroc(images: Images) -> np.ndarray:
    """The chance that an unsafe image scores above a safe one; ties count half."""
    rows = []
    for table in images.ranked():
        above, not_below = (np.einsum("sb,sb->b", table.unsafe, safe) for safe in (table.below, table.not_above))
        rows.append((above + not_below) / 2 / (table.n_unsafe * table.n_safe))
    return np.array(rows)


def _average_precision(images: Images) -> np.ndarray:
    """Precision at every distinct score of an unsafe image, weighted by what it adds to recall; no interpolation."""
    rows = []
    for table in images.ranked():
        flagged = table.tp + table.fp
        precision = np.divide(table.tp, flagged, out=np.zeros_like(flagged), where=flagged > 0)
        rows.append(table.where_both((table.unsafe * precision).sum(axis=0) / table.n_unsafe))
    return np.array(rows)


def _recall_at_fpr(images: Images) -> np.ndarray:
    """The largest share of unsafe images flagged at a threshold that flags at most 1 % of the safe ones."""
    rows = []
    for table in images.ranked():
        found = np.where(table.fp <= _MAX_FPR * table.n_safe, table.tp, 0.0).max(axis=0, initial=0.0)
        rows.append(table.where_both(found / table.n_unsafe))
    return np.array(rows)


def _calibration_error(images: Images) -> np.ndarray:
    """Expected calibration error over equal bins of scores, L1; a bin holds its lower edge."""
    edges = np.linspace(0, 1, N_CALIBRATION_BINS + 1)
    rows = []
    for scores in images.scores:
        there = np.flatnonzero(~np.isnan(scores))
        member = np.searchsorted(edges, scores[there], side="right") - 1
        gaps = np.zeros((N_CALIBRATION_BINS + 2, len(there)))
        gaps[member, np.arange(len(there))] = scores[there] - images.labels[there]
        gaps[-1] = 1
        totals = images.draws.totals(gaps, images.units[there])
        rows.append(np.abs(totals[:-1]).sum(axis=0) / totals[-1])
    return np.array(rows)


def _pair_accuracy(pairs: Pairs) -> np.ndarray:
    at = np.asarray(pairs.thresholds)[:, None]
    return pairs.share((pairs.unsafe >= at) & (pairs.safe < at))


def _ranking_accuracy(pairs: Pairs) -> np.ndarray:
    return pairs.share(pairs.unsafe > pairs.safe)


def _mean_margin(pairs: Pairs) -> np.ndarray:
    margin = pairs.unsafe - pairs.safe
    there = ~np.isnan(margin)
    totals = pairs.draws.totals(np.concatenate([np.where(there, margin, 0.0), there]), pairs.units)
    return totals[: len(margin)] / totals[len(margin) :]


METRICS = {
    metric.name: metric
    for metric in (
        Metric("f1", "F1", _f1, better="higher"),
        Metric("precision", "precision", _precision, share_of="flagged"),
        Metric("recall", "recall", _recall, share_of="unsafe"),
        Metric("fpr", "false-positive rate", _fpr, share_of="safe"),
        Metric("balanced_accuracy", "balanced accuracy", _balanced_accuracy, better="higher"),
        Metric("precision_at_prevalence", "precision at prevalence", _precision_at_prevalence, needs_prevalence=True),
        Metric("auroc", "AUROC", _auroc, better="higher", at_threshold=False, needs_answers=True),
        Metric("average_precision", "average precision", _average_precision, better="higher", at_threshold=False, needs_answers=True),
        Metric("recall_at_fpr_0.01", "recall at 1 % FPR", _recall_at_fpr, better="higher", at_threshold=False, needs_answers=True),
        Metric("ece", "calibration error", _calibration_error, at_threshold=False, needs_answers=True, needs_probabilities=True),
        # pairs: SafetyPairs, 2025
        Metric("pair_accuracy", "pair accuracy", _pair_accuracy, of="pairs", better="higher", share_of="pairs"),
        Metric("ranking_accuracy", "ranking accuracy", _ranking_accuracy, "pairs", "higher", at_threshold=False, share_of="pairs"),
        Metric("mean_margin", "mean margin", _mean_margin, "pairs", at_threshold=False, needs_answers=True, needs_probabilities=True),
    )
}
OF_IMAGES = tuple(name for name, metric in METRICS.items() if metric.of == "images")
OF_PAIRS = tuple(name for name, metric in METRICS.items() if metric.of == "pairs")


def weighted(names: Iterable[str], of: Images | Pairs) -> dict[str, np.ndarray]:
    """Figures on every weighted copy, in bounded memory.

    Args:
        names: among `OF_IMAGES`, or among `OF_PAIRS`.
        of: what to measure on.
    Returns:
        (c, b) per figure; NaN where it is undefined.
    """
    metrics = [METRICS[name] for name in names]
    parts = [replace(of, draws=draws) for draws in of.draws.parts(len(of.units))]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = [[metric.values(part) for metric in metrics] for part in parts]
    return {metric.name: np.concatenate(values, axis=1) for metric, values in zip(metrics, zip(*found, strict=True), strict=True)}


def classification_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """How well scores tell unsafe from safe images, without intervals.

    Args:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (n,) float in [0, 1], probability of unsafe.
        threshold: flag when score >= threshold.
    Returns:
        The figures of images, but the one that needs a stated prevalence; threshold, n, prevalence. What a missing class
        leaves undefined is None.
    Raises:
        ValueError: lengths differ, or a score lies outside [0, 1].
    """
    labels, scores = checked(labels, scores)
    n = len(labels)
    names = [name for name in OF_IMAGES if not METRICS[name].needs_prevalence]
    found = weighted(names, Images(labels, scores[None], np.array([threshold]), GroupDraws.as_is(n), np.arange(n)))
    about = {"threshold": float(threshold), "n": n, "prevalence": float((labels == 1).mean()) if n else None}
    return {name: _known(values[0, 0]) for name, values in found.items()} | about


def pair_metrics(unsafe_scores: np.ndarray, counterfactual_scores: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """How well a guard tells unsafe images from their counterfactuals, without intervals.

    Args:
        unsafe_scores: (p,) scores of unsafe images.
        counterfactual_scores: (p,) of their counterfactuals, in the same order.
        threshold: flag when score >= threshold.
    Returns:
        pair_accuracy (both members decided rightly), ranking_accuracy (the unsafe one scores higher), mean_margin (mean
        difference of scores), n. All but n are None without pairs.
    Raises:
        ValueError: lengths differ.
    """
    unsafe, safe = np.asarray(unsafe_scores, float), np.asarray(counterfactual_scores, float)
    if unsafe.shape != safe.shape or unsafe.ndim != 1:
        raise ValueError(f"pairs need two score arrays of one length, got shapes {unsafe.shape} and {safe.shape}")
    n = len(unsafe)
    found = weighted(OF_PAIRS, Pairs(unsafe[None], safe[None], np.array([threshold]), GroupDraws.as_is(n), np.arange(n)))
    return {name: _known(values[0, 0]) for name, values in found.items()} | {"n": n}


def always_unsafe_f1(labels: np.ndarray) -> float | None:
    """F1 of flagging everything, 2p / (1 + p) at prevalence p: what any useful guard must beat. None without images."""
    labels = np.asarray(labels)
    if not len(labels):
        return None
    prevalence = float((labels == 1).mean())
    return 2 * prevalence / (1 + prevalence)


def checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) int64 labels and (n,) float64 scores; raises ValueError when lengths differ or a score lies outside [0, 1]."""
    labels, scores = np.asarray(labels).astype(np.int64), np.ascontiguousarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels and scores must be (n,) arrays of one length, got shapes {labels.shape} and {scores.shape}")
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"scores must lie in [0, 1], got values from {scores.min()} to {scores.max()}; apply a sigmoid to logits")
    return labels, scores


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
