"""Labels that are probably wrong, by scores of guards that did not see the images."""

from __future__ import annotations

import numpy as np


def probable_label_errors(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Images that are scored like those of the other label.

    An image counts where its probability of the other label is at least the mean of that probability over the images that carry
    the other label (Northcutt, Jiang and Chuang, 2021, "Confident learning: estimating uncertainty in dataset labels", section 3.1), and
    larger than that of its own.

    Args:
        labels: (n,) int, 1 = unsafe, 0 = safe.
        scores: (n,) probability of unsafe in [0, 1], out of fold.
    Returns:
        (m,) rows, the least probable label first; none where a label is missing.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, float)
    if len(set(labels.tolist())) < 2:
        return np.zeros(0, int)
    other = np.where(labels == 1, 1 - scores, scores)  # probability of the label that the image does not carry
    usual = np.where(labels == 1, (1 - scores[labels == 0]).mean(), scores[labels == 1].mean())
    rows = np.flatnonzero((other >= usual) & (other > 0.5))
    return rows[np.argsort(-other[rows], kind="stable")]
