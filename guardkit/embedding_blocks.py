"""Embeddings by the million, a block at a time: out of a file, through the processor's cache, and out of memory again."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

_ROWS = 1 << 16  # of a block
_NEAR = 1e-3  # of two logits that may be one but for rounding
_CACHE_BYTES = 2 << 20  # of float32, which several operations pass over while one core's cache holds them


def decide_blocks(
    embeddings: np.ndarray, decide: Callable[[Tensor], Tensor], *, normalize: bool
) -> Iterator[tuple[slice, Tensor, np.ndarray]]:
    """Gives embeddings to a head, a block of rows a core. What was read of a mapped file is given back to the system after each.

    Args:
        embeddings: (n, d) of any number type.
        decide: (j, d) float32 -> (j,) logits; called in inference mode, in several threads at once.
        normalize: bring rows to unit length first.
    Yields:
        The rows of a few blocks, in order, (m,) float32 logits of theirs, and (m,) bool: those that are zero or not finite, whose logits mean
        nothing.
    """
    workers = min(torch.get_num_threads(), -(-len(embeddings) // _ROWS))
    with ExitStack() as stack:
        each: Callable[..., Iterable[tuple[Tensor, np.ndarray]]] = map
        if workers > 1:
            # many small products are no work to share: one thread each, of the libraries that would start more
            alone = partial(threadpool_limits, 1, user_api="openmp")
            each = stack.enter_context(ThreadPoolExecutor(workers, initializer=alone)).map
        for start in range(0, len(embeddings), max(1, workers) * _ROWS):
            rows = slice(start, min(len(embeddings), start + workers * _ROWS))
            blocks = [embeddings[first : min(rows.stop, first + _ROWS)] for first in range(start, rows.stop, _ROWS)]
            done = list(each(partial(_decide, decide=decide, normalize=normalize), blocks))
            yield rows, torch.cat([logits for logits, _ in done]), np.concatenate([unusable for _, unusable in done])
            give_back(embeddings)


def _decide(block: np.ndarray, decide: Callable[[Tensor], Tensor], normalize: bool) -> tuple[Tensor, np.ndarray]:
    block = np.asarray(block)  # views of a mapped array take long to make
    n, width = block.shape
    size = min(n, max(1, _CACHE_BYTES // (4 * max(1, width))))
    whole = _shared(block)
    held = np.empty((0 if whole is not None else size, width), np.float16 if block.dtype == np.float16 else np.float32)
    source, floats = torch.from_numpy(held), torch.empty((size, width))
    logits, sums = torch.empty(n), []
    with torch.inference_mode(), np.errstate(over="ignore"):  # of numbers that float32 does not hold
        for start in range(0, n, size):
            m = min(size, n - start)
            rows = slice(start, start + m)
            if whole is None:
                np.copyto(held[:m], block[rows], casting="same_kind")
            # PyTorch converts float16 many times faster than NumPy
            vectors = floats[:m].copy_(source[:m] if whole is None else whole[rows])
            if normalize:
                lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
                vectors *= lengths.reciprocal()
                sums.append(lengths.sum())  # as good as that of all numbers, and there already
            else:
                sums.append(vectors.sum())
            logits[rows] = decide(vectors)
        of_zero = decide(torch.zeros(1, width))
        # one by one rows are looked at only where these leave it open: that costs more than to decide
        finite = torch.stack(sums).isfinite().repeat_interleave(size)[:n]
        odd = (~finite | ~((logits - of_zero).abs() > _NEAR * (1 + of_zero.abs()))).numpy()
        if odd.any():
            rest = block[odd].astype(np.float32)
            odd[odd] = ~(np.isfinite(rest).all(axis=1) & rest.any(axis=1))
    return logits, odd


class _Readable:
    """Lets PyTorch, which takes no array that may not be written to, look at one. Nobody writes to it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # lives as long as this
        address, _ = array.__array_interface__["data"]
        self.__array_interface__ = {**array.__array_interface__, "data": (address, False)}


def _shared(block: np.ndarray) -> Tensor | None:
    """The same numbers as a tensor, without a copy; None of an array that is laid out otherwise than PyTorch has it."""
    is_plain = block.dtype in (np.float16, np.float32) and block.dtype.isnative and block.flags.c_contiguous and block.flags.aligned
    return torch.from_numpy(np.asarray(_Readable(block))) if is_plain and len(block) else None


def give_back(array: np.ndarray) -> None:
    """Lets the system take back what was read of a mapped file; of other arrays nothing."""
    mode: str | None = None
    owner: object = array
    while isinstance(owner, np.ndarray):
        mode, owner = getattr(owner, "mode", mode), owner.base
    # a private mapping ("c") would lose what was written to it
    if isinstance(owner, mmap.mmap) and mode in ("r", "r+", "w+") and hasattr(mmap, "MADV_DONTNEED"):
        owner.madvise(mmap.MADV_DONTNEED)
