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
from pathlib import Path

QUICK = {"python -c pass": ["-c", "pass"], "import guardkit": ["-c", "import guardkit"], "train --help": ["-m", "guardkit.train", "--help"]}


def run(checkout: Path, arguments: list[str]) -> tuple[float, float]:
    """Seconds of the processor and on the clock."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    ended = subprocess.run([sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode:
        raise SystemExit(f"{' '.join(arguments)} in {checkout} ended with status {ended.returncode}:\n{ended.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, took


def jobs(folder: Path, overrides: list[str]) -> dict[str, list[str]]:
    """Commands in the order in which they run; the first job of a `folder` finds no embeddings there."""
    train = ["-m", "guardkit.train", "experiment=pairs_aug", f"cache_dir={folder / 'cache'}"]
    sweep = ["-m", "guardkit.sweep", f"cache_dir={folder.parent / 'stored'}", *overrides]
    return {
        **QUICK,
        "main job, cold": [*train, f"output_dir={folder / 'cold'}"],
        "main job, warm": [*train, f"output_dir={folder / 'warm'}"],
        "sweep": [*sweep, f"output_dir={folder / 'sweep'}"],
    }


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
    times: dict[str, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for side, checkout in enumerate(checkouts):  # stores embeddings for the sweeps, and compiles what is imported
            for arguments_of_job in jobs(Path(temporary) / str(side) / "first", overrides).values():
                run(checkout, arguments_of_job)
        for repeat in range(repeats):
            for side in (0, 1) if repeat % 2 == 0 else (1, 0):
                for name, job in jobs(Path(temporary) / str(side) / str(repeat), overrides).items():
                    times.setdefault(name, ([], []))[side].append(run(checkouts[side], job))
    print(f"smallest to largest of {repeats}, in seconds, one thread; sweep {' '.join(overrides) or 'as it is by default'}\n")
    print("| job | processor, before | after | ratio | clock, before | after | ratio |\n|---|---|---|---|---|---|---|")
    for name, sides in times.items():
        cells = []
        for clock in (0, 1):
            before, after = ([one[clock] for one in side] for side in sides)
            cells += [f"{min(before):.2f} to {max(before):.2f}", f"{min(after):.2f} to {max(after):.2f}", f"{min(after) / min(before):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
