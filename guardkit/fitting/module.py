"""Training: `GuardModule` is what Lightning runs, `fit` turns a data module and a head into a `GuardClassifier`."""

from __future__ import annotations

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from guardkit.checks import check_same, completed
from guardkit.classifier import GuardClassifier
from guardkit.data.datamodule import Batch, GuardDataModule
from guardkit.fitting.objective import Objective, penalised, start_of
from guardkit.heads import Head
from guardkit.metrics.operating_points import operating_points, operating_threshold
from guardkit.progress import progress
from guardkit.schema import InputError, shortened

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


class GuardModule(L.LightningModule):
    """A head under training.

    `L.Trainer(callbacks=[BestHead()]).fit(module, datamodule=data)` trains it; without `BestHead` it keeps the weights of the
    last step, as Lightning has it. `trainer.test(module, datamodule=data)` returns the figures of metrics.json that are
    numbers. `GuardModule.load_from_checkpoint(path, head=..., optimizer=...)` takes a head that was built like the one that was
    trained: a checkpoint holds weights, not classes.

    Args:
        head: (n, d) -> (n, 1 + k) logits.
        optimizer: makes an optimizer from parameters.
        objective: what the head is trained for.
        threshold: of the test figures, in [0, 1]: flag when score >= threshold.

    Attributes:
        l2: pull of the weights towards their start: the objective's, or the head's own where that has none.
        test_figures: "test", "pairs" and "always_unsafe" as metrics.json has them, after a test.
    """

    def __init__(
        self,
        head: Head,
        optimizer: Callable[[Iterator[torch.nn.Parameter]], torch.optim.Optimizer],
        objective: Objective | None = None,
        *,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> None:
        super().__init__()
        if not head.is_prepared:
            raise InputError("the head is not prepared; call head.prepare(guardkit.data.unlabelled.Unlabelled(data)) first")
        self.head = head
        self._optimizer = optimizer
        self.objective = objective or Objective()
        self.l2 = self.head.usual_l2 if self.objective.l2 is None else self.objective.l2
        self.threshold = threshold
        self.test_figures: dict[str, Any] = {}
        self._start = start_of(dict(head.named_parameters()))
        self._coins: Tensor | None = None

    def check_finite(self, loss: float, epoch: int) -> None:
        """Raises Diverged unless the loss is a finite number; epochs are counted from 1."""
        if not math.isfinite(loss):
            raise Diverged(divergence(epoch, self.trainer.optimizers[0].param_groups[0]["lr"], self.l2))

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a batch: what validation compares."""
        return self.objective.loss(self.head(batch["embeddings"]), batch)

    def penalised_loss(self, batch: Batch) -> Tensor:
        """With the pull towards the start, which belongs to the training objective and not to what validation compares."""
        loss = self.loss(batch)
        return penalised(loss, dict(self.head.named_parameters()), self._start, self.l2) if self.l2 else loss

    # --- Lightning's hooks ----------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:  # noqa: ARG002
        """One batch's loss."""
        loss = self.penalised_loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["labels"]))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:  # noqa: ARG002
        """After a step. Some optimizers ask for several losses a step, and only the last one counts."""
        self.check_finite(float(outputs["loss"]), self.current_epoch + 1)

    def validation_step(self, batch: Batch, batch_index: int) -> None:  # noqa: ARG002
        """The loss on all validation images, which are one batch."""
        loss = float(self.loss(batch))
        self.check_finite(loss, self.current_epoch + 1)
        self.log("validation_loss", loss, batch_size=1)

    def test_step(self, batch: Batch, batch_index: int) -> None:  # noqa: ARG002
        """The figures of all test images and pairs, which are one batch."""
        # heavy, and of use to tests only
        from guardkit.evaluation.training import test_figures

        data: GuardDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        guard = GuardClassifier(copy.deepcopy(self.head).cpu(), data.store.encoder, data.policy, threshold=self.threshold)
        self.test_figures, _ = test_figures(guard, data)
        # in double precision, as metrics.json has them
        self.log_dict({name: torch.tensor(value, dtype=torch.double) for name, value in scalars(self.test_figures).items()}, batch_size=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer over the head's parameters."""
        return self._optimizer(self.head.parameters())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a resumed run needs to go on as if it had not been stopped: dropout's random numbers, and what it is trained for."""
        checkpoint["guardkit"] = {"trained_for": self._trained_for(), "coins": torch.get_rng_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses weights of another head or objective."""
        known, now = checkpoint.get("guardkit", {"trained_for": {}, "coins": None}), self._trained_for()
        earlier = dict(known["trained_for"])
        if earlier.get("head", {}).get("kind") == self.head.kind:
            earlier["head"] = completed(earlier["head"], now["head"], type(self.head))
        check_same("the checkpoint", earlier, now)
        has, wanted = (
            {name: tuple(value.shape) for name, value in weights.items()} for weights in (checkpoint["state_dict"], self.state_dict())
        )
        wrong = next((name for name in sorted(wanted.keys() | has.keys()) if has.get(name) != wanted.get(name)), None)
        if wrong is not None:
            raise InputError(
                f"the checkpoint is damaged: {wrong} has shape {has.get(wrong)}, expected {wanted.get(wrong)}; give another one, or begin anew in another output_dir"
            )
        self._coins = known["coins"]

    def on_train_start(self) -> None:
        """Goes on where a checkpoint was made."""
        if not self.trainer.ckpt_path:
            return
        if self._coins is not None:
            torch.set_rng_state(self._coins.cpu())
        for one in self.trainer.early_stopping_callbacks:
            # Lightning keeps how long it has waited, and forgets that the wait was over
            self.trainer.should_stop |= one.wait_count >= one.patience

    def on_train_end(self) -> None:
        """Refuses what was learned from one class only."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, GuardDataModule):
            data.check_both_sides()

    # --- what came of it ------------------------------------------------------------------------------------------------

    def to_guard(self, data: GuardDataModule, threshold: float | str = DEFAULT_THRESHOLD) -> GuardClassifier:
        """The head as it is, with thresholds chosen on the validation images, which count in the label budget.

        Args:
            data: that it was trained on.
            threshold: a number in [0, 1], or the name of an operating point.
        Raises:
            InputError: an unknown operating point.
        """
        batch = data.validation_batch()
        noted = {"prevalence": self.objective.prevalence, "n_unsafe": len(data.choice.train["unsafe"])}
        guard = GuardClassifier(self.head.cpu().eval(), data.store.encoder, data.policy, threshold=DEFAULT_THRESHOLD, training=noted)
        set_threshold(guard, batch, threshold)
        self.threshold = guard.threshold
        return guard

    def _trained_for(self) -> dict[str, Any]:
        return {"head": {"kind": self.head.kind, **self.head.config}, "loss": self.objective.settings | {"l2": self.l2}}


class BestHead(L.Callback):
    """Keeps the head with the smallest validation loss, and puts it into the module when training ends.

    It keeps it in memory, and in every checkpoint, so that a resumed run knows what was best before.

    Attributes:
        loss: its validation loss; infinite before the first validation.
        epoch: in which that was, counted from 0; -1 before the first validation.
        curve: epoch, train_loss (the mean since the validation before) and validation_loss at every validation.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.loss, self.epoch = math.inf, -1
        self.curve: list[dict[str, float]] = []
        self._weights: dict[str, Tensor] | None = None
        self._losses: list[float] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:  # noqa: ARG002
        """Forgets an earlier training."""
        if stage == "fit":
            self._forget()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Notes the loss of a step."""
        self._losses.append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the head, if it is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = float(trainer.callback_metrics["validation_loss"])
        train = float(np.mean(self._losses)) if self._losses else math.nan
        self.curve.append({"epoch": trainer.current_epoch, "train_loss": train, "validation_loss": loss})
        self._losses.clear()
        if loss < self.loss:
            self.loss, self.epoch = loss, trainer.current_epoch
            self._weights = {name: value.clone() for name, value in pl_module.head.state_dict().items()}

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002
        """Puts the best head back, after the last checkpoint; without a validation the last head stays."""
        if self._weights is not None:
            pl_module.head.load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Of a checkpoint."""
        return {"loss": self.loss, "epoch": self.epoch, "curve": self.curve, "weights": self._weights, "losses": self._losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.loss, self.epoch, self.curve = state_dict["loss"], state_dict["epoch"], list(state_dict["curve"])
        self._weights, self._losses = state_dict["weights"], list(state_dict["losses"])


@dataclass(frozen=True)
class Fitted:
    """What `fit` returns.

    Attributes:
        guard: the trained classifier, thresholds chosen.
        module: that was trained, with its best head.
        curve: epoch, train_loss and validation_loss at every validation.
        best_epoch: of the head that was kept; -1 when nothing was trained.
        best_loss: its validation loss; infinite when nothing was validated.
        seconds: that fitting took, waiting for edits included.
    """

    guard: GuardClassifier
    module: GuardModule
    curve: list[dict[str, float]]
    best_epoch: int
    best_loss: float
    seconds: float


def fit(
    module: GuardModule,
    data: GuardDataModule,
    trainer: L.Trainer,
    *,
    threshold: float | str = DEFAULT_THRESHOLD,
    ckpt_path: str | Path | None = None,
) -> Fitted:
    """Trains a head and chooses thresholds on the validation images, which count in the label budget.

    Args:
        module: the head with its losses.
        data: the labelled embeddings.
        trainer: Lightning's, with a `BestHead` among its callbacks; with `max_epochs=0` the head stays as it is (zero-shot).
        threshold: a number in [0, 1], or the name of an operating point.
        ckpt_path: a checkpoint of an earlier run with the same settings, to go on from.
    Raises:
        Diverged: a loss is not finite.
        InputError: an unknown operating point, no negative to train against, or a checkpoint of other settings.
    """
    started = time.perf_counter()
    if isinstance(threshold, str):
        # with perfect scores: what the validation images allow at best, before the long part
        labels = data.validation_batch()["labels"].numpy()
        choose_threshold(threshold, operating_points(labels, labels.astype(float)))
    (best,) = (one for one in trainer.callbacks if isinstance(one, BestHead))  # type: ignore[attr-defined]
    if trainer.max_epochs:
        run(trainer, module, data, ckpt_path)
        if best.epoch < 0:  # it was never validated
            with torch.inference_mode():
                module.check_finite(float(module.loss(data.validation_batch())), trainer.current_epoch)
    else:
        data.check_both_sides()
    return Fitted(module.to_guard(data, threshold), module, best.curve, best.epoch, best.loss, time.perf_counter() - started)


def run(trainer: L.Trainer, module: GuardModule, data: GuardDataModule, ckpt_path: str | Path | None) -> None:
    """Lightning's `fit`, without its own messages, and with Ctrl-C as Python has it."""
    with quiet_lightning():
        try:
            trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        except SystemExit as ended:
            # Lightning turns Ctrl-C into an exit with status 1
            raise KeyboardInterrupt from ended


def check_checkpoint(path: str | Path) -> None:
    """Raises InputError unless the file holds tensors and plain values, as a checkpoint of `GuardModule` does."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if (
            not {"guardkit", "loops", "callbacks"} <= checkpoint.keys()
            or "fit_loop" not in checkpoint["loops"]
            or not checkpoint["state_dict"]
        ):
            raise ValueError("it is none of a guard's training")
    except Exception as error:  # whatever bytes it holds, torch has a kind of error for them
        raise InputError(
            f"ckpt_path={path} cannot be resumed from ({shortened(str(error), 120)}); give a file that train wrote into checkpoints/, or null"
        ) from error


def scalars(figures: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among nested figures, as loggers take them: {"test": {"f1": 0.5, "n": None}} -> {"test/f1": 0.5}."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            flat |= scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = float(value)
    return flat


def set_threshold(guard: GuardClassifier, batch: Batch, threshold: float | str) -> None:
    """Gives a guard its operating points on validation images, and the threshold that is asked for.

    Args:
        guard: changed.
        batch: with embeddings of the guard's encoder, and labels.
        threshold: a number in [0, 1], or the name of an operating point.
    Raises:
        InputError: an unknown operating point.
    """
    guard.operating_points = operating_points(batch["labels"].numpy(), guard.score_embeddings(batch["embeddings"].numpy()))
    guard.threshold = choose_threshold(threshold, guard.operating_points)


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
    """Lightning's training in the same manner as other work: epochs, rate, time left."""

    def __init__(self) -> None:
        self._epochs: Iterator[Any] | None = None

    def on_train_start(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Starts counting epochs."""
        left = range(trainer.current_epoch, trainer.max_epochs)
        self._epochs = progress(left, total=len(left), what="training epochs")
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
def quiet(logger_name: str) -> Iterator[None]:
    """Of a logger and those below it, errors alone are shown."""
    logger = logging.getLogger(logger_name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning advises on data loader workers and logging intervals, which do not apply to embeddings in memory."""
    with quiet("lightning.pytorch"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
