"""What each number is. The ranking, threshold and calibration metrics are torchmetrics'; pair metrics,
prevalence-adjusted precision, the all-unsafe baseline, operating points and the edited-versus-original probe are ours.

Labels: 1 = unsafe, 0 = safe. Scores: probability of unsafe in [0, 1]. Flagged: score >= threshold. A figure that
cannot be computed is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guardkit.schema import InputError

N_CALIBRATION_BINS = 15
PROBE_MIN_IMAGES = 10


def classification_metrics(labels: np.ndarray, scores: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """How well scores tell unsafe from safe images.

    Args:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (n,) float in [0, 1], probability of unsafe.
        threshold: flag when score >= threshold.
    Returns:
        auroc, average_precision, recall_at_fpr_0.01, f1, precision, recall, fpr, balanced_accuracy, ece (15 equal
        bins, L1), threshold, n, prevalence. What a missing class leaves undefined is None.
    Raises:
        ValueError: lengths differ, or a score lies outside [0, 1].
    """
    labels, scores = _checked(labels, scores)
    flagged = scores >= threshold
    tp, fp = int((flagged & (labels == 1)).sum()), int((flagged & (labels == 0)).sum())
    n_unsafe, n_safe = int((labels == 1).sum()), int((labels == 0).sum())
    recall = tp / n_unsafe if n_unsafe else None
    fpr = fp / n_safe if n_safe else None
    both = recall is not None and fpr is not None
    auroc = average_precision = ece = None
    if len(labels):
        import torch
        from torchmetrics.functional.classification import binary_auroc, binary_average_precision, binary_calibration_error

        target, preds = torch.from_numpy(labels), torch.from_numpy(scores)
        ece = float(binary_calibration_error(preds, target, n_bins=N_CALIBRATION_BINS, norm="l1"))
        if both:
            auroc = float(binary_auroc(preds, target))
            average_precision = float(binary_average_precision(preds, target))
    return {
        "auroc": auroc,
        "average_precision": average_precision,
        "f1": 2 * tp / (2 * tp + fp + n_unsafe - tp) if n_unsafe or fp else None,
        "precision": tp / (tp + fp) if tp + fp else None,
        "recall": recall,
        "fpr": fpr,
        "balanced_accuracy": (recall + 1 - fpr) / 2 if recall is not None and fpr is not None else None,
        "ece": ece,
        "recall_at_fpr_0.01": recall_at_fpr(labels, scores, max_fpr=0.01)[0] if both else None,
        "threshold": float(threshold),
        "n": len(labels),
        "prevalence": n_unsafe / len(labels) if len(labels) else None,
    }


def recall_at_fpr(labels: np.ndarray, scores: np.ndarray, *, max_fpr: float) -> tuple[float, float]:
    """Share of unsafe images flagged when at most `max_fpr` of the safe ones are.

    Args:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (n,) float in [0, 1].
        max_fpr: false-positive rate, a fraction in (0, 1].
    Returns:
        The largest such recall, and the smallest threshold among the unsafe scores that gives it. Where no threshold
        among them keeps the rate, recall is 0 and the threshold lies just above every score.
    Raises:
        ValueError: a class is missing from `labels`, or `max_fpr` is out of range.
    Source: ROC definitions; agrees with sklearn.metrics.roc_curve (tests/test_metrics.py).
    """
    labels, scores = _checked(labels, scores)
    if not 0 < max_fpr <= 1:
        raise ValueError(f"max_fpr must lie in (0, 1], got {max_fpr}")
    unsafe, safe = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    if not len(unsafe) or not len(safe):
        raise ValueError(f"recall at a false-positive rate needs both classes, got {len(unsafe)} unsafe and {len(safe)} safe")
    flagged_safe = len(safe) - np.searchsorted(safe, unsafe, side="left")
    fine = np.flatnonzero(flagged_safe <= max_fpr * len(safe))
    if not len(fine):
        return 0.0, float(np.nextafter(scores.max(), 2))
    threshold = float(unsafe[fine[0]])
    return float((unsafe >= threshold).mean()), threshold


def operating_points(labels: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, Any]]:
    """Thresholds for named purposes, chosen on validation images.

    Args:
        labels: (n,) int; scores: (n,) float in [0, 1].
    Returns:
        "balanced" (largest balanced accuracy; among equals the threshold nearest 0.5), "fpr_0.01" and "fpr_0.05" (at
        most that share of safe validation images flagged), each with threshold, recall, fpr, n_unsafe, n_safe and
        `fpr_ci_high`, the upper end of the 95 % Clopper-Pearson interval of the false-positive rate: with 10 safe
        images a rate of 0 may still be 0.31. A rate that cannot be seen on so few safe images (0.05 on fewer than 20)
        has a `reason` beside it; where no threshold keeps the rate and flags anything, threshold, recall, fpr and
        fpr_ci_high are None. Empty when a class is missing.
    """
    from guardkit.stats import clopper_pearson  # SciPy takes a while to load

    labels, scores = _checked(labels, scores)
    n_unsafe, n_safe = int((labels == 1).sum()), int((labels == 0).sum())
    if not n_unsafe or not n_safe:
        return {}
    values = np.unique(scores)
    # halfway between neighbours: the same decisions here, the most room for new images
    candidates = np.unique(np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [0.5, 1.0]]))
    recall = (scores[labels == 1][None] >= candidates[:, None]).mean(axis=1)
    fpr = (scores[labels == 0][None] >= candidates[:, None]).mean(axis=1)
    gain = recall - fpr
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    thresholds = {"balanced": float(candidates[best[np.abs(candidates[best] - 0.5).argmin()]])}
    reasons: dict[str, str] = {}
    for max_fpr in (0.01, 0.05):
        name, needed = f"fpr_{max_fpr}", math.ceil(1 / max_fpr)
        fine = np.flatnonzero(fpr <= max_fpr)
        # from the largest score on there is nothing to choose a threshold by
        thresholds[name] = float(candidates[fine[0]]) if len(fine) and recall[fine[0]] > 0 else math.nan
        if n_safe < needed:
            reasons[name] = f"it rests on {n_safe} safe validation images, and a rate of {max_fpr} takes {needed} to be seen"
        elif math.isnan(thresholds[name]):
            reasons[name] = f"no threshold flags an unsafe validation image and at most {max_fpr} of the {n_safe} safe ones"
    points: dict[str, dict[str, Any]] = {}
    for name, threshold in thresholds.items():
        is_there = not math.isnan(threshold)
        n_flagged = int((scores[labels == 0] >= threshold).sum())
        points[name] = {
            "threshold": threshold if is_there else None,
            "recall": float((scores[labels == 1] >= threshold).mean()) if is_there else None,
            "fpr": n_flagged / n_safe if is_there else None,
            "fpr_ci_high": clopper_pearson(n_flagged, n_safe)[1] if is_there else None,
            "n_unsafe": n_unsafe,
            "n_safe": n_safe,
        }
        if name in reasons:
            points[name]["reason"] = reasons[name]
    return points


def operating_threshold(name: str, points: Mapping[str, Mapping[str, Any]]) -> float:
    """The threshold of a named operating point, in [0, 1].

    Args:
        name: one of them.
        points: as `operating_points` gives them.
    Raises:
        InputError: there is none of that name, or what its name promises cannot be promised.
    """
    if name not in points:
        known = ", ".join(points) or "none, because validation images of both classes are missing"
        raise InputError(f"{name!r} is not among the operating points ({known})")
    point = points[name]
    if point.get("reason") is not None or point["threshold"] is None:
        raise InputError(
            f"operating point {name} cannot be promised: {point.get('reason', 'it has no threshold')}; train with more labelled images "
            "(data.n_unsafe), or give a number as the threshold"
        )
    return float(point["threshold"])


def pair_metrics(unsafe_scores: np.ndarray, counterfactual_scores: np.ndarray, threshold: float) -> dict[str, float | int | None]:
    """How well a guard tells unsafe images from their safe twins (SafetyPairs, 2025).

    Args:
        unsafe_scores: (p,) scores of unsafe images; counterfactual_scores: (p,) of their twins, in the same order.
        threshold: flag when score >= threshold.
    Returns:
        pair_accuracy (both members decided rightly), ranking_accuracy (score(unsafe) > score(twin)), mean_margin
        (mean difference of scores), n. All but n are None without pairs.
    Raises:
        ValueError: lengths differ.
    """
    unsafe, twin = np.asarray(unsafe_scores, float), np.asarray(counterfactual_scores, float)
    if unsafe.shape != twin.shape or unsafe.ndim != 1:
        raise ValueError(f"pairs need two score arrays of one length, got shapes {unsafe.shape} and {twin.shape}")
    if not len(unsafe):
        return {"pair_accuracy": None, "ranking_accuracy": None, "mean_margin": None, "n": 0}
    return {
        "pair_accuracy": float(((unsafe >= threshold) & (twin < threshold)).mean()),
        "ranking_accuracy": float((unsafe > twin).mean()),
        "mean_margin": float((unsafe - twin).mean()),
        "n": len(unsafe),
    }


def precision_at_prevalence(recall: float, fpr: float, prevalence: float) -> float | None:
    """Precision in a population with another share of unsafe images, by Bayes' rule.

    Args:
        recall, fpr: measured on any sample, fractions.
        prevalence: share of unsafe images in the population, in [0, 1].
    Returns:
        The precision, or None when nothing would be flagged.
    Raises:
        ValueError: an argument outside [0, 1].
    """
    for name, value in (("recall", recall), ("fpr", fpr), ("prevalence", prevalence)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")
    flagged = recall * prevalence + fpr * (1 - prevalence)
    return recall * prevalence / flagged if flagged else None


def always_unsafe_f1(labels: np.ndarray) -> float | None:
    """F1 of flagging everything, 2p / (1 + p) at prevalence p: what any useful guard must beat. None without images."""
    labels = np.asarray(labels)
    if not len(labels):
        return None
    prevalence = float((labels == 1).mean())
    return 2 * prevalence / (1 + prevalence)


def edited_vs_original_auroc(original: np.ndarray, edited: np.ndarray, *, seed: int = 0) -> float | None:
    """How well a linear probe tells edited images from the untouched ones they were made from.

    Both carry the same label (the edits are null edits), so what the probe finds is the editor's trace. Each image and
    its edit lie in the same fold of a five-fold cross-validation; the value is the mean AUROC over folds.

    Args:
        original: (n, d) embeddings of untouched images; edited: (n, d) of their null edits, in the same order.
        seed: of the assignment to folds.
    Returns:
        AUROC: 0.5 when the editor leaves no trace that a linear guard could use. None for fewer than 10 images.
    """
    if len(original) < PROBE_MIN_IMAGES:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    fold = np.random.default_rng(seed).permutation(len(original)) % 5
    aurocs = []
    for k in range(5):
        train, test = fold != k, fold == k
        x = np.concatenate([original[train], edited[train]])
        y = np.repeat([0, 1], train.sum())
        probe = LogisticRegression(C=100.0, max_iter=2000).fit(x * x.shape[1] ** 0.5, y)
        scores = probe.decision_function(np.concatenate([original[test], edited[test]]) * x.shape[1] ** 0.5)
        aurocs.append(roc_auc_score(np.repeat([0, 1], test.sum()), scores))
    return float(np.mean(aurocs))


def by_group(labels: np.ndarray, scores: np.ndarray, groups: Sequence[str | None], threshold: float) -> dict[str, dict]:
    """`classification_metrics` of every group of images; images whose group is None are in none."""
    names = np.array([group or "" for group in groups])
    return {name: classification_metrics(labels[names == name], scores[names == name], threshold) for name in sorted(set(names) - {""})}


def by_category(labels: np.ndarray, scores: np.ndarray, categories: Sequence[str | None], threshold: float) -> dict[str, dict]:
    """Each category's unsafe images against all safe images."""
    names = np.array([category or "" for category in categories])
    result = {}
    for name in sorted(set(names[labels == 1]) - {""}):
        chosen = ((labels == 1) & (names == name)) | (labels == 0)
        result[name] = classification_metrics(labels[chosen], scores[chosen], threshold)
    return result


def _checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels).astype(np.int64), np.ascontiguousarray(scores, dtype=np.float64)
    if labels.shape != scores.shape or labels.ndim != 1:
        raise ValueError(f"labels and scores must be (n,) arrays of one length, got shapes {labels.shape} and {scores.shape}")
    if len(scores) and not (scores.min() >= 0 and scores.max() <= 1):
        raise ValueError(f"scores must lie in [0, 1], got values from {scores.min()} to {scores.max()}; apply a sigmoid to logits")
    return labels, scores
