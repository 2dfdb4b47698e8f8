"""Hiding parts of a grid, one window after the other, and what that tells of its cells."""

from __future__ import annotations

from itertools import product

import numpy as np

CELLS = 8  # along a side: how fine maps of hidden windows are
_WINDOWS = ((2, 1), (4, 2))  # side and step, in cells: small things are found by small ones, and large things need large ones
_NOISE = 1e-4  # logits; smaller differences are rounding


def windows(rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Square windows of two sizes that slide over a grid, and half across its edges, so that as many cover each cell.

    Args:
        rows, columns: of the grid.
    Returns:
        Masks, (n, rows, columns) bool, True within the window; and (n,) the cells of each window, those beyond the edge too. n is at
        most 106 with `CELLS` cells along each side.
    """
    masks, sizes = [], []
    for side, step in _WINDOWS:
        for top, left in product(range(step - side, rows, step), range(step - side, columns, step)):
            mask = np.zeros((rows, columns), bool)
            mask[max(0, top) : top + side, max(0, left) : left + side] = True
            masks.append(mask)
            sizes.append(side**2)
    return np.stack(masks), np.array(sizes)


def from_drops(masks: np.ndarray, sizes: np.ndarray, drops: np.ndarray) -> np.ndarray:
    """What hiding windows tells of cells.

    Args:
        masks, sizes: of `windows`.
        drops: (n,) by how many logits the score fell when each was hidden.
    Returns:
        (rows, columns) float64, at least 0: the logits that a hidden cell costs, the mean over the windows that cover it.
    """
    by_cell = np.where(np.abs(drops) > _NOISE, drops, 0) / sizes
    mean = np.tensordot(by_cell, masks.astype(float), 1) / masks.sum(axis=0)
    return np.maximum(mean, 0)
