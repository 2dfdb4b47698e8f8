"""One evaluation against the encoder's bare rate, and what more heads cost, in one run.

    python benchmarks/evaluate.py [n_images=768] [repeats=3] [side=256] [width=0]

Prints, on JPEG files on disk: images a second of the encoder alone (preprocessed images in memory), of reading and
preprocessing alone, of both by hand one after the other, and of the whole scoring pass with one guard and with ten
heads on the encoder, beside what the cores could do at best; then what figures, intervals and the report cost beside it. With width=W the encoder is a randomly
weighted ViT of that width instead of the small shipped one, as a stand-in for the encoders of photographs.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from guardkit import Policy
from guardkit.baselines.base import HeadGuard
from guardkit.data.sources.folder import FolderSource
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.evaluation.benchmark import read_benchmark
from guardkit.evaluation.effectiveness import measure
from guardkit.evaluation.outcome import Evaluation
from guardkit.evaluation.scoring import Contender, embedding_stores, judgment_stores, score
from guardkit.images import read_image
from guardkit.reports.evaluation import write_report
from guardkit.runs.hydra import CONF_DIR

warnings.simplefilter("ignore")


class Head(torch.nn.Module):
    """A linear head with one logit."""

    def __init__(self, dim: int, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(10 * torch.randn(dim, generator=torch.Generator().manual_seed(seed)) / dim**0.5)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return embeddings @ self.weight


def build_encoder(width: int, folder: Path) -> OpenClipEncoder:
    if not width:
        return OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=64)
    import json

    import open_clip

    # open_clip builds any architecture from a folder that holds its settings and weights
    model = {
        "embed_dim": 256,
        "vision_cfg": {"image_size": 224, "layers": 12, "width": width, "head_width": 64, "patch_size": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    built = open_clip.CLIP(**model)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.save(built.state_dict(), folder / "open_clip_pytorch_model.bin")
    return OpenClipEncoder(None, f"local-dir:{folder}", batch_size=64)


def write_images(folder: Path, n: int, side: int) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(n):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = folder / ("unsafe" if i % 2 else "safe") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(path, quality=90)
        paths.append(path)
    return paths


def best(repeats: int, work: Callable[[], Any]) -> tuple[float, Any]:
    took, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = work()
        took.append(time.perf_counter() - started)
    return min(took), result


def main(n_images: int = 768, repeats: int = 3, side: int = 256, width: int = 0) -> None:
    policy = Policy.load(CONF_DIR / "policy" / "scenes.yaml")
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        (root / "model").mkdir()
        encoder = build_encoder(width, root / "model")
        paths = write_images(root / "images", n_images, side)
        encoder.encode_images([read_image(path) for path in paths[:64]])  # first calls of all libraries
        heads = [
            Contender(f"head {i}", HeadGuard(f"head {i}", Head(encoder.dim, i), encoder, dim=encoder.dim, covers=None, threshold=0.5))
            for i in range(10)
        ]
        benchmark = read_benchmark(FolderSource(policy, str(root / "images"), check_images=False), split="all")

        def scored(contenders: list[Contender]) -> Any:
            return score(
                benchmark, contenders, embedding_stores(contenders, None), judgment_stores(contenders, None), policy.category_names
            )

        read, ready = best(repeats, lambda: [encoder.preprocess(read_image(path)) for path in paths])
        before = time.process_time()
        bare, _ = best(repeats, lambda: encoder.encode_preprocessed(ready))
        busy = read + (time.process_time() - before) / repeats  # of processors, for all images
        ones, tens = [], []
        for _ in range(repeats):  # in turn, so that a busy moment of the machine meets both
            ones.append(best(1, lambda: scored(heads[:1]))[0])
            tens.append(best(1, lambda: scored(heads))[0])
        one, ten = min(ones), min(tens)
        sheet = scored(heads)
        figures, (rows, tests) = best(1, lambda: measure(sheet, prevalence=0.01, n_resamples=1000, seed=0))
        evaluation = Evaluation(benchmark, policy, sheet, rows, tests, [], 0.01, {}, "python benchmarks/evaluate.py")
        report, _ = best(1, lambda: write_report(root / "report", evaluation))
    counts = next(iter(sheet.counts["encoders"].values()))
    print(f"{n_images} JPEG files of {side * 4 // 3} x {side} pixels, {encoder.name}, {torch.get_num_threads()} threads, best of {repeats}")
    print(f"encoder alone               {n_images / bare:8.0f} images/s")
    print(f"reading and preprocessing   {n_images / read:8.0f} images/s on one thread")
    print(f"both, one after the other   {n_images / (bare + read):8.0f} images/s")
    cores = len(os.sched_getaffinity(0))
    print(
        f"floor                       {n_images / max(bare, busy / cores):8.0f} images/s   the same work spread evenly over {cores} cores"
    )
    print(f"scoring pass, one head      {n_images / one:8.0f} images/s   over the encoder's bare rate {bare / one:.2f} (aim: at least 0.9)")
    print(f"scoring pass, ten heads     {n_images / ten:8.0f} images/s   cost over one head {ten / one:.3f} (aim: at most 1.05)")
    print(f"ten heads: {sheet.counts['read']} images read, {counts['encoded']} encoded")
    print(f"figures and intervals of ten heads {figures:.1f} s, report {report:.1f} s")


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
