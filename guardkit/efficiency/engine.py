"""From cells to fitted cells: the batched engine. Linear heads are solved to their optimum, others trained side by side.

Every head is fitted with each strength of regularisation (the `l2` of `guardkit.fitting.objective`), and the strength with the
smallest loss on the cell's validation images is kept. Those count in the label budget; test images are scored once,
by the head that was kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

import numpy as np
import torch

from guardkit.data.arms import Batch
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import CellData, CellError
from guardkit.efficiency.solver import Curve, Rows, fit_linear, joined
from guardkit.efficiency.stacked import Schedule, StackedHeads
from guardkit.fitting.objective import Objective
from guardkit.fitting.terms import Gaps, Term
from guardkit.heads import AnchoredHead, Head, LinearHead


@dataclass(frozen=True)
class FittedCell:
    """A cell whose regularisation is chosen.

    Attributes:
        chosen: position of the strength that was kept.
        validation_losses: (h,) of each strength.
        objectives: (h,) reached in training, by strength.
        gradients: (h,) largest absolute gradient entry there; NaN where it is not known.
        logits: (n,) decision logits of the test images.
        counterfactual_logits: (p,) of the test counterfactuals.
        validation_logits, validation_labels: (v,) of the validation images.
        counts: of its images and edits, see `CellData.counts`.
        seconds: it took, in a share of what was fitted together.
    """

    chosen: int
    validation_losses: np.ndarray
    objectives: np.ndarray
    gradients: np.ndarray
    logits: np.ndarray
    counterfactual_logits: np.ndarray
    validation_logits: np.ndarray
    validation_labels: np.ndarray
    counts: Mapping[str, int]
    seconds: float


class Engine(Protocol):
    """Fits cells of one head, at least one, in the order given."""

    name: str

    def fit(self, cells: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none: with one of the strengths its training diverged."""
        ...


class BatchedEngine:
    """Fits cells side by side, on a CPU or a GPU, in bounded memory.

    Args:
        objective: of every head; the strengths are in place of its l2.
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
        self._objective, self._strengths = objective, tuple(strengths)
        self._make_head, self._schedule = make_head, schedule
        self._device, self._tolerance = device, tolerance

    def fit(self, cells: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none."""
        started = time.perf_counter()
        first = self._make_head(cells[0].cell.head, cells[0].cell.seed)
        fitted: Sequence[FittedCell | CellError]
        if is_solved(first, self._objective):
            fitted = self._fit_linear(first, cells, test)
        else:
            heads = [first, *(self._make_head(one.cell.head, one.cell.seed) for one in cells[1:])]
            fitted = self._fit_stacked(heads, cells, test)
        seconds = (time.perf_counter() - started) / max(1, len(cells))
        return [one if isinstance(one, CellError) else replace(one, seconds=seconds) for one in fitted]

    def _fit_linear(self, head: LinearHead | AnchoredHead, data: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        """Every column of the head by itself: the decision, and each category that a term reads."""
        starts, strengths = head.linear.weight.detach().double().numpy(), np.array(self._strengths)

        def features(vectors: torch.Tensor | np.ndarray) -> np.ndarray:
            return head.features(torch.as_tensor(vectors).double()).numpy()

        problems = [LinearProblem(self._objective, one.train, head.features) for one in data]
        validation = [features(one.validation["embeddings"]) for one in data]
        on_validation = [np.zeros((len(strengths), len(vectors), len(starts))) for vectors in validation]
        objectives, gradients = np.zeros((len(data), len(strengths))), np.zeros((len(data), len(strengths)))
        for column in sorted(problems[0].columns, reverse=True):  # to the decision, which is always read
            rows = [one.rows(column) for one in problems]
            solved = fit_linear(rows, strengths, start=starts[column], device=self._device, tolerance=self._tolerance)
            weights, bias = solved.weights, solved.bias
            objectives, gradients = objectives + solved.objective, np.maximum(gradients, solved.gradient)
            for i, vectors in enumerate(validation):
                on_validation[i][..., column] = (vectors @ weights[i].T + bias[i]).T
        losses = [
            np.array([float(self._objective.loss(logits, one.validation)) for logits in torch.from_numpy(each)])
            for each, one in zip(on_validation, data, strict=True)
        ]
        best = [chosen(mine, self._strengths) for mine in losses]
        cells = np.arange(len(data))
        # in single precision, as the embeddings are: what is kept of a cell is mostly this
        on_test, on_counterfactuals = (
            (features(vectors) @ weights[cells, best].T + bias[cells, best]).astype(np.float32)
            for vectors in (test.embeddings, test.counterfactuals)
        )
        return [
            FittedCell(
                chosen=best[i],
                validation_losses=losses[i],
                objectives=objectives[i],
                gradients=gradients[i],
                logits=on_test[:, i],
                counterfactual_logits=on_counterfactuals[:, i],
                validation_logits=on_validation[i][best[i], :, 0],
                validation_labels=one.validation["labels"].numpy(),
                counts=one.counts,
                seconds=0.0,
            )
            if np.isfinite(losses[i]).all() and np.isfinite(objectives[i]).all()
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
            logits, counterfactual_logits = mine[best].test_logits
            fitted.append(
                FittedCell(
                    chosen=best,
                    validation_losses=losses,
                    objectives=np.array([one.objective for one in mine]),
                    gradients=np.full(n, np.nan),
                    logits=logits,
                    counterfactual_logits=counterfactual_logits,
                    validation_logits=mine[best].validation_logits,
                    validation_labels=cell.validation["labels"].numpy(),
                    counts=cell.counts,
                    seconds=0.0,
                )
            )
        return fitted


class LinearProblem:
    """What the columns of a linear head are fitted to on a batch.

    Args:
        objective: convex.
        batch: see `guardkit.data.arms.assemble`.
        features: of embeddings: what the weights are multiplied with.

    Attributes:
        columns: that a term reads; 0 is the decision.
    """

    def __init__(self, objective: Objective, batch: Batch, features: Callable[[torch.Tensor], torch.Tensor]) -> None:
        # an image that stands beside several counterfactuals is several times in the batch; once with more weight is the same
        images = batch["embeddings"].numpy()
        as_bytes = np.ascontiguousarray(images).view(np.dtype((np.void, images.itemsize * images.shape[1])))[:, 0]
        _, first, self._place = np.unique(as_bytes, return_index=True, return_inverse=True)
        self._vectors = features(batch["embeddings"][first].double()).numpy()
        self._terms = [(term, term.gaps(batch)) for term in objective.active]
        self._all = range(1 + batch["targets"].shape[1])
        self.columns = {column for _, gaps in self._terms for column in self._columns(gaps)}

    def _columns(self, gaps: Gaps) -> Sequence[int]:
        return self._all[gaps.columns] if isinstance(gaps.columns, slice) else [self._all[gaps.columns]]

    def rows(self, column: int) -> Rows:
        """Of one column, those of all its terms."""
        here = [(term, gaps, self._columns(gaps).index(column)) for term, gaps in self._terms if column in self._columns(gaps)]
        return joined([self._rows_of(*one) for one in here], self._vectors.shape[1])

    def _rows_of(self, term: Term, gaps: Gaps, i: int) -> Rows:
        """Of one term, the i-th of its columns."""
        labels, shares = (np.atleast_2d(each.numpy().T)[i] for each in (gaps.labels, gaps.shares(term.weight)))
        at, signs = np.flatnonzero(shares), np.where(labels == 1, 1.0, -1.0)
        place = self._place if gaps.rows is None else self._place[gaps.rows.numpy()]
        if gaps.others is None:
            _, kinds = np.unique(shares[at], return_inverse=True)
            _, kept, counts = np.unique((2 * place[at] + (signs[at] > 0)) * (len(at) + 1) + kinds, return_index=True, return_counts=True)
            at = at[kept]
            z, bias, shares = self._vectors[place[at]], signs[at], counts * shares[at]
        else:
            z = self._vectors[place[at]] - self._vectors[self._place[gaps.others.numpy()][at]]
            bias, shares = np.zeros(len(at)), shares[at]
        margin = term.softplus_margin()
        curves = [(slice(0, len(at)), _curve(term, signs[at]))] if margin is None else []
        return Rows(signs[at, None] * z, bias, np.full(len(at), margin or 0.0), shares, curves)


def _curve(term: Term, signs: np.ndarray) -> Curve:
    """A term's function of what rows lack, their gaps with the sign turned."""
    turned = torch.from_numpy(-signs)
    labels = (turned < 0).double()
    return lambda lack: term.each(turned * lack, labels)


def is_solved(head: Head, objective: Objective) -> TypeGuard[LinearHead | AnchoredHead]:
    """Whether a head is brought to its optimum; others are trained. A subclass of one of these may compute something else."""
    return type(head) in (LinearHead, AnchoredHead) and objective.is_convex


def chosen(losses: np.ndarray, strengths: Sequence[float]) -> int:
    """Position of the smallest validation loss; among equals that of the strongest regularisation."""
    order = np.argsort(-np.asarray(strengths), kind="stable")
    return int(order[np.asarray(losses)[order].argmin()])
