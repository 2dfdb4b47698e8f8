"""The figures of `guardkit.metrics` on many weighted copies of the same images at once: what bootstrap intervals need.

A copy is a row of weights: how often each image was drawn. The first row of the weights is usually all ones, and its
figures are those of `classification_metrics` and `pair_metrics` (tests/test_evaluate.py). Images on which a classifier
abstained count as not flagged; ranking and calibration are over the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from guardkit.metrics import N_CALIBRATION_BINS

RANKING = ("auroc", "average_precision", "recall_at_fpr_0.01", "ece")
DECIDING = ("f1", "precision", "recall", "fpr", "balanced_accuracy", "precision_at_prevalence")
PAIRED = ("pair_accuracy", "ranking_accuracy", "mean_margin")
_CHUNK_BYTES = 32 << 20
_MAX_FPR = 0.01


def resampled_metrics(
    labels: np.ndarray, scores: np.ndarray, threshold: float, weights: np.ndarray, *, prevalence: float, ranking: bool = True
) -> dict[str, np.ndarray]:
    """How well scores tell unsafe from safe images, on every weighted copy.

    Args:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (n,) float in [0, 1]; NaN: abstained, which flags nothing.
        threshold: flag when score >= threshold.
        weights: (b, n), at least 0.
        prevalence: share of unsafe images to state precision for, in [0, 1].
        ranking: whether to give the figures of `RANKING` too.
    Returns:
        (b,) per figure; NaN where it is undefined.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        figures = decisions(labels, np.asarray(scores) >= threshold, weights, prevalence=prevalence)
    answered = ~np.isnan(scores)
    if not ranking:
        return figures
    parts = _in_chunks(lambda part: _ranking(labels[answered], scores[answered], part), weights[:, answered], int(answered.sum()))
    return figures | parts


def decisions(labels: np.ndarray, flagged: np.ndarray, weights: np.ndarray, *, prevalence: float) -> dict[str, np.ndarray]:
    """The figures of `DECIDING` from (n,) bool decisions; see `resampled_metrics`."""
    unsafe, safe = (labels == 1).astype(float), (labels == 0).astype(float)
    tp, fp, n_unsafe, n_safe = (weights @ np.stack([flagged * unsafe, flagged * safe, unsafe, safe], axis=1)).T
    recall, fpr = _over(tp, n_unsafe), _over(fp, n_safe)
    return {
        "f1": _over(2 * tp, tp + fp + n_unsafe),
        "precision": _over(tp, tp + fp),
        "recall": recall,
        "fpr": fpr,
        "balanced_accuracy": (recall + 1 - fpr) / 2,
        "precision_at_prevalence": _over(recall * prevalence, recall * prevalence + fpr * (1 - prevalence)),
    }


def resampled_pairs(unsafe: np.ndarray, twin: np.ndarray, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """How well a classifier tells unsafe images from their safe twins, on every weighted copy.

    Args:
        unsafe, twin: (p,) scores; NaN: abstained. A pair with an abstention is neither decided nor ranked rightly, and has
            no margin.
        threshold: flag when score >= threshold.
        weights: (b, p).
    Returns:
        (b,) pair_accuracy, ranking_accuracy and mean_margin; NaN without pairs.
    """
    with np.errstate(invalid="ignore"):
        right = ((unsafe >= threshold) & (twin < threshold)).astype(float)
        ranked = (unsafe > twin).astype(float)
        margin = unsafe - twin
    answered = ~np.isnan(margin)
    total = weights.sum(axis=1)
    return {
        "pair_accuracy": _over(weights @ right, total),
        "ranking_accuracy": _over(weights @ ranked, total),
        "mean_margin": _over(weights @ np.where(answered, margin, 0.0), weights @ answered.astype(float)),
    }


def _ranking(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Figures over all thresholds, from weighted counts at every distinct score, highest first."""
    undefined = np.full(len(weights), np.nan)
    if not len(scores):
        return dict.fromkeys(RANKING, undefined)
    order = np.argsort(-scores, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(scores[order]) != 0])
    drawn = weights[:, order]
    unsafe = np.add.reduceat(drawn * (labels[order] == 1), starts, axis=1)
    safe = np.add.reduceat(drawn * (labels[order] == 0), starts, axis=1)
    tp, fp = np.cumsum(unsafe, axis=1), np.cumsum(safe, axis=1)
    n_unsafe, n_safe = tp[:, -1], fp[:, -1]
    both = (n_unsafe > 0) & (n_safe > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        # a safe image ranks below every unsafe one before it, and ties count half
        auroc = (safe * (tp - unsafe / 2)).sum(axis=1) / (n_unsafe * n_safe)
        precision = np.where(tp + fp > 0, tp / np.maximum(tp + fp, 1e-300), 0.0)
        average = (unsafe * precision).sum(axis=1) / n_unsafe
        recall = np.where(fp <= _MAX_FPR * n_safe[:, None], tp, 0.0).max(axis=1) / n_unsafe
    return {
        "auroc": np.where(both, auroc, np.nan),
        "average_precision": np.where(both, average, np.nan),
        "recall_at_fpr_0.01": np.where(both, recall, np.nan),
        "ece": _calibration(labels, scores, weights),
    }


def _calibration(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error over equal bins of scores, L1; a bin holds its lower edge."""
    edges = np.linspace(0, 1, N_CALIBRATION_BINS + 1)
    member = np.searchsorted(edges, scores, side="right") - 1
    gaps = np.zeros((len(scores), N_CALIBRATION_BINS + 1))
    gaps[np.arange(len(scores)), member] = scores - labels
    return _over(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def _in_chunks(work: Callable[[np.ndarray], dict[str, np.ndarray]], weights: np.ndarray, n: int) -> dict[str, np.ndarray]:
    step = max(1, _CHUNK_BYTES // (8 * max(1, n)))
    parts = [work(weights[start : start + step].astype(float)) for start in range(0, len(weights), step)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _over(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """top / bottom, NaN where there is nothing to divide by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, top / bottom, np.nan)
