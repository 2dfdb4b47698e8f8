"""The same shards on every engine: equal bytes, also where a worker or the command itself is killed; and what engines cost.

    pip install "guardkit[ray,slurm]"
    python benchmarks/engines.py FOLDER                 # of Parquet files with a column of encoded images, such as a data set of the Hub
    python benchmarks/engines.py FOLDER --limit 20000 --shard 500

The photographs become tar shards. They are embedded and decided on engine=local, on engine=ray with two and with four workers, there once more with a worker that gets SIGKILL in the middle, once with
the command killed in the middle and given again, and in two jobs of engine=slurm as processes of this machine. Every file of every output is compared with that of engine=local.
Prints photographs a second, and of Ray the share of its workers' time in which they were in no task: to begin, to be sent one, to wait for the last.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from kills import attempt, files_of, started_ray
from shards import tars

import guardkit
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.engines.base import Engine
from guardkit.engines.local import LocalEngine
from guardkit.engines.ray import RayEngine
from guardkit.engines.slurm import SlurmEngine
from guardkit.policy import Policy


def kill_a_worker(after: float) -> list[int]:
    """SIGKILL for one of Ray's workers, in so many seconds; which one, once it is done."""
    killed: list[int] = []

    def kill() -> None:
        time.sleep(after)
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if b"ray::_Worker" in entry.read_bytes():
                    os.kill(int(entry.parent.name), signal.SIGKILL)
                    killed.append(int(entry.parent.name))
                    return
            except OSError:  # it has ended
                continue

    threading.Thread(target=kill, daemon=True).start()
    return killed


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=20_000)
    parser.add_argument("--shard", type=int, default=500)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu", batch_size=250)
    torch.manual_seed(0)
    rules = Policy.load("guardkit:scenes")
    guard = guardkit.GuardClassifier(guardkit.LinearHead.build(encoder, rules), encoder, rules)
    torch.nn.init.normal_(guard.head.linear.weight, std=0.1)  # type: ignore[union-attr, attr-defined]
    address = started_ray()
    with tempfile.TemporaryDirectory(prefix="guardkit-engines-") as place:
        root = Path(place)
        n = tars(sorted(asked.folder.glob("*.parquet")), root / "in", asked.limit, asked.shard)
        print(f"{n:,} photographs in {-(-n // asked.shard)} shards, {os.cpu_count()} processors")
        print(f"{'':<46}{'embed':>16}{'moderate':>16}    a second, share of scheduling")

        def embed(out: Path, engine: Engine) -> object:
            return guardkit.embed(input=root / "in", encoder=encoder, output_dir=out / "embed", engine=engine)

        def decide(out: Path, engine: Engine) -> object:
            return guardkit.moderate(guard, root / "in", output_dir=out / "moderate", engine=engine)

        def ray(workers: int) -> RayEngine:
            return RayEngine(workers=workers, address=address)

        jobs = root / "jobs"
        seconds: dict[str, float] = {}
        for name, make, disturbed in (
            ("local", LocalEngine, None),
            ("ray, two workers", lambda: ray(2), None),
            ("ray, four workers", lambda: ray(4), None),
            ("ray, two workers, one killed", lambda: ray(2), "worker"),
            ("ray, two workers, the command killed", lambda: ray(2), "command"),
            ("slurm (processes here), two jobs", lambda: SlurmEngine(workers=2, cluster="local", jobs_dir=jobs), None),
        ):
            out, said = root / name.replace(" ", "_"), ""
            for kind, work in (("embed", embed), ("moderate", decide)):
                engine = make()
                killed: list[int] = [1]
                if disturbed == "worker":
                    killed = kill_a_worker(seconds[kind] / 3)
                if disturbed == "command" and attempt(_of(work, out, ray(2)), seconds[kind] / 2):
                    raise SystemExit("the command was done before it was killed")
                started = time.perf_counter()
                work(out, engine)
                took = time.perf_counter() - started
                if not killed:
                    raise SystemExit("no worker was there to be killed")
                if isinstance(engine, RayEngine) and not disturbed:
                    seconds[kind] = took
                    said += f"{n / took:>9.0f}{1 - engine.busy_s / engine.wall_s / engine.workers:>7.3f}"
                else:
                    said += f"{n / took:>9.0f}       " if disturbed != "command" else f"{'':>16}"
                found, expected = files_of(out / kind), files_of(root / "local" / kind)
                odd = sorted(file for file in found.keys() | expected.keys() if found.get(file) != expected.get(file))
                if odd:
                    raise SystemExit(f"{name}: {kind} wrote other files than engine=local: {', '.join(odd[:5])}")
            print(f"{name:<46}{said}    the same files", flush=True)


def _of(work: Callable[[Path, Engine], object], out: Path, engine: Engine) -> Callable[[], object]:
    return lambda: work(out, engine)


if __name__ == "__main__":
    main()
