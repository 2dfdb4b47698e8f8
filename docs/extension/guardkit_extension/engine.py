"""An engine: who does the next shard. Here processes of this machine, of the standard library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from guardkit import InputError


class ProcessesEngine:
    """Each worker is sent the task once, then one item after the other.

    Args:
        workers: processes.
    """

    name = "processes"
    is_here = False  # the task works elsewhere: what it learns there comes back as its answer alone

    def __init__(self, workers: int = 2) -> None:
        self.workers = workers

    def run(self, task: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `guardkit.engines.base.Engine`: the place of every item, once, and the answer to it, as they are done."""
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_keep, initargs=(task,))
        try:
            places = {pool.submit(_do, item): place for place, item in enumerate(items)}
            for done in as_completed(places):
                yield places[done], done.result()
        except BrokenProcessPool as error:
            raise InputError("a worker of engine=processes ended; what was done stays: run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)


_kept: list[Callable[[Any], Any]] = []


def _keep(task: Callable[[Any], Any]) -> None:
    _kept[:] = [task]


def _do(item: Any) -> Any:
    return _kept[0](item)
