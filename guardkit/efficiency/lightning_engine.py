"""Cells of a sweep, fitted one after the other by the code of training: the reference for the batched engine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from guardkit.data.arms import Arm
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Cell, CellData, CellError
from guardkit.efficiency.engine import FittedCell, chosen, is_solved
from guardkit.fitting.module import Diverged
from guardkit.fitting.parts import HeadFactory, Parts, new_head
from guardkit.fitting.recipe import OptimizerFactory, Recipe

LBFGS: OptimizerFactory = partial(
    torch.optim.LBFGS, lr=1.0, max_iter=2000, tolerance_grad=1e-6, tolerance_change=1e-12, history_size=20, line_search_fn="strong_wolfe"
)


class LightningEngine:
    """A linear head is brought to its optimum by L-BFGS in one epoch over all images of the cell; others are trained as
    training does, with all images in one batch.

    Args:
        parts: of the sweep.
        arms: of the sweep.
        heads: what makes them, by name.
        strengths: of the regularisation, to choose from.
        recipe: of heads that are not linear.
        linear_optimizer: of linear ones.
        data: settings of `GuardDataModule` that all cells share.
    """

    name = "lightning"

    def __init__(
        self,
        parts: Parts,
        arms: Sequence[Arm],
        heads: Mapping[str, HeadFactory],
        strengths: Sequence[float],
        recipe: Recipe,
        linear_optimizer: OptimizerFactory,
        data: Mapping[str, Any],
    ) -> None:
        self._parts, self._arms, self._heads = parts, {arm.name: arm for arm in arms}, heads
        self._strengths, self._data = strengths, data
        self._recipe = recipe
        once = {"max_epochs": 1, "check_val_every_n_epoch": 1}
        self._linear = replace(recipe, optimizer=linear_optimizer, trainer={**recipe.trainer, **once})

    def fit(self, cells: Sequence[CellData], test: TestSet) -> list[FittedCell | CellError]:
        """One fitted cell each, or why there is none."""
        fitted: list[FittedCell | CellError] = []
        for one in cells:
            try:
                fitted.append(self._fit_one(one.cell, one.counts, test))
            except Diverged as error:
                fitted.append(CellError(str(error)))
        return fitted

    def _fit_one(self, cell: Cell, counts: Mapping[str, int], test: TestSet) -> FittedCell:
        started = time.perf_counter()
        parts = self._parts.rebuilt(self._arms[cell.arm], n_unsafe=cell.n_unsafe, seed=cell.seed, **self._data)
        guards, losses, objectives = [], [], []
        try:
            for l2 in self._strengths:
                head = new_head(self._heads[cell.head], parts, cell.seed)
                recipe = self._linear if is_solved(head, self._recipe.objective) else self._recipe
                fitted = replace(recipe, objective=replace(recipe.objective, l2=l2)).fit(head, parts)
                guards.append(fitted.guard)
                losses.append(fitted.best_loss)
                with torch.no_grad():
                    objectives.append(float(fitted.module.penalised_loss(next(parts.data.batches(1)))))
            validation = parts.data.validation_batch()
        finally:
            parts.data.close()
        best = chosen(np.array(losses), self._strengths)
        head = guards[best].head
        with torch.inference_mode():
            logits, counterfactual_logits, on_validation = (
                head(torch.as_tensor(x))[:, 0].numpy() for x in (test.embeddings, test.counterfactuals, validation["embeddings"])
            )
        return FittedCell(
            chosen=best,
            validation_losses=np.array(losses),
            objectives=np.array(objectives),
            gradients=np.full(len(losses), np.nan),
            logits=logits,
            counterfactual_logits=counterfactual_logits,
            validation_logits=on_validation,
            validation_labels=validation["labels"].numpy(),
            counts=counts,
            seconds=time.perf_counter() - started,
        )
