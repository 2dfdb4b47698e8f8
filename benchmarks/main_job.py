"""The whole job against its bare stages, in one run.

    python benchmarks/main_job.py [n_unsafe=64] [n_test=450] [repeats=3]

Prints: the time of the whole job (cold store) over that of its stages done by hand on the same images (draw, edit,
encode, fit); warm over cold; images drawn, edited and encoded per second; the floor of encoding, which is the model's
multiplications over what this machine's matrix product reaches; `import guardkit` and `--help`.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from guardkit.fitting.objective import Objective
from guardkit.heads import LinearHead
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.objects import build
from guardkit.runs.train import run
from guardkit.scenes.content import SceneContent

warnings.simplefilter("ignore")


def seconds(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def command(*arguments: str) -> float:
    return min(seconds(lambda: subprocess.run([sys.executable, *arguments], check=True, capture_output=True)) for _ in range(3))


def by_hand(cfg, encoder, policy, unsafe, others) -> dict[str, float]:
    """The stages without stores, threads, Lightning, metrics or files."""
    took: dict[str, float] = {}
    started = time.perf_counter()
    images = [SceneContent(scene).load() for scene in unsafe + others]
    took["draw"] = time.perf_counter() - started
    started = time.perf_counter()
    twins = [SceneContent(scene.counterfactual()).load() for scene in unsafe]
    twins += [SceneContent(scene.null_edit()).load() for scene in unsafe]
    took["edit"] = time.perf_counter() - started
    started = time.perf_counter()
    vectors = encoder.encode_images(images)
    twin_vectors = encoder.encode_images(twins)
    took["encode"] = time.perf_counter() - started
    started = time.perf_counter()
    n = len(unsafe)
    x = torch.from_numpy(np.concatenate([vectors[:n], twin_vectors[:n]]))
    y, targets = torch.cat([torch.ones(n), torch.zeros(n)]), torch.zeros(2 * n, len(policy.categories))
    for i, scene in enumerate(unsafe):
        targets[i, policy.category_names.index(scene.category)] = 1
    batch = {"labels": y, "targets": targets, "unsafe_rows": torch.arange(n), "counterfactual_rows": n + torch.arange(n)}
    head, goal = LinearHead.build(encoder, policy), Objective()
    optimizer = torch.optim.AdamW(head.parameters(), lr=cfg.optimizer.lr, weight_decay=cfg.optimizer.weight_decay)
    for epoch in range(cfg.trainer.max_epochs):
        loss = goal.loss(head(x), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % cfg.trainer.check_val_every_n_epoch == 0:
            with torch.no_grad():
                head(x)
    took["fit"] = time.perf_counter() - started
    return took


def floor(encoder) -> tuple[float, float]:
    """Images per second that the model's multiplications would allow, and the matrix product's GFLOP/s."""
    from torch.utils.flop_counter import FlopCounterMode

    height, width = encoder.preprocessing["size"]
    pixels = torch.zeros(64, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.model.encode_image(pixels)
    a = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / min(seconds(torch.mm, a, a) for _ in range(10))
    return rate / (counter.get_total_flops() / 64), rate / 1e9


def main(n_unsafe: int = 64, n_test: int = 450, repeats: int = 3) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)

    def config(cache: str):
        overrides = ["experiment=pairs_aug", f"data.n_unsafe={n_unsafe}", f"source.n_test={n_test}", f"cache_dir={cache}"]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("train", overrides)

    with tempfile.TemporaryDirectory() as temporary:
        warm_up = Path(temporary) / "warm_up"
        run(config(str(warm_up)), {}, warm_up)  # imports and first calls of all libraries
        cold, warm, hands = [], [], []
        for i in range(repeats):
            cfg = config(f"{temporary}/{i}")
            cold.append(seconds(run, cfg, {}, Path(temporary) / f"cold{i}"))
            warm.append(seconds(run, cfg, {}, Path(temporary) / f"warm{i}"))
            parts = build(config(f"{temporary}/none"))
            unsafe = [record.content.scene for record in parts.data.choice.of("unsafe")]
            pairs = parts.data.loaded.test_pairs
            others = [record.content.scene for record in parts.data.test] + [twin.content.scene for _, twin in pairs]
            parts.data.close()
            hands.append(by_hand(cfg, parts.encoder, parts.policy, unsafe, others))
    best = {stage: min(hand[stage] for hand in hands) for stage in hands[0]}
    n_drawn, n_edited = len(unsafe) + len(others), 2 * len(unsafe)
    bare = min(sum(hand.values()) for hand in hands)
    limit, gflops = floor(parts.encoder)
    encoded = (n_drawn + n_edited) / best["encode"]
    print(f"n_unsafe={n_unsafe}, {n_drawn} images drawn, {n_edited} edited, best of {repeats}, {torch.get_num_threads()} threads")
    print(f"whole job, cold          {min(cold):8.2f} s")
    print(f"stages by hand           {bare:8.2f} s   " + ", ".join(f"{stage} {took:.2f}" for stage, took in best.items()))
    print(f"whole over stages        {min(cold) / bare:8.2f}     (aim: at most 1.3)")
    print(f"whole job, warm          {min(warm):8.2f} s   warm over cold {min(warm) / min(cold):.2f}")
    print(f"drawn                    {n_drawn / best['draw']:8.0f} images/s")
    print(f"edited                   {n_edited / best['edit']:8.0f} images/s")
    print(
        f"encoded                  {encoded:8.0f} images/s   floor {limit:.0f} at {gflops:.0f} GFLOP/s, {limit / encoded:.1f} times as many"
    )
    bare_python = command("-c", "pass")
    print(f"import guardkit          {command('-c', 'import guardkit') - bare_python:8.3f} s   beyond Python's own {bare_python:.3f} s")
    print(f"train --help             {command('-m', 'guardkit.train', '--help'):8.2f} s")


if __name__ == "__main__":
    main(**{key: int(value) for key, value in (argument.split("=") for argument in sys.argv[1:])})
