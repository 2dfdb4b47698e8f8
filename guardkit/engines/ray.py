"""Actors of Ray, on this machine or on a cluster: each keeps the task, and with it its models, and is given one item after the other."""

from __future__ import annotations

import logging
import os
import re
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from guardkit.checks import check_number, check_whole
from guardkit.schema import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items that an actor has been sent: it begins the next one without asking
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_OBJECT_STORE_BYTES = 256 << 20  # tasks and items are small; by itself Ray takes a third of the memory


class RayEngine:
    """Works in actors of Ray; see `guardkit.engines.base.Engine`.

    Workers read and write the same places as this process: paths of a file system that all machines share, or URLs of an object storage.
    guardkit must be installed on each of them.

    Args:
        workers: actors.
        cpus, gpus: that each asks Ray for, so that it knows how many fit on a machine.
        address: of a running cluster ("auto": the one on this machine); None: RAY_ADDRESS, or else a new one on this machine that ends with the run.
        retries: how often an item is begun again whose worker ended (killed, out of memory, its machine gone).
    Raises:
        InputError: a wrong value.

    Attributes:
        busy_s: seconds that workers spent in tasks, in the last run, all together.
        wall_s: seconds that the last run took, once the actors were there.
    """

    name = "ray"
    is_here = False

    def __init__(self, *, workers: int = 2, cpus: float = 1, gpus: float = 0, address: str | None = None, retries: int = 3) -> None:
        check_whole("engine.workers", workers, 1)
        check_number("engine.cpus", cpus, "[0, inf)")
        check_number("engine.gpus", gpus, "[0, inf)")
        check_whole("engine.retries", retries, 0)
        self.workers, self.cpus, self.gpus, self.address, self.retries = workers, cpus, gpus, address, retries
        self.busy_s = self.wall_s = 0.0

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See `Engine`. No more items are sent than the actors can begin soon: what is read and written stays as little as they are."""
        try:
            import ray
        except ImportError as error:
            raise InputError('engine=ray needs the package ray; pip install "guardkit[ray]"') from error
        with self._connected(ray):
            kept = ray.put(task)
            worker = ray.remote(_Worker).options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)
            started = time.perf_counter()
            self.busy_s = 0.0
            waiting = deque(range(len(items)))
            ended = [0] * len(items)
            actors: list[Any] = [worker.remote(kept) for _ in range(min(self.workers, len(items)))]
            under_way: dict[Any, tuple[Any, int]] = {}
            try:
                while waiting or under_way:
                    for actor in actors:
                        n_mine = sum(one is actor for one, _ in under_way.values())
                        while waiting and n_mine < _AHEAD:
                            place = waiting.popleft()
                            under_way[actor.call.remote(items[place])] = (actor, place)
                            n_mine += 1
                    (first, *_), _ = ray.wait(list(under_way), num_returns=1)
                    actor, place = under_way[first]
                    try:
                        seconds, result = ray.get(first)
                    except ray.exceptions.RayTaskError as error:
                        raise _as_raised(error) from error
                    except ray.exceptions.RayActorError as error:
                        if "creation task" in str(error):
                            raise InputError(
                                f"a worker of engine=ray could not begin ({_last_line(error)}); guardkit, and the packages of all parts that are "
                                "used, must be installed on every machine of the cluster"
                            ) from error
                        lost = [other for one, other in under_way.values() if one is actor]
                        under_way = {ref: found for ref, found in under_way.items() if found[0] is not actor}
                        ended[lost[0]] += 1  # the first of what it was sent is what it was at
                        if ended[lost[0]] > self.retries:
                            raise InputError(
                                f"a worker of engine=ray ended {ended[lost[0]]} times at {_name(items[lost[0]])}: {_reason(error)}; what "
                                "was done stays: see Ray's logs, give workers more memory or fewer images at once, and run the same command again"
                            ) from error
                        log.warning("a worker of engine=ray ended (%s); what it was at is begun again", _reason(error))
                        waiting.extendleft(reversed(lost))
                        actors = [one for one in actors if one is not actor] + [worker.remote(kept)]
                        continue
                    del under_way[first]
                    self.busy_s += seconds
                    self.wall_s = time.perf_counter() - started
                    yield place, result
            finally:
                for actor in actors:
                    ray.kill(actor)

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """Ray as it runs already in this process, or else as `address` says, for the time of the block."""
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        settings: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.WARNING}
        if self.address is None and not os.environ.get("RAY_ADDRESS"):
            # logical processors, so that as many actors as were asked for are there
            settings |= {
                "num_cpus": max(os.cpu_count() or 1, int(self.workers * self.cpus + 0.999)),
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            settings = {"logging_level": logging.WARNING, "address": self.address}
        before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"engine=ray cannot reach a cluster at {self.address or os.environ.get('RAY_ADDRESS') or 'this machine'} ({' '.join(str(error).split())[:200]}); "
                "start one (ray start --head), or leave engine.address null"
            ) from error
        try:
            for one, handler in before.items():  # Ray sets its own, which end the process without a word
                if handler is not None and signal.getsignal(one) is not handler:
                    signal.signal(one, handler)
            yield
        finally:
            ray.shutdown()


class _Worker:
    """An actor."""

    def __init__(self, task: Callable[[Any], Any]) -> None:
        self._task = task

    def call(self, item: Any) -> tuple[float, Any]:
        """Seconds, and what the task gives."""
        started = time.perf_counter()
        result = self._task(item)
        return time.perf_counter() - started, result


def _as_raised(error: Any) -> BaseException:
    """What the task raised: a user's mistake as the line that it is, and anything else with its traceback there."""
    cause = getattr(error, "cause", None)
    return InputError(str(cause)) if isinstance(cause, InputError) else RuntimeError(f"a task failed in a worker of engine=ray:\n{error}")


def _name(item: object) -> str:
    return str(getattr(item, "name", item))[:200]


def _reason(error: BaseException) -> str:
    return " ".join(_COLOUR.sub("", str(error)).split())[:200] or type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return lines[-1][:200]
