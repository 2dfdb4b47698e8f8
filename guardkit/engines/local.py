"""This process, one task after the other: each uses all of the machine by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class LocalEngine:
    """Works here; see `guardkit.engines.base.Engine`."""

    name = "local"
    is_here = True

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See `Engine`."""
        for place, item in enumerate(items):
            yield place, task(item)
