"""What PGD costs beyond the forward and backward passes it needs, in one run.

    python benchmarks/attacks.py [n_images=128] [steps=20] [repeats=5] [batch_size=32]

Attacks a zero-shot guard on drawn scenes with the embedded encoder, and runs the same number of bare forward and backward
passes, in batches of the same size, in turns. `attack` is `pgd` alone; `row` is a row of the protocol `pixels`, with
the decisions on the attacked images before and after rounding to 8 bits. The best of the repeats counts, of elapsed time and
of processor time apart: the second holds on a machine that has other work as well.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

from guardkit import GuardClassifier, Policy
from guardkit.encoders.open_clip import OpenClipEncoder
from guardkit.heads import PromptHead
from guardkit.robustness.attacks import pgd
from guardkit.robustness.measuring import RobustnessSettings, measure_robustness
from guardkit.robustness.victim import Victim, to_pixels
from guardkit.scenes.content import SceneContent
from guardkit.scenes.world import ScenePool

EPSILON = 2 / 255


def bare(victim: Victim, batches, steps: int) -> None:
    """The passes alone: pixels to logits, and the gradient with respect to the pixels."""
    for x, _ in batches:
        for _ in range(steps):
            pixels = x.detach().requires_grad_()
            torch.autograd.grad(victim.guard.logits(victim.guard.encoder.encode_pixels(pixels)).sum(), pixels)


def attack(victim: Victim, batches, steps: int) -> None:
    for x, y in batches:
        pgd(victim.on_pixels, x, y, epsilon=EPSILON, steps=steps, step_size=EPSILON / 10, rng=np.random.default_rng(0))


def seconds(work, *arguments) -> tuple[float, float]:
    """Elapsed, and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def main(n_images: int = 128, steps: int = 20, repeats: int = 5, batch_size: int = 32) -> None:
    policy = Policy.load(Path(__file__).resolve().parents[1] / "conf/policy/scenes.yaml")
    encoder = OpenClipEncoder(None, "guardkit:scenes_clip", batch_size=batch_size)
    guard = GuardClassifier(PromptHead.build(encoder, policy), encoder, policy)
    scenes = [ScenePool("test", seed=7).scene(i % 2, i) for i in range(n_images)]
    images, labels = [SceneContent(scene).load() for scene in scenes], [i % 2 for i in range(n_images)]
    victim = Victim(guard)
    parts = [slice(start, start + batch_size) for start in range(0, n_images, batch_size)]
    batches = [(to_pixels(images[part], victim.device), torch.tensor(labels[part], device=victim.device)) for part in parts]
    settings = RobustnessSettings(
        protocols=("pixels",),
        n_pixels=n_images,
        epsilons=(2,),
        pgd_steps=steps,
        pgd_restarts=1,
        noise_stds=(),
        edits=(),
        batch_size=batch_size,
    )
    bare(victim, batches[:1], 2)  # the first passes reserve memory
    took: dict[str, list[float]] = {"bare": [], "attack": [], "row": []}
    on_cpu: dict[str, list[float]] = {"bare": [], "attack": []}
    for _ in range(repeats):
        for name, work in (("bare", bare), ("attack", attack)):
            wall, cpu = seconds(work, victim, batches, steps)
            took[name].append(wall)
            on_cpu[name].append(cpu)
        rows = measure_robustness(guard, images, labels, None, settings)
        took["row"].append(next(row["seconds"] for row in rows if row["attack"] == "pgd"))
    best = {name: min(times) for name, times in took.items()}
    best_on_cpu = {name: min(times) for name, times in on_cpu.items()}
    n_passes = n_images * steps
    height, width = images[0].shape[:2]
    print(
        f"{n_images} images of {width} x {height}, {steps} steps, batches of {batch_size}, best of {repeats}, {torch.get_num_threads()} threads"
    )
    for name, what in (
        ("bare", "forward and backward passes alone"),
        ("attack", "PGD"),
        ("row", "PGD and decisions before and after rounding"),
    ):
        print(f"{name:<8} {best[name]:7.2f} s   {n_passes / best[name]:6.0f} passes/s   {best[name] / best['bare']:.3f} of bare   {what}")
    print(
        f"PGD over its passes {best['attack'] / best['bare']:.3f}, by processor time {best_on_cpu['attack'] / best_on_cpu['bare']:.3f} (aim: at most 1.15)"
    )


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
