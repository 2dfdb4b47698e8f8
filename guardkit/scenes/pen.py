"""A pen that draws flat shapes in unit coordinates on a uint8 canvas.

Every drawing of the scenes world is a function of a pen: coordinates run from -1 to 1 in a box that the pen
places, stretches, leans, turns and mirrors on the canvas. The pen knows nothing of scenes or labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

_SHIFT = 4  # sub-pixel bits of OpenCV's drawing calls: shapes move smoothly, not in whole pixels
_ELLIPSE_STEPS = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_UNIT_ELLIPSE = np.stack([np.cos(_ELLIPSE_STEPS), np.sin(_ELLIPSE_STEPS)], axis=1)

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]


class Pen:
    """Draws on `canvas` inside a box of half-width `half` pixels around `centre`.

    Args:
        canvas: (h, w, 3) uint8 RGB, drawn on in place.
        centre: x and y in pixels.
        half: half of the box's side in pixels.
        colours: what the names in drawing calls stand for.
        stretch: width of the box over its height, with the area kept.
        lean: horizontal shear, a fraction of the height.
        angle: turn in radians, clockwise.
        mirror: flips left and right.
        outline: width in pixels of a dark line around every filled shape; 0 draws none.
    """

    def __init__(
        self,
        canvas: np.ndarray,
        centre: tuple[float, float],
        half: float,
        colours: Mapping[str, Colour],
        *,
        stretch: float = 1.0,
        lean: float = 0.0,
        angle: float = 0.0,
        mirror: bool = False,
        outline: int = 0,
    ) -> None:
        self.canvas = canvas
        self.colours = colours
        self.outline = outline
        self.half = half
        root = stretch**0.5
        shape = np.array([[root * (-1 if mirror else 1), lean], [0.0, 1 / root]])
        cos, sin = np.cos(angle), np.sin(angle)
        self._matrix = half * (np.array([[cos, -sin], [sin, cos]]) @ shape)
        self._offset = np.asarray(centre, dtype=float)
        self.low = np.array([np.inf, np.inf])
        self.high = -self.low

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """What was drawn so far: x_min, y_min, x_max, y_max in pixels, clipped to the canvas."""
        height, width = self.canvas.shape[:2]
        x_min, y_min = np.clip(self.low, 0, (width, height))
        x_max, y_max = np.clip(self.high, 0, (width, height))
        return float(x_min), float(y_min), float(x_max), float(y_max)

    def poly(self, points: Points | np.ndarray, colour: str) -> None:
        """Fills a polygon."""
        pixels = self._place(np.asarray(points, dtype=float), margin=self.outline / 2)
        cv2.fillPoly(self.canvas, [pixels], self.colours[colour], cv2.LINE_AA, _SHIFT)
        if self.outline:
            cv2.polylines(self.canvas, [pixels], True, self.colours["ink"], self.outline, cv2.LINE_AA, _SHIFT)

    def rect(self, x0: float, y0: float, x1: float, y1: float, colour: str) -> None:
        """Fills an upright rectangle."""
        self.poly([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour: str, turn: float = 0.0) -> None:
        """Fills an ellipse with radii `rx` and `ry`, turned by `turn` radians."""
        points = _UNIT_ELLIPSE * (rx, ry)
        if turn:
            cos, sin = np.cos(turn), np.sin(turn)
            points = points @ np.array([[cos, sin], [-sin, cos]])
        self.poly(np.add(points, (x, y)), colour)

    def circle(self, x: float, y: float, r: float, colour: str) -> None:
        """Fills a circle."""
        self.ellipse(x, y, r, r, colour)

    def line(self, points: Points, width: float, colour: str) -> None:
        """Draws an open line; `width` is in unit coordinates."""
        thickness = max(1, round(width * self.half))
        pixels = self._place(np.asarray(points, dtype=float), margin=thickness / 2 + self.outline)
        if self.outline:
            ink = self.colours["ink"]
            cv2.polylines(self.canvas, [pixels], False, ink, thickness + 2 * self.outline, cv2.LINE_AA, _SHIFT)
        cv2.polylines(self.canvas, [pixels], False, self.colours[colour], thickness, cv2.LINE_AA, _SHIFT)

    def arc(self, x: float, y: float, r: float, start: float, end: float, width: float, colour: str) -> None:
        """Draws part of a circle from `start` to `end` radians (0 is right, clockwise)."""
        steps = np.linspace(start, end, 12)
        self.line([(x + r * np.cos(t), y + r * np.sin(t)) for t in steps], width, colour)

    def _place(self, points: np.ndarray, margin: float) -> np.ndarray:
        pixels = points @ self._matrix.T + self._offset
        self.low = np.minimum(self.low, pixels.min(axis=0) - margin)
        self.high = np.maximum(self.high, pixels.max(axis=0) + margin)
        return np.round(pixels * (1 << _SHIFT)).astype(np.int32)
