"""A guard as robustness sees it: from images or pixels to decision values, with a count of what was asked.

A decision value is >= 0 exactly when the guard flags, and NaN when it abstains. For a guard with an encoder it is the logit
less the threshold's logit; for one that looks at images it is the score less the threshold. Knows no attack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from guardkit.embeddings import EmbeddingStore
from guardkit.encoders.base import Differentiable
from guardkit.schema import Content, EmbeddingGuard, Guard, takes_embeddings


class Victim:
    """Asks a guard, by the way that every image takes and by the way that gradients take.

    Args:
        guard: of either kind.
        store: embeddings of the guard's encoder, to share edited images among guards; None: a store of its own. One that
            keeps no norms does not serve a guard that needs them.
        batch_size: images judged at once.
    Raises:
        ValueError: the store belongs to another encoder.

    Attributes:
        n_passes: images that went forward and backward.
        n_queries: images that went forward only.
    """

    def __init__(self, guard: Guard, *, store: EmbeddingStore | None = None, batch_size: int = 32) -> None:
        self.guard, self.batch_size = guard, batch_size
        self.n_passes = self.n_queries = 0
        self._store = store
        if not takes_embeddings(guard):
            return
        if store is not None and store.encoder.fingerprint != guard.encoder.fingerprint:
            raise ValueError(f"guard {guard.name} needs embeddings of {guard.encoder.name}, the store holds those of {store.encoder.name}")
        if store is None or not (guard.is_normalized or store.keep_norms):
            self._store = EmbeddingStore(guard.encoder, None, keep_norms=not guard.is_normalized)

    @property
    def has_gradients(self) -> bool:
        """Whether values can be differentiated with respect to pixels: where the guard stands on an encoder that can."""
        return takes_embeddings(self.guard) and isinstance(self.guard.encoder, Differentiable)

    @property
    def on_embeddings(self) -> EmbeddingGuard:
        """The guard, which must be one with an encoder: gradients go no other way."""
        assert takes_embeddings(self.guard)
        return self.guard

    # --- the way every image takes ------------------------------------------------------------------------------------

    def decide(self, contents: Sequence[Content]) -> np.ndarray:
        """(n,) float64 values of images that are kept in the store, such as edited ones."""
        guard = self.guard
        if self._store is None or not takes_embeddings(guard):
            parts = range(0, len(contents), self.batch_size)
            return np.concatenate(
                [np.zeros(0), *(self._judge([content.load() for content in contents[i : i + self.batch_size]]) for i in parts)]
            )
        self.n_queries += len(contents)
        vectors = self._store.embed(contents)
        if not guard.is_normalized:
            vectors = vectors * self._store.norms(contents)[:, None]
        return self._values_of_vectors(vectors)

    def decide_images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(h, w, 3) uint8 RGB images, seen once and not kept -> (n,) float64 values."""
        guard = self.guard
        if not takes_embeddings(guard):
            return self._judge(images)
        self.n_queries += len(images)
        return self._values_of_vectors(guard.encoder.encode_images(images, normalize=guard.is_normalized))

    # --- the way gradients take ---------------------------------------------------------------------------------------

    def on_pixels(self, pixels: Tensor) -> Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n,) values, through a preprocessing that is differentiable.

        Without gradients the pixels are rounded to 8 bits and take the way of every image.
        """
        if not self.has_gradients:
            return torch.from_numpy(self.decide_images(to_images(pixels))).to(pixels)
        return self._on_pixels(pixels, prepared=False)

    def _on_pixels(self, pixels: Tensor, *, prepared: bool) -> Tensor:
        self._count(pixels)
        guard = self.on_embeddings
        embeddings = guard.encoder.encode_pixels(pixels, normalize=guard.is_normalized, prepared=prepared)
        # a head may stay on the CPU while its encoder is on a GPU
        return self._margin(guard.logits(embeddings.cpu())).to(pixels.device)

    def on_standardised(self, pixels: Tensor) -> Tensor:
        """(n, 3, height, width) as the encoder's `preprocess` gives them -> (n,) values; any real number is a pixel here."""
        settings = self.on_embeddings.encoder.preprocessing
        mean, std = (torch.tensor(settings[key], device=pixels.device).view(1, 3, 1, 1) for key in ("mean", "std"))
        # of the model's own size, so that nothing is resized, clipped or cropped on the way
        return self._on_pixels(pixels * std + mean, prepared=True)

    @cached_property
    def device(self) -> torch.device:
        """Where the encoder computes; pixels that lie there need not travel."""
        if not self.has_gradients:
            return torch.device("cpu")
        encoder = self.on_embeddings.encoder
        height, width = encoder.preprocessing["size"]
        with torch.no_grad():
            return encoder.encode_pixels(torch.zeros(1, 3, height, width)).device

    # --- values -------------------------------------------------------------------------------------------------------

    def _judge(self, images: Sequence[np.ndarray]) -> np.ndarray:
        guard = self.guard
        assert not takes_embeddings(guard)
        self.n_queries += len(images)
        return np.array([judgment.score for judgment in guard.judge(images)], np.float64) - guard.threshold

    def _values_of_vectors(self, vectors: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._margin(self.on_embeddings.logits(torch.from_numpy(vectors))).double().numpy()

    def _margin(self, logits: Tensor) -> Tensor:
        threshold = self.guard.threshold
        if threshold <= 0 or threshold >= 1:  # flags everything, or nothing
            return logits + (math.inf if threshold <= 0 else -math.inf)
        return logits - math.log(threshold / (1 - threshold))

    def _count(self, pixels: Tensor) -> None:
        if torch.is_grad_enabled() and pixels.requires_grad:
            self.n_passes += len(pixels)
        else:
            self.n_queries += len(pixels)


def to_images(pixels: Tensor) -> list[np.ndarray]:
    """(n, 3, h, w) float in [0, 1] -> n (h, w, 3) uint8 RGB images: what can be uploaded."""
    rounded = (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8)
    return list(rounded.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def to_pixels(images: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """(h, w, 3) uint8 RGB images of one size -> (n, 3, h, w) float32 in [0, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device, torch.float32).contiguous() / 255
