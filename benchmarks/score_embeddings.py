"""Scores of millions of stored embeddings: bytes a second over the rate at which this machine copies the same file, and the peak of memory.

    python benchmarks/score_embeddings.py            # ten million rows of 512 float16, 10.2 GB on disk, about two minutes
    python benchmarks/score_embeddings.py --rows 1000000 --folder /somewhere/else

A copy takes the mapped file into memory, 256 MB at a time, by one thread. Both take turns, and the better time of each counts, so that one load on the machine, or a file that is not yet in the system's cache, is not
blamed on either. Scores are of a linear head with nine categories, and of an anchored one with 40 texts, which is what `head=auto` gives.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

WIDTH, CATEGORIES, TEXTS, TURNS = 512, 9, 40, 2


def write(folder: Path, n: int) -> Path:
    """An embedding folder of n unit vectors in one part; the same 100,000 over and over."""
    path = folder / "img_emb" / "img_emb_0.npy"
    path.parent.mkdir(parents=True)
    vectors = np.random.default_rng(0).standard_normal((min(n, 100_000), WIDTH), np.float32)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (n, WIDTH)})
        for start in range(0, n, len(vectors)):
            file.write(vectors[: n - start])
    return path


def head(kind: str):
    import torch

    from guardkit.heads import AnchoredHead, LinearHead

    torch.manual_seed(0)
    made = LinearHead(WIDTH, CATEGORIES) if kind == "linear" else AnchoredHead(WIDTH, CATEGORIES, n_prompts=TEXTS)
    torch.nn.init.normal_(made.linear.weight)
    if kind == "anchored":
        made.prompts.normal_()
        made.members[:, :] = torch.arange(TEXTS) % (2 + CATEGORIES) == torch.arange(2 + CATEGORIES)[:, None]
    return made


def guard(kind: str):
    from guardkit import Category, GuardClassifier, Policy

    rules = tuple(Category(f"category_{i}", "", (), (), "", ("unsafe",), ("safe",)) for i in range(CATEGORIES))
    policy = Policy("benchmark", "", rules)
    encoder = SimpleNamespace(dim=WIDTH, name="none", fingerprint="0" * 64)
    return GuardClassifier(head(kind), encoder, policy)


def copied(path: Path) -> float:
    rows = np.load(path, mmap_mode="r")
    held = np.zeros((1 << 18, WIDTH), np.float16)
    started = time.perf_counter()
    for start in range(0, len(rows), len(held)):
        block = rows[start : start + len(held)]
        np.copyto(held[: len(block)], block)
    return time.perf_counter() - started


def scored(path: Path, kind: str, connection) -> None:
    """In a process of its own, whose memory is looked at."""
    one = guard(kind)
    one.score_embeddings(np.load(path, mmap_mode="r")[:100_000])
    for given in (np.load(path, mmap_mode="r"), path.parent.parent):
        before = peak()
        started = time.perf_counter()
        scores = one.score_embeddings(given)
        connection.send((time.perf_counter() - started, before, peak(), bool(np.isfinite(scores).all())))


def peak() -> float:
    """MB of this process at its largest, files that it has mapped included (Linux)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the file is written, and removed afterwards; the usual one for temporary files")
    args = parser.parse_args()
    if args.folder is not None:
        Path(args.folder).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        n_bytes, free = args.rows * WIDTH * 2, shutil.disk_usage(folder).free
        if n_bytes > 0.9 * free:
            raise SystemExit(
                f"{args.rows} rows take {n_bytes / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB; give fewer --rows, or another --folder"
            )
        path = write(folder, args.rows)
        spawn = multiprocessing.get_context("spawn")
        copies, found = [], {}
        for _ in range(TURNS):
            copies.append(copied(path))
            for kind in ("linear", "anchored"):
                mine, theirs = spawn.Pipe(duplex=False)
                process = spawn.Process(target=scored, args=(path, kind, theirs))
                process.start()
                for given in ("mapped array", "folder"):
                    found.setdefault(f"{kind} head, {given}", []).append(mine.recv())
                process.join()
        rows = {"rows": args.rows, "GB": n_bytes / 1e9, "copy, GB/s": n_bytes / min(copies) / 1e9}
        print(json.dumps(rows))
        for name, runs in found.items():
            seconds = min(run[0] for run in runs)
            figures = {
                "rate over copy": min(copies) / seconds,
                "peak MB": max(run[2] for run in runs),
                "of that before, MB": max(run[1] for run in runs),
            }
            print(
                f"{name}: " + json.dumps({key: round(value, 2) for key, value in figures.items()}),
                "all finite" if all(run[3] for run in runs) else "NaN",
            )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
