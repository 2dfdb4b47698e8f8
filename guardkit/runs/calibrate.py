"""`calibrate`: from its configuration to objects to one call."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.calibrate import CalibrationReport, calibrate
from guardkit.classifier import GuardClassifier
from guardkit.evaluation.calibration import Asked
from guardkit.folders import refuse_others
from guardkit.runs.hydra import cache_dir, make_source, plain

_PROMISES = ("max_fpr", "min_recall", "queue_per_day", "volume_per_day", "prevalence", "confidence", "by_category")


def run(cfg: DictConfig, folder: Path) -> CalibrationReport:
    """Sets thresholds and writes everything the contract promises of `calibrate`.

    Args:
        cfg: composed from conf/calibrate.yaml.
        folder: results are written there under their names when complete.
    Raises:
        InputError: a wrong value, named with what is allowed.
    """
    promises = {name: plain(cfg[name]) for name in _PROMISES}
    Asked(**promises)  # asked here too: guards take seconds to load
    refuse_others(folder, "calibrate", replaces=True)
    guard = GuardClassifier.from_pretrained(cfg.guard, trust=plain(cfg.trust))
    return calibrate(
        guard,
        make_source(cfg, guard.policy),
        **promises,
        **{name: cfg[name] for name in ("split", "test_share", "split_seed")},
        cache_dir=cache_dir(cfg),
        output_dir=folder,
        settings=json.loads(json.dumps(plain(cfg), default=str)),
    )
