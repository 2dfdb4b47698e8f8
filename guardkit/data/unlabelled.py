"""What images tell without labels: the directions in which they vary anyway, safe or not."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from guardkit.counterfactual.pipeline import EditCounts
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.splits import nested_order
from guardkit.metrics.probe import PROBE_MIN_IMAGES
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
        self._images: dict[int, Record] = {}  # by identity: names may repeat
        self._vectors: dict[int, np.ndarray] = {}
        self._null_edits: dict[int, tuple[np.ndarray, np.ndarray]] = {}
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
            vectors = self.embeddings(n_images)
            if len(vectors) < n_images:
                self.notes.append(
                    f"the head learns how {vectors.shape[1]}-d embeddings vary from {len(vectors)} training images, where {n_images} are asked "
                    f"for: source={self._data.source.name} has no more"
                )
                log.warning("%s", self.notes[-1])
            vectors = vectors - vectors.mean(axis=0)
            covariance = vectors.T @ vectors
            size = np.trace(covariance) / len(covariance)
            values, axes = np.linalg.eigh(covariance / size if size > 0 else np.eye(len(covariance)))
            values = np.maximum(values, 0) + shrinkage  # rounding may leave a variance below zero
            self._whitenings[key] = (axes * (values.mean() / values) ** 0.5) @ axes.T
        return self._whitenings[key]

    @property
    def images(self) -> list[Record]:
        """Those that were looked at so far, each once."""
        return list(self._images.values())

    def embeddings(self, n_images: int) -> np.ndarray:
        """(n, d) float64 of so many images, fewer if there are fewer or some cannot be read. Raises InputError where none can."""
        if n_images not in self._vectors:
            self._vectors[n_images] = self._embedded(nested_order(self._data.load(), _ORDER_SEED)[:n_images])
        return self._vectors[n_images]

    def null_edits(self, n_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and their null edits: both have the same label, whatever that is.

        Args:
            n_images: to edit; all there are, if there are fewer.
        Returns:
            (n, d) float64 embeddings of the images whose edits were accepted, and as many of the edits.
        Raises:
            InputError: too few images, or edits, to tell a trace from chance.
        """
        if n_images not in self._null_edits:
            images = [record for record in nested_order(self._data.load(), _ORDER_SEED) if record.content is not None][:n_images]
            counts = EditCounts()
            views = self._data.views.edited(images, 1, "null", counts)
            self._data.other_edits.seconds += counts.seconds
            there = views.there[:, 0]
            if there.sum() < PROBE_MIN_IMAGES:
                reasons = "; ".join(f"{count} x {reason}" for reason, count in sorted(counts.rejected.items()))
                raise InputError(
                    f"head.leace_images={n_images}: LEACE needs at least {PROBE_MIN_IMAGES} null edits to see the editor's trace, and "
                    f"editor={self._data.pipeline.editor.name} made {int(there.sum())} of {len(images)} images ({reasons or 'there are no more'}); choose an "
                    "editor that makes them, more images, or head.leace_images=0"
                )
            kept = [record for record, accepted in zip(images, there, strict=True) if accepted]
            self._images |= {id(record): record for record in kept}
            self._null_edits[n_images] = self._data.views.embed(kept).astype(np.float64), views.vectors[there, 0].astype(np.float64)
        return self._null_edits[n_images]

    def _embedded(self, images: Sequence[Record]) -> np.ndarray:
        """(n, d) float64. An image that cannot be read is no reason to stop: nobody asked for this very one."""
        brought = [record.embedding for record in images if record.embedding is not None]
        read, made, unreadable = self._data.store.embed_readable([record for record in images if record.embedding is None])
        self._images |= {id(record): record for record in [*(record for record in images if record.embedding is not None), *read]}
        if unreadable:
            log.warning(
                "whitening leaves out %d image(s) that cannot be read, the first is %s: %s",
                len(unreadable),
                unreadable[0].id,
                unreadable[0].reason,
            )
        vectors = np.concatenate([np.reshape(brought, (len(brought), made.shape[1])), made]).astype(np.float64)
        if not len(vectors):
            raise InputError(
                f"the head looks at training images: none of {len(images)} images of source={self._data.source.name} can be read"
            )
        return vectors
