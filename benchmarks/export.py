"""An exported guard in ONNX Runtime beside the same guard in torch, ratios in one run, with random weights: nothing is fetched.

    OMP_NUM_THREADS=1 python benchmarks/export.py [repeats=5] [batches=1,32]

ViT-B-32 of open_clip without weights under a linear head, pixels ready, on the processor, both with as many threads as torch has. Prints the table
of docs/sharing.md. The smallest time of the repeats counts, taken in turns; on a shared machine the ratios say more than the rates.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from serve import make_guard

import guardkit
from guardkit import GuardClassifier


def main(repeats: int = 5, batches: str = "1,32") -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        guard = GuardClassifier.from_pretrained(make_guard(folder), device="cpu", batch_size=64)
        torch.nn.init.normal_(guard.head.linear.weight, std=0.1)  # zeros would hide any difference
        started = time.perf_counter()
        exported = guardkit.export_guard(guard, folder / "exported")
        print(f"exported and checked in {time.perf_counter() - started:.0f} s\n{exported.table}\n")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(exported.files["guard"]), options, ["CPUExecutionProvider"])
        print("| images at once | torch, images a second | ONNX Runtime, images a second | ratio |\n|---|---|---|---|")
        for n in map(int, batches.split(",")):
            pixels = torch.from_numpy(np.random.default_rng(n).standard_normal((n, 3, 224, 224)).astype(np.float32))
            jobs = {
                "torch": lambda pixels=pixels: guard.probabilities(guard.encoder.encode_preprocessed(list(pixels))),
                "onnx": lambda pixels=pixels: session.run(None, {"pixels": pixels.numpy()}),
            }
            best = dict.fromkeys(jobs, float("inf"))
            for _ in range(repeats + 1):  # once to warm up
                for name, job in jobs.items():
                    for _ in range(max(1, 8 // n)):
                        started = time.perf_counter()
                        job()
                        best[name] = min(best[name], time.perf_counter() - started)
            rate = {name: n / seconds for name, seconds in best.items()}
            print(f"| {n} | {rate['torch']:.1f} | {rate['onnx']:.1f} | {rate['onnx'] / rate['torch']:.2f} |")


if __name__ == "__main__":
    given = dict(argument.split("=") for argument in sys.argv[1:])
    main(**{name: value if name == "batches" else int(value) for name, value in given.items()})
