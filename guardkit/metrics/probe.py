"""Whether an editor leaves a trace that a guard could cheat with."""

from __future__ import annotations

import numpy as np

PROBE_MIN_IMAGES = 10


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
        x, y = _stacked(original[train], edited[train])
        # the penalty keeps the weights in the span of what they are fitted to: few images of a wide encoder are a small problem
        basis = np.linalg.qr(x.T)[0] if len(x) < x.shape[1] else np.eye(x.shape[1])
        probe = LogisticRegression(C=100.0, solver="newton-cholesky").fit(x @ basis, y)
        x, y = _stacked(original[test], edited[test])
        aurocs.append(roc_auc_score(y, probe.decision_function(x @ basis)))
    return float(np.mean(aurocs))


def _stacked(original: np.ndarray, edited: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2m, d) embeddings scaled to coordinates of size 1, and (2m,) which are edited."""
    x = np.concatenate([original, edited]).astype(np.float64)
    return x * x.shape[1] ** 0.5, np.repeat([0, 1], len(original))
