"""Who may call an endpoint next, and how often it was called."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_n_calls: ContextVar[int] = ContextVar("n_calls", default=0)  # of the question that this task asks


class Turns:
    """When the next call may start, and how many have, over all threads and event loops.

    Args:
        per_minute: calls start at least 60 / this many seconds apart; None for no limit.
        max_calls: the budget; None for no limit.
    """

    def __init__(self, per_minute: float | None, max_calls: int | None) -> None:
        self.max_calls, self.n_calls = max_calls, 0
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_free_at")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._free_at, self._lock = 0.0, threading.Lock()  # the clock is another machine's

    async def take(self) -> bool:
        """Waits until a call may start and counts it; False when the budget is spent."""
        while True:
            with self._lock:
                if self.max_calls is not None and self.n_calls >= self.max_calls:
                    return False
                wait = self._free_at - time.monotonic()
                if wait <= 0:
                    self._free_at = time.monotonic() + self._gap_s
                    self.n_calls += 1
                    _n_calls.set(_n_calls.get() + 1)
                    return True
            await asyncio.sleep(wait)

    def hold(self, seconds: float) -> None:
        """Lets no call start for a while: what one question is told holds for all."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() + seconds)


def calls_of_this_question() -> int:
    """How many calls the present task has made, repetitions included."""
    return _n_calls.get()
