"""From cells to fitted cells: the batched engine. Linear heads are solved to their optimum, others trained side by side.

Every head is fitted with each strength of regularisation (the `l2` of `guardkit.fitting.module`), and the strength with the
smallest loss on the cell's validation images is kept. Those count in the label budget; test images are scored once,
by the head that was kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from guardkit.data.arms import Batch
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Cell, CellData, CellError
from guardkit.efficiency.solver import Rows, decision_rows, fit_linear
from guardkit.efficiency.stacked import Schedule, StackedHeads
from guardkit.fitting.objective import Objective
from guardkit.heads import Head, LinearHead


@dataclass(frozen=True)
class FittedCell:
    """A cell whose regularisation is chosen.

    Attributes:
        chosen: position of the strength that was kept.
        validation_losses: (h,) of each strength.
        objectives: (h,) reached in training, by strength.
        gradients: (h,) largest absolute gradient entry there; NaN where it is not known.
        logits: (n,) decision logits of the test images.
        twin_logits: (p,) of the test counterfactuals.
        validation_logits, validation_labels: (v,) of the validation images.
        seconds: it took, in a share of what was fitted together.
    """

    chosen: int
    validation_losses: np.ndarray
    objectives: np.ndarray
    gradients: np.ndarray
    logits: np.ndarray
    twin_logits: np.ndarray
    validation_logits: np.ndarray
    validation_labels: np.ndarray
    seconds: float


class Engine(Protocol):
    """Fits cells of one head, at least one, in the order given."""

    name: str

    def fit(self, cells: Sequence[tuple[Cell, CellData]], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none: with one of the strengths its training diverged."""
        ...


class BatchedEngine:
    """Fits cells side by side, on a CPU or a GPU, in bounded memory.

    Args:
        objective: of every head; its category loss and its l2 are left out.
        strengths: of the regularisation, l2 above 0, to choose from.
        make_head: a new head by its name and a cell's seed.
        schedule: how heads that are not linear are trained.
        device: where to compute.
        tolerance: of linear heads, see `fit_linear`.
    """

    name = "batched"

    def __init__(
        self,
        objective: Objective,
        strengths: Sequence[float],
        make_head: Callable[[str, int], Head],
        schedule: Schedule,
        *,
        device: str = "cpu",
        tolerance: float = 1e-6,
    ) -> None:
        # categories have outputs of their own: those of a linear head do not touch its decision
        self._objective, self._strengths = replace(objective, category_weight=0.0, l2=0.0), tuple(strengths)
        self._make_head, self._schedule = make_head, schedule
        self._device, self._tolerance = device, tolerance

    def fit(self, cells: Sequence[tuple[Cell, CellData]], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none."""
        started = time.perf_counter()
        data = [one for _, one in cells]
        first = self._make_head(cells[0][0].head, cells[0][0].seed)
        fitted: Sequence[FittedCell | CellError]
        if type(first) is LinearHead:  # starts alike for every seed; a subclass may compute something else
            fitted = self._fit_linear(first, data, test)
        else:
            heads = [first, *(self._make_head(cell.head, cell.seed) for cell, _ in cells[1:])]
            fitted = self._fit_stacked(heads, data, test)
        seconds = (time.perf_counter() - started) / max(1, len(cells))
        return [one if isinstance(one, CellError) else replace(one, seconds=seconds) for one in fitted]

    def _fit_linear(self, head: LinearHead, data: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        start = head.linear.weight[0].detach().double().numpy()
        problems = [self.rows(one.train, head) for one in data]
        solved = fit_linear(problems, np.array(self._strengths), start=start, device=self._device, tolerance=self._tolerance)
        # of the embeddings themselves: features are a linear map of them
        weights = solved.weights @ head.features(torch.eye(len(start), dtype=torch.double)).numpy().T
        bias = solved.bias
        on_validation = [one.validation["embeddings"].double().numpy() @ weights[i].T + bias[i] for i, one in enumerate(data)]
        losses = [
            np.array([self.loss(torch.from_numpy(logits[:, j].copy()), one.validation) for j in range(logits.shape[1])])
            for logits, one in zip(on_validation, data, strict=True)
        ]
        best = [chosen(mine, self._strengths) for mine in losses]
        rows = np.arange(len(data))
        # in single precision, as the embeddings are: what is kept of a cell is mostly this
        on_test, on_twins = (
            (vectors @ weights[rows, best].T + bias[rows, best]).astype(np.float32) for vectors in (test.embeddings, test.counterfactuals)
        )
        return [
            FittedCell(
                chosen=best[i],
                validation_losses=losses[i],
                objectives=solved.objective[i],
                gradients=solved.gradient[i],
                logits=on_test[:, i],
                twin_logits=on_twins[:, i],
                validation_logits=on_validation[i][:, best[i]],
                validation_labels=one.validation["labels"].numpy(),
                seconds=0.0,
            )
            if np.isfinite(losses[i]).all() and np.isfinite(solved.objective[i]).all()
            else CellError("its loss is not finite; lower loss.pair_weight or loss.pair_margin")
            for i, one in enumerate(data)
        ]

    def _fit_stacked(self, heads: Sequence[Head], data: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        stacked = StackedHeads(self._schedule, self._objective, device=self._device)
        n = len(self._strengths)
        trained = stacked.train(
            [head for head in heads for _ in range(n)],
            [cell for cell in data for _ in range(n)],
            list(self._strengths) * len(data),
            [test.embeddings, test.counterfactuals],
        )
        fitted: list[FittedCell | CellError] = []
        for i, cell in enumerate(data):
            mine = trained[i * n : (i + 1) * n]
            reason = next((one.diverged for one in mine if one.diverged), None)
            if reason:
                fitted.append(CellError(reason))
                continue
            losses = np.array([one.validation_loss for one in mine])
            best = chosen(losses, self._strengths)
            logits, twins = mine[best].test_logits
            fitted.append(
                FittedCell(
                    chosen=best,
                    validation_losses=losses,
                    objectives=np.array([one.objective for one in mine]),
                    gradients=np.full(n, np.nan),
                    logits=logits,
                    twin_logits=twins,
                    validation_logits=mine[best].validation_logits,
                    validation_labels=cell.validation["labels"].numpy(),
                    seconds=0.0,
                )
            )
        return fitted

    def rows(self, batch: Batch, head: LinearHead) -> Rows:
        """What a linear head is fitted to on a batch."""
        # an image that stands beside several counterfactuals is several times in the batch; once with more weight is the same
        images = torch.cat([batch["embeddings"], batch["labels"][:, None]], dim=1).numpy()
        as_bytes = np.ascontiguousarray(images).view(np.dtype((np.void, images.itemsize * images.shape[1])))[:, 0]
        _, first, place, counts = np.unique(as_bytes, return_index=True, return_inverse=True, return_counts=True)
        return decision_rows(
            head.features(batch["embeddings"][first].double()).numpy(),
            batch["labels"].numpy()[first],
            place[torch.stack([batch["unsafe_rows"], batch["counterfactual_rows"]], dim=1).numpy()],
            counts=counts,
            prevalence=self._objective.prevalence,
            pair_weight=self._objective.pair_weight,
            pair_margin=self._objective.pair_margin,
        )

    def loss(self, logits: torch.Tensor, batch: Batch) -> float:
        """The loss that chooses the strength: that of `GuardModule` on the decision, of (n,) logits."""
        return float(self._objective.loss(logits[:, None], {**batch, "labels": batch["labels"].to(logits)}))


def chosen(losses: np.ndarray, strengths: Sequence[float]) -> int:
    """Position of the smallest validation loss; among equals that of the strongest regularisation."""
    order = np.argsort(-np.asarray(strengths), kind="stable")
    return int(order[np.asarray(losses)[order].argmin()])
