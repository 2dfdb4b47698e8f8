"""What a command can know before its long part: settings and parts that cannot work are said in one line while nothing has begun.

What only the images can tell (too few, or none that the editor can edit) is in `guardkit.data.budget`.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from guardkit.checks import check_choice, check_flag, check_whole
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.encoders.base import Encoder
from guardkit.metrics import operating_points
from guardkit.module import check_loss, choose_threshold, quiet_lightning
from guardkit.policy import Policy
from guardkit.runs.hydra import make
from guardkit.schema import InputError, shortened


def check_settings(cfg: DictConfig, *, optimizers: Iterable[str] = ("optimizer",)) -> None:
    """Threshold, loss, optimizer, trainer and logger, of which training would otherwise learn at its end, or midway.

    Args:
        cfg: composed from conf/train.yaml or conf/sweep.yaml.
        optimizers: the keys of its optimizers.
    Raises:
        InputError: one of them cannot work.
    """
    _check_threshold(cfg.threshold)
    check_loss(**cfg.loss)
    for name in optimizers:
        _check_optimizer(cfg[name], name)
    _check_trainer(cfg.trainer)
    check_whole("early_stopping_patience", cfg.early_stopping_patience, 0)
    _check_logger(cfg.logger)


def check_parts(encoder: Encoder, pipeline: CounterfactualPipeline | None, policy: Policy, heads: Iterable[DictConfig] = ()) -> None:
    """Loads the encoder, and builds what editor, verifier and heads need of it and of their weights.

    Args:
        encoder: of the run.
        pipeline: with editor and verifier; None: nothing is edited.
        policy: whose texts are encoded.
        heads: configurations of the heads to be trained.
    Raises:
        InputError: weights that cannot be found or loaded, an encoder that reads no texts where they are needed, settings out
            of range, or texts that are the same to the encoder.
    """
    _ = encoder.dim
    if pipeline is not None:
        _ = pipeline.editor.config, pipeline.verifier.config
        prepare = getattr(pipeline.verifier, "prepare", None)
        if prepare is not None:
            prepare()
    for head in heads:
        # a head to try: the run's own starts from its own seed
        with torch.random.fork_rng(devices=[]):
            make(head, encoder=encoder, policy=policy)


def _check_threshold(threshold: object) -> None:
    names = operating_points(np.array([1, 0]), np.array([0.9, 0.1]))
    if not isinstance(threshold, str | int | float) or isinstance(threshold, bool):
        raise InputError(f"threshold must be a number in [0, 1] or an operating point ({', '.join(names)}), got {threshold!r}")
    if threshold not in names:
        choose_threshold(threshold, names)


def _check_optimizer(cfg: DictConfig, name: str) -> None:
    """One step of one number: optimizers check their settings when they are made, and some only when they are used."""
    number = torch.nn.Parameter(torch.ones(1))
    try:
        optimizer = instantiate(cfg)([number])

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            value = number.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    except (InstantiationException, ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = shortened(str(error.__cause__ or error), 200)
        raise InputError(f"{name} cannot work with these settings ({reason}); see conf/optimizer for what it takes") from error


def _check_trainer(cfg: DictConfig) -> None:
    for name, least in (("max_epochs", -1), ("check_val_every_n_epoch", 1), ("num_sanity_val_steps", -1), ("log_every_n_steps", 0)):
        check_whole(f"trainer.{name}", cfg.get(name, least), least)
    for name in ("enable_progress_bar", "enable_model_summary"):
        check_flag(f"trainer.{name}", cfg.get(name, False))
    check_choice("trainer.deterministic", cfg.get("deterministic", False), (True, False, "warn"))
    try:
        with quiet_lightning():
            make(cfg, logger=False, callbacks=[], enable_checkpointing=False)
    except Exception as error:  # Lightning's own kinds and those of Python: whatever it is, it comes of these settings
        reason = shortened(str(error.__cause__ or error), 200)
        raise InputError(f"trainer cannot work with these settings ({reason}); see conf/trainer/default.yaml") from error


def _check_logger(cfg: DictConfig) -> None:
    is_online = str(cfg._target_).endswith("WandbLogger") and not cfg.get("offline", False)
    if is_online and os.environ.get("WANDB_MODE", "online") == "online" and not _is_logged_in():
        raise InputError("logger=wandb with logger.offline=false needs a login: run `wandb login`, set WANDB_API_KEY, or leave it offline")


def _is_logged_in() -> bool:
    """Whether W&B will find a key. Asking the library itself would change how later runs of this process log in."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in map(Path, [os.environ["NETRC"]] if "NETRC" in os.environ else ["~/.netrc", "~/_netrc"]):
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, RuntimeError):
            continue  # there is none
        except netrc.NetrcParseError:
            return True  # the library will say what is wrong with it
    return False
