"""Progress: a bar with rate and time left on a terminal, a log line every 30 s elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0
T = TypeVar("T")


def progress(items: Iterable[T], *, total: int | None, what: str) -> Iterator[T]:
    """Passes items through and tells how far it is.

    Args:
        items: what is worked on.
        total: how many there will be, if known.
        what: is being done, for instance "embedding images".
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what)
        return
    started = last = time.monotonic()
    for n, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            rate = n / (now - started)
            left = f", {(total - n) / rate:.0f} s left" if total else ""
            log.info("%s: %d%s, %.1f/s%s", what, n, f" of {total}" if total else "", rate, left)


@contextmanager
def bars_on_terminals_only(*logs: Any) -> Iterator[None]:
    """Keeps other libraries' progress bars out of log files.

    Args:
        logs: the `utils.logging` modules of diffusers or transformers.
    """
    with ExitStack() as stack:
        for one in logs:
            if not sys.stderr.isatty() and one.is_progress_bar_enabled():
                one.disable_progress_bar()
                stack.callback(one.enable_progress_bar)
        yield
