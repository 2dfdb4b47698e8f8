"""`embed`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.embed import embed
from guardkit.runs.hydra import cache_dir, make_source, policy
from guardkit.runs.objects import encoder


def run(cfg: DictConfig, folder: Path) -> dict[str, int]:
    """Embeds every image of a source into an embedding folder.

    Args:
        cfg: composed from conf/embed.yaml.
        folder: written to.
    Returns:
        given, written and rejected; given is the sum of the others.
    """
    rules = policy(cfg)
    return embed(
        make_source(cfg, rules),
        encoder=encoder(cfg, rules),
        output_dir=folder,
        limit=cfg.limit,
        shard_size=cfg.shard_size,
        cache_dir=cache_dir(cfg),
    )
