"""Classic augmentation of images: crops, flips and colour changes, each fixed by a seed of its own.

The parameters are drawn here rather than by torchvision's transform classes, because those take them from the global
random state, which a background thread must not touch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guardkit.limits import shrink
from guardkit.schema import Content


@dataclass(frozen=True)
class AugmentedContent:
    """A content, cropped, flipped and recoloured.

    Attributes:
        original: what is augmented.
        seed: of this augmentation.
    """

    original: Content
    seed: int

    def __str__(self) -> str:
        return str(self.original)

    @property
    def key(self) -> str:
        """Of the original and the seed."""
        return f"classic-1:{self.seed}:{self.original.key}"

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB of the original's size, or of the working size if that is smaller."""
        return classic_augment(shrink(self.original.load()), np.random.default_rng([self.seed, 21]))


def classic_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random view of an image.

    A crop of 60 to 100 % of the area with an aspect ratio of 3:4 to 4:3, enlarged again; a mirror image half of the
    time; brightness, contrast and saturation changed by up to 30 %, hue by up to 5 %.

    Args:
        image: (h, w, 3) uint8 RGB.
        rng: where the choices come from.
    Returns:
        (h, w, 3) uint8 RGB.
    """
    import torch
    from torchvision.transforms.v2 import functional

    height, width = image.shape[:2]
    area = rng.uniform(0.6, 1.0)
    ratio = float(np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3))))
    crop_h = min(height, max(1, round(height * (area / ratio) ** 0.5)))
    crop_w = min(width, max(1, round(width * (area * ratio) ** 0.5)))
    top, left = int(rng.integers(height - crop_h + 1)), int(rng.integers(width - crop_w + 1))
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    pixels = functional.resized_crop(pixels, top, left, crop_h, crop_w, [height, width], antialias=True)
    if rng.random() < 0.5:
        pixels = functional.horizontal_flip(pixels)
    pixels = functional.adjust_brightness(pixels, rng.uniform(0.7, 1.3))
    pixels = functional.adjust_contrast(pixels, rng.uniform(0.7, 1.3))
    pixels = functional.adjust_saturation(pixels, rng.uniform(0.7, 1.3))
    pixels = functional.adjust_hue(pixels, rng.uniform(-0.05, 0.05))
    return pixels.permute(1, 2, 0).numpy()
