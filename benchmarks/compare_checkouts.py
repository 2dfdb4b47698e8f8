"""Two checkouts side by side in one run: `import guardkit`, `--help`, the main job cold and warm, and a sweep.

    python benchmarks/compare_checkouts.py BEFORE AFTER [repeats=5] [key=value ...]

BEFORE and AFTER are folders with a checkout each (`git worktree add ../before v0.1.0`). The repeats of both are interleaved, the first of a pair
in turn, and each job has one thread. The time of the processor, of a job and all its children, is what to compare where
other work runs on the machine; the time on the clock stands beside it. Of each the smallest of all repeats and, for its spread, the largest.
Further settings are for the sweep, as in `sweep.sizes=[8,32] sweep.seeds=2`; without them it is the default one, whose
embeddings were stored before.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path


def run(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the processor and on the clock."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {checkout} ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, took


def main(arguments: list[str]) -> None:
    if len(arguments) < 2:
        raise SystemExit(__doc__)
    checkouts = [Path(argument).resolve() for argument in arguments[:2]]
    repeats, overrides = 5, []
    for argument in arguments[2:]:
        key, _, value = argument.partition("=")
        if key == "repeats":
            repeats = int(value)
        else:
            overrides.append(argument)
    print(f"smallest to largest of {repeats}, in seconds, one thread; sweep: {' '.join(overrides) or 'the default one'}\n")
    print("| job | processor, before | after | ratio | clock, before | after | ratio |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:

        def train(name: str, folder: Path) -> list[str]:
            return [
                "-m",
                "guardkit.train",
                "experiment=pairs_aug",
                "head=linear",
                f"cache_dir={folder / 'cache'}",
                f"output_dir={folder / name}",
            ]

        def sweep(folder: Path) -> list[str]:
            stored = folder.parent / "stored"
            same = ["head=linear_whitened", "data.variants_per_image=4"]  # defaults of one checkout may be others than the other's
            return ["-m", "guardkit.sweep", *same, f"cache_dir={stored}", f"output_dir={folder / 'sweep'}", *overrides]

        jobs: dict[str, Callable[[Path], list[str]]] = {
            "`python -c pass`": lambda _: ["-c", "pass"],
            "`import guardkit`": lambda _: ["-c", "import guardkit"],
            "`train --help`": lambda _: ["-m", "guardkit.train", "--help"],
            "main job, cold": lambda folder: train("cold", folder),
            "main job, warm": lambda folder: train("warm", folder),  # finds the embeddings of the cold one of that repeat
            "sweep": sweep,
        }
        for name, job in jobs.items():
            if not name.startswith("main job"):  # compiles what is imported, and stores the embeddings of the sweeps
                for side, checkout in enumerate(checkouts):
                    run(checkout, job(Path(temporary) / str(side) / "first"))
            times: list[list[tuple[float, float]]] = [[], []]
            for repeat in range(repeats):
                for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                    times[side].append(run(checkouts[side], job(Path(temporary) / str(side) / str(repeat))))
            cells = []
            for clock in (0, 1):
                before, after = ([one[clock] for one in side] for side in times)
                cells += [
                    f"{min(before):.2f} to {max(before):.2f}",
                    f"{min(after):.2f} to {max(after):.2f}",
                    f"{min(after) / min(before):.2f}",
                ]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
