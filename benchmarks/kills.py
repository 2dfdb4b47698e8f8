"""`embed` and `moderate` killed at random moments and resumed, until they are done: the folder must be that of a run nobody disturbed.

    python benchmarks/kills.py                          # 50 kills of each command on engine=local, some minutes
    python benchmarks/kills.py --engine ray --kills 50  # on a Ray that this script starts; the command is killed, and its actors with it
    python benchmarks/kills.py --engine slurm           # jobs of engine.cluster=local; the command is killed, and its jobs go on, as on a cluster

A process that has imported everything is forked for each attempt, so that a kill falls into the work and not into imports. SIGKILL comes at a moment drawn from an exponential distribution
whose mean is a third of what the undisturbed run takes. A folder that was finished is compared, file by file, with the undisturbed one, and a new one is begun, until enough kills were made.
Jobs of killed commands work beside those of the next one; the last of them has ended before a folder is compared. Prints kills, finished folders, how many of these were equal, what the
attempts took for each second of the undisturbed run, and seconds for each kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

import guardkit
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.engines.base import Engine
from guardkit.engines.local import LocalEngine
from guardkit.engines.ray import RayEngine
from guardkit.engines.slurm import SlurmEngine
from guardkit.policy import Policy

N_IMAGES, SHARD = 600, 20


def images(folder: Path) -> Path:
    """Blurred noise as PNG: every ninth one again, every fiftieth cut short."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(N_IMAGES):
        pixels = cv2.resize(rng.integers(0, 256, (8, 8, 3), np.uint8), (160, 120), interpolation=cv2.INTER_CUBIC)
        data = cv2.imencode(".png", pixels)[1].tobytes()
        if number % 9 == 8:
            data = (folder / f"{number - 8:04d}.png").read_bytes()
        (folder / f"{number:04d}.png").write_bytes(data[: len(data) // 3] if number % 50 == 49 else data)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def attempt(work: Callable[[], object], seconds: float | None, groups: list[int] | None = None) -> bool:
    """Whether a forked process finished its work before it was killed. With `groups` it has one of its own, which is added."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if groups is not None:
                os.setpgid(0, 0)
            work()
            code = 0
        finally:
            os._exit(code)
    if groups is not None:
        groups.append(child)
    until = None if seconds is None else time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            if status:
                raise SystemExit(f"an attempt ended with status {status} by itself")
            return True
        if until is not None and time.monotonic() >= until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.002)


def wait_for(groups: list[int]) -> None:
    """Until no process of theirs is left, such as a job whose command was killed."""
    while groups:
        try:
            os.killpg(groups[-1], 0)
        except ProcessLookupError:
            groups.pop()
        else:
            time.sleep(0.1)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=["local", "ray", "slurm"], default="local")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    draw = random.Random(asked.seed)
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu", batch_size=32)
    rules = Policy.load(Path(guardkit.__file__).parent.parent / "conf/policy/scenes.yaml")
    torch.manual_seed(0)
    guard = guardkit.GuardClassifier(guardkit.LinearHead.build(encoder, rules), encoder, rules)
    address = started_ray() if asked.engine == "ray" else None

    groups: list[int] | None = [] if asked.engine == "slurm" else None
    with tempfile.TemporaryDirectory(prefix="guardkit-kills-") as place:
        root = Path(place)

        def engine() -> Engine:
            if asked.engine == "slurm":
                return SlurmEngine(workers=2, cluster="local", jobs_dir=root / "jobs")
            return LocalEngine() if address is None else RayEngine(workers=2, address=address)

        given = images(root / "images")
        commands: dict[str, Callable[[Path], Callable[[], object]]] = {
            "embed": lambda out: lambda: guardkit.embed(input=given, encoder=encoder, output_dir=out, shard_size=SHARD, engine=engine()),
            "moderate": lambda out: lambda: guardkit.moderate(guard, given, output_dir=out, shard_size=SHARD, engine=engine()),
        }
        print(
            f"{'command':<10}{'kills':>6}{'folders':>9}{'equal':>7}{'time over undisturbed':>24}{'seconds a kill':>16}   engine={asked.engine}"
        )
        for name, make in commands.items():
            started = time.monotonic()
            attempt(make(root / f"{name}_whole"), None, groups)
            whole = time.monotonic() - started
            expected = files_of(root / f"{name}_whole")
            kills = folders = equal = 0
            started = time.monotonic()
            while kills < asked.kills:
                out = root / f"{name}_{folders}"
                while not attempt(make(out), draw.expovariate(3 / whole), groups):
                    kills += 1
                wait_for(groups or [])
                folders += 1
                found = files_of(out)
                equal += found == expected
                if found != expected:
                    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
                    print(f"{out.name} differs in {len(odd)} files: {', '.join(odd[:8])}")
            took = time.monotonic() - started
            print(f"{name:<10}{kills:>6}{folders:>9}{equal:>7}{took / whole / folders:>24.2f}{took / max(kills, 1):>16.1f}")
            if equal != folders:
                raise SystemExit("a folder differs from the undisturbed one")


def started_ray() -> str:
    """The address of a Ray that ends with this process."""
    import atexit
    import subprocess

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    subprocess.run(
        ["ray", "start", "--head", "--num-cpus=4", "--include-dashboard=false", "--object-store-memory=200000000"],
        check=True,
        capture_output=True,
    )
    atexit.register(lambda: subprocess.run(["ray", "stop", "--force"], capture_output=True, check=False))
    return "auto"


if __name__ == "__main__":
    main()
