"""Actors of Ray, on this machine or on a cluster: each keeps the task, and with it its models, and is given one item after the other."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

from guardkit.checks import check_number, check_whole
from guardkit.engines.base import sending
from guardkit.engines.pools import checked_pools, pool
from guardkit.schema import InputError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # items that an actor has been sent: it begins the next one without asking
_MOST_CPUS = 4096  # logical ones of a Ray that is started here: it keeps an entry for each, and of a thousand million does not begin
_CONNECT_S = 10.0  # in which a cluster's address must answer: Ray itself asks for minutes, without a word
_PLACE = re.compile(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})")  # HOST:PORT, of Ray's client too
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
        retries: how often an item is begun again whose worker ended (killed, out of memory, its machine gone), and a call of a pool's actor.
        pools: {role: {workers: 1, cpus: 1, gpus: 0}}: parts that work in actors of their own, and not in each worker: `editor`, `encoder`,
            `instructor`, `verifier`. Workers read, prepare and write then, and wait for what they ask of them.
    Raises:
        InputError: a wrong value.

    Attributes:
        busy_s: seconds that workers spent in tasks, in the last run, all together.
        wall_s: seconds that the last run took, the beginning of its actors included.
    """

    name = "ray"
    is_here = False

    def __init__(
        self,
        *,
        workers: int = 2,
        cpus: float = 1,
        gpus: float = 0,
        address: str | None = None,
        retries: int = 3,
        pools: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        check_whole("engine.workers", workers, 1)
        check_number("engine.cpus", cpus, "[0, inf)")
        check_number("engine.gpus", gpus, "[0, inf)")
        check_whole("engine.retries", retries, 0)
        if address is not None and not isinstance(address, str):
            raise InputError(f"engine.address must be HOST:PORT, auto or null, got {address!r}")
        self.workers, self.cpus, self.gpus, self.address, self.retries = workers, cpus, gpus, address, retries
        self.pools = checked_pools(pools)
        self.busy_s = self.wall_s = 0.0

    def run(self, task: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[int, R]]:
        """See `Engine`. No more items are sent than the actors can begin soon: what is read and written stays as little as they are."""
        try:
            import ray
        except ImportError as error:
            raise InputError('engine=ray needs the package ray; pip install "guardkit[ray]"') from error
        n_pools, n_workers = self._counted(task), min(self.workers, len(items))
        with self._connected(ray, n_pools, n_workers), self._with_pools(ray, task) as task:
            with sending(self.name):
                kept = ray.put(task)
            worker = ray.remote(_Worker).options(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)
            started = time.perf_counter()
            self.busy_s = 0.0
            waiting = deque(range(len(items)))
            ended = [0] * len(items)
            actors: list[Any] = [worker.remote(kept) for _ in range(n_workers)]
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

    def _counted(self, task: Any) -> Counter[str]:
        """How many pools of each role the task needs."""
        found: Counter[str] = Counter()

        def count(role: str, part: Any) -> Any:
            found[role] += 1
            return part

        change = getattr(task, "with_parts", None)
        if change is not None and self.pools:
            change(count)
        if idle := [role for role in self.pools if role not in found]:
            used = f"the parts here are {', '.join(sorted(found))}" if found else "no part here can be in one"
            raise InputError(f"engine.pools names {', '.join(idle)}, which nothing here uses; {used}")
        return Counter({role: found[role] for role in self.pools})

    @contextmanager
    def _with_pools(self, ray: Any, task: Any) -> Iterator[Any]:
        """The task, with stand-ins for the parts that have a pool."""
        with ExitStack() as opened:

            def put(role: str, part: Any) -> Any:
                return opened.enter_context(pool(ray, role, part, self.pools[role], self.retries)) if role in self.pools else part

            yield task.with_parts(put) if self.pools else task

    def _asked(self, what: str, n_pools: Mapping[str, int], n_workers: int) -> float:
        """All the "cpus" or "gpus" that workers and pools ask Ray for."""
        own: float = n_workers * getattr(self, what)
        return own + sum(n * self.pools[role]["workers"] * self.pools[role][what] for role, n in n_pools.items())

    @contextmanager
    def _connected(self, ray: Any, n_pools: Mapping[str, int], n_workers: int) -> Iterator[None]:
        """Ray as it runs already in this process, or else as `address` says, for the time of the block."""
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
        settings: dict[str, Any] = {"include_dashboard": False, "logging_level": logging.WARNING}
        if self.address is None and not os.environ.get("RAY_ADDRESS"):
            # logical processors, so that as many actors as were asked for are there
            cpus = self._asked("cpus", n_pools, n_workers)
            if cpus > _MOST_CPUS:
                raise InputError(
                    f"engine=ray asks for {cpus:g} processors, on one machine at most {_MOST_CPUS} can be asked for; give fewer engine.workers or "
                    "engine.cpus, or name a cluster's engine.address"
                )
            settings |= {
                "address": "local",  # else Ray joins one that somebody started on this machine, or waits for one that is gone
                "num_cpus": max(os.cpu_count() or 1, math.ceil(cpus)),
                "object_store_memory": _OBJECT_STORE_BYTES,
            }
        else:
            settings = {"logging_level": logging.WARNING, "address": self.address}
            named = self.address if self.address not in (None, "auto") else os.environ.get("RAY_ADDRESS")  # as Ray takes them
            _check_answers(named or "")
            # where something else answers: one attempt of a minute, not twenty
            os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        before = {one: signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)}
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _unreachable(self.address or os.environ.get("RAY_ADDRESS") or "this machine", error) from error
        try:
            for one, handler in before.items():  # Ray sets its own, which end the process without a word
                if handler is not None and signal.getsignal(one) is not handler:
                    signal.signal(one, handler)
            gpus, there = self._asked("gpus", n_pools, n_workers), ray.cluster_resources().get("GPU", 0)
            if gpus > there:
                if "num_cpus" in settings:
                    raise InputError(
                        f"engine=ray asks for {gpus:g} GPUs, and this machine has {there:g}; ask for less, or name a cluster's engine.address"
                    )
                log.warning(
                    "engine=ray asks for %g GPUs, and the cluster has %g: what does not fit waits until there are more", gpus, there
                )
            yield
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raises InputError where nothing answers at a cluster's address. "auto", and what else only Ray can read, is left to Ray."""
    if (place := _PLACE.fullmatch(address)) is None:
        return
    try:
        socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:  # also of a name or port that is none
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> InputError:
    return InputError(
        f"engine=ray cannot reach a cluster at {address} ({' '.join(str(error).split())[:200]}); start one (ray start --head), or leave "
        "engine.address null"
    )


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
    if isinstance(cause, OSError):  # a full disk, a place that is not shared
        return InputError(f"a worker of engine=ray failed ({cause}); what was done stays: mend it, and run the same command again")
    return InputError(str(cause)) if isinstance(cause, InputError) else RuntimeError(f"a task failed in a worker of engine=ray:\n{error}")


def _name(item: object) -> str:
    return str(getattr(item, "name", item))[:200]


def _reason(error: BaseException) -> str:
    return " ".join(_COLOUR.sub("", str(error)).split())[:200] or type(error).__name__


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    return lines[-1][:200]
