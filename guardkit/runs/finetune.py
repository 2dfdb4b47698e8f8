"""`finetune`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.api.finetune import finetune
from guardkit.api.trained import TrainingReport
from guardkit.checks import check_map
from guardkit.runs.hydra import cache_dir, factory, make, make_source, plain, policy
from guardkit.runs.loggers import check_logger, logger_of
from guardkit.runs.objects import arm, data, edits, loss


def run(cfg: DictConfig, settings: Any, folder: Path) -> TrainingReport:
    """Trains and measures one LoRA guard and writes everything the contract promises of `finetune` into `folder`.

    Args:
        cfg: composed from conf/finetune.yaml.
        settings: the same in plain values, for loggers.
        folder: results are written there under their names when complete.
    """
    check_logger(cfg.logger)
    rules = policy(cfg)
    check_map("lora", cfg.lora, "{rank: 8}", optional=False)
    return finetune(
        make_source(cfg, rules),
        rules,
        encoder=make(cfg.encoder),
        words=plain(cfg.lora.words),
        rank=cfg.lora.rank,
        alpha=cfg.lora.alpha,
        images_at_once=cfg.lora.images_at_once,
        arm=arm(cfg),
        editor=edits(cfg),
        **data(cfg),
        n_unsafe=cfg.data.n_unsafe,
        seed=cfg.seed,
        threshold=cfg.threshold,
        loss=loss(cfg),
        optimizer=factory(cfg.optimizer),
        trainer=plain(cfg.trainer),
        early_stopping_patience=cfg.early_stopping_patience,
        logger=lambda: logger_of(cfg.logger, settings, folder),
        cache_dir=cache_dir(cfg),
        output_dir=folder,
    )
