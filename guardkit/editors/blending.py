"""An object of one image in the place of another's: cut out, fitted, blended. Knows pixels and no editor."""

from __future__ import annotations

import cv2
import numpy as np

from guardkit.schema import Region

_GREY = 4  # levels of 255 between channels, up to which a pixel has no colour
_KEPT = 0.5  # of its own colours, in the middle of an object that is cloned into another image
_DEPTH = 0.35  # how far from the edge that begins to be so, as a fraction of the shorter side
_PAD = 2  # pixels around an image, so that a place at its border has a surrounding too


def box(region: Region, shape: tuple[int, ...], *, grow: float = 0.0) -> tuple[slice, slice]:
    """Rows and columns of a region, `grow` (a fraction of the longer side) wider on every side; at least one pixel."""
    height, width = shape[:2]
    more = grow * max(height, width)
    x_min, y_min, x_max, y_max = region
    left, top = max(0, int(x_min * width - more)), max(0, int(y_min * height - more))
    right, bottom = min(width, int(np.ceil(x_max * width + more))), min(height, int(np.ceil(y_max * height + more)))
    return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))


def stretch(image_size: tuple[int, int], region: Region, width: int, height: int) -> float:
    """How badly an object fits a place: 0 as it is; 1 when it is stretched or enlarged about e times.

    Args:
        image_size: width and height of its image.
        region: where it is.
        width, height: of the place in pixels.
    """
    across, down = (region[2] - region[0]) * image_size[0], (region[3] - region[1]) * image_size[1]
    return float(abs(np.log(across / down * height / width)) + max(0.0, np.log(width * height / (across * down)) / 2))


def cut_out(image: np.ndarray, region: Region, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: an object with as much of its own surroundings as the other shape needs; where its image ends before
    that, it is stretched.

    Args:
        image: (h, w, 3) uint8.
        region: where the object is.
        width, height: in pixels.
    """
    rows, columns = image.shape[:2]
    across, down = max(1.0, (region[2] - region[0]) * columns), max(1.0, (region[3] - region[1]) * rows)
    if across * height < down * width:
        across = min(columns, down * width / height)
    else:
        down = min(rows, across * height / width)
    left = round(float(np.clip((region[0] + region[2]) / 2 * columns - across / 2, 0, columns - across)))
    top = round(float(np.clip((region[1] + region[3]) / 2 * rows - down / 2, 0, rows - down)))
    part = image[top : max(top + 1, round(top + down)), left : max(left + 1, round(left + across))]
    return resized(part, width, height)


def colour_step(image: np.ndarray, patch: np.ndarray, place: tuple[slice, slice]) -> np.ndarray:
    """(3,) float: how much lighter, in levels of 255, what surrounds a place is on average than the edge of a patch for it; zero
    where the place fills the image.

    Args:
        image: (h, w, 3) uint8.
        patch: of the place's size.
        place: rows and columns.
    """
    rows, columns = place
    steps = [np.zeros((0, 3))]
    if rows.start > 0:
        steps.append(image[rows.start - 1, columns] - patch[0].astype(float))
    if rows.stop < image.shape[0]:
        steps.append(image[rows.stop, columns] - patch[-1].astype(float))
    if columns.start > 0:
        steps.append(image[rows, columns.start - 1] - patch[:, 0].astype(float))
    if columns.stop < image.shape[1]:
        steps.append(image[rows, columns.stop] - patch[:, -1].astype(float))
    found = np.concatenate(steps)
    return found.mean(axis=0) if len(found) else np.zeros(3)


def in_colours_of(image: np.ndarray, patch: np.ndarray) -> np.ndarray:
    """The patch, without colours if the image has none."""
    if (np.ptp(image.astype(np.int16), axis=2) > _GREY).mean() > 0.01:
        return patch
    return cv2.cvtColor(cv2.cvtColor(patch, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def resized(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """By averages where it becomes smaller, else by cubic curves."""
    smaller = width * height < image.shape[0] * image.shape[1]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_CUBIC)


def cloned(image: np.ndarray, patch: np.ndarray, place: tuple[slice, slice]) -> np.ndarray:
    """The image with a patch in a place: the patch's own detail, in the colours of what surrounds the place.

    Where the place lies at the border of the image, nothing surrounds it, and colours run out freely.

    Args:
        image: (h, w, 3) uint8.
        patch: of the place's size.
        place: rows and columns.
    Source: Perez, Gangnet and Blake (2003), "Poisson image editing", by OpenCV's seamless cloning.
    """
    rows, columns = place
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(image, _PAD, _PAD, _PAD, _PAD, cv2.BORDER_REPLICATE)
    top, bottom, left, right = rows.start + _PAD - 1, rows.stop + _PAD, columns.start + _PAD - 1, columns.stop + _PAD
    down, across = slice(top + 1, bottom), slice(left + 1, right)
    step = colour_step(image, patch, place)
    for edge, at, is_border in (
        (patch[0], (top, across), rows.start == 0),
        (patch[-1], (bottom, across), rows.stop == height),
        (patch[:, 0], (down, left), columns.start == 0),
        (patch[:, -1], (down, right), columns.stop == width),
    ):
        if is_border:
            padded[at] = np.clip(edge + step, 0, 255).round()
    source = cv2.copyMakeBorder(patch, 1, 1, 1, 1, cv2.BORDER_REPLICATE)
    mask = np.zeros(source.shape[:2], np.uint8)
    mask[1:-1, 1:-1] = 255
    middle = (left + 1 + patch.shape[1] // 2, top + 1 + patch.shape[0] // 2)
    result = cv2.seamlessClone(source, padded, mask, middle, cv2.NORMAL_CLONE)[_PAD:-_PAD, _PAD:-_PAD].copy()
    # towards its middle an object keeps more of its own colours: a green one does not turn purple on brown ground
    inside = np.zeros((patch.shape[0] + 2, patch.shape[1] + 2), np.uint8)
    inside[1:-1, 1:-1] = 1
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)[1:-1, 1:-1] / min(patch.shape[:2])
    kept = _KEPT * np.clip(depth / _DEPTH, 0, 1)[..., None]
    result[place] = np.round(kept * patch + (1 - kept) * result[place])
    return result
