"""`moderate`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.moderate import ModerationReport, check_fail_on, moderate
from guardkit.runs.hydra import make, plain

_SETTINGS = (
    "scope", "block_list", "allow_list", "trim_bars", "max_pixels", "max_frames", "image_column", "id_column", "file_column", "limit", "shard_size", "json_lines", "trust",
)  # fmt: skip


def run(cfg: DictConfig, folder: Path | str) -> tuple[ModerationReport, bool]:
    """Decides over images and writes everything the contract promises of `moderate`.

    Args:
        cfg: composed from conf/moderate.yaml.
        folder: results are written there under their names when complete.
    Returns:
        The report, and whether there was an action that `fail_on` names.
    """
    fatal = check_fail_on(plain(cfg.fail_on))
    report = moderate(
        plain(cfg.guard), plain(cfg.input), output_dir=folder, engine=make(cfg.engine), **{name: plain(cfg[name]) for name in _SETTINGS}
    )
    return report, any(report.actions[action] for action in fatal)
