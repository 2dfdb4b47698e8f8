"""The service, `predict` and `moderate` beside the bare encoder, ratios in one run, with random weights: nothing is fetched.

    OMP_NUM_THREADS=1 python benchmarks/serve.py [images=48] [repeats=3] [clients=1,8,32] [requests=96]

ViT-B-32 of open_clip without weights, JPEG files of 500 x 375. The service is a process of its own on loopback, asked by this one. Prints the
tables of docs/serving.md. The smallest time of the repeats counts, taken in turns; on a shared machine the ratios say more than the rates.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import cv2
import httpx
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

import guardkit
from guardkit import Category, GuardClassifier, LinearHead, OpenClipEncoder, Policy
from guardkit.images import read_image

warnings.simplefilter("ignore")
logging.disable()  # open_clip warns of random weights


PREPROCESS = {
    "size": [224, 224],
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def make_guard(folder: Path) -> Path:
    torch.manual_seed(0)
    save_file(open_clip.create_model("ViT-B-32").state_dict(), folder / "random.safetensors")
    encoder = OpenClipEncoder("ViT-B-32", str(folder / "random.safetensors"), preprocess=PREPROCESS)
    named = {"covered": (), "not_covered": (), "edit": "Take it away."}
    categories = [Category(name=one, definition=one, unsafe_texts=(one,), safe_texts=(f"no {one}",), **named) for one in ("left", "right")]
    policy = Policy(name="two", description="Two things.", categories=tuple(categories), safe_texts=("a photo",))
    return GuardClassifier(LinearHead(encoder.dim, 2), encoder, policy).save_pretrained(folder / "guard")


def make_photos(folder: Path, n: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:04}.jpg" for i in range(n)]
    for path in paths:
        small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        cv2.imwrite(str(path), cv2.resize(small, (500, 375), interpolation=cv2.INTER_CUBIC))
    return paths


async def load(address: str, photos: list[bytes], clients: int, requests: int) -> tuple[float, list[float]]:
    seconds: list[float] = []
    left = iter(range(requests))

    async def ask(client: httpx.AsyncClient) -> None:
        for n in left:
            started = time.perf_counter()
            answer = await client.post(f"{address}v1/moderate", content=photos[n % len(photos)], headers={"content-type": "image/jpeg"})
            seconds.append(time.perf_counter() - started)
            assert answer.json()["decisions"][0]["action"] != "error"

    async with httpx.AsyncClient(trust_env=False, timeout=300) as client:
        started = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
        return time.perf_counter() - started, seconds


def main(images: int = 48, repeats: int = 3, clients: str = "1,8,32", requests: int = 96) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        saved, paths = make_guard(folder), make_photos(folder / "photos", images)
        photos = [path.read_bytes() for path in paths]
        guard = GuardClassifier.from_pretrained(saved)
        encoder = guard.encoder
        pixels = [encoder.preprocess(read_image(one)) for one in photos]

        def bare_one() -> None:
            encoder.encode_preprocessed([encoder.preprocess(read_image(paths[0]))])

        def moderated() -> None:
            with tempfile.TemporaryDirectory() as out:
                guardkit.moderate(guard, folder / "photos", output_dir=out)

        jobs = {
            "one, bare": bare_one,
            "one, predict": lambda: guard.predict(paths[0]),
            "loop": lambda: [guard.predict(one) for one in photos],
            "encoder": lambda: encoder.encode_preprocessed(pixels),
            "batched": lambda: encoder.encode_images([read_image(one) for one in photos]),
            "moderate": moderated,
        }
        best = dict.fromkeys(jobs, float("inf"))
        for _ in range(repeats + 1):  # once to warm up
            for name, job in jobs.items():
                for _ in range(8 if name.startswith("one") else 1):
                    started = time.perf_counter()
                    job()
                    best[name] = min(best[name], time.perf_counter() - started)
        rate = {name: (1 if name.startswith("one") else images) / seconds for name, seconds in best.items()}
        floor = rate["encoder"]
        print("| | images a second | over the encoder alone, in batches |\n|---|---|---|")
        print(f"| encoder alone, pixels ready, batches of {encoder.batch_size} (the floor of one thread) | {floor:.1f} | 1.00 |")
        for name, what in (
            ("batched", "read, prepare and encode, in batches"),
            ("loop", "a loop of bare `predict`"),
            ("moderate", "`moderate`"),
        ):
            print(f"| {what} | {rate[name]:.1f} | {rate[name] / floor:.2f} |")
        print(f"\n`predict` on one image over encode with the same preprocessing: {best['one, predict'] / best['one, bare']:.3f}\n")
        command = [sys.executable, "-m", "guardkit.serve", f"guard={saved}", "port=0", f"output_dir={folder / 'out'}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            assert found is not None
            asyncio.run(load(found[0], photos, 4, 8))
            print(
                "| clients | requests a second | over the encoder alone | over a loop of `predict` | median, ms | 99th percentile, ms |\n|---|---|---|---|---|---|"
            )
            for n in map(int, clients.split(",")):
                taken, seconds = asyncio.run(load(found[0], photos, n, requests))
                median, high = np.percentile(seconds, [50, 99]) * 1000
                each = requests / taken
                print(f"| {n} | {each:.1f} | {each / floor:.2f} | {each / rate['loop']:.2f} | {median:.0f} | {high:.0f} |")
            process.send_signal(signal.SIGTERM)


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(**{name: value if name == "clients" else int(value) for name, value in given.items()})
