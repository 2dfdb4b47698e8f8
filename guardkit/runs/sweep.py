"""`sweep`: from its configuration to objects to one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.api.sweep import SweepReport, sweep
from guardkit.checks import is_list
from guardkit.data.arms import Arm
from guardkit.runs.hydra import cache_dir, factory, make_source, plain, policy
from guardkit.runs.loggers import check_logger, logger_of
from guardkit.runs.objects import data, edits, encoder, loss
from guardkit.schema import InputError


def run(cfg: DictConfig, settings: Any, folder: Path) -> SweepReport:
    """Fits every cell that is not finished yet, and writes everything the contract promises of `sweep` into `folder`.

    Args:
        cfg: composed from conf/sweep.yaml.
        settings: the same in plain values, for loggers.
        folder: of an earlier, interrupted sweep, or a new one.
    Raises:
        InputError: a wrong value, or a folder that holds another experiment.
    """
    asked = plain(cfg.sweep)
    arms, heads = arms_of(cfg), _heads(cfg)
    check_logger(cfg.logger)
    rules = policy(cfg)
    return sweep(
        make_source(cfg, rules),
        rules,
        encoder=encoder(cfg, rules),
        output_dir=folder,
        arms=arms,
        heads=heads,
        **{name: value for name, value in asked.items() if name not in ("arms", "heads")},
        threshold=cfg.threshold,
        seed=cfg.seed,
        editor=edits(cfg),
        **data(cfg),
        loss=loss(cfg),
        optimizer=factory(cfg.optimizer),
        linear_optimizer=factory(cfg.linear_optimizer),
        trainer=plain(cfg.trainer),
        early_stopping_patience=cfg.early_stopping_patience,
        logger=lambda: logger_of(cfg.logger, settings, folder),
        cache_dir=cache_dir(cfg),
    )


def arms_of(cfg: DictConfig) -> list[Arm]:
    """The arms that `sweep.arms` names."""
    _check_names(cfg, "arms")
    found = []
    for name in cfg.sweep.arms:
        if name not in cfg.arms:
            raise InputError(
                f"sweep.arms names {name!r}; there are {', '.join(cfg.arms)}, and +experiment@arms.{name}={name} adds one of conf/experiment"
            )
        said = plain(cfg.arms[name])
        asked = said.get("data", {})
        other = [*(set(said) - {"experiment_name", "data"}), *(f"data.{key}" for key in set(asked) - _OF_AN_ARM)]
        if other:
            raise InputError(
                f"arm {name} sets {', '.join(sorted(other))}, which all arms of a sweep share; an arm may set data.{', data.'.join(sorted(_OF_AN_ARM))}"
            )
        found.append(
            Arm(
                name,
                asked.get("negatives", plain(cfg.data)["negatives"]),
                asked.get("transform", cfg.data.transform),
                asked.get("variants_per_image"),
                asked.get("positives", plain(cfg.data)["positives"]),
            )
        )
    return found


_OF_AN_ARM = {"negatives", "positives", "transform", "variants_per_image"}


def _heads(cfg: DictConfig) -> dict[str, Any]:
    if cfg.sweep.heads is None:
        named = [name for name, head in cfg.heads.items() if head._target_ == cfg.head._target_]
        return {named[0] if named else str(cfg.head._target_): factory(cfg.head)}
    _check_names(cfg, "heads")
    for name in cfg.sweep.heads:
        if name not in cfg.heads:
            raise InputError(f"sweep.heads names {name!r}; there are {', '.join(cfg.heads)}")
    return {name: factory(cfg.heads[name]) for name in cfg.sweep.heads}


def _check_names(cfg: DictConfig, setting: str) -> None:
    value = plain(cfg.sweep[setting])
    if not is_list(value):
        raise InputError(f"sweep.{setting} must be a list, as in sweep.{setting}=[{value}], got {value!r}")
