"""What an encoder is: frozen, images and texts to unit vectors of one space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class Encoder(Protocol):
    """A frozen image and text encoder.

    Attributes:
        name: for people, such as "ViT-B-32 (openai)".
        dim: d, width of the embeddings.
        fingerprint: a hash over weights, architecture and preprocessing, 64 hex digits.
        config: constructor arguments that build it again, in plain JSON types.
        preprocessing: size, mean, std, interpolation and resize mode.
        batch_size: images encoded at once.
    """

    name: str
    batch_size: int

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def config(self) -> dict[str, Any]: ...

    @property
    def preprocessing(self) -> dict[str, Any]: ...

    def preprocess(self, image: np.ndarray) -> torch.Tensor:
        """(h, w, 3) uint8 RGB -> (3, height, width) float32, resized and normalised as the model expects."""
        ...

    def encode_preprocessed(self, images: Sequence[torch.Tensor], *, fixed_batch: bool = False) -> np.ndarray:
        """What `preprocess` gave -> (n, d) float32 unit vectors; see `encode_images`."""
        ...

    def encode_images(self, images: Sequence[np.ndarray], *, fixed_batch: bool = False) -> np.ndarray:
        """(h, w, 3) uint8 RGB images -> (n, d) float32 unit vectors.

        Args:
            images: of any sizes.
            fixed_batch: always run the model on equally many images, so that a vector does not depend, to the last
                bit, on which and how many others were encoded with it.
        """
        ...

    def encode_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d) unit vectors, differentiable with respect to the pixels."""
        ...

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """(n, d) float32 unit vectors."""
        ...
