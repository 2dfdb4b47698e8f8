"""Thresholds for named purposes, and what each of them may promise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from guardkit.metrics.figures import checked
from guardkit.schema import InputError


def operating_points(labels: np.ndarray, scores: np.ndarray) -> dict[str, dict[str, Any]]:
    """Thresholds for named purposes, chosen on validation images.

    Args:
        labels: (n,) int; scores: (n,) float in [0, 1].
    Returns:
        "balanced" (largest balanced accuracy; among equals the threshold nearest 0.5), "fpr_0.01" and "fpr_0.05" (at
        most that share of safe validation images flagged), each with threshold, recall, fpr, n_unsafe, n_safe and
        `fpr_ci_high`, the upper end of the 95 % Clopper-Pearson interval of the false-positive rate: with 10 safe
        images a rate of 0 may still be 0.31. A rate that cannot be seen on so few safe images (0.05 on fewer than 20)
        has a `reason` beside it; where no threshold keeps the rate and flags anything, or none is better than chance, threshold,
        recall, fpr and fpr_ci_high are None. Empty when a class is missing.
    """
    from guardkit.metrics.intervals import clopper_pearson  # SciPy takes a while to load

    labels, scores = checked(labels, scores)
    n_unsafe, n_safe = int((labels == 1).sum()), int((labels == 0).sum())
    if not n_unsafe or not n_safe:
        return {}
    values = np.unique(scores)
    # halfway between neighbours: the same decisions here, the most room for new images
    candidates = np.unique(np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [0.5, 1.0]]))
    recall, fpr = (_share_from(scores[labels == label], candidates) for label in (1, 0))
    gain = recall - fpr
    best = np.flatnonzero(gain >= gain.max() - 1e-12)
    thresholds = {"balanced": float(candidates[best[np.abs(candidates[best] - 0.5).argmin()]])}
    reasons: dict[str, str] = {}
    if gain.max() <= 0:
        thresholds["balanced"] = math.nan
        reasons["balanced"] = f"no threshold tells the {n_unsafe} unsafe validation images from the {n_safe} safe ones better than chance"
    for max_fpr in (0.01, 0.05):
        name, needed = f"fpr_{max_fpr}", math.ceil(1 / max_fpr)
        fine = np.flatnonzero(fpr <= max_fpr)
        # from the largest score on there is nothing to choose a threshold by
        thresholds[name] = float(candidates[fine[0]]) if len(fine) and recall[fine[0]] > 0 else math.nan
        if n_safe < needed:
            reasons[name] = (
                f"it rests on {n_safe} safe validation images, counterfactuals included, and a rate of {max_fpr} takes {needed} to be seen"
            )
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


def _share_from(scores: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """(c,) which share of the scores is at least each candidate."""
    return (len(scores) - np.searchsorted(np.sort(scores), candidates, side="left")) / len(scores)


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
            "(data.n_unsafe, data.safe_per_unsafe), or give a number as the threshold"
        )
    return float(point["threshold"])
