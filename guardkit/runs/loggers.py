"""The logger of a run has an owner: it is opened, told the settings, and closed whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from guardkit.runs.hydra import make


@contextmanager
def logger_of(cfg: DictConfig, settings: Any, folder: Path) -> Iterator[Any]:
    """The logger that the configuration names; one run of it, closed at the end as finished or as failed.

    Args:
        cfg: with the group `logger`.
        settings: of the run, in plain values.
        folder: of the run.
    """
    logger = make(cfg.logger, save_dir=str(folder))
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
