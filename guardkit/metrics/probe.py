"""Whether an editor leaves a trace that a guard could cheat with."""

from __future__ import annotations

import numpy as np

from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.figures import Images, weighted
from guardkit.metrics.intervals import Interval, percentile_interval

PROBE_MIN_IMAGES = 10
_N_FOLDS, _N_RESAMPLES = 5, 1000


def edited_vs_original_auroc(original: np.ndarray, edited: np.ndarray, *, seed: int = 0) -> Interval | None:
    """How well a linear probe tells edited images from the untouched ones they were made from.

    Both carry the same label (the edits are null edits), so what the probe finds is the editor's trace. Each image and
    its edit lie in the same fold of a five-fold cross-validation; the value is the mean AUROC over folds. The interval is
    from redraws of the images, each with its edit; that other images would have made another probe is not in it.

    Args:
        original: (n, d) embeddings of untouched images; edited: (n, d) of their null edits, in the same order.
        seed: of the assignment to folds, and of the redraws.
    Returns:
        AUROC: 0.5 when the editor leaves no trace that a linear guard could use. None for fewer than 10 images.
    """
    if len(original) < PROBE_MIN_IMAGES:
        return None
    from sklearn.linear_model import LogisticRegression

    n = len(original)
    fold = np.random.default_rng(seed).permutation(n) % _N_FOLDS
    draws = GroupDraws(range(n), n_resamples=_N_RESAMPLES, seed=seed)
    aurocs = []
    for k in range(_N_FOLDS):
        train, test = fold != k, np.flatnonzero(fold == k)
        x, y = _stacked(original[train], edited[train])
        # the penalty keeps the weights in the span of what they are fitted to: few images of a wide encoder are a small problem
        basis = np.linalg.qr(x.T)[0] if len(x) < x.shape[1] else np.eye(x.shape[1])
        probe = LogisticRegression(C=100.0, solver="newton-cholesky").fit(x @ basis, y)
        x, y = _stacked(original[test], edited[test])
        images = Images(y, probe.decision_function(x @ basis)[None], np.zeros(1), draws, np.tile(test, 2))
        aurocs.append(weighted(["auroc"], images)["auroc"][0])
    means = np.nanmean(aurocs, axis=0)  # a redraw may lack the images of a fold
    return percentile_interval(means[1:], float(means[0]))


def _stacked(original: np.ndarray, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2m, d) embeddings scaled to coordinates of size 1, and (2m,) which are edited."""
    x = np.concatenate([original, edited]).astype(np.float64)
    return x * x.shape[1] ** 0.5, np.repeat([0, 1], len(original))
