"""What a hostile world does to the library: malformed images, tampered files, kills, two runs in one folder, a full disk.

    python benchmarks/campaign.py [images=200] [files=150] [kills=60] [doubles=8] [disks=8] [at_once=2] [seed=0]

A trial survives where what came in is used rightly, or refused with a reason in one line. A run that was killed, or had no
space left, must give the undisturbed result when it is started again. Everything else is a failure: a traceback, a wrong
result without a word, a process that dies or hangs. Prints what was tried, survived and failed by kind; status 1 where
anything failed. A full disk takes the right to mount a small tmpfs; where there is none, that kind is not tried, and said so.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image

from guardkit import GuardClassifier, Policy
from guardkit.counterfactual.pair_dataset import read_pair_dataset
from guardkit.data.sources.embeddings import EmbeddingsSource
from guardkit.embedding_folder import read_embedding_folder
from guardkit.images import read_image
from guardkit.runs.embed import run as embed_source
from guardkit.runs.hydra import CONF_DIR, default_cache_dir, user_error
from guardkit.runs.sweep import run as run_sweep
from guardkit.runs.synthesize import run as synthesize_source
from guardkit.runs.train import run
from guardkit.schema import ImageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tampering import survives, tampered

Trial = tuple[str, Callable[[], str | None]]
"""What is done, and the work: it gives None, or what went wrong."""

TIME_LIMIT_S = 120.0
SMALL = ["source.n_train=40", "source.n_test=9"]
SETTINGS = {
    "train": [*SMALL, "data.n_unsafe=16", "trainer.max_epochs=40"],
    "embed": [*SMALL, "shard_size=40"],
    "synthesize": [*SMALL, "limit=24", "edit_batch_size=4"],
    "sweep": [*SMALL, "sweep.sizes=[4,8]", "sweep.seeds=2", "sweep.arms=[unpaired,pairs_aug]", "sweep.n_resamples=100"],
}


# --- trials in processes of their own -----------------------------------------------------------------------------------------


class Child:
    """A forked process that does some work; it ends with 0, 2 (refused in one line) or 1, and says what it was.

    Args:
        work: gives None, or what went wrong.
        notes: a file for what it says.
    """

    def __init__(self, work: Callable[[], str | None], notes: Path) -> None:
        self._notes = notes
        sys.stdout.flush()
        self.pid = _forked()
        if self.pid == 0:
            status, text = 1, ""
            try:
                text = work() or ""
                status = 1 if text else 0
            except BaseException as error:
                line = user_error(error)
                status, text = (1, f"{type(error).__name__}: {error}") if line is None else (2, line)
            finally:
                notes.write_text(text, encoding="utf-8")
                os._exit(status)

    def wait(self, limit_s: float = TIME_LIMIT_S) -> tuple[int, str]:
        """Status and words; a process that died of a signal has its negative number, one that hung -9."""
        until = time.monotonic() + limit_s
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status), self._notes.read_text(encoding="utf-8") if self._notes.exists() else ""
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        return -signal.SIGKILL, f"hung for {limit_s:g} s"

    def kill(self) -> None:
        """At once, as the system does when memory is short."""
        os.kill(self.pid, signal.SIGKILL)


def _forked() -> int:
    while True:
        try:
            return os.fork()
        except RuntimeError:
            # filelock lets no process fork in the moment in which another thread takes or gives back a lock
            time.sleep(0.01)


def judged(outcome: tuple[int, str]) -> str | None:
    """Why a run that was to succeed or to be refused did neither, or None."""
    status, text = outcome
    if status == 0 or (status == 2 and text and "\n" not in text):
        return None
    return f"status {status}: {' '.join(text.split())[:300]}"


# --- malformed images -----------------------------------------------------------------------------------------------------------


def malformed(n: int, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of `n` files that are nearly images."""
    pixels = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((160, 120))
    kinds = ("png", "jpeg", "webp", "gif", "tiff", "bmp")
    whole: dict[str, bytes] = {}
    for kind in kinds:
        buffer = io.BytesIO()
        pixels.save(buffer, kind.upper())
        whole[kind] = buffer.getvalue()
    for i in range(n):
        kind, other = kinds[i % len(kinds)], kinds[(i + 1) % len(kinds)]
        data = bytearray(whole[kind])
        match int(rng.integers(8)):
            case 0:
                what, data = "cut", data[: int(rng.integers(len(data)))]
            case 1:
                what = "bytes changed"
                for place in rng.integers(0, len(data), 20):
                    data[place] = int(rng.integers(256))
            case 2:
                what = "head changed"
                for place in rng.integers(0, min(64, len(data)), 4):
                    data[place] = int(rng.integers(256))
            case 3:
                what, start = "zeros inside", int(rng.integers(len(data)))
                data[start : start + 200] = bytes(len(data[start : start + 200]))
            case 4:
                what, data = f"the rest of a {other}", data[: len(data) // 2] + whole[other][len(whole[other]) // 2 :]
            case 5:
                what, data = "its length a hundred times", data * 100
            case 6:
                what = "sides of millions"
                data = bytearray(bytes(data).replace((160).to_bytes(4, "big"), b"\x00\x7f\xff\xff", 1))
                data = bytearray(bytes(data).replace((160).to_bytes(2, "little"), b"\xff\xff", 1))
            case _:
                what, data = "noise behind its mark", data[:16] + rng.bytes(3000)
        yield f"{i:03d} {kind} {what}.{kind}", bytes(data)


def image_trials(folder: Path, n: int, rng: np.random.Generator) -> Iterator[Trial]:
    folder.mkdir()
    for name, data in malformed(n, rng):
        path = folder / name
        path.write_bytes(data)

        def read(path: Path = path) -> str | None:
            try:
                image = read_image(path)
            except ImageError as error:
                return None if "\n" not in str(error) else f"not one line: {error}"
            return None if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 else f"{image.dtype} {image.shape}"

        yield name, read

    def embed() -> str | None:
        (folder / "unsafe").mkdir()
        (folder / "safe").mkdir()
        for i, path in enumerate(sorted(folder.glob("*.*"))):
            path.rename(folder / ("unsafe" if i % 2 else "safe") / path.name)
        cfg = composed("embed", ["source=folder", "policy=handled_objects"])
        cfg.source.root, cfg.cache_dir = str(folder), None
        counts = embed_source(cfg, folder.with_name("embedded"))
        return None if counts["given"] == counts["written"] + counts["rejected"] == n else f"counts that do not add up: {counts}"

    yield "all of them, embedded", embed


# --- tampered files -------------------------------------------------------------------------------------------------------------


def file_trials(made: Path, n: int, rng: np.random.Generator) -> Iterator[Trial]:
    """Every kind of file by turns, one mutation each; what is read must be refused, or what was read before."""
    policy_file = made / "policy.yaml"
    Policy.load(CONF_DIR / "policy" / "scenes.yaml").save(policy_file)
    guard, embedded, pairs = made / "train" / "guard", made / "embed", made / "synthesize"
    vectors, rules = read_embedding_folder(embedded)[0], Policy.load(policy_file)

    def guard_says() -> list[float]:
        loaded = GuardClassifier.from_pretrained(guard)
        return [loaded.threshold, *loaded.score_embeddings(vectors[:8]).tolist()]

    def rows() -> list[str]:
        return [f"{row['pair_id']} {row['label']} {row['status']}" for row in read_pair_dataset(pairs)[0]]

    def embeddings() -> set[tuple[int, bytes]]:
        loaded = EmbeddingsSource(rules, str(embedded)).load()
        if len(loaded.train) + len(loaded.rejected) != loaded.given:
            raise ValueError("counts that do not add up")
        return {(record.label, np.asarray(record.embedding).tobytes()) for record in loaded.train}

    def is_right(found: object, expected: object) -> bool:
        # a row that cannot be used is rejected and counted, the others are as they were
        return found <= expected if isinstance(found, set) and isinstance(expected, set) else found == expected

    kinds: list[tuple[Path, Callable[[], object]]] = [
        (guard / "config.json", guard_says),
        (embedded / "manifest.json", embeddings),
        (embedded / "img_emb" / "img_emb_0.npy", embeddings),
        (embedded / "metadata" / "metadata_0.parquet", embeddings),
        (pairs / "manifest.json", rows),
        (pairs / "metadata.parquet", rows),
        (policy_file, lambda: [one.unsafe_texts for one in Policy.load(policy_file).categories]),
    ]
    for number, (path, read) in enumerate(kinds):
        expected = read()
        share = n // len(kinds) + (number < n % len(kinds))
        ways = list(tampered(path))
        for i in rng.permutation(len(ways))[:share]:
            what, data = ways[i]

            def trial(path: Path = path, data: bytes = data, read: Callable[[], object] = read, expected: object = expected) -> str | None:
                return survives(path, data, read, lambda found: is_right(found, expected))

            yield f"{path.relative_to(made)}: {what}", trial


# --- runs -----------------------------------------------------------------------------------------------------------------------


def composed(command: str, settings: list[str]):
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, settings)


def work(command: str, folder: Path, cache: Path) -> Callable[[], None]:
    """One run of a command into a folder."""

    def start() -> None:
        cfg = composed(command, SETTINGS[command])
        cfg.cache_dir = str(cache)
        folder.mkdir(parents=True, exist_ok=True)
        if command == "embed":
            embed_source(cfg, folder)
        elif command == "synthesize":
            synthesize_source(cfg, folder)
        else:
            {"train": run, "sweep": run_sweep}[command](cfg, {}, folder)

    return start


def result(command: str, folder: Path) -> dict[str, object]:
    """What a run must give again, without its times."""
    if command == "train":
        metrics = json.loads((folder / "metrics.json").read_text())
        kept = {key: metrics[key] for key in ("test", "pairs", "n_unsafe", "n_counterfactuals", "best_epoch")}
        return kept | {"weights": _hash(folder / "guard" / "model.safetensors"), "rows": len(pq.read_table(folder / "predictions.parquet"))}
    if command == "embed":
        vectors, table, _ = read_embedding_folder(folder)
        return {"vectors": hashlib.sha256(vectors.tobytes()).hexdigest(), "rows": table.to_pylist()}
    if command == "synthesize":
        images = {path.name: _hash(path) for path in sorted((folder / "images").iterdir())}
        return {"rows": read_pair_dataset(folder)[0], "images": images}
    summary = json.loads((folder / "summary.json").read_text())
    return {key: summary[key] for key in ("curves", "tests", "samples_to_target", "left_out")}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Runs:
    """Undisturbed runs, and what disturbed ones are compared with.

    Args:
        folder: of all that is made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self.expected: dict[str, dict[str, object]] = {}
        for command in SETTINGS:
            started = time.monotonic()
            outcome = self.child(command, folder / command, folder / "cache" / command, f"{command}.txt").wait(600)
            if outcome[0]:
                raise SystemExit(f"an undisturbed {command} failed: {outcome}")
            self.seconds[command] = time.monotonic() - started
            self.expected[command] = result(command, folder / command)

    def child(self, command: str, folder: Path, cache: Path, notes: str) -> Child:
        return Child(work(command, folder, cache), self.folder / notes)

    def again(self, command: str, folder: Path, cache: Path, notes: str) -> str | None:
        """Runs it once more, undisturbed; what is wrong with what it gives, or None."""
        status, text = self.child(command, folder, cache, notes).wait()
        if status:
            return f"the rerun ended with {status}: {' '.join(text.split())[:300]}"
        found = result(command, folder)
        wrong = [key for key, value in self.expected[command].items() if found[key] != value]
        return f"the rerun gave other {', '.join(wrong)}" if wrong else None

    def killed(self, command: str, name: str, after_s: float) -> str | None:
        folder, cache = self.folder / name, self.folder / f"{name} cache"
        child = self.child(command, folder, cache, f"{name}.txt")
        time.sleep(after_s)
        child.kill()
        status, text = child.wait()
        return judged((status, text)) if status not in (0, -signal.SIGKILL) else self.again(command, folder, cache, f"{name}.txt")

    def doubled(self, command: str, name: str, later_s: float) -> str | None:
        folder, cache = self.folder / name, self.folder / f"{name} cache"
        first = self.child(command, folder, cache, f"{name} 1.txt")
        time.sleep(later_s)
        second = self.child(command, folder, cache, f"{name} 2.txt")
        outcomes = [first.wait(), second.wait()]
        wrong = next((text for one in outcomes if (text := judged(one))), None)
        if wrong or all(status for status, _ in outcomes):
            return wrong or f"both were refused: {outcomes}"
        return self.again(command, folder, cache, f"{name}.txt")

    def on_full_disk(self, command: str, name: str, kilobytes: int) -> str | None:
        disk = self.folder / name
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)], check=True)
        try:
            outcome = self.child(command, disk / "out", disk / "cache", f"{name}.txt").wait()
            wrong = judged(outcome)
            if wrong:
                return wrong
            subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
            return self.again(command, disk / "out", disk / "cache", f"{name}.txt")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def can_mount(folder: Path) -> bool:
    place = folder / "mount"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True, check=False)
    if done.returncode == 0:
        subprocess.run(["umount", str(place)], check=True)
    return done.returncode == 0


# --- the campaign ---------------------------------------------------------------------------------------------------------------


def main(images: int, files: int, kills: int, doubles: int, disks: int, at_once: int, seed: int) -> int:
    logging.disable(logging.ERROR)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    rng = np.random.default_rng(seed)
    n_failed = 0

    def tell(kind: str, outcomes: list[tuple[str, str | None]], started: float) -> None:
        nonlocal n_failed
        failed = [(what, wrong) for what, wrong in outcomes if wrong]
        n_failed += len(failed)
        n, took = len(outcomes), time.monotonic() - started
        print(f"{kind:<22} tried {n:>4}  survived {n - len(failed):>4}  failed {len(failed):>4}  {took:6.1f} s", flush=True)
        for what, wrong in failed:
            print(f"    {what}: {wrong}", flush=True)

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(at_once) as pool:
        folder = Path(name)
        os.environ["GUARDKIT_CACHE"] = str(folder / "cache")

        def alone(trials: Iterator[Trial], kind: str) -> list[tuple[str, str | None]]:
            """In processes of their own, because a damaged file may end one."""
            return [(what, judged(Child(trial, folder / f"{kind}.txt").wait())) for what, trial in trials]

        started = time.monotonic()
        runs = Runs(folder)
        took = ", ".join(f"{command} {seconds:.1f}" for command, seconds in runs.seconds.items())
        print(f"undisturbed runs, seconds: {took}", flush=True)
        started = time.monotonic()
        tell("malformed images", alone(image_trials(folder / "images", images, rng), "images"), started)
        started = time.monotonic()
        tell("tampered files", alone(file_trials(folder, files, rng), "files"), started)

        def many(kind: str, n: int, trial: Callable[[str, str, float], str | None]) -> None:
            started, commands = time.monotonic(), list(SETTINGS)
            jobs = [(commands[i % len(commands)], f"{kind} {i}", float(rng.uniform(0.02, 0.98))) for i in range(n)]
            wrong = pool.map(lambda job: trial(*job), jobs)
            tell(kind, [(f"{job[0]} at {job[2]:.2f}", one) for job, one in zip(jobs, wrong, strict=True)], started)

        many("kills", kills, lambda command, name, share: runs.killed(command, name, share * runs.seconds[command]))
        many("two runs in a folder", doubles, lambda command, name, share: runs.doubled(command, name, share * runs.seconds[command] / 2))
        if can_mount(folder):
            many("full disks", disks, lambda command, name, share: runs.on_full_disk(command, name, round(16 * 200**share)))
        else:
            print("full disks             not tried: no tmpfs may be mounted here")
    return 1 if n_failed else 0


if __name__ == "__main__":
    given = {"images": 200, "files": 150, "kills": 60, "doubles": 8, "disks": 8, "at_once": 2, "seed": 0}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in given or not value.isdigit():
            raise SystemExit(f"got {argument!r}; there are {', '.join(f'{name}=N' for name in given)}")
        given[key] = int(value)
    sys.exit(main(**given))
