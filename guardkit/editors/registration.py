"""An edit laid over its original: moved back where it slipped, compared, pasted. Knows pixels and no editor.

A slight zoom, which some models add, is not undone: phase correlation finds translations only.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from guardkit.limits import WORKING_SIDE, shrink

_WORKING_PX = 512  # shifts are measured at most at this length of the longer side
_STRIP_PX = 1 << 20  # pixels that are pasted at once
_MIN_PX = 16  # smaller images hold too little to correlate
_CLEAR_PEAK = 0.3  # OpenCV's response: up to 0.25 between unlike images, from 0.4 between an image and its noisy edit


def global_shift(original: np.ndarray, edited: np.ndarray, mask: np.ndarray | None) -> tuple[int, int]:
    """How far the whole of an edit lies off, to the right and down, in whole pixels; (0, 0) where that is not clear.

    Whole pixels, because moving by a fraction blurs, and a guard could learn to see that.

    Args:
        original: (h, w, 3) uint8 RGB.
        edited: the same shape.
        mask: (h, w) bool, what was meant to change and is left out; None when nobody knows.
    Source: phase correlation, Foroosh et al. (2002), "Extension of phase correlation to subpixel registration", by OpenCV.
    """
    height, width = original.shape[:2]
    scale = min(1.0, _WORKING_PX / max(height, width))
    size = (round(width * scale), round(height * scale))
    if min(size) < _MIN_PX:
        return 0, 0
    weight = cv2.createHanningWindow(size, cv2.CV_32F)
    if mask is not None:
        # a hole with hard borders would be an edge in itself, one that never moves
        soft = max(2, max(size) // 64)
        hole = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA)
        weight = weight * (1 - cv2.GaussianBlur(cv2.dilate(hole, np.ones((4 * soft + 1, 4 * soft + 1))), (0, 0), soft))
    if weight.sum() < _MIN_PX:
        return 0, 0
    greys = []
    for image in (original, edited):
        grey = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY).astype(np.float32)
        greys.append((grey - (grey * weight).sum() / weight.sum()) * weight)
    (across, down), peak = cv2.phaseCorrelate(*greys)
    # unlike images have a highest peak too; of even ones it is not a number
    if not (math.isfinite(across) and math.isfinite(down)) or peak < _CLEAR_PEAK:
        return 0, 0
    shift = (round(across / scale), round(down / scale))
    if 2 * abs(shift[0]) >= width or 2 * abs(shift[1]) >= height:
        return 0, 0
    if shift == (0, 0):
        return 0, 0
    kept = np.ones((height, width), bool) if mask is None else ~mask
    kept &= moved(np.zeros_like(kept), np.ones_like(kept), -shift[0], -shift[1])
    some = np.s_[:: math.ceil(max(height, width) / WORKING_SIDE), :: math.ceil(max(height, width) / WORKING_SIDE)]  # of a large image
    kept, shown = kept[some], original[some]
    if not kept.any():
        return 0, 0
    back = moved(original, edited, -shift[0], -shift[1])
    before, after = (np.abs(shown[kept].astype(np.int16) - image[some][kept]).mean() for image in (edited, back))
    return shift if after < before else (0, 0)


def moved(original: np.ndarray, edited: np.ndarray, right: int, down: int) -> np.ndarray:
    """The edit moved by whole pixels; what it leaves bare shows the original."""
    height, width = original.shape[:2]
    result = original.copy()
    result[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)] = edited[
        max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)
    ]
    return result


def largest_change(original: np.ndarray, edited: np.ndarray, mask: np.ndarray | None, *, window: float = 1 / 16) -> float:
    """The largest mean change of a patch, in levels of 255.

    Signed differences are averaged over the patch, colour by colour: the fine noise of an autoencoder, which a mean of
    absolute differences over the image would count, averages out, and a small edited object in a large image does not.

    Args:
        original: (h, w, 3) uint8 RGB.
        edited: the same shape.
        mask: (h, w) bool, where to look; None for everywhere.
        window: side of a patch, a fraction of the longer side; no more than the sides of the mask.
    """
    original, edited = shrink(original), shrink(edited)
    if mask is not None and mask.shape != original.shape[:2]:
        mask = shrink(mask.astype(np.uint8) * 255) > 0
    side = max(1, round(window * max(original.shape[:2])))
    if mask is not None:
        side = max(1, min(side, int(mask.any(axis=1).sum()), int(mask.any(axis=0).sum())))
    change = np.abs(cv2.blur(edited.astype(np.float32) - original.astype(np.float32), (side, side))).mean(axis=2)
    return float((change if mask is None else change[mask]).max())


def pasted(original: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(h, w, 3) uint8: the edit within the mask (h, w bool), the original outside, and a seam a few pixels wide between."""
    height, width = mask.shape
    solid = mask.astype(np.float32)
    if max(height, width) > WORKING_SIDE:  # a blur costs pixels times its width, which grows with the image
        solid = shrink(solid)
    alpha = cv2.GaussianBlur(solid, (0, 0), max(1.0, 0.004 * max(solid.shape)))
    if solid.shape != mask.shape:
        alpha = cv2.resize(alpha, (width, height), interpolation=cv2.INTER_LINEAR)
    alpha = np.maximum(alpha, mask)
    alpha[alpha < 0.02] = 0
    result = np.empty_like(original)
    rows = max(1, _STRIP_PX // width)
    for top in range(0, height, rows):
        part, share = slice(top, top + rows), alpha[top : top + rows, :, None]
        result[part] = np.round(share * edited[part] + (1 - share) * original[part])
    return result
