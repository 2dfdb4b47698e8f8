"""Reading ahead: threads read and prepare what comes next while whoever asks works on what came before, in order and in bounded memory.

Threads are enough, and nothing is copied between processes: what takes the time (files, decoders, resizing, hashes) lets go of Python's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_MOST_THREADS = 16
_MOST_BYTES = 256 << 20  # of items that are waiting
Item = TypeVar("Item")
Result = TypeVar("Result")


def n_readers() -> int:
    """Threads that read images: one for each processor that this process may use, 16 at most."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def read_ahead(
    items: Iterable[Item],
    read: Callable[[Item], Result],
    *,
    ahead: int,
    is_needed: Callable[[Item], bool] = lambda _: True,
    n_bytes: Callable[[Item], int] = lambda _: 0,
    n_threads: int | None = None,
) -> Generator[tuple[Item, Result | None]]:
    """Items with what `read` gives of them, in order.

    Args:
        items: are asked for by the caller's thread, one after the other, at most `ahead` before they are given.
        read: called by threads, with several items at once; what it raises is raised when its item's turn comes.
        ahead: items that are read, or are waiting, at once.
        is_needed: whether an item is read at all; one that is not is given with None.
        n_bytes: of an item in memory; of those that wait there are 256 MB at most, or one item.
        n_threads: None: as `n_readers` says, which suits what keeps a processor busy.
    """
    waiting: deque[tuple[Item, Future[Result] | None, int]] = deque()
    held, failed, stream = 0, None, iter(items)
    is_over = False
    pool = ThreadPoolExecutor(n_threads or n_readers(), thread_name_prefix="reading")
    try:
        while True:
            while not is_over and len(waiting) < ahead and (held < _MOST_BYTES or not waiting):
                try:
                    item = next(stream)
                except StopIteration:
                    is_over = True
                except Exception as error:  # what came before it is given first
                    is_over, failed = True, error
                else:
                    size = n_bytes(item)
                    waiting.append((item, pool.submit(read, item) if is_needed(item) else None, size))
                    held += size
            if not waiting:
                if failed is not None:
                    raise failed
                return
            item, future, size = waiting.popleft()
            held -= size
            yield item, None if future is None else future.result()
    finally:
        pool.shutdown(cancel_futures=True)
