"""What images tell without labels: the directions in which they vary anyway, safe or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from guardkit.data.datamodule import GuardDataModule
from guardkit.data.splits import nested_order
from guardkit.schema import InputError, Record

log = logging.getLogger(__name__)

_ORDER_SEED = 0  # the same images whatever the seed of a run: its labelled subset says nothing about them


class Unlabelled:
    """Training images of a source whose labels are not looked at. They are embedded when first asked for; test images never are.

    Args:
        data: has the source and the store of embeddings.

    Attributes:
        images: those that were asked for and could be read.
    """

    def __init__(self, data: GuardDataModule) -> None:
        self._data = data
        self.images: list[Record] = []
        self._whitenings: dict[tuple[int, float], np.ndarray] = {}
        self.notes: list[str] = []  # what there was too little of

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
        Raises:
            InputError: no image can be read.
        """
        key = n_images, shrinkage
        if key not in self._whitenings:
            vectors = self._embedded(nested_order(self._data.load(), _ORDER_SEED)[:n_images])
            if len(vectors) < n_images:
                self.notes.append(
                    f"head=linear_whitened learns how {vectors.shape[1]}-d embeddings vary from {len(vectors)} training images, where head.n_images asks "
                    f"for {n_images}: source={self._data.source.name} has no more"
                )
                log.warning("%s", self.notes[-1])
            vectors = vectors - vectors.mean(axis=0)
            covariance = vectors.T @ vectors
            size = np.trace(covariance) / len(covariance)
            values, axes = np.linalg.eigh(covariance / size if size > 0 else np.eye(len(covariance)))
            values = np.maximum(values, 0) + shrinkage  # rounding may leave a variance below zero
            self._whitenings[key] = (axes * (values.mean() / values) ** 0.5) @ axes.T
        return self._whitenings[key]

    def _embedded(self, images: Sequence[Record]) -> np.ndarray:
        """(n, d) float64. An image that cannot be read is no reason to stop: nobody asked for this very one."""
        brought = [record.embedding for record in images if record.embedding is not None]
        read, made, unreadable = self._data.store.embed_readable([record for record in images if record.embedding is None])
        self.images += [*(record for record in images if record.embedding is not None), *read]
        if unreadable:
            log.warning(
                "whitening leaves out %d image(s) that cannot be read, the first is %s: %s",
                len(unreadable),
                unreadable[0].id,
                unreadable[0].reason,
            )
        vectors = np.concatenate([np.reshape(brought, (len(brought), made.shape[1])), made]).astype(np.float64)
        if not len(vectors):
            raise InputError(f"head=linear_whitened: none of {len(images)} images of source={self._data.source.name} can be read")
        return vectors
