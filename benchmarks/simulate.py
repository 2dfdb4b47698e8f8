"""A hundred million images on n workers that fail: a discrete-event simulation of shard tasks, and a check of it against the real engine.

    python benchmarks/simulate.py                                        # 100 million images, tables for docs/scale.md, a second
    python benchmarks/simulate.py --rate 700 --images 5e7 --workers 8,64 # images a second of your worker (benchmarks/embed.py), your cluster
    python benchmarks/simulate.py --check                                # beside engine=ray with four workers on this machine, a minute

What is assumed, and where it may be wrong:
- A worker does `rate` images a second, each shard up to `spread` (a normal share) faster or slower: images differ in size, neighbours are noisy. Workers are equal, and do not slow each other down:
  a network or a bucket that all share is no part of it.
- A shard costs `overhead` seconds beside its images: opening, listing, writing, the entry of the ledger. They are measured with one worker and many small shards.
- A worker ends at a moment of an exponential distribution with mean `mtbf`, whatever it does. Its shard is lost and begun again by the next that is free; after `restart` seconds a new
  worker is there, with its models loaded. What a cluster does in maintenance, all at once, is no part of it.
- The process that sends shards needs `dispatch` seconds for each, one after the other; each worker has two, so that it waits only when that process cannot follow.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOUR = 3600.0


@dataclass(frozen=True)
class Cluster:
    """Seconds and rates, see above."""

    workers: int
    rate: float = 400.0
    overhead: float = 2.0
    spread: float = 0.1
    mtbf: float = 24 * HOUR
    restart: float = 60.0
    dispatch: float = 0.002


@dataclass(frozen=True)
class Outcome:
    """Seconds until the last shard is done; shares of all workers' time until then."""

    seconds: float
    useful: float
    lost: float
    waiting: float
    failures: int


def simulate(n_images: int, shard: int, cluster: Cluster, seed: int = 0) -> Outcome:
    """One run.

    Args:
        n_images: of all shards.
        shard: images in one.
        cluster: does it.
        seed: of durations and failures.
    """
    draw = random.Random(seed)
    n_shards = -(-n_images // shard)
    waiting = list(range(n_shards - 1, -1, -1))  # the next one last
    events: list[tuple[float, int, int, float, int]] = []  # when, order, worker, since, shard (-1: the worker has begun)
    ends = [draw.expovariate(1 / cluster.mtbf) for _ in range(cluster.workers)]
    sender_free = useful = lost = 0.0
    n_events = failures = done = 0
    for worker in range(cluster.workers):
        heapq.heappush(events, (0.0, worker, worker, 0.0, -1))
        n_events += 1
    now = 0.0
    while done < n_shards:
        now, _, worker, since, number = heapq.heappop(events)
        if number >= 0:
            if now >= ends[worker]:  # it ended before it was done
                lost += max(0.0, ends[worker] - since)
                failures += 1
                waiting.append(number)
                begun = ends[worker] + cluster.restart
                ends[worker] = begun + draw.expovariate(1 / cluster.mtbf)
                n_events += 1
                heapq.heappush(events, (max(now, begun), n_events, worker, begun, -1))
                continue
            useful += now - since
            done += 1
        if not waiting:
            continue
        number = waiting.pop()
        sender_free = max(sender_free, now) + cluster.dispatch
        # it was sent while the one before was done, unless the sender could not follow
        start = max(now, sender_free - cluster.dispatch * 2)
        images = min(shard, n_images - number * shard)
        seconds = cluster.overhead + images / cluster.rate * max(0.1, draw.gauss(1, cluster.spread))
        n_events += 1
        end = start + seconds
        # a failure is noticed when it happens
        heapq.heappush(events, (min(end, max(ends[worker], start)) if ends[worker] < end else end, n_events, worker, start, number))
    total = now * cluster.workers
    return Outcome(now, useful / total, lost / total, 1 - (useful + lost) / total, failures)


def table(n_images: int, workers: list[int], shards: list[int], cluster: Cluster) -> None:
    """Hours, and where the time goes, for each number of workers and size of shards."""
    print(
        f"{n_images:,} images, {cluster.rate:g} a second and worker, a failure every {cluster.mtbf / HOUR:g} h of a worker, {cluster.restart:g} s to begin anew"
    )
    print(
        f"{'workers':>8}{'images a shard':>16}{'shards':>10}{'hours':>9}{'over ideal':>12}{'overhead':>10}{'lost':>8}{'waiting':>9}{'failures':>10}"
    )
    for n in workers:
        for shard in shards:
            made = Cluster(n, cluster.rate, cluster.overhead, cluster.spread, cluster.mtbf, cluster.restart, cluster.dispatch)
            found = simulate(n_images, shard, made)
            ideal = n_images / cluster.rate / n
            n_shards = -(-n_images // shard)
            overhead = n_shards * cluster.overhead / (found.seconds * n)
            print(
                f"{n:>8}{shard:>16,}{n_shards:>10,}{found.seconds / HOUR:>9.2f}{found.seconds / ideal:>12.3f}{overhead:>10.3f}"
                f"{found.lost:>8.4f}{found.waiting:>9.4f}{found.failures:>10}"
            )


class Sleeping:
    """A task that takes as long as it is told, and the first times ends its worker instead."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, item: tuple[int, float, float | None]) -> int:
        number, seconds, ends_after = item
        mark = self.folder / str(number)
        if ends_after is not None and not mark.exists():
            mark.touch()
            time.sleep(ends_after)
            os.kill(os.getpid(), 9)
        time.sleep(seconds)
        return number


def check() -> None:
    """The same shards, durations and number of failures, in the real engine and in the simulation."""
    import statistics
    import tempfile

    from guardkit.engines.ray import RayEngine

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import simulate as here  # by this name workers find the task

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
    draw = random.Random(1)
    workers, shard, rate = 4, 100, 100.0
    with tempfile.TemporaryDirectory() as place:
        engine = RayEngine(workers=workers)
        # what this machine takes: tasks of nothing, and a worker that begins anew
        list(engine.run(here.Sleeping(Path(place)), [(-1, 0.0, None)] * 4))
        started = time.perf_counter()
        list(engine.run(here.Sleeping(Path(place)), [(-1, 0.0, None)] * 400))
        dispatch = engine.wall_s / 400
        begin = time.perf_counter() - started - engine.wall_s
        print(f"measured: {1000 * dispatch:.1f} ms to send a task, {begin:.2f} s beside the tasks")
        for every in (None, 10):
            items = [
                (number, shard / rate * max(0.1, draw.gauss(1, 0.1)), draw.uniform(0, 1) if every and number % every == 3 else None)
                for number in range(60)
            ]
            list(engine.run(here.Sleeping(Path(place)), items))
            real = engine.wall_s
            mtbf = 1e9 if every is None else 60 * shard / rate / 6
            restart = _restart(engine, here, Path(place))
            found = [
                simulate(60 * shard, shard, Cluster(workers, rate, 0.0, 0.1, mtbf, restart, dispatch), seed).seconds for seed in range(200)
            ]
            low, middle, high = (sorted(found)[place] for place in (5, 100, 194))
            what = "no failures" if every is None else "six failures, or as many on average"
            print(
                f"{what}: engine {real:.2f} s, simulated {middle:.2f} s (95 % of runs {low:.2f} to {high:.2f}), engine over simulated {real / statistics.median(found):.2f}"
            )
    ray.shutdown()


def _restart(engine: object, here: object, place: Path) -> float:
    """Seconds between the end of a worker and the next that works."""
    started = time.perf_counter()
    list(engine.run(here.Sleeping(place), [(10_000 + int(started), 0.0, 0.0)]))  # type: ignore[attr-defined]
    return time.perf_counter() - started


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--images", type=float, default=1e8)
    parser.add_argument("--workers", default="8,64,512")
    parser.add_argument("--shards", default="1000,10000,100000")
    parser.add_argument("--rate", type=float, default=400.0)
    parser.add_argument("--overhead", type=float, default=2.0)
    parser.add_argument("--mtbf-hours", type=float, default=24.0)
    parser.add_argument("--restart", type=float, default=60.0)
    parser.add_argument("--dispatch", type=float, default=0.002)
    asked = parser.parse_args()
    if asked.check:
        sys.exit(check())
    workers, shards = ([int(one) for one in text.split(",")] for text in (asked.workers, asked.shards))
    cluster = Cluster(1, asked.rate, asked.overhead, 0.1, asked.mtbf_hours * HOUR, asked.restart, asked.dispatch)
    table(int(asked.images), workers, shards, cluster)


if __name__ == "__main__":
    main()
