"""From what an encoder sees back to the image: its resizing, cropping and padding undone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from guardkit.encoders.base import placement


def on_image(grid: np.ndarray, rows: int, columns: int, preprocessing: Mapping[str, Any]) -> np.ndarray:
    """A coarse map of an encoder's view, laid onto the image that it was made of.

    Between the middles of the grid's cells it is interpolated, and beyond the outermost ones it stays as it is. Encoders that crop by
    another rounding see up to one pixel of their own view beside it.

    Args:
        grid: (gh, gw) of any values.
        rows, columns: of the image.
        preprocessing: see `guardkit.encoders.base.prepare_pixels`.
    Returns:
        (rows, columns) float32; 0 where the encoder sees nothing, because it is cropped away.
    """
    new, top, left = placement(rows, columns, preprocessing)
    height, width = preprocessing["size"]
    vertical = _shares(rows, new[0], top, height, grid.shape[0])
    horizontal = _shares(columns, new[1], left, width, grid.shape[1])
    return vertical @ grid.astype(np.float32) @ horizontal.T


def _shares(n: int, n_resized: int, start: int, n_seen: int, n_cells: int) -> np.ndarray:
    """(n, n_cells) float32: how much each cell counts for each pixel of one side; a row of zeros for a pixel that is not seen."""
    seen = ((np.arange(n) + 0.5) * n_resized / n - start) / n_seen  # 0 to 1 across the encoder's view
    place = np.clip(seen * n_cells - 0.5, 0, n_cells - 1)
    shares = np.clip(1 - np.abs(place[:, None] - np.arange(n_cells)), 0, None)
    shares[(seen < 0) | (seen > 1)] = 0
    return shares.astype(np.float32)
