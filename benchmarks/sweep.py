"""Speed of the sample-efficiency engine, side by side in one run, on the cells of the default sweep.

    python benchmarks/sweep.py [seeds=10] [widths=256,768] [lightning=3] [whole=true] [key=value ...]

Batched engine against scikit-learn's LogisticRegression, one fit after the other, spread over both cores with joblib;
both at the same objective (cross-entropy without the pair loss, which scikit-learn does not have). Against Lightning on a
sample of cells. Width 256 are the embeddings of the default encoder; 768 are random features of them, so that they are
no easier. The floor is the operations of the curvatures that the fits need, at the rate of a large matrix product.
"""

from __future__ import annotations

import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from joblib import Parallel, delayed
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression

from guardkit._hydra import CONF_DIR, default_cache_dir
from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.solver import Rows, decision_rows, fit_linear
from guardkit.sweeping import LightningEngine, Objective, arms_of
from guardkit.training import build

CORES = 2
TOLERANCE = 1e-6  # largest gradient entry, for both


def widened(vectors: np.ndarray, width: int) -> np.ndarray:
    """(n, d) unit vectors as (n, width) unit vectors: random features, cut off at zero."""
    if vectors.shape[1] == width:
        return vectors
    rng = np.random.default_rng(0)
    features = np.maximum(vectors @ rng.normal(size=(vectors.shape[1], width)) + 0.2 * rng.normal(size=width), 0)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def one_by_one(rows: Rows, strengths: list[float]) -> np.ndarray:
    """(h, d + 1) weights and bias, by scikit-learn."""
    signs = rows.bias
    x, y = rows.vectors * signs[:, None], signs > 0
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for l2 in strengths:
            # its gradient has the scale of ours, because the shares sum to 1: the same tolerance
            fitted = LogisticRegression(C=1 / l2, tol=TOLERANCE, max_iter=10_000).fit(x, y, sample_weight=rows.shares)
            found.append(np.append(fitted.coef_[0], fitted.intercept_[0]))
    return np.array(found)


def objective(rows: Rows, head: np.ndarray, l2: float) -> float:
    pull = -(rows.vectors @ head[:-1] + rows.bias * head[-1])
    return float(rows.shares @ np.logaddexp(0, pull) + 0.5 * l2 * head[:-1] @ head[:-1])


def gflops() -> float:
    """Rate of a large product in double precision."""
    x = torch.randn(2048, 2048, dtype=torch.float64)
    x @ x
    started = time.perf_counter()
    for _ in range(3):
        x @ x
    return 3 * 2 * 2048**3 / (time.perf_counter() - started) / 1e9


def main(arguments: list[str]) -> None:
    settings = {"seeds": "10", "widths": "256,768", "lightning": "3", "whole": "true"}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in settings:
            settings[key] = value
        else:
            overrides.append(argument)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    logging.disable(logging.WARNING)
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("sweep", overrides)
    sizes, seeds, strengths = list(cfg.sweep.sizes), range(int(settings["seeds"])), [float(value) for value in cfg.sweep.strengths]
    OmegaConf.set_struct(cfg, False)
    parts = build(OmegaConf.merge(cfg, {"experiment_name": "benchmark"}))
    stock = Stock(parts.data, arms_of(cfg), sizes, seeds)
    cells = [Cell(arm.name, "linear", size, seed) for arm in arms_of(cfg) for size in sizes for seed in seeds]
    data = [stock.data_of(cell) for cell in cells]
    labels = np.array([record.label for record in stock.test.records])
    rate = gflops()
    print(
        f"{len(cells)} cells x {len(strengths)} strengths = {len(cells) * len(strengths)} fits, {torch.get_num_threads()} threads, {rate:.0f} GFLOP/s"
    )
    for width in map(int, settings["widths"].split(",")):
        scale = width**0.5
        problems = [
            decision_rows(
                widened(one.train["embeddings"].numpy(), width).astype(float) * scale, one.train["labels"].numpy(), np.zeros((0, 2), int)
            )
            for one in data
        ]
        test = widened(stock.test.embeddings, width) * scale
        started = time.perf_counter()
        operations, batched = 0.0, []
        for start in range(0, len(problems), len(seeds)):  # the seeds of one arm and size, as the engine does
            solved = fit_linear(problems[start : start + len(seeds)], np.array(strengths), tolerance=TOLERANCE)
            operations += solved.operations
            batched += list(np.concatenate([solved.weights, solved.bias[..., None]], axis=2))
        mine = time.perf_counter() - started
        Parallel(CORES)(delayed(one_by_one)(problems[0], strengths[:1]) for _ in range(CORES))  # starts the processes
        started = time.perf_counter()
        alone = Parallel(CORES)(delayed(one_by_one)(rows, strengths) for rows in problems)
        theirs = time.perf_counter() - started
        excess, accuracy = [], []
        for rows, first, second in zip(problems, batched, alone, strict=True):
            for j, l2 in enumerate(strengths):
                values = objective(rows, first[j], l2), objective(rows, second[j], l2)
                excess.append(((values[0] - values[1]) / values[1], (values[1] - values[0]) / values[0]))
                accuracy.append([(((test @ head[:-1] + head[-1]) >= 0) == labels).mean() for head in (first[j], second[j])])
        worst = np.max(excess, axis=0)
        points = 100 * np.mean(accuracy, axis=0)
        print(f"\nwidth {width}")
        print(f"  batched engine                {mine:8.2f} s   {1000 * mine / len(cells) / len(strengths):7.3f} ms a fit")
        print(f"  scikit-learn on {CORES} cores       {theirs:8.2f} s   {theirs / mine:.1f} times as long   (aim: 10)")
        print(f"  floor                         {operations / rate / 1e9:8.2f} s   {operations / 1e9:.0f} GFLOP of curvatures")
        print(
            f"  test accuracy                 {points[0]:8.2f} %   scikit-learn {points[1]:.2f} %, largest difference of a fit {100 * np.abs(np.diff(accuracy)).max():.2f}"
        )
        print(f"  objective, relative excess    at most {worst[0]:.1e} over scikit-learn's; scikit-learn's at most {worst[1]:.1e} over it")
        if width == parts.encoder.dim and int(settings["lightning"]):
            goal = Objective((0.1,), 0.5, 0.0, 1.0)
            engine = LightningEngine(replace_loss(cfg), parts, {"linear": cfg.head}, goal)
            sample = [cell for cell in cells if cell.seed == 0 and cell.n_unsafe in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
            sample = sample[:: max(1, len(sample) // int(settings["lightning"]))]
            started = time.perf_counter()
            engine.fit([(cell, stock.data_of(cell)) for cell in sample], stock.test)
            each = (time.perf_counter() - started) / len(sample)
            print(
                f"  Lightning, {len(sample)} cells           {each:8.2f} s a fit   {each / (mine / len(cells) / len(strengths)):.0f} times as long   (aim: 200)"
            )
    print(f"\nlargest memory of this process  {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
    parts.data.close()
    if settings["whole"] == "true":
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            command = [sys.executable, "-m", "guardkit.sweep", f"output_dir={folder}/sweep", *overrides]
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=os.environ
            )
            seconds = time.perf_counter() - started
            assert done.returncode == 0, done.stderr[-2000:]
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            print(f"python -m guardkit.sweep         {seconds:8.1f} s   with embeddings stored (aim: 60), memory {peak:.2f} GiB (aim: 2)")


def replace_loss(cfg):
    """The same objective for Lightning: no pair loss."""
    return OmegaConf.merge(cfg, {"loss": {"pair_weight": 0.0}})


if __name__ == "__main__":
    main(sys.argv[1:])
