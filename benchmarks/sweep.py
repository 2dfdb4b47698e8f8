"""Speed of the sample-efficiency engine, side by side in one run, on the cells of the default sweep.

    python benchmarks/sweep.py [seeds=10] [widths=256,768 or nothing] [lightning=3] [whole=true] [key=value ...]

Batched engine against scikit-learn's LogisticRegression, one fit after the other, spread over both cores with joblib;
both at the same objective (cross-entropy of a plain head without the pair loss, which scikit-learn does not have) and on the
same rows, in which an image that stands beside several counterfactuals is one row with more weight. scikit-learn stops where
the gradient falls below its `tol`, which at weak penalties is far from the optimum: so it runs with its default and with
smaller ones, and each line says how far its heads are from the batched engine's, on the objective and on test images.
Against Lightning on a sample of cells. Width 256 are the embeddings of the default encoder; 768 are random features of
them, so that they are no easier. The floor is what the batched engine's fits must do: the operations of their curvatures
at the rate of a large matrix product in single precision, and the bytes of their other products at the rate at which
memory is read. At the end the whole command, and once more with four times the subsets, for its memory.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from joblib import Parallel, delayed
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression

from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.engine import LinearProblem
from guardkit.efficiency.lightning_engine import LBFGS, LightningEngine
from guardkit.efficiency.solver import Rows, fit_linear
from guardkit.fitting.objective import Objective
from guardkit.fitting.recipe import Recipe
from guardkit.heads import LinearHead
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.objects import build
from guardkit.runs.sweep import arms_of

CORES = 2
TOLERANCE = 1e-6  # of the batched engine, as the sweep has it
SCIKIT_LEARN = (1e-4, 1e-6, 1e-8)  # tolerances: its default, and smaller ones


def widened(vectors: np.ndarray, width: int) -> np.ndarray:
    """(n, d) unit vectors as (n, width) unit vectors: random features, cut off at zero."""
    if vectors.shape[1] == width:
        return vectors
    rng = np.random.default_rng(0)
    features = np.maximum(vectors @ rng.normal(size=(vectors.shape[1], width)) + 0.2 * rng.normal(size=width), 0)
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def widened_rows(rows: Rows, width: int) -> Rows:
    """The same images, wider."""
    images = rows.vectors * rows.bias[:, None] / rows.vectors.shape[1] ** 0.5
    return replace(rows, vectors=widened(images, width).astype(float) * width**0.5 * rows.bias[:, None])


def one_by_one(rows: Rows, strengths: list[float], tolerance: float) -> np.ndarray:
    """(h, d + 1) weights and bias, by scikit-learn."""
    signs = rows.bias
    x, y = rows.vectors * signs[:, None], signs > 0
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for l2 in strengths:
            fitted = LogisticRegression(C=1 / l2, tol=tolerance, max_iter=10_000).fit(x, y, sample_weight=rows.shares)
            found.append(np.append(fitted.coef_[0], fitted.intercept_[0]))
    return np.array(found)


def objective(rows: Rows, head: np.ndarray, l2: float) -> float:
    pull = -(rows.vectors @ head[:-1] + rows.bias * head[-1])
    return float(rows.shares @ np.logaddexp(0, pull) + 0.5 * l2 * head[:-1] @ head[:-1])


def rates() -> tuple[float, float]:
    """Operations a second of a large product in single precision, and bytes a second that are read from memory."""
    x, y = torch.randn(2048, 2048), torch.randn(1 << 25)
    took = []
    for work in (lambda: x @ x, lambda: y.sum()):
        work()
        started = time.perf_counter()
        for _ in range(3):
            work()
        took.append((time.perf_counter() - started) / 3)
    return 2 * 2048**3 / took[0], 4 * len(y) / took[1]


def sweep_seconds(folder: str, overrides: list[str]) -> tuple[float, float]:
    """Of the whole command, and its largest memory in GiB."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "guardkit.sweep", f"output_dir={folder}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[1])
    peak = 0
    while process.poll() is None:
        # not the usage that the system reports at the end: it counts the parent from which the process was forked
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
        peak = max(peak, int(found.group(1)) if found else 0)
        time.sleep(0.1)
    assert process.returncode == 0, f"{' '.join(command)} ended with {process.returncode}"
    return time.perf_counter() - started, peak / 2**20


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
    plain = LinearHead(parts.encoder.dim, len(parts.policy.categories))
    goal = Objective(pair_weight=0.0, category_weight=0.0)
    fitted_to = [LinearProblem(goal, stock.data_of(cell).train, plain.features).rows(0) for cell in cells]
    labels = np.array([record.label for record in stock.test.records])
    n_fits = len(cells) * len(strengths)
    operations_rate, bytes_rate = rates()
    print(
        f"{len(cells)} cells x {len(strengths)} strengths = {n_fits} fits, {torch.get_num_threads()} threads, "
        f"{operations_rate / 1e9:.0f} GFLOP/s in single precision, {bytes_rate / 1e9:.0f} GB/s"
    )
    for width in (int(width) for width in settings["widths"].split(",") if width):
        scale = width**0.5
        problems = [widened_rows(rows, width) for rows in fitted_to]
        test = widened(stock.test.embeddings, width) * scale
        operations, read, batched = 0.0, 0.0, []
        started = time.perf_counter()
        for start in range(0, len(problems), len(seeds)):  # the seeds of one arm and size, as the engine does
            solved = fit_linear(problems[start : start + len(seeds)], np.array(strengths), tolerance=TOLERANCE)
            operations, read = operations + solved.curvature_operations, read + solved.product_bytes
            batched += list(np.concatenate([solved.weights, solved.bias[..., None]], axis=2))
        mine = time.perf_counter() - started
        floor = operations / operations_rate + read / bytes_rate
        print(f"\nwidth {width}")
        print(
            f"  batched engine            {mine:8.2f} s   {1000 * mine / n_fits:7.3f} ms a fit, test accuracy {mean_accuracy(batched, test, labels):.2f} %"
        )
        print(
            f"  floor                     {floor:8.2f} s   {operations / 1e9:.0f} GFLOP of curvatures, {read / 1e9:.0f} GB read by other products"
        )
        Parallel(CORES)(delayed(one_by_one)(problems[0], strengths[:1], 1e-4) for _ in range(CORES))  # starts the processes
        for tolerance in SCIKIT_LEARN:
            started = time.perf_counter()
            alone = Parallel(CORES)(delayed(one_by_one)(rows, strengths, tolerance) for rows in problems)
            theirs = time.perf_counter() - started
            ours_over, theirs_over, apart = differences(problems, strengths, batched, alone, test, labels)
            print(
                f"  scikit-learn, tol={tolerance:.0e}  {theirs:8.2f} s   {theirs / mine:.1f} times as long, test accuracy "
                f"{mean_accuracy(alone, test, labels):.2f} %, of one head at most {apart:.2f} points apart; objective up to "
                f"{theirs_over:.0e} of it above the engine's, the engine's up to {ours_over:.0e} above"
            )
        if width == parts.encoder.dim and int(settings["lightning"]):
            recipe = Recipe(goal)
            shared = {name: cfg.data[name] for name in ("batch_size", "all_views", "test_share", "split_seed")}
            engine = LightningEngine(parts, arms_of(cfg), {"linear": LinearHead.build}, (0.1,), recipe, LBFGS, shared)
            sample = [cell for cell in cells if cell.seed == 0 and cell.n_unsafe in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
            sample = sample[:: max(1, len(sample) // int(settings["lightning"]))]
            started = time.perf_counter()
            engine.fit([stock.data_of(cell) for cell in sample], stock.test)
            each = (time.perf_counter() - started) / len(sample)
            print(f"  Lightning, {len(sample)} cells       {each:8.2f} s a fit   {each / (mine / n_fits):.0f} times as long   (aim: 200)")
    parts.data.close()
    if settings["whole"] == "true":
        with tempfile.TemporaryDirectory() as folder:
            seconds, peak = sweep_seconds(f"{folder}/sweep", overrides)
            print(f"\npython -m guardkit.sweep    {seconds:8.1f} s   with embeddings stored (aim: 60), memory {peak:.2f} GiB (aim: 2)")
            seconds, peak = sweep_seconds(f"{folder}/sweep", [*overrides, f"sweep.seeds={4 * len(seeds)}"])
            print(f"sweep.seeds={4 * len(seeds)}, the rest    {seconds:8.1f} s   {4 * len(cells)} cells in all, memory {peak:.2f} GiB")


def mean_accuracy(heads: list[np.ndarray], test: np.ndarray, labels: np.ndarray) -> float:
    """Of all heads of all problems, in percent."""
    return 100 * float(np.mean([((test @ head[:, :-1].T + head[:, -1] >= 0) == labels[:, None]).mean() for head in heads]))


def differences(
    problems: list[Rows], strengths: list[float], ours: list[np.ndarray], theirs: list[np.ndarray], test: np.ndarray, labels: np.ndarray
) -> tuple[float, float, float]:
    """Largest relative excess of our objective over theirs and of theirs over ours, and of test accuracy in points."""
    mine = yours = apart = 0.0
    for rows, first, second in zip(problems, ours, theirs, strict=True):
        for j, l2 in enumerate(strengths):
            values = objective(rows, first[j], l2), objective(rows, second[j], l2)
            mine, yours = max(mine, values[0] / values[1] - 1), max(yours, values[1] / values[0] - 1)
            right = [((test @ head[j, :-1] + head[j, -1] >= 0) == labels).mean() for head in (first, second)]
            apart = max(apart, 100 * abs(right[0] - right[1]))
    return mine, yours, apart


if __name__ == "__main__":
    main(sys.argv[1:])
