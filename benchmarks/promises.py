"""A probe or more for each kind of promise, tried on any number of checkouts.

    python benchmarks/promises.py CHECKOUT [CHECKOUT ...] [kind=NUMBER ...]

A checkout is a folder with the project (`git worktree add ../before v0.1.0`). Every probe types what a user types, in a
process of its own that imports that checkout, so that a version in which the promise was not yet kept is tried by the same
words. Prints a table: kept, or what came instead. Linux, one thread a process; the probe of a full disk mounts a small
tmpfs, which only root may, and the last kind needs Python 3.13 to be seen (`python3.13 benchmarks/promises.py ...`).
"""

from __future__ import annotations

import http.server
import os
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

SMALL = ["source.n_train=60", "source.n_test=40", "data.n_unsafe=8", "trainer.max_epochs=3"]
OWN = ["experiment=unpaired", "source=folder", "policy=handled_objects", "editor=none", "data.n_unsafe=6", "trainer.max_epochs=2"]
PROBES: list[tuple[int, str, Callable[[Checkout], None]]] = []


class NotKept(Exception):
    """What came instead of what was promised."""


@dataclass
class Checkout:
    """A checkout under trial, and a folder for what its probes write."""

    folder: Path
    work: Path
    _guard: Path | None = field(default=None, repr=False)

    def run(self, *arguments: str, seconds: float = 300, **environment: str) -> tuple[int, str]:
        """Status and everything printed of `python ARGUMENTS`."""
        settings = {
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "GUARDKIT_CACHE": str(self.work / "cache"),
            "WANDB_MODE": "offline",
        }
        ended = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.work,
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        return ended.returncode, ended.stdout + ended.stderr

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        settings = {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", "GUARDKIT_CACHE": str(self.work / "cache")}
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.work,
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def guard(self) -> Path:
        """A small guard that this checkout trained, once."""
        if self._guard is None:
            status, said = self.run("-m", "guardkit.train", "experiment=unpaired", *SMALL, f"output_dir={self.work / 'run'}")
            expect(status == 0, said)
            self._guard = self.work / "run/guard"
        return self._guard

    def with_guard(self, code: str, folder: Path | None = None, **environment: str) -> tuple[int, str]:
        """Runs code that finds the guard as `g`."""
        opened = f"from guardkit import GuardClassifier\ng = GuardClassifier.from_pretrained({str(folder or self.guard())!r})\n"
        return self.run("-c", opened + code, **environment)


def probe(kind: int, promise: str) -> Callable[[Callable[[Checkout], None]], Callable[[Checkout], None]]:
    def add(function: Callable[[Checkout], None]) -> Callable[[Checkout], None]:
        PROBES.append((kind, promise, function))
        return function

    return add


def expect(kept: bool, instead: object) -> None:
    if not kept:
        lines = [line.strip() for line in str(instead).strip().splitlines() if line.strip()]
        raise NotKept(lines[-1] if lines else "nothing was said")


def expect_line(said: str, *words: str) -> None:
    """One line for the user that holds the words."""
    expect("Traceback" not in said and all(word.lower() in said.lower() for word in words), said)


def pictures(folder: Path, n: int = 32, words: tuple[str, str] = ("safe", "unsafe"), seed: int = 0) -> Path:
    """A folder of n pictures that look alike nowhere, every other one unsafe, with its metadata.csv."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = ["file_name,label,category"]
    for index in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((96, 96), Image.Resampling.BICUBIC).save(folder / f"p{index:03d}.png")
        rows.append(f"p{index:03d}.png,{words[index % 2]},{'weapons' if index % 2 else ''}")
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def png(width: int, height: int) -> bytes:
    """A grey PNG of any size, in a few kilobytes."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    lines = zlib.compress((b"\0" + b"\x80" * width * 3) * height, 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", lines)
        + chunk(b"IEND", b"")
    )


@probe(1, "a guard is not tested on what it was trained on, whatever the split seed")
def _(c: Checkout) -> None:
    own = [f"source.root={pictures(c.work / 'seen', 40)}"]
    status, said = c.run("-m", "guardkit.train", *OWN, *own, f"output_dir={c.work / 'seen_run'}")
    expect(status == 0, said)
    source = ["source=folder", "policy=handled_objects", *own, "split_seed=5"]
    status, said = c.run("-m", "guardkit.evaluate", f"guard={c.work / 'seen_run/guard'}", *source, f"output_dir={c.work / 'seen_test'}")
    expect(status == 0 and "left out" in said, "tested on its own training images without a word")


@probe(2, "a row without a label is rejected and counted")
def _(c: Checkout) -> None:
    folder = pictures(c.work / "unlabelled")
    table = folder / "metadata.csv"
    table.write_text(table.read_text().replace("p003.png,unsafe,weapons", "p003.png,,"))
    status, said = c.run("-m", "guardkit.train", *OWN, f"source.root={folder}", f"output_dir={c.work / 'unlabelled_run'}")
    expect(status == 0, said)
    expect("p003.png" in (c.work / "unlabelled_run/metrics.json").read_text(), "the row is not named in metrics.json")


@probe(3, "jobs of a multirun stay inside output_dir, one folder each")
def _(c: Checkout) -> None:
    pictures(c.work / "many/pics")
    out = c.work / "many/out"
    status, said = c.run("-m", "guardkit.train", "-m", *OWN, "source.root=many/../many/pics", "seed=0,1", f"output_dir={out}")
    expect(status == 0, said)
    expect(len(list(out.rglob("metrics.json"))) == 2, f"{len(list(c.work.rglob('many/**/metrics.json')))} result for 2 jobs")


@probe(4, "a path with brackets is a path")
def _(c: Checkout) -> None:
    _, said = c.run("-m", "guardkit.train", "source=folder", "source.root=photos (1)")
    expect_line(said, "photos (1)")
    expect("Unknown function" not in said, said)


@probe(4, "a misspelt setting suggests the nearest one")
def _(c: Checkout) -> None:
    expect_line(c.run("-m", "guardkit.train", "data.n_unsaf=3")[1], "n_unsafe")


@probe(4, "--version is guardkit's")
def _(c: Checkout) -> None:
    expect_line(c.run("-m", "guardkit.train", "--version")[1], "guardkit")


@probe(5, "another user can read a guard's weights")
def _(c: Checkout) -> None:
    hidden = [path.name for path in c.guard().iterdir() if not path.stat().st_mode & stat.S_IROTH]
    expect(not hidden, f"not readable: {', '.join(hidden)}")


@probe(5, "a guard pickles and deepcopies")
def _(c: Checkout) -> None:
    status, said = c.with_guard("import copy, pickle\npickle.loads(pickle.dumps(g))\ncopy.deepcopy(g)")
    expect(status == 0, said)


@probe(5, "a guard is found in its run folder")
def _(c: Checkout) -> None:
    status, said = c.with_guard("", folder=c.guard().parent)
    expect(status == 0, said)


@probe(5, "a stranger's files are not overwritten")
def _(c: Checkout) -> None:
    (c.work / "mine").mkdir()
    (c.work / "mine/config.json").write_text("mine")
    c.with_guard("g.save_pretrained('mine')")
    expect((c.work / "mine/config.json").read_text() == "mine", "config.json of something else was overwritten")


@probe(6, "a file object is one image")
def _(c: Checkout) -> None:
    Image.new("RGB", (64, 64), (200, 10, 10)).save(c.work / "red.png")
    code = "found = g.predict(open('red.png', 'rb'))\nfound = found if isinstance(found, list) else [found]\nprint(len(found), 'decisions', found[0].error)"
    _, said = c.with_guard(code)
    expect("1 decisions None" in said, said)


@probe(6, "an undecided image is not taken for a safe one, and its decision is JSON")
def _(c: Checkout) -> None:
    (c.work / "broken.png").write_bytes(b"nonsense")
    code = "import json\nfound = g.predict(['broken.png'])[0]\njson.dumps(found.to_dict(), allow_nan=False)\ntry:\n    print('flagged', bool(found.flagged))\n"
    status, said = c.with_guard(code + "except Exception:\n    print('raises')")
    expect(status == 0 and ("raises" in said or "flagged True" in said), said)


@probe(7, "colours are those that the embedded profile says")
def _(c: Checkout) -> None:
    # the profile swaps red and blue: with it, stored blue is shown as red
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)}
    red, blue = tags[b"rXYZ"] + 4, tags[b"bXYZ"] + 4
    profile[red : red + 8], profile[blue : blue + 8] = profile[blue : blue + 8], profile[red : red + 8]
    Image.new("RGB", (64, 64), (0, 0, 255)).save(c.work / "swapped.png", icc_profile=bytes(profile))
    Image.new("RGB", (64, 64), (255, 0, 0)).save(c.work / "shown.png")
    Image.new("RGB", (64, 64), (0, 0, 255)).save(c.work / "stored.png")
    code = "a, b, c = [found.score for found in g.predict(['swapped.png', 'shown.png', 'stored.png'])]\nprint('shown', abs(a - b) < abs(a - c) / 5)"
    _, said = c.with_guard(code)
    expect("shown True" in said, "scored by the stored numbers, which a viewer does not show")


@probe(8, "the plain call of datasets reads both images of each pair with every column")
def _(c: Checkout) -> None:
    status, said = c.run("-m", "guardkit.synthesize", "limit=3", "source.n_train=30", f"output_dir={c.work / 'pairs'}")
    expect(status == 0, said)
    code = "import datasets\nd = datasets.load_dataset('imagefolder', data_dir='pairs', split='train')\nprint(len(d), 'rows of', ' '.join(d.column_names))"
    _, said = c.run("-c", code)
    expect(" category" in said, "no column of the table: " + next((line for line in said.splitlines() if "rows of" in line), said))


@probe(9, "label words as people have them")
def _(c: Checkout) -> None:
    folder = pictures(c.work / "words", words=("sfw", "NSFW"))
    status, said = c.run("-m", "guardkit.train", *OWN, f"source.root={folder}", f"output_dir={c.work / 'words_run'}")
    expect(status == 0, said)


@probe(10, "one cell's scores copied over all cells are noticed")
def _(c: Checkout) -> None:
    sweep = [
        "-m",
        "guardkit.sweep",
        "sweep.sizes=[4]",
        "sweep.seeds=2",
        "sweep.arms=[unpaired,pairs_aug]",
        "source.n_test=40",
        f"output_dir={c.work / 'sweep'}",
    ]
    status, said = c.run(*sweep)
    expect(status == 0, said)
    with sqlite3.connect(c.work / "sweep/cells.sqlite") as store:
        table = next(row[0] for row in store.execute("select name from sqlite_master where sql like '%value BLOB%'"))
        store.execute(f"update {table} set value = (select value from {table} limit 1)")
    store.close()
    status, said = c.run(*sweep)
    expect(status != 0 or "anew" in said or "damaged" in said, "status 0, every cell with the same figure")


@probe(11, "an image of 99,999 x 1,000 pixels is refused")
def _(c: Checkout) -> None:
    (c.work / "long.png").write_bytes(png(99_999, 1_000))
    _, said = c.with_guard("print('error:', g.predict(['long.png'])[0].error)")
    expect("error: None" not in said, "read at full size")


@probe(12, "a 32-bit TIFF of values to 255 is not black")
def _(c: Checkout) -> None:
    ramp = np.tile(np.arange(256), (64, 1))
    Image.fromarray(ramp.astype(np.int32)).save(c.work / "ramp.tif")
    Image.fromarray(ramp.astype(np.uint8)).save(c.work / "ramp.png")
    _, said = c.with_guard("a, b = g.predict(['ramp.tif', 'ramp.png'])\nprint('equal', abs(a.score - b.score) < 1e-6)")
    expect("equal True" in said, "another picture was scored")


@probe(12, "an animated PNG is its first frame, not its hidden default image")
def _(c: Checkout) -> None:
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    red.save(c.work / "animated.png", save_all=True, append_images=[blue, blue], default_image=True, duration=100)
    blue.save(c.work / "blue.png")
    _, said = c.with_guard("a, b = g.predict(['animated.png', 'blue.png'])\nprint('equal', abs(a.score - b.score) < 1e-6)")
    expect("equal True" in said, "another picture was scored")


@probe(13, "a folder has one owner: two trainings do not mix in it")
def _(c: Checkout) -> None:
    both = [
        c.start("-m", "guardkit.train", "experiment=unpaired", *SMALL, f"seed={seed}", f"output_dir={c.work / 'mixed'}") for seed in (0, 3)
    ]
    said = [run.communicate()[0] for run in both]
    statuses = sorted(run.returncode for run in both)
    expect(statuses == [0, 2], f"both ended with status {statuses}: {said[0][-80:]}")


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@probe(14, "a full disk ends a training in one line")
def _(c: Checkout) -> None:
    with _small_disk(c.work / "disk") as disk:
        status, said = c.run(
            "-m", "guardkit.train", "experiment=unpaired", *SMALL, f"output_dir={disk / 'run'}", GUARDKIT_CACHE=str(disk / "cache")
        )
    expect(status != 0, "status 0")
    expect_line(said, "space")


@probe(15, "a forked child of a process that has predicted predicts, or says why not")
def _(c: Checkout) -> None:
    code = """
import os, signal, torch
from PIL import Image
images = [Image.new("RGB", (64, 64), (i, 0, 0)) for i in range(8)]
torch.set_num_threads(2)
g.predict(images)
if (child := os.fork()) == 0:
    signal.alarm(30)
    try:
        g.predict(images)
    except Exception:
        os._exit(7)
    os._exit(0)
print("ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    _, said = c.with_guard(code, OMP_NUM_THREADS="2")
    expect("ended with 0" in said or "ended with 7" in said, "the child hung until it was killed")


@probe(16, "a prompt and its image follow no redirect to another host")
def _(c: Checkout) -> None:
    reached: list[str] = []

    class Redirecting(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            reached.append(self.server.server_name_here)  # type: ignore[attr-defined]
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(307)
            self.send_header("Location", f"http://127.0.0.1:{other.server_port}/v1/chat/completions")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    asked, other = (http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirecting) for _ in range(2))
    asked.server_name_here, other.server_name_here = "asked", "other"  # type: ignore[attr-defined]
    for server in (asked, other):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = ["instructor=vlm", "instructor.vlm.model=m", f"instructor.vlm.base_url=http://127.0.0.1:{asked.server_port}/v1"]
    c.run("-m", "guardkit.synthesize", "limit=1", "source.n_train=30", *settings, f"output_dir={c.work / 'redirected'}", OPENAI_API_KEY="x")
    for server in (asked, other):
        server.shutdown()
        server.server_close()
    expect("asked" in reached, "no call was made")
    expect("other" not in reached, f"{reached.count('other')} requests went to the other host")


@probe(17, "the review page takes no uploads, and nothing from other origins")
def _(c: Checkout) -> None:
    status, said = c.run("-m", "guardkit.synthesize", "limit=2", "source.n_train=30", f"output_dir={c.work / 'reviewed'}")
    expect(status == 0, said)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = c.start("-m", "guardkit.app", f"pairs={c.work / 'reviewed'}", "reviewer=x", f"port={port}", f"output_dir={c.work / 'page'}")

    def answer(path: str, data: bytes | None = None, **headers: str) -> tuple[int, str | None]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=20) as found:
                return found.status, found.headers.get("access-control-allow-origin")
        except urllib.error.HTTPError as error:
            return error.code, None

    try:
        for _ in range(120):
            try:
                answer("/")
                break
            except OSError:
                time.sleep(0.5)
        form = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nx\r\n--b--\r\n'
        upload, _none = answer("/gradio_api/upload", form, **{"Content-Type": "multipart/form-data; boundary=b"})
        status, allowed = answer("/", Origin="http://127.0.0.1:9")
    finally:
        page.send_signal(signal.SIGINT)
        page.communicate(timeout=60)
    expect(upload >= 400, f"an upload was answered with {upload}")
    expect(status >= 400 or allowed is None, f"the origin {allowed} is allowed")


@probe(18, "a run in which nothing can be edited says so, with status 2")
def _(c: Checkout) -> None:
    own = ["source=folder", "policy=handled_objects", f"source.root={pictures(c.work / 'unboxed', 12)}", "editor=inpaint"]
    status, said = c.run("-m", "guardkit.synthesize", *own, f"output_dir={c.work / 'unboxed_pairs'}")
    expect(status == 2, f"status {status}, nothing accepted")
    expect_line(said, "box")


@probe(19, "what is opened is closed (seen from Python 3.13 on)")
def _(c: Checkout) -> None:
    train = ["experiment=pairs_aug", *SMALL, f"cache_dir={c.work / 'closed_cache'}", f"output_dir={c.work / 'closed'}"]
    status, said = c.run("-X", "dev", "-m", "guardkit.train", *train)
    expect(status == 0, said)
    left_open = [line for line in said.splitlines() if "unclosed" in line]
    expect(not left_open, f"{len(left_open)} warnings: {left_open[0] if left_open else ''}")


def main(arguments: list[str]) -> int:
    folders = [Path(argument).resolve() for argument in arguments if "=" not in argument]
    kinds = {int(argument.removeprefix("kind=")) for argument in arguments if argument.startswith("kind=")}
    if not folders:
        raise SystemExit(__doc__)
    not_kept = 0
    print(f"| kind | promise | {' | '.join(folder.name for folder in folders)} |\n|---|---|{'---|' * len(folders)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        checkouts = [Checkout(folder, Path(temporary) / str(row)) for row, folder in enumerate(folders)]
        for checkout in checkouts:
            checkout.work.mkdir()
        for kind, promise, function in PROBES:
            if kinds and kind not in kinds:
                continue
            cells = []
            for checkout in checkouts:
                try:
                    function(checkout)
                    cells.append("kept")
                except (NotKept, subprocess.SubprocessError) as instead:
                    cells.append(str(instead).replace(temporary, "").replace("|", "/")[:140])
            not_kept += cells[-1] != "kept"
            print(f"| {kind} | {promise} | {' | '.join(cells)} |", flush=True)
    return int(not_kept > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
