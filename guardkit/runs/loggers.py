"""The logger of a run has an owner: it is opened, told the settings, and closed whatever happens."""

from __future__ import annotations

import netrc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import DictConfig

from guardkit.runs.hydra import make
from guardkit.schema import InputError


@contextmanager
def logger_of(cfg: DictConfig, settings: Any, folder: Path) -> Iterator[Any]:
    """The logger that the configuration names; one run of it, closed at the end as finished or as failed.

    Args:
        cfg: of the group `logger`.
        settings: of the run, in plain values.
        folder: of the run.
    """
    logger = make(cfg, save_dir=str(folder))
    is_finished = False
    try:
        logger.log_hyperparams(settings)
        yield logger
        is_finished = True
    finally:
        logger.finalize("success" if is_finished else "failed")
        # a W&B run goes on in its process, and would take the next job's figures too
        if hasattr(getattr(logger, "experiment", None), "finish"):
            logger.experiment.finish(exit_code=0 if is_finished else 1)


def check_logger(cfg: DictConfig) -> None:
    """Raises InputError where W&B will ask for a login that nobody can give."""
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
