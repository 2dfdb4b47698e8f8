"""Progress: a bar with rate and time left on a terminal, a log line every 30 s elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
    with ticking(total=total, what=what) as tick:
        for item in items:
            yield item
            tick(1)


@contextmanager
def ticking(*, total: int | None, what: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told how many more items are done. Arguments as of `progress`."""
    if sys.stderr.isatty():
        with tqdm(total=total, desc=what) as bar:

            def show(n: int) -> None:
                bar.update(n)

            yield show
        return
    n_done, started = 0, time.monotonic()
    last = started

    def tick(n: int) -> None:
        nonlocal n_done, last
        n_done += n
        now = time.monotonic()
        if now - last >= LOG_EVERY_S:
            last = now
            rate = n_done / (now - started)
            left = f", {(total - n_done) / rate:.0f} s left" if total and rate else ""
            log.info("%s: %d%s, %.1f/s%s", what, n_done, f" of {total}" if total else "", rate, left)

    yield tick


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
