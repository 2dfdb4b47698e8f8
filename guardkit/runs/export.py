"""`export`: from its configuration to one call."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig

from guardkit.api.export import ExportReport, export_guard
from guardkit.runs.hydra import plain


def run(cfg: DictConfig, folder: Path) -> ExportReport:
    """Exports a guard and writes everything the contract promises of `export`.

    Args:
        cfg: composed from conf/export.yaml.
        folder: files are written there under their names when complete.
    Raises:
        InputError: what cannot be exported, and what can.
    """
    settings = json.loads(json.dumps(plain(cfg), default=str))
    return export_guard(plain(cfg.guard), folder, parts=plain(cfg.parts), trust=plain(cfg.trust), settings=settings)
