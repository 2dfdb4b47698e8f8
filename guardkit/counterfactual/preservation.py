"""How much of an image an edit kept. Knows pixels and regions, no label and no model."""

from __future__ import annotations

import cv2
import numpy as np

from guardkit.limits import shrink
from guardkit.schema import Region

_WORKING_PX = 256  # larger images are compared at this length of their longer side


def preservation(original: np.ndarray, edited: np.ndarray, region: Region | None, *, margin: float = 0.03) -> float:
    """Structural similarity of what should have stayed, in [0, 1].

    With a region it is the mean SSIM outside of it. Without one nobody knows what was to change, and it is the mean SSIM
    of the more similar half of the image: an edit that touches less than half of it is not blamed for the touched part.

    Args:
        original: (h, w, 3) uint8 RGB.
        edited: the same shape.
        region: what the edit was about.
        margin: by which the region is widened on each side, a fraction of width and height.
    Source: SSIM is Wang et al. (2004), "Image quality assessment", with its 11-pixel Gaussian window.
    """
    similarity = _ssim_map(_reduced(original), _reduced(edited))
    if region is None:
        values = np.sort(similarity, axis=None)[similarity.size // 2 :]
    else:
        height, width = similarity.shape
        x_min, y_min, x_max, y_max = region
        outside = np.ones(similarity.shape, bool)
        top, left = max(0, int((y_min - margin) * height)), max(0, int((x_min - margin) * width))
        outside[top : int(np.ceil((y_max + margin) * height)), left : int(np.ceil((x_max + margin) * width))] = False
        values = similarity[outside] if outside.any() else similarity
    return float(np.clip(values.mean(), 0, 1))


def _reduced(image: np.ndarray) -> np.ndarray:
    """(h, w) float32 luminance in [0, 1], at the working size at most."""
    return cv2.cvtColor(shrink(image, _WORKING_PX), cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


def _ssim_map(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM at every pixel. torchmetrics offers the same but crops the borders from its map, and with them the place."""

    def smooth(image: np.ndarray) -> np.ndarray:
        return cv2.GaussianBlur(image, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT)

    mean_one, mean_other = smooth(one), smooth(other)
    variance_one, variance_other = smooth(one * one) - mean_one**2, smooth(other * other) - mean_other**2
    covariance = smooth(one * other) - mean_one * mean_other
    c1, c2 = 0.01**2, 0.03**2
    numerator = (2 * mean_one * mean_other + c1) * (2 * covariance + c2)
    return numerator / ((mean_one**2 + mean_other**2 + c1) * (variance_one + variance_other + c2))
