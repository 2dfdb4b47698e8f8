"""Training on millions of stored embeddings: rows a second beside reading the files, time to the first batch, memory.

    python benchmarks/rows.py                        # ten million rows of 768 float16, 15.4 GB on disk, removed afterwards
    python benchmarks/rows.py --rows 1000000 --folder /somewhere/else

What is timed is `guardkit.train_guard` as a command calls it: one epoch of a linear head over everything, its figures and its files. The floor
is reading the same files, 64 MB at a time, before and after. The old way, an object a row, is `as_objects`: it makes a `Record` of every row and holds
them, and is given at most 200,000 rows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import ClassVar

import numpy as np

WIDTH, PART, OBJECTS, AT_ONCE = 768, 100_000, 200_000, 64 << 20


def write(folder: Path, n: int) -> None:
    """A folder as clip-retrieval writes it: unit vectors in half precision, one of five unsafe, which lie a little to one side."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((PART, WIDTH), np.float32)
    side = rng.standard_normal(WIDTH, np.float32)
    for part, first in enumerate(range(0, n, PART)):
        size = min(PART, n - first)
        unsafe = rng.random(size) < 0.2
        # another part of the noise for each row, and numbers of its own, so that no two rows are alike
        vectors = np.roll(noise[:size], part, axis=1)
        vectors[:, :32] = rng.standard_normal((size, 32), np.float32)
        vectors[unsafe] += 0.1 * side
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / f"img_emb/img_emb_{part}.npy", vectors.astype(np.float16))
        numbers = np.arange(first, first + size)
        table = {
            "image_path": [f"{part:05d}/{number:012d}.jpg" for number in numbers.tolist()],
            "label": np.where(unsafe, "unsafe", "safe"),
            "category": pa.array(np.where(unsafe, "weapons", None).tolist(), pa.string()),
        }
        pq.write_table(pa.table(table), folder / f"metadata/metadata_{part}.parquet")


def read(folder: Path) -> float:
    """Seconds that reading all vectors takes, from wherever the system has them."""
    held = bytearray(AT_ONCE)
    started = time.perf_counter()
    for path in sorted(folder.glob("img_emb/*.npy")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(held):
                pass
    return time.perf_counter() - started


def memory() -> dict[str, float]:
    """MB of this process: its own, and mapped files, which the system may take back."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(said[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


class Watch(threading.Thread):
    """Notes the most memory that was there at one time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = {"RssAnon": 0.0, "RssFile": 0.0}
        self.is_over = threading.Event()

    def run(self) -> None:
        while not self.is_over.wait(0.05):
            for name, value in memory().items():
                self.most[name] = max(self.most[name], value)


def rules():
    from guardkit import Category, Policy

    return Policy("benchmark", "", (Category("weapons", "", (), (), "", ("unsafe",), ("safe",)),))


class Stored:
    """In the place of an encoder: nothing is encoded here."""

    name, dim, batch_size, fingerprint = "none", WIDTH, 1, "0" * 64
    config: ClassVar[dict] = {}
    preprocessing: ClassVar[dict] = {}

    def preprocess(self, image):
        return image

    def encode_preprocessed(self, images, *, fixed_batch=False, normalize=True):  # noqa: ARG002
        return self.encode_images(images)

    def encode_images(self, images):
        vectors = np.zeros((len(images), WIDTH), np.float32)
        vectors[:, 0] = 1
        return vectors


def trained(folder: Path, batch_size: int, connection) -> None:
    """In a process of its own, whose memory is looked at."""
    import lightning as L
    import torch

    import guardkit

    torch.set_num_threads(max(1, multiprocessing.cpu_count() - 1))  # one processor makes the next batch

    class Clock(L.Callback):
        first = started = ended = 0.0

        def on_train_start(self, trainer, module):  # noqa: ARG002
            self.started = time.perf_counter()

        def on_train_batch_start(self, trainer, module, batch, batch_idx):  # noqa: ARG002
            self.first = self.first or time.perf_counter()
            self.rows = getattr(self, "rows", 0) + len(batch["labels"])

        def on_train_epoch_end(self, trainer, module):  # noqa: ARG002
            self.ended = time.perf_counter()
            print(
                f"first batch after {self.first - started:.1f} s, epoch {self.ended - self.started:.1f} s, {self.rows} rows, {watch.most}",
                flush=True,
            )

    before, watch, clock = memory()["RssAnon"], Watch(), Clock()
    watch.start()
    started = time.perf_counter()
    source = guardkit.EmbeddingsSource(rules(), str(folder))
    with tempfile.TemporaryDirectory() as out:
        report = guardkit.train_guard(
            source,
            rules(),
            encoder=Stored(),
            head="linear",
            n_unsafe="all",
            safe_per_unsafe="all",
            batch_size=batch_size,
            trainer={"max_epochs": 1},
            callbacks=[clock],
            output_dir=out,
        )
        sizes = {path.name: path.stat().st_size for path in Path(out).rglob("*") if path.is_file()}
    ended = time.perf_counter()
    watch.is_over.set()
    connection.send(
        {
            "rows": clock.rows,
            "to_first_batch_s": clock.first - started,
            "epoch_s": clock.ended - clock.started,
            "after_s": ended - clock.ended,
            "anon_before_mb": before,
            **watch.most,
            "auroc": report.metrics["test"]["auroc"],
            "n_test": report.metrics["test"]["n"],
            "notes": report.metrics["notes"],
            "seen_mb": sizes.get("training_vectors.parquet", 0) / 1e6,
        }
    )


def as_objects(folder: Path, n: int, connection) -> None:
    """Every row as an object, grouped by the functions that take objects."""
    import guardkit
    from guardkit.data.grouping import group
    from guardkit.data.sources.base import Loaded

    source = guardkit.EmbeddingsSource(rules(), str(folder))
    loaded = source.load()
    before = memory()["RssAnon"]
    started = time.perf_counter()
    records = list(loaded.train[:n])
    group(Loaded(train=records, test=None, rejected=[], given=len(records)))
    connection.send({"rows": len(records), "seconds": time.perf_counter() - started, "mb": memory()["RssAnon"] - before})


def loaded(folder: Path, connection) -> None:
    import guardkit

    before = memory()["RssAnon"]
    started = time.perf_counter()
    found = guardkit.EmbeddingsSource(rules(), str(folder)).load()
    connection.send({"rows": len(found.train), "seconds": time.perf_counter() - started, "mb": memory()["RssAnon"] - before})


def alone(function, *arguments):
    """What a function sends from a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(*arguments, theirs))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--batch-size", type=int, default=1024, help="unsafe images in a batch; four safe ones stand beside each")
    parser.add_argument("--folder", type=Path, help="for the rows; a temporary one unless given")
    parser.add_argument("--keep", action="store_true", help="leave the rows there, and use those that are there")
    asked = parser.parse_args()
    place = asked.folder or Path(tempfile.mkdtemp(prefix="rows-"))
    try:
        if not (place / "img_emb").is_dir():
            write(place, asked.rows)
        floor = [read(place)]
        done = alone(trained, place, asked.batch_size)
        print(json.dumps(done), flush=True)
        floor.append(read(place))
        old, new = alone(as_objects, place, OBJECTS), alone(loaded, place)
        n_bytes = sum(path.stat().st_size for path in place.glob("img_emb/*.npy"))
        rate, reading = done["rows"] / done["epoch_s"], asked.rows / min(floor)
        print(
            f"files          {n_bytes / 1e9:.1f} GB, read in {floor[0]:.1f} s before and {floor[1]:.1f} s after: {reading / 1e6:.2f} million rows a second"
        )
        print(
            f"epoch          {done['rows']} rows in {done['epoch_s']:.1f} s: {rate / 1e6:.2f} million rows a second, {rate / reading:.2f} of reading"
        )
        print(f"first batch    after {done['to_first_batch_s']:.1f} s; figures and files took {done['after_s']:.1f} s after the epoch")
        print(f"memory         {done['RssAnon']:.0f} MB of its own at most, {done['RssFile']:.0f} MB of mapped files")
        slower = (old["seconds"] / old["rows"]) / (new["seconds"] / new["rows"])
        heavier = (old["mb"] / old["rows"]) / (max(1.0, new["mb"]) / new["rows"])
        print(
            f"an object a row {old['seconds']:.1f} s and {old['mb']:.0f} MB for {old['rows']} rows; in columns {new['seconds']:.1f} s and {new['mb']:.0f} MB for "
            f"{new['rows']}: {slower:.0f} times the seconds, {heavier:.0f} times the memory a row"
        )
    finally:
        if not asked.keep:
            shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
