"""Letterbox bars: plain strips around a picture, which an encoder would take for part of it."""

from __future__ import annotations

import numpy as np

_ALIKE = 12  # levels by which the values of a bar differ at most
_LEAST = 0.02  # of the side: a thinner strip is no bar
_KEPT = 0.25  # of the side: what is left must be as much, or it was no bar


def trim_bars(image: np.ndarray) -> np.ndarray:
    """An image without plain strips along opposite sides; the same where there are none.

    Args:
        image: (h, w, 3) uint8 RGB.
    Returns:
        A view of it.
    """
    for axis in (0, 1):
        n = image.shape[axis]
        lines = np.moveaxis(image, axis, 0).reshape(n, -1, 3)
        low, high = lines.min(axis=1).astype(int), lines.max(axis=1).astype(int)
        first = _strip(low, high)
        last = _strip(low[::-1], high[::-1])
        if min(first, last) >= max(1, _LEAST * n) and n - first - last >= _KEPT * n:
            image = image[first : n - last] if axis == 0 else image[:, first : n - last]
    return image


def _strip(low: np.ndarray, high: np.ndarray) -> int:
    """How many lines from the beginning are plain, and of one colour together."""
    so_far = np.maximum.accumulate(high) - np.minimum.accumulate(low)
    plain = (so_far <= _ALIKE).all(axis=1)
    return len(low) if plain.all() else int(plain.argmin())
