"""`synthesize`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.api.synthesize import synthesize
from guardkit.runs.hydra import cache_dir, make, make_source, policy
from guardkit.runs.objects import edits, encoder


def run(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Makes a pair dataset of a source's images.

    Args:
        cfg: composed from conf/synthesize.yaml.
        folder: written to.
    Returns:
        The dataset's manifest.
    """
    rules = policy(cfg)
    return synthesize(
        make_source(cfg, rules),
        rules,
        encoder=encoder(cfg, rules),
        editor=edits(cfg),
        output_dir=folder,
        direction=cfg.direction,
        variants_per_image=cfg.variants_per_image,
        limit=cfg.limit,
        shard_size=cfg.shard_size,
        cache_dir=cache_dir(cfg),
        engine=make(cfg.engine),
    )
