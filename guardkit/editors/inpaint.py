"""Classical, region-based editing: what lies in the region is painted over from its surroundings.

It removes an object and invents nothing, so it suits photographs with a box around the feature. The method is
OpenCV's: Telea (2004), "An image inpainting technique based on the fast marching method", or Navier-Stokes (Bertalmio
et al., 2001). Large regions come out blurred: the edited-versus-original probe of a training report shows how much a
guard could learn from that.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from guardkit.checks import check_choice, check_number, check_whole
from guardkit.editors.base import NEEDS_REGION, NO_ROUND_TRIP, EditRequest, EditResult, lacks_region
from guardkit.editors.registration import pasted
from guardkit.schema import ImageError, Region

_METHODS = {"telea": cv2.INPAINT_TELEA, "navier_stokes": cv2.INPAINT_NS}


class InpaintEditor:
    """Paints a region over from its surroundings.

    Args:
        method: "telea" or "navier_stokes".
        radius: of the neighbourhood of each painted pixel, in pixels of the working image.
        dilate: how far the painted region reaches beyond the given one, a fraction of the image's longer side.
        max_side: regions are painted at most at this size in pixels and enlarged again, which keeps large
            photographs quick; pixels outside the region always come from the original.
        max_area: a region that covers a larger share of the image is rejected: nothing would be left to paint from.
    Raises:
        InputError: an argument out of range.
    """

    name = "inpaint"

    def __init__(
        self, *, method: str = "telea", radius: int = 5, dilate: float = 0.01, max_side: int = 384, max_area: float = 0.85
    ) -> None:
        check_choice("editor.method", method, _METHODS)
        check_number("editor.radius", radius, "[1, inf)")
        check_whole("editor.max_side", max_side, 16)
        check_number("editor.dilate", dilate, "[0, 0.5)")
        check_number("editor.max_area", max_area, "(0, 1]")
        self.method, self.radius, self.dilate, self.max_side, self.max_area = method, radius, dilate, max_side, max_area
        self.config = {
            "editor": self.name,
            "method": method,
            "radius": radius,
            "dilate": dilate,
            "max_side": max_side,
            "max_area": max_area,
            "opencv": cv2.__version__,
        }

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request. Rejected: no region is known, the region is too large, the image cannot be read."""
        return [self._edit_one(request) for request in requests]

    def refuses(self, request: EditRequest) -> str | None:
        """Why an image will not be edited, or None."""
        return f"no region: editor=inpaint {NEEDS_REGION}" if lacks_region(request) else None

    def _edit_one(self, request: EditRequest) -> EditResult:
        region = request.region
        if request.kind == "round_trip":
            return EditResult(None, NO_ROUND_TRIP)
        reason = self.refuses(request)
        if reason is not None:
            return EditResult(None, reason)
        try:
            image = request.content.load()
        except ImageError as error:
            return EditResult(None, f"unreadable image: {error}")
        if request.kind == "null":
            region = elsewhere(region, np.random.default_rng([request.seed, *image.shape]))
        if region is None:
            return EditResult(None, "no room for a null edit beside the region")
        mask = self._mask(image.shape[:2], region)
        if mask.mean() > 255 * self.max_area:
            return EditResult(None, f"region covers more than {self.max_area:.0%} of the image")
        return EditResult(self._paint(image, mask))

    def _mask(self, shape: tuple[int, int], region: Region) -> np.ndarray:
        height, width = shape
        grow = self.dilate * max(height, width)
        x_min, y_min, x_max, y_max = region
        mask = np.zeros(shape, np.uint8)
        top, bottom = max(0, int(y_min * height - grow)), min(height, int(np.ceil(y_max * height + grow)))
        left, right = max(0, int(x_min * width - grow)), min(width, int(np.ceil(x_max * width + grow)))
        mask[top:bottom, left:right] = 255
        return mask

    def _paint(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        height, width = mask.shape
        scale = min(1.0, self.max_side / max(height, width))
        small_size = (max(1, round(width * scale)), max(1, round(height * scale)))
        small = cv2.resize(image, small_size, interpolation=cv2.INTER_AREA)
        small_mask = cv2.resize(mask, small_size, interpolation=cv2.INTER_NEAREST)
        painted = cv2.inpaint(small, small_mask, self.radius, _METHODS[self.method])
        return pasted(image, cv2.resize(painted, (width, height), interpolation=cv2.INTER_CUBIC), mask > 0)


def elsewhere(region: Region | None, rng: np.random.Generator) -> Region | None:
    """A box of the same shape beside the region, shrunk to a quarter of its area at most, or None. Without a region,
    a box anywhere whose sides are 20 to 60 % of the image's."""
    if region is None:
        width, height = rng.uniform(0.2, 0.6, 2)
        left, top = rng.uniform(0, 1 - width), rng.uniform(0, 1 - height)
        return float(left), float(top), float(left + width), float(top + height)
    x_min, y_min, x_max, y_max = region
    for scale in (1.0, 0.7, 0.5):
        width, height = scale * (x_max - x_min), scale * (y_max - y_min)
        spots = []
        for x, y in zip(rng.uniform(0, max(0.0, 1 - width), 64), rng.uniform(0, max(0.0, 1 - height), 64), strict=True):
            beside = x + width <= x_min or x >= x_max or y + height <= y_min or y >= y_max
            if beside and x + width <= 1 and y + height <= 1:
                spots.append((float(x), float(y), float(x + width), float(y + height)))
        if spots:
            return spots[0]
    return None
