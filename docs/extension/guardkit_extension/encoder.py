"""An encoder: images to unit vectors of one width."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch
from torch.nn import functional

from guardkit import InputError


class ColourGrid:
    """The mean colours of an image in a grid of cells: no weights, no network.

    An encoder with weights loads them when it is first asked for `dim`, `fingerprint` or vectors, and hashes them into
    `fingerprint`: a saved guard recognises its encoder by it.

    Args:
        cells: of the grid, in each direction.
        batch_size: images encoded at once. It and `device`, where there is one, are not in `config`: they change no vector.
    """

    def __init__(self, cells: int = 4, *, batch_size: int = 64) -> None:
        if not isinstance(cells, int) or cells < 1:
            raise InputError(f"encoder.cells must be a whole number of at least 1, got {cells!r}")
        self.batch_size = batch_size
        self.config = {"cells": cells}  # builds it again: ColourGrid(**config)
        self.name = f"colour grid {cells}x{cells}"
        self.dim = 3 * cells**2 + 1
        self.preprocessing = {"size": [cells, cells], "interpolation": "area"}
        self.fingerprint = sha256(f"colour grid, version 1, {cells}".encode()).hexdigest()

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """(h, w, 3) uint8 RGB -> (3, cells, cells) float32 in [0, 1]."""
        pixels = torch.tensor(image).permute(2, 0, 1).float() / 255
        return functional.adaptive_avg_pool2d(pixels, self.config["cells"])

    def encode_preprocessed(self, images: Sequence[torch.Tensor], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:  # noqa: ARG002
        """What `preprocess` gave -> (n, d) float32. Here no vector depends on its batch, fixed or not."""
        vectors = np.full((len(images), self.dim), 0.1, np.float32)  # the last number: an even grey has a direction, too
        for row, image in zip(vectors, images, strict=True):
            row[:-1] = image.flatten() - 0.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    def encode_images(self, images: Sequence[np.ndarray], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(h, w, 3) uint8 RGB images of any sizes -> (n, d) float32."""
        return self.encode_preprocessed([self.preprocess(image) for image in images], fixed_batch=fixed_batch, normalize=normalize)
