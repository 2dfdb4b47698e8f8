"""`embed`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.embed import embed
from guardkit.runs.hydra import asked_for, cache_dir, make, make_source, plain, policy
from guardkit.runs.objects import encoder
from guardkit.schema import InputError

_SETTINGS = ("image_column", "id_column", "file_column", "max_pixels", "limit", "shard_size")


def run(cfg: DictConfig, folder: Path | str) -> dict[str, int]:
    """Embeds every image of a source, or of `input`, into an embedding folder.

    Args:
        cfg: composed from conf/embed.yaml.
        folder: written to; or a URL of an object storage.
    Returns:
        given, written and rejected; given is the sum of the others.
    """
    rules = policy(cfg)
    if cfg.input is not None and (named := asked_for("source")):
        raise InputError(
            f"input= and {named} were both given; give input= for images alone, or source= for images whose labels are to be read"
        )
    return embed(
        make_source(cfg, rules) if cfg.input is None else None,
        input=plain(cfg.input),
        encoder=encoder(cfg, rules),
        output_dir=folder,
        cache_dir=cache_dir(cfg),
        engine=make(cfg.engine),
        **{name: plain(cfg[name]) for name in _SETTINGS},
    )
