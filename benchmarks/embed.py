"""`embed` beside a plain open_clip loop and beside the bare encoder: the same files and the same model, in one run. Nothing is fetched.

    python benchmarks/embed.py [photos=FOLDER] [small=256] [large=64] [repeats=3] [workers=0,1,2] [model=ViT-B-32] [device=auto] [backend=torchvision]
        [dtype=float32]

ViT-B-32 of open_clip with random weights. JPEG files of 500 x 400 and of 3,000 x 2,000 are made of the photographs of a folder, enlarged and with
grain, else of drawn shades, edges and grain. The plain loop is open_clip's own transform and encode_image in a DataLoader, with the best of the numbers
of workers, which are started beforehand. The bare encoder is given tensors that are ready. Jobs take turns, and the smallest time of the repeats counts:
on a shared machine ratios say more than rates. The plain loop computes in float32 whatever dtype is. Then the bare encoder alone in other ways:
channels-last and compiled, which guardkit leaves off, and both of its dtypes.
Prints the tables of docs/scale.md.
"""

from __future__ import annotations

import copy
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

import guardkit
from guardkit import OpenClipEncoder
from guardkit.encoders.base import DTYPES
from guardkit.encoders.ways import drawn_images
from guardkit.images import FileContent, read_image
from guardkit.reading_ahead import n_readers

warnings.simplefilter("ignore")
logging.disable()  # open_clip warns of random weights

SIZES = {"small": (500, 400), "large": (3000, 2000)}


def make_photos(folder: Path, originals: list[np.ndarray], size: tuple[int, int], n: int) -> list[Path]:
    folder.mkdir()
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 4, (size[1] + n, size[0], 3)).astype(np.float32)
    paths = [folder / f"{i:05}.jpg" for i in range(n)]
    for i, path in enumerate(paths):
        enlarged = cv2.resize(originals[i % len(originals)], size, interpolation=cv2.INTER_CUBIC)
        image = np.clip(enlarged + grain[i : i + size[1]], 0, 255).astype(np.uint8)  # no two the same
        Image.fromarray(image).save(path, quality=90)
    return paths


class Files(torch.utils.data.Dataset):
    """What the plain loop reads."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> torch.Tensor:
        with Image.open(self.paths[row]) as image:
            return self.transform(image)


def plain_loop(paths: list[Path], model: torch.nn.Module, transform: Callable, workers: int, batch_size: int) -> Callable[[], None]:
    loader = torch.utils.data.DataLoader(
        Files(paths, transform), batch_size=batch_size, num_workers=workers, persistent_workers=workers > 0
    )
    device = next(model.parameters()).device

    def run() -> None:
        vectors = []
        with torch.inference_mode():
            for batch in loader:
                vectors.append(torch.nn.functional.normalize(model.encode_image(batch.to(device)), dim=-1).cpu())
        torch.cat(vectors).numpy().astype(np.float16)

    return run


def seconds(job: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of this process's processors."""
    started, worked = time.perf_counter(), time.process_time()
    job()
    return time.perf_counter() - started, time.process_time() - worked


def main(
    photos: str = "", small: int = 256, large: int = 64, repeats: int = 3, workers: str = "0,1,2",
    model: str = "ViT-B-32", device: str = "auto", backend: str = "torchvision",
    dtype: str = "float32",
) -> None:  # fmt: skip
    found = (
        sorted(path for path in Path(photos).expanduser().rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png")) if photos else []
    )
    originals = [FileContent(path).load() for path in found[:100]] or [read_image(data) for data in drawn_images()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        torch.manual_seed(0)
        whole, _, transform = open_clip.create_model_and_transforms(model)
        save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, folder / "random.safetensors")
        said = whole.visual.preprocess_cfg
        stated = {
            name: list(said[name]) if isinstance(said[name], tuple) else said[name]
            for name in ("size", "mean", "std", "interpolation", "resize_mode")
        }
        encoder = OpenClipEncoder(model, str(folder / "random.safetensors"), preprocess=stated, backend=backend, dtype=dtype, device=device)
        where = next(encoder.model.parameters()).device
        threads = f"OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'unset')}"
        print(
            f"{model} on {where}, {n_readers()} processors, torch on {torch.get_num_threads()} threads ({threads}), "
            f"batches of {encoder.batch_size}, {dtype}\n"
        )
        print("| | 500 x 400 | 3,000 x 2,000 |\n|---|---|---|")
        columns = []
        for name, n in (("small", small), ("large", large)):
            paths = make_photos(folder / name, originals, SIZES[name], n)
            columns.append(measured(folder, paths, encoder, encoder.model, transform, repeats, [int(one) for one in workers.split(",")]))
        for row in columns[0]:
            print(f"| {row} | {' | '.join(column[row] for column in columns)} |")
        ready = [encoder.preprocess(FileContent(path).load()) for path in sorted((folder / "small").iterdir())[: encoder.batch_size]]
        other_ways(encoder, torch.stack(ready).to(where), repeats)


def other_ways(encoder: OpenClipEncoder, images: torch.Tensor, repeats: int) -> None:
    """Prints how quick the same model is otherwise, and how far its vectors are from the usual ones."""
    model = encoder.model
    plain, cast = (encoder.going({"dtype": dtype}) for dtype in DTYPES)
    ways: dict[str, Callable[[], tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]]] = {
        "`dtype=float32`": lambda: (lambda given: plain._encode(given, False), images),
        "`dtype=bfloat16`": lambda: (lambda given: cast._encode(given, False), images),
        "channels-last": lambda: (
            copy.deepcopy(model).to(memory_format=torch.channels_last).encode_image,
            images.contiguous(memory_format=torch.channels_last),
        ),
        "`torch.compile`": lambda: (torch.compile(copy.deepcopy(model).visual), images),
    }
    usual, first = None, 0.0
    print(
        "\n| the bare encoder | images a second | times as quick | to begin, s | smallest cosine to the usual vectors |\n|---|---|---|---|---|"
    )
    for name, make in ways.items():
        with torch.inference_mode():
            encode, given = make()
            begun, _ = seconds(lambda encode=encode, given=given: encode(given))
            taken = min(seconds(lambda encode=encode, given=given: encode(given))[0] for _ in range(repeats + 1))
            vectors = torch.nn.functional.normalize(encode(given).float(), dim=-1)
        usual, first = (vectors, taken) if usual is None else (usual, first)
        cosine = float((vectors * usual).sum(dim=1).min())
        print(f"| {name} | {len(images) / taken:.1f} | {first / taken:.2f} | {max(0.0, begun - taken):.1f} | {cosine:.6f} |", flush=True)


def measured(
    folder: Path, paths: list[Path], encoder: OpenClipEncoder, model: torch.nn.Module, transform: Callable, repeats: int, workers: list[int]
) -> dict[str, str]:
    contents = [FileContent(path) for path in paths]
    with ThreadPoolExecutor(n_readers()) as pool:

        def read() -> list[torch.Tensor]:
            return list(pool.map(lambda one: encoder.preprocess(one.load()), contents))

        ready = read()
        loops = {n: plain_loop(paths, model, transform, n, encoder.batch_size) for n in workers}
        if len(workers) > 1:
            for loop in loops.values():
                loop()  # workers start
        best = min(loops, key=lambda n: seconds(loops[n])) if len(workers) > 1 else workers[0]
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ("bare", "read", "plain", "guardkit", "warm")}
        for number in range(repeats + 1):  # once to warm up
            place = folder / f"{paths[0].parent.name}_{number}"

            def embed(out: str, place: Path = place) -> None:
                counts = guardkit.embed(input=paths[0].parent, encoder=encoder, output_dir=place / out, cache_dir=place / "cache")
                assert counts["written"] == len(paths)

            jobs: dict[str, Callable[[], object]] = {
                "bare": lambda: encoder.encode_preprocessed(ready, fixed_batch=True),
                "plain": loops[best],
                "guardkit": lambda: embed("first"),
                "warm": lambda: embed("second"),
                "read": read,
            }
            for name, job in jobs.items():
                took = seconds(job)
                if number:
                    taken[name].append(took)
    best_of, work = ({name: min(one[i] for one in values) for name, values in taken.items()} for i in (0, 1))
    n, bare = len(paths), best_of["bare"]
    # a processor that encodes cannot read meanwhile; a GPU leaves the processors to the reading
    most = bare + best_of["read"] if encoder._device.type == "cpu" else max(bare, best_of["read"])
    return {
        "images": str(n),
        "bare encoder, tensors ready, images a second": f"{n / bare:.1f}",
        "reading and preparing alone, images a second": f"{n / best_of['read']:.1f}",
        f"plain loop ({', '.join(map(str, workers))} workers, the best of them), images a second": f"{n / best_of['plain']:.1f}",
        "`embed`, images a second": f"{n / best_of['guardkit']:.1f}",
        "**`embed` over the bare encoder**": f"{bare / best_of['guardkit']:.2f}",
        "the floor: reading and encoding on the same processors, over the bare encoder": f"{bare / most:.2f}",
        "**`embed` over the plain loop**": f"{best_of['plain'] / best_of['guardkit']:.2f}",
        "the same two by processor seconds, which other people's work changes little": f"{work['bare'] / work['guardkit']:.2f}, "
        + ("workers' are not counted" if best else f"{work['plain'] / work['guardkit']:.2f}"),
        "a second pass with the same store, times as quick": f"{best_of['guardkit'] / best_of['warm']:.0f}",
    }


if __name__ == "__main__":
    given = dict(one.split("=", 1) for one in sys.argv[1:])
    main(**{name: int(value) if value.isdigit() and name != "workers" else value for name, value in given.items()})  # type: ignore[arg-type]
