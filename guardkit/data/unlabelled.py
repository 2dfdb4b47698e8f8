"""What images tell without labels: the directions in which they vary anyway, safe or not."""

from __future__ import annotations

import numpy as np

from guardkit.data.datamodule import GuardDataModule
from guardkit.data.splits import nested_order

_ORDER_SEED = 0  # the same images whatever the seed of a run: its labelled subset says nothing about them


class Unlabelled:
    """Training images of a source whose labels are not looked at. They are embedded when first asked for; test images never are.

    Args:
        data: has the source and the store of embeddings.
    """

    def __init__(self, data: GuardDataModule) -> None:
        self._data = data
        self._whitenings: dict[tuple[int, float], np.ndarray] = {}

    def whitening(self, n_images: int, shrinkage: float) -> np.ndarray:
        """The map under which images vary alike in all directions.

        Hariharan, Malik and Ramanan, 2012, "Discriminative decorrelation for clustering and classification", whiten by a
        covariance that unlabelled images give once for all classifiers.

        Args:
            n_images: to estimate the covariance from; all there are, if there are fewer.
            shrinkage: how much of the mean variance is added to every direction's, above 0.
        Returns:
            (d, d) float64, symmetric: C ** -0.5 of the shrunken covariance C, which is scaled to a mean variance of 1. The
            identity where images do not vary.
        """
        key = n_images, shrinkage
        if key not in self._whitenings:
            images = nested_order(self._data.load(), _ORDER_SEED)[:n_images]
            vectors = self._data.views.embed(images).astype(np.float64)
            covariance = np.cov(vectors.T, bias=True)
            mean = np.trace(covariance) / len(covariance)
            values, axes = np.linalg.eigh(covariance / mean) if mean > 0 else (np.ones(len(covariance)), np.eye(len(covariance)))
            values = np.maximum(values, 0) + shrinkage  # rounding may leave a variance below zero
            self._whitenings[key] = (axes * (values.mean() / values) ** 0.5) @ axes.T
        return self._whitenings[key]
