"""This process, one task after the other: each uses all of the machine by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from guardkit.engines.base import Engine
from guardkit.schema import InputError

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


def engine_of(value: Any) -> Engine:
    """An engine that was given; this process where it is None. Raises InputError of anything else."""
    if value is not None and not (callable(getattr(value, "run", None)) and isinstance(getattr(value, "is_here", None), bool)):
        raise InputError(
            f"engine must be an engine, such as guardkit.engines.ray.RayEngine(workers=2), or None, got {str(value)[:100]!r}; "
            "names are for the command line: engine=ray"
        )
    return LocalEngine() if value is None else value
