"""Trains many heads of one architecture at once, each on its own images and with its own strength of regularisation.

Parameters of all heads are stacked into one tensor each and run through `torch.func.vmap`. Optimizers that treat every
number by itself (SGD, Adam, AdamW) move the heads as if each were alone. An epoch is one step on all images of a cell,
so it is the same as `guardkit.fitting.module` with a batch size that holds them all: same losses, same validations, same rule
which epoch is kept and when to stop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from guardkit.data.arms import Batch
from guardkit.efficiency.cells import CellData
from guardkit.fitting.module import divergence
from guardkit.fitting.objective import Objective
from guardkit.heads import Head

_CHUNK_BYTES = 384 << 20
# activations and their gradients, in numbers a row and input dimension: generous for the heads that there are
_ACTIVATIONS = 16
# parameters, gradients, two moments, the best so far, the start
_COPIES = 6


@dataclass(frozen=True)
class Schedule:
    """How long to train and what to keep; the names are those of `guardkit.train`'s settings.

    Attributes:
        optimizer: makes an optimizer from parameters.
        max_epochs: steps on all images of a cell.
        check_every: epochs from one validation to the next.
        patience: validations without a better loss before a head stops.
    """

    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer]
    max_epochs: int
    check_every: int
    patience: int


class _Problems:
    """Batches of several models, padded to one shape; padding has no weight."""

    def __init__(self, batches: Sequence[Batch], objective: Objective, device: str) -> None:
        n = max(len(one["labels"]) for one in batches)
        p = max(1, max(len(one["unsafe_rows"]) for one in batches))
        d = batches[0]["embeddings"].shape[1]
        self.embeddings = torch.zeros(len(batches), n, d, device=device)
        self.labels, self.shares = torch.zeros(len(batches), n, device=device), torch.zeros(len(batches), n, device=device)
        self.pairs = torch.zeros(len(batches), p, 2, dtype=torch.long, device=device)
        self.pair_shares = torch.zeros(len(batches), p, device=device)
        self.margin = objective.pair_margin
        for i, one in enumerate(batches):
            labels, pairs = one["labels"], torch.stack([one["unsafe_rows"], one["counterfactual_rows"]], dim=1)
            unsafe = labels == 1
            self.embeddings[i, : len(labels)], self.labels[i, : len(labels)] = one["embeddings"], labels
            each = objective.prevalence / unsafe.sum().clamp(min=1), (1 - objective.prevalence) / (~unsafe).sum().clamp(min=1)
            self.shares[i, : len(labels)] = torch.where(unsafe, *each)
            self.pairs[i, : len(pairs)] = pairs
            self.pair_shares[i, : len(pairs)] = objective.pair_weight / max(1, len(pairs))

    def losses(self, logits: Tensor) -> Tensor:
        """(m, n) decision logits -> (m,) losses."""
        cross = functional.binary_cross_entropy_with_logits(logits, self.labels, reduction="none")
        unsafe, twin = logits.gather(1, self.pairs[..., 0]), logits.gather(1, self.pairs[..., 1])
        return (self.shares * cross).sum(dim=1) + (self.pair_shares * functional.softplus(self.margin - (unsafe - twin))).sum(dim=1)


@dataclass(frozen=True)
class Trained:
    """A head that was kept.

    Attributes:
        validation_loss: the smallest seen.
        objective: training loss with penalty.
        validation_logits: (v,) decision logits.
        test_logits: decision logits of each of the test's sets of embeddings.
        diverged: why none of this means anything; None when training stayed finite.
    """

    validation_loss: float
    objective: float
    validation_logits: np.ndarray
    test_logits: list[np.ndarray]
    diverged: str | None = None


class StackedHeads:
    """Trains heads side by side.

    Args:
        schedule: optimizer, epochs, validations.
        objective: of every head; its category loss is left out, and each head has an l2 of its own.
        device: where to compute.
    """

    def __init__(self, schedule: Schedule, objective: Objective, *, device: str) -> None:
        self._schedule, self._objective, self._device = schedule, objective, device

    def train(
        self, heads: Sequence[Head], data: Sequence[CellData], strengths: Sequence[float], test: Sequence[np.ndarray]
    ) -> list[Trained]:
        """Trains heads, as many at once as memory allows.

        Args:
            heads: (p,) where each starts; the same one may start several.
            data: (p,) what each is trained on.
            strengths: (p,) of regularisation.
            test: sets of (n, d) embeddings.
        """
        trained: list[Trained] = []
        while len(trained) < len(heads):
            start = len(trained)
            n_parameters = sum(value.numel() for value in heads[start].parameters())
            stop, longest = start, 0
            while stop < len(heads):
                longest = max(longest, data[stop].train["embeddings"].numel())
                if stop > start and 4 * (stop + 1 - start) * (_ACTIVATIONS * longest + _COPIES * n_parameters) > _CHUNK_BYTES:
                    break
                stop += 1
            trained += self._train(heads[start:stop], data[start:stop], strengths[start:stop], test)
        return trained

    def _train(
        self, heads: Sequence[Head], data: Sequence[CellData], strengths: Sequence[float], test: Sequence[np.ndarray]
    ) -> list[Trained]:
        base = copy.deepcopy(heads[0]).to(self._device)
        parameters, buffers = stack_module_state(list(heads))
        state = {name: value.detach().to(self._device).requires_grad_() for name, value in parameters.items()}
        shared = {name: value[0].to(self._device) for name, value in buffers.items()}
        start = {name: value.detach().clone() for name, value in state.items() if value.ndim > 2}
        l2 = torch.tensor(strengths, device=self._device)

        def one(values: dict[str, Tensor], embeddings: Tensor) -> Tensor:
            return functional_call(base, {**values, **shared}, (embeddings,))[:, 0]

        forward = vmap(one, randomness="different")
        train = _Problems([cell.train for cell in data], self._objective, self._device)
        validation = _Problems([cell.validation for cell in data], self._objective, self._device)

        def objective() -> Tensor:
            losses = train.losses(forward(state, train.embeddings))
            for name, there in start.items():
                losses = losses + 0.5 * l2 * (state[name] - there).flatten(1).square().sum(dim=1)
            return losses

        optimizer = self._schedule.optimizer(list(state.values()))
        best = {name: value.detach().clone() for name, value in state.items()}
        best_losses = torch.full((len(l2),), torch.inf, device=self._device)
        waited = torch.zeros(len(l2), dtype=torch.long, device=self._device)
        left_finite = torch.zeros(len(l2), dtype=torch.long, device=self._device)  # in which epoch; 0: never

        def watch(losses: Tensor, epoch: int) -> None:
            # a head that has stopped goes on only because others do
            new = ~losses.detach().isfinite() & (left_finite == 0) & (waited < self._schedule.patience)
            left_finite[new] = epoch

        for epoch in range(1, self._schedule.max_epochs + 1):
            base.train()
            optimizer.zero_grad()
            losses = objective()
            watch(losses, epoch)
            losses.sum().backward()
            optimizer.step()
            if epoch % self._schedule.check_every == 0:
                base.eval()
                with torch.no_grad():
                    losses = validation.losses(forward(state, validation.embeddings))
                    watch(losses, epoch)
                    better = (losses < best_losses) & (waited < self._schedule.patience)
                    waited = torch.where(better, 0, waited + 1)
                    best_losses = torch.where(better, losses, best_losses)
                    for name, value in state.items():
                        best[name][better] = value[better]
                if bool((waited >= self._schedule.patience).all()):
                    break
        base.eval()
        with torch.no_grad():
            for name, value in state.items():
                value.copy_(best[name])
            reached = objective()
            logits = forward(best, validation.embeddings)
            best_losses = validation.losses(logits)
            images = [torch.from_numpy(np.asarray(one, np.float32)).to(self._device) for one in test]
            trained = []
            for i, cell in enumerate(data):
                alone = {name: value[i : i + 1] for name, value in best.items()}
                on_test = [forward(alone, one[None])[0].cpu().numpy() for one in images]
                on_validation = logits[i, : len(cell.validation["labels"])].cpu().numpy()
                left = int(left_finite[i])
                why = divergence(left, optimizer.param_groups[0]["lr"], strengths[i]) if left else None
                trained.append(Trained(float(best_losses[i]), float(reached[i]), on_validation, on_test, why))
        return trained
