"""How much of the gain survives an imperfect editor, with and without a verifier: docs/imperfect_editor.png.

    python benchmarks/imperfect_editor.py [seeds=5] [n_unsafe=64] [out=docs/imperfect_editor.png]

`pairs_aug` on scenes with an editor that does what it is asked in a given share of tries and otherwise changes something
irrelevant, so that the violation stays and the guard is told it is safe. The verifier reads the policy's texts, knows nothing
of the editor, and has up to four tries an image. Intervals are Student's t over seeds.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import t

from guardkit.artifacts import written
from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.train import run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RATES = (0.1, 0.23, 0.5, 0.75, 0.9, 1.0)
VERIFIERS = {"no verifier": ["verifier=none"], "verifier=encoder, up to 4 tries": ["verifier=encoder", "edit_max_tries=4"]}


def interval(values: list[float]) -> tuple[float, float]:
    array = np.array(values)
    return float(array.mean()), float(t.ppf(0.975, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5)


def main(seeds: int = 5, n_unsafe: int = 64, out: str = "docs/imperfect_editor.png") -> None:
    logging.disable(logging.WARNING)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)

    def measure(folder: str, *overrides: str) -> dict:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = compose("train", ["head=linear", f"data.n_unsafe={n_unsafe}", *overrides])
        return run(cfg, {}, Path(folder)).metrics

    results: dict[str, dict[float, dict]] = {name: {} for name in VERIFIERS}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        baseline = [measure(folder, "experiment=unpaired", f"seed={seed}")["pairs"]["pair_accuracy"] for seed in range(seeds)]
        print(f"unpaired: pair accuracy {interval(baseline)[0]:.3f} ± {interval(baseline)[1]:.3f}", flush=True)
        print("| success rate | verifier | pair accuracy | gain over unpaired | accepted of images | tries an image |")
        print("|---|---|---|---|---|---|")
        for rate in RATES:
            for name, verifier in VERIFIERS.items():
                overrides = ["experiment=pairs_aug", "editor=imperfect", f"editor.success_rate={rate}", *verifier]
                runs = [measure(folder, *overrides, f"seed={seed}") for seed in range(seeds)]
                accuracy = [one["pairs"]["pair_accuracy"] for one in runs]
                gain = interval([a - b for a, b in zip(accuracy, baseline, strict=True)])
                kept = float(np.mean([one["edits"]["accepted"] / one["edits"]["requested"] for one in runs]))
                tries = float(np.mean([one["edits"]["tries"] / one["edits"]["requested"] for one in runs]))
                results[name][rate] = {"gain": gain, "accepted": kept, "tries": tries}
                mean, half = interval(accuracy)
                print(
                    f"| {rate} | {name} | {mean:.3f} ± {half:.3f} | {gain[0]:+.3f} ± {gain[1]:.3f} | {kept:.2f} | {tries:.2f} |", flush=True
                )
    draw(results, Path(out))
    print(json.dumps({"n_unsafe": n_unsafe, "seeds": seeds, "picture": out}))


def draw(results: dict[str, dict[float, dict]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (name, of_rate), colour, marker in zip(results.items(), ("#c2410c", "#1d4ed8"), ("o", "s"), strict=True):
        rates = np.array(list(of_rate))
        means = np.array([one["gain"][0] for one in of_rate.values()])
        halves = np.array([one["gain"][1] for one in of_rate.values()])
        axes.plot(rates, means, color=colour, marker=marker, label=name)
        axes.fill_between(rates, means - halves, means + halves, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(0, color="0.4", linewidth=1)
    axes.axvline(0.23, color="0.6", linewidth=1, linestyle=":")
    axes.annotate(
        "accepted in SafetyPairs (2025)", (0.23, axes.get_ylim()[0]), xytext=(4, 6), textcoords="offset points", color="0.4", fontsize=8
    )
    axes.set(xlabel="share of edits that the editor does as asked", ylabel="gain in pair accuracy over unpaired", xlim=(0, 1.02))
    axes.set_title("What an imperfect editor leaves of the gain (95 % bands over seeds)", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=150)


if __name__ == "__main__":
    settings = dict(argument.split("=") for argument in sys.argv[1:])
    main(**{key: value if key == "out" else int(value) for key, value in settings.items()})
