"""The arms side by side on scenes, over seeds, with 95 % intervals: the table of the README.

    python benchmarks/arms.py [seeds=5] [n_unsafe=64] [scene_shift=0.5] [head=linear] [key=value ...]

Intervals are Student's t over seeds, each seed another labelled subset on the same test set; differences to
`unpaired` are paired by seed.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy.stats import t

from guardkit.runs.hydra import CONF_DIR, default_cache_dir
from guardkit.runs.train import run

ARMS = ("unpaired", "classic_aug", "null_edits", "shuffled_pairs", "pairs_aug", "pairs_plus", "zero_shot")
FIGURES = {
    "pair accuracy": lambda m: m["pairs"]["pair_accuracy"],
    "photo pairs": lambda m: m["pairs"]["by_source"]["scenes_photo"]["pair_accuracy"],
    "ranking": lambda m: m["pairs"]["ranking_accuracy"],
    "AUROC": lambda m: m["test"]["auroc"],
    "F1": lambda m: m["test"]["f1"],
}


def interval(values: np.ndarray) -> str:
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return f"{values.mean():.3f} ± {half:.3f}"


def main(arguments: list[str]) -> None:
    settings = {"seeds": 5, "n_unsafe": 64, "scene_shift": 0.5, "head": "linear"}
    overrides = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in settings:
            settings[key] = type(settings[key])(value)
        else:
            overrides.append(argument)
    overrides += [f"data.n_unsafe={settings['n_unsafe']}", f"source.scene_shift={settings['scene_shift']}"]
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    OmegaConf.register_new_resolver("default_cache_dir", default_cache_dir, replace=True)
    results: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arm in ARMS:
            head = [] if arm == "zero_shot" else [f"head={settings['head']}"]
            for seed in range(settings["seeds"]):
                with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
                    cfg = compose("train", [f"experiment={arm}", f"seed={seed}", *head, *overrides])
                results[arm].append(run(cfg, {}, Path(temporary) / f"{arm}{seed}").metrics)
                print(f"{arm} seed {seed}: pair accuracy {results[arm][-1]['pairs']['pair_accuracy']:.3f}", file=sys.stderr, flush=True)
    print(
        f"{settings} {' '.join(overrides)}; n={results['unpaired'][0]['pairs']['n']} pairs, {results['unpaired'][0]['test']['n']} natural test images\n"
    )
    print("| arm | " + " | ".join(FIGURES) + " | pair accuracy against `unpaired` |")
    print("|---|" + "---|" * (len(FIGURES) + 1))
    base = np.array([metrics["pairs"]["pair_accuracy"] for metrics in results["unpaired"]])
    for arm in ARMS:
        cells = [interval(np.array([figure(metrics) for metrics in results[arm]])) for figure in FIGURES.values()]
        gain = np.array([metrics["pairs"]["pair_accuracy"] for metrics in results[arm]]) - base
        print(f"| `{arm}` | " + " | ".join(cells) + f" | {'' if arm == 'unpaired' else interval(gain)} |")
    print(json.dumps({"edited_vs_original_auroc": round(float(np.mean([m["edited_vs_original_auroc"] for m in results["pairs_aug"]])), 3)}))


if __name__ == "__main__":
    main(sys.argv[1:])
