"""Trains many heads of one architecture at once, each on its own images and with its own strength of regularisation.

Parameters of all heads are stacked into one tensor each and run through `torch.func.vmap`. Optimizers that treat every
number by itself (SGD, Adam, AdamW) move the heads as if each were alone. An epoch is one step on all images of a cell,
so it is the same as `guardkit.fitting.module` with a batch size that holds them all: same losses, same validations, same rule
which epoch is kept and when to stop.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils.rnn import pad_sequence

from guardkit.data.arms import Batch
from guardkit.efficiency.cells import CellData
from guardkit.fitting.module import divergence
from guardkit.fitting.objective import Objective, penalised, start_of
from guardkit.fitting.terms import Gaps
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
        def padded(parts: Iterable[Tensor]) -> Tensor:
            return pad_sequence(list(parts), batch_first=True).to(device)

        self.embeddings = padded(one["embeddings"] for one in batches)
        self._terms = []
        for term in objective.active:
            found = [term.gaps(one) for one in batches]
            shares = padded(one.shares(term.weight) for one in found).to(self.embeddings.dtype)
            labels = padded(one.labels for one in found)
            rows, others = (
                None if getattr(found[0], name) is None else padded(getattr(one, name) for one in found) for name in ("rows", "others")
            )
            self._terms.append((term, Gaps(labels, (), found[0].columns, rows, others), shares))

    def losses(self, logits: Tensor) -> Tensor:
        """(m, n, 1 + k) logits -> (m,) losses."""
        total = logits.new_zeros(len(logits))
        for term, gaps, shares in self._terms:
            total = total + (shares * term.each(gaps.values(logits), gaps.labels)).flatten(1).sum(dim=1)
        return total


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
        objective: of every head; each has an l2 of its own.
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
        start = start_of(state, 1)
        l2 = torch.tensor(strengths, device=self._device)

        def one(values: dict[str, Tensor], embeddings: Tensor) -> Tensor:
            return functional_call(base, {**values, **shared}, (embeddings,))

        forward = vmap(one, randomness="different")
        train = _Problems([cell.train for cell in data], self._objective, self._device)
        validation = _Problems([cell.validation for cell in data], self._objective, self._device)

        def objective() -> Tensor:
            return penalised(train.losses(forward(state, train.embeddings)), state, start, l2)

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
                on_test = [forward(alone, one[None])[0, :, 0].cpu().numpy() for one in images]
                on_validation = logits[i, : len(cell.validation["labels"]), 0].cpu().numpy()
                left = int(left_finite[i])
                why = divergence(left, optimizer.param_groups[0]["lr"], strengths[i]) if left else None
                trained.append(Trained(float(best_losses[i]), float(reached[i]), on_validation, on_test, why))
        return trained
