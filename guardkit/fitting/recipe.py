"""How a head is brought from its start to a guard: optimizer, Lightning's trainer, and what can be known of them beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from guardkit.checks import check_choice, check_flag, check_whole
from guardkit.fitting.module import DEFAULT_THRESHOLD, BestHead, Fitted, GuardModule, choose_threshold, fit, quiet_lightning
from guardkit.fitting.objective import Objective
from guardkit.fitting.parts import Parts
from guardkit.heads import Head
from guardkit.metrics.operating_points import operating_points
from guardkit.schema import InputError, shortened

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""Called with parameters, makes an optimizer of them."""

ADAMW: OptimizerFactory = partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.1)

TRAINER: Mapping[str, Any] = {
    "max_epochs": 300,
    "accelerator": "cpu",  # heads are small: a GPU only adds transfers (the encoder chooses its own device)
    "devices": 1,
    "deterministic": True,
    "check_val_every_n_epoch": 5,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@dataclass(frozen=True)
class Recipe:
    """How heads are trained.

    Attributes:
        objective: what they are trained for.
        optimizer: makes an optimizer from parameters.
        trainer: keyword arguments of `lightning.Trainer` that differ from `TRAINER`.
        patience: validations without a better loss before training stops.
    """

    objective: Objective = field(default_factory=Objective)
    optimizer: OptimizerFactory = ADAMW
    trainer: Mapping[str, Any] = field(default_factory=dict)
    patience: int = 12

    @property
    def trains(self) -> bool:
        """Whether heads are trained; else they stay as they start."""
        return bool({**TRAINER, **self.trainer}["max_epochs"])

    def check(self) -> None:
        """Raises InputError for what training would otherwise learn at its end, or midway."""
        check_optimizer(self.optimizer)
        _check_trainer(self.trainer)
        check_whole("early_stopping_patience", self.patience, 0)

    def fit(
        self,
        head: Head,
        parts: Parts,
        *,
        logger: Any = False,
        callbacks: Sequence[L.Callback] = (),
        threshold: float | str = DEFAULT_THRESHOLD,
        ckpt_path: str | Path | None = None,
    ) -> Fitted:
        """Trains a head on the images of the data module.

        Args:
            head: new.
            parts: with the data.
            logger: Lightning's; False: none.
            callbacks: beside early stopping and the one that keeps the best head.
            threshold: a number in [0, 1], or the name of an operating point.
            ckpt_path: of an earlier run with the same settings, to go on from.
        """
        module = GuardModule(head, self.optimizer, self.objective)
        stop = L.pytorch.callbacks.EarlyStopping("validation_loss", patience=self.patience)
        trainer = make_trainer(self.trainer, logger=logger, callbacks=[BestHead(), *callbacks, stop])
        return fit(module, parts.data, trainer, threshold=threshold, ckpt_path=ckpt_path)


def make_trainer(settings: Mapping[str, Any], *, logger: Any = False, callbacks: Sequence[L.Callback] = ()) -> L.Trainer:
    """Lightning's trainer with `TRAINER` and the settings over it; it writes checkpoints where a callback does."""
    keep = any(isinstance(one, L.pytorch.callbacks.ModelCheckpoint) for one in callbacks)
    with quiet_lightning():
        return L.Trainer(**{**TRAINER, **settings}, logger=logger, callbacks=list(callbacks), enable_checkpointing=keep)


def opened_logger(logger: Any) -> AbstractContextManager[Any]:
    """A logger that its owner closes, or one that a function opens here for as long as the block lasts; False: none."""
    return nullcontext(logger) if not logger or hasattr(logger, "log_metrics") else logger()


def named(function: Callable[..., Any]) -> list[Any]:
    """What a function is called, and the arguments that are fixed in it: the same in every process."""
    if isinstance(function, partial):
        return [
            *named(function.func),
            [str(value) for value in function.args],
            {key: str(value) for key, value in function.keywords.items()},
        ]
    return [getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)]


def check_threshold(threshold: object) -> None:
    """Raises InputError unless it is a number in [0, 1] or the name of an operating point."""
    names = operating_points(np.array([1, 0]), np.array([0.9, 0.1]))
    if not isinstance(threshold, str | int | float) or isinstance(threshold, bool):
        raise InputError(f"threshold must be a number in [0, 1] or an operating point ({', '.join(names)}), got {threshold!r}")
    if threshold not in names:
        choose_threshold(threshold, names)


def check_optimizer(optimizer: OptimizerFactory, name: str = "optimizer") -> None:
    """One step of one number: optimizers check their settings when they are made, and some only when they are used."""
    number = torch.nn.Parameter(torch.ones(1))
    try:
        made = optimizer([number])

        def loss() -> torch.Tensor:
            made.zero_grad()
            value = number.square().sum()
            value.backward()
            return value

        made.step(loss)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = shortened(str(error), 200)
        raise InputError(f"{name} cannot work with these settings ({reason}); see conf/optimizer for what it takes") from error


def _check_trainer(settings: Mapping[str, Any]) -> None:
    wanted = {**TRAINER, **settings}
    for name, least in (("max_epochs", -1), ("check_val_every_n_epoch", 1), ("num_sanity_val_steps", -1), ("log_every_n_steps", 0)):
        check_whole(f"trainer.{name}", wanted[name], least)
    check_whole("trainer.accumulate_grad_batches", wanted.get("accumulate_grad_batches", 1), 1)
    for name in ("enable_progress_bar", "enable_model_summary"):
        check_flag(f"trainer.{name}", wanted[name])
    check_choice("trainer.deterministic", wanted["deterministic"], (True, False, "warn"))
    try:
        trainer = make_trainer(settings)
    except Exception as error:  # Lightning's own kinds and those of Python: whatever it is, it comes of these settings
        reason = shortened(str(error.__cause__ or error), 200)
        raise InputError(f"trainer cannot work with these settings ({reason}); see conf/trainer/default.yaml") from error
    if trainer.num_devices * trainer.num_nodes != 1:
        raise InputError(
            f"trainer.devices={wanted['devices']} would start {trainer.num_devices * trainer.num_nodes} processes, and a guard is trained in one; "
            "set trainer.devices=1"
        )
