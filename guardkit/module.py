"""Training: `GuardModule` is what Lightning runs, `fit` turns a data module and a head into a `GuardClassifier`."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from guardkit.checks import check_number
from guardkit.classifier import GuardClassifier
from guardkit.data.datamodule import Batch, GuardDataModule
from guardkit.encoders.base import Encoder
from guardkit.heads import Head
from guardkit.losses import category_loss, decision_loss, pair_loss
from guardkit.metrics.operating_points import operating_points, operating_threshold
from guardkit.policy import Policy
from guardkit.progress import progress
from guardkit.schema import InputError

DEFAULT_THRESHOLD = 0.5


class Diverged(InputError):
    """Training left the finite numbers: there is no guard to be had of it."""


def divergence(epoch: int, rate: float, l2: float) -> str:
    """What is said of it.

    Args:
        epoch: in which it happened, counted from 1.
        rate: learning rate.
        l2: pull of the weights towards their start.
    """
    pull = f" or loss.l2 (now {l2:g})" if l2 else ""
    return f"training diverged: the loss is not finite in epoch {epoch}; lower optimizer.lr (now {rate:g}){pull}"


def check_loss(prevalence: object, **weights: object) -> None:
    """Raises InputError for settings of the loss that are out of range, or no finite numbers."""
    check_number("loss.prevalence", prevalence, "(0, 1)")
    for name, value in weights.items():
        check_number(f"loss.{name}", value, "[0, inf)")


class GuardModule(L.LightningModule):
    """A head under training.

    Args:
        head: (n, d) -> (n, 1 + k) logits.
        optimizer: makes an optimizer from parameters.
        prevalence: share of unsafe images to train for, in (0, 1); classes are weighted to it.
        pair_weight: of the pair loss beside cross-entropy; 0 leaves it out.
        pair_margin: between twins, in logits.
        category_weight: of the category loss.
        l2: half of it times the squared distance of the weights from where they started is added: from zero for a
            linear head (ridge), from the policy's texts for a prompt head.
    Raises:
        InputError: an argument out of range.
    """

    def __init__(
        self,
        head: Head,
        optimizer: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer],
        *,
        prevalence: float = 0.5,
        pair_weight: float = 1.0,
        pair_margin: float = 1.0,
        category_weight: float = 0.5,
        l2: float = 0.0,
    ) -> None:
        super().__init__()
        check_loss(prevalence, pair_weight=pair_weight, pair_margin=pair_margin, category_weight=category_weight, l2=l2)
        self.head = head
        self._optimizer = optimizer
        self.prevalence, self.pair_weight, self.pair_margin, self.category_weight = prevalence, pair_weight, pair_margin, category_weight
        self.l2 = l2
        self._start = {name: value.detach().clone() for name, value in head.named_parameters() if value.ndim > 1}
        self.curve: list[dict[str, float]] = []
        self._epoch_losses: list[float] = []
        self._epoch = 0  # of the last step
        self.best_state: dict[str, Tensor] | None = None
        self.best_loss = float("inf")
        self.best_epoch = -1

    def check_finite(self, loss: float) -> None:
        """Raises Diverged unless the loss is a finite number."""
        if not math.isfinite(loss):
            raise Diverged(divergence(self._epoch + 1, self.trainer.optimizers[0].param_groups[0]["lr"], self.l2))

    def loss(self, batch: Batch) -> Tensor:
        """Decision, category and pair loss of a batch."""
        logits = self.head(batch["embeddings"])
        decision = logits[:, 0]
        total = decision_loss(decision, batch["labels"], self.prevalence)
        if self.category_weight:
            total = total + self.category_weight * category_loss(logits[:, 1:], batch["targets"])
        if self.pair_weight:
            pairs = pair_loss(decision[batch["unsafe_rows"]], decision[batch["twin_rows"]], self.pair_margin)
            total = total + self.pair_weight * pairs
        return total

    def penalty(self) -> Tensor:
        """The pull towards the start; it belongs to the training objective and not to what validation compares."""
        distances = [(value - self._start[name]).square().sum() for name, value in self.head.named_parameters() if name in self._start]
        return 0.5 * self.l2 * torch.stack(distances).sum()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:  # noqa: ARG002
        """Lightning's: one batch's loss."""
        loss = self.loss(batch)
        if self.l2:
            loss = loss + self.penalty()
        self._epoch_losses.append(float(loss.detach()))
        self._epoch = self.current_epoch
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:  # noqa: ARG002
        """Lightning's: after a step. Some optimizers ask for several losses a step, and only the last one counts."""
        self.check_finite(self._epoch_losses[-1])

    def validation_step(self, batch: Batch, batch_index: int) -> None:  # noqa: ARG002
        """Lightning's: the loss on all validation images; the head with the smallest is kept."""
        loss = float(self.loss(batch))
        self.check_finite(loss)
        self.log("validation_loss", loss, batch_size=len(batch["labels"]))
        train = float(np.mean(self._epoch_losses)) if self._epoch_losses else float("nan")
        self.curve.append({"epoch": self.current_epoch, "train_loss": train, "validation_loss": loss})
        self._epoch_losses.clear()
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.current_epoch
            self.best_state = {name: value.clone() for name, value in self.head.state_dict().items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Lightning's: the optimizer over the head's parameters."""
        return self._optimizer(self.head.parameters())


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns.

    Attributes:
        guard: the trained classifier, thresholds chosen.
        curve: epoch, train_loss and validation_loss at every validation.
        best_epoch: of the head that was kept; -1 when nothing was trained.
        seconds: that fitting took, waiting for edits included.
    """

    guard: GuardClassifier
    curve: list[dict[str, float]]
    best_epoch: int
    seconds: float


def fit(
    module: GuardModule,
    data: GuardDataModule,
    trainer: L.Trainer,
    *,
    encoder: Encoder,
    policy: Policy,
    threshold: float | str = DEFAULT_THRESHOLD,
) -> Fitted:
    """Trains a head and chooses thresholds on the validation images, which count in the label budget.

    Args:
        module: the head with its losses.
        data: the labelled embeddings.
        trainer: Lightning's; with `max_epochs=0` the head stays as it is (zero-shot).
        encoder: that made the embeddings; it is named in the guard.
        policy: that the guard enforces.
        threshold: a number in [0, 1], or the name of an operating point.
    Raises:
        Diverged: a loss is not finite.
        InputError: an unknown operating point, or no negative to train against.
    """
    started = time.perf_counter()
    data.setup("fit")
    if isinstance(threshold, str):
        # with perfect scores: what the validation images allow at best, before the long part
        labels = data.validation_batch()["labels"].numpy()
        choose_threshold(threshold, operating_points(labels, labels.astype(float)))
    if trainer.max_epochs:
        with quiet_lightning():
            try:
                trainer.fit(module, datamodule=data)
            except SystemExit as ended:
                # Lightning turns Ctrl-C into an exit with status 1
                raise KeyboardInterrupt from ended
        data.check_both_sides()
    head = module.head.cpu().eval()
    batch = data.validation_batch()
    if module.best_state is not None:
        head.load_state_dict(module.best_state)
    elif trainer.max_epochs:  # it was never validated
        with torch.inference_mode():
            module.check_finite(float(module.loss(batch)))
    guard = GuardClassifier(
        head, encoder, policy, threshold=DEFAULT_THRESHOLD, training={"prevalence": module.prevalence, "n_unsafe": len(data.unsafe_train)}
    )
    points = operating_points(batch["labels"].numpy(), guard.score_embeddings(batch["embeddings"].numpy()))
    guard.operating_points = points
    guard.threshold = choose_threshold(threshold, points)
    return Fitted(guard, module.curve, module.best_epoch, time.perf_counter() - started)


def choose_threshold(threshold: float | str, points: dict[str, dict]) -> float:
    """The number itself, or that of the named operating point.

    Raises:
        InputError: a number outside [0, 1], or a name that is not among the points or promises too much.
    """
    if isinstance(threshold, str):
        if threshold not in points:
            known = ", ".join(points) or "none, because validation images of both classes are missing"
            raise InputError(f"threshold must be a number in [0, 1] or an operating point ({known}), got {threshold!r}")
        return operating_threshold(threshold, points)
    if not 0 <= threshold <= 1:
        raise InputError(f"threshold must lie in [0, 1], got {threshold}")
    return float(threshold)


class EpochProgress(L.Callback):
    """Lightning's training in the same manner: epochs, rate, time left."""

    def __init__(self) -> None:
        self._epochs: Iterator[Any] | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Starts counting epochs."""
        self._epochs = progress(range(trainer.max_epochs), total=trainer.max_epochs, what="training epochs")
        next(self._epochs, None)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Counts one."""
        if self._epochs is not None:
            next(self._epochs, None)

    def on_train_end(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Takes the bar away."""
        self._close()

    def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:  # noqa: ARG002
        """Takes the bar away before the error is shown."""
        self._close()

    def _close(self) -> None:
        close = getattr(self._epochs, "close", None)
        if close:
            close()


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning advises on data loader workers and logging intervals, which do not apply to embeddings in memory."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
