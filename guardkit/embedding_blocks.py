"""Embeddings by the million, a block at a time: out of a file, through the processor's cache, and out of memory again."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_ROWS = 1 << 16  # between two looks at what came out
_CACHE_BYTES = 1 << 21  # of float32: what one core's cache holds while three operations pass over it
_UNIT = 1e-3  # that a length may be off 1, more than float16 rounds by


def each_block(embeddings: np.ndarray) -> Iterator[np.ndarray]:
    """(n, d) -> (m, d) views of some rows, in order. What was read of a mapped file is given back to the system after each."""
    for start in range(0, len(embeddings), _ROWS):
        yield embeddings[start : start + _ROWS]
        _give_back(embeddings)


def decide_block(block: np.ndarray, decide: Callable[[Tensor], Tensor], *, normalize: bool) -> tuple[Tensor, np.ndarray]:
    """Gives the rows of a block to a head.

    Args:
        block: (m, d) of any number type.
        decide: (j, d) float32 -> (j,) logits; called in inference mode.
        normalize: bring rows to unit length first.
    Returns:
        (m,) float32 logits, and (m,) bool: rows that are zero or not finite, whose logits mean nothing.
    """
    n, width = block.shape
    size = min(n, max(1, _CACHE_BYTES // (4 * max(1, width))))
    # PyTorch takes no array that may not be written to, and converts float16 many times faster than NumPy
    held = np.empty((size, width), np.float16 if block.dtype == np.float16 else np.float32)
    floats = torch.empty((size, width))
    logits, unusable = torch.empty(n), np.zeros(n, bool)
    with torch.inference_mode():
        for start in range(0, n, size):
            rows = slice(start, min(n, start + size))
            there = held[: rows.stop - start]
            with np.errstate(over="ignore"):  # of numbers that float32 does not hold
                np.copyto(there, block[rows], casting="same_kind")
            vectors = floats[: len(there)].copy_(torch.from_numpy(there))
            norms = torch.linalg.vector_norm(vectors, dim=1)
            odd = ~((norms > 0) & norms.isfinite())
            if normalize and bool(((norms - 1).abs() > _UNIT).any()):
                vectors /= norms[:, None]
            elif bool(odd.any()):  # or too small or large to be squared
                odd[odd.clone()] = ~(vectors[odd].isfinite().all(dim=1) & vectors[odd].any(dim=1))
            unusable[rows] = odd.numpy()
            logits[rows] = decide(vectors)
    return logits, unusable


def _give_back(array: np.ndarray) -> None:
    mode, owner = None, array
    while isinstance(owner, np.ndarray):
        mode, owner = getattr(owner, "mode", mode), owner.base
    # a private mapping ("c") would lose what was written to it
    if isinstance(owner, mmap.mmap) and mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
