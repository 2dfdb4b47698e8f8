"""`train`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.api.train import train_guard
from guardkit.api.trained import TrainingReport
from guardkit.classifier import GuardClassifier
from guardkit.runs.hydra import cache_dir, factory, make, make_source, plain, policy
from guardkit.runs.loggers import check_logger, logger_of
from guardkit.runs.objects import arm, data, edits, encoder, loss


def run(cfg: DictConfig, settings: Any, folder: Path) -> TrainingReport:
    """Trains and measures one guard and writes everything the contract promises of `train` into `folder`.

    Args:
        cfg: composed from conf/train.yaml.
        settings: the same in plain values, for loggers.
        folder: results are written there under their names when complete.
    """
    check_logger(cfg.logger)
    rules = policy(cfg)
    extend = None if cfg.extend is None else GuardClassifier.from_pretrained(cfg.extend, trust=plain(cfg.trust))
    return train_guard(
        make_source(cfg, rules),
        rules,
        encoder=encoder(cfg, rules) if extend is None else extend.encoder,
        head=factory(cfg.head),
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
        callbacks=[make(one) for one in cfg.callbacks.values() if one is not None],
        ckpt_path=cfg.ckpt_path,
        logger=lambda: logger_of(cfg.logger, settings, folder),
        extend=extend,
        cache_dir=cache_dir(cfg),
        output_dir=folder,
    )
