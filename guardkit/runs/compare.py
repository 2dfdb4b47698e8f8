"""`compare`: from its configuration to objects to one call."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.compare import ComparisonReport, compare
from guardkit.classifier import GuardClassifier
from guardkit.folders import refuse_others
from guardkit.runs.hydra import cache_dir, make_source, plain

_SETTINGS = ("split", "test_share", "split_seed", "prevalence", "n_resamples", "seed")


def run(cfg: DictConfig, folder: Path) -> ComparisonReport:
    """Compares two guards and writes everything the contract promises of `compare`.

    Args:
        cfg: composed from conf/compare.yaml.
        folder: results are written there under their names when complete.
    """
    refuse_others(folder, "compare", replaces=True)
    new = GuardClassifier.from_pretrained(cfg.new, trust=plain(cfg.trust))
    return compare(
        cfg.old,
        new,
        make_source(cfg, new.policy),
        **{name: cfg[name] for name in _SETTINGS},
        trust=plain(cfg.trust),
        cache_dir=cache_dir(cfg),
        output_dir=folder,
        settings=json.loads(json.dumps(plain(cfg), default=str)),
    )
