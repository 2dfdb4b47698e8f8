"""What finished cells say of the test set. Their scores are read, measured and let go, one arm and label budget at a time,
so that memory does not grow with the number of cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Cell
from guardkit.efficiency.curves import SWEPT, Curve, Yardstick
from guardkit.efficiency.engine import FittedCell
from guardkit.efficiency.plan import Plan
from guardkit.efficiency.results import CellStore, CellTable
from guardkit.fitting.module import choose_threshold
from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.operating_points import operating_points
from guardkit.progress import progress
from guardkit.schema import InputError

FIGURES = (*SWEPT, "threshold_logit")


class Yardsticks:
    """The metric of a plan on the whole test set and on its parts, and every metric without redraws.

    Args:
        plan: has the metric and its redraws.
        test: images and pairs.

    Attributes:
        overall: on all of it.
        by_source: where test images come from.
        by_category: the unsafe images of a category against all safe ones.
    """

    def __init__(self, plan: Plan, test: TestSet) -> None:
        draws = GroupDraws([record.group for record in test.records], n_resamples=plan.n_resamples, seed=plan.draw_seed)
        sources = np.array([record.source for record in test.records])
        categories = np.array([record.category or "" if record.label else "" for record in test.records])
        safe = np.array([record.label == 0 for record in test.records])
        self.overall = Yardstick(plan.metric, test, draws)
        self.by_source = {str(name): Yardstick(plan.metric, test, draws, sources == name) for name in sorted(set(sources))}
        self.by_category = {
            str(name): Yardstick(plan.metric, test, draws, (categories == name) | safe) for name in sorted(set(categories) - {""})
        }
        self._all = [Yardstick(metric, test) for metric in SWEPT]

    def figures(self, fitted: Mapping[Cell, FittedCell], thresholds: Sequence[float]) -> dict[Cell, dict[str, float | None]]:
        """`FIGURES` of every cell."""
        columns = [*(yardstick.values(list(fitted.values()), thresholds) for yardstick in self._all), thresholds]
        known = [[None if np.isnan(value) else float(value) for value in row] for row in zip(*columns, strict=True)]
        return {cell: dict(zip(FIGURES, row, strict=True)) for cell, row in zip(fitted, known, strict=True)}


@dataclass
class Measured:
    """What the cells of one head came to.

    Attributes:
        curves: by their names, in the order of the arms.
        by_source: the same on the test images of each source.
        by_category: the same on each category, at the one size of the table.
        cost: labels, edits and seconds by curve and size, means over seeds.
        chosen: how often each strength of regularisation was chosen, by curve.
        n_cells, seconds: finished cells, and what fitting them took, in this run or before.
        failed: reasons by cell that could be fitted but not measured.
    """

    curves: dict[str, Curve]
    by_source: dict[str, dict[str, Curve]]
    by_category: dict[str, dict[str, Curve]]
    cost: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    chosen: dict[str, dict[str, int]] = field(default_factory=dict)
    n_cells: int = 0
    seconds: float = 0.0
    failed: dict[Cell, str] = field(default_factory=dict)


class _Curves:
    """Curves on one yardstick, size by size."""

    def __init__(self, yardstick: Yardstick) -> None:
        self._yardstick = yardstick
        self._parts: dict[str, list[Curve]] = {}

    def add(self, name: str, size: int, fitted: Sequence[FittedCell], thresholds: Sequence[float]) -> None:
        part = self._yardstick.curve(size, fitted, thresholds)
        if part:
            self._parts.setdefault(name, []).append(part)

    def joined(self, names: Sequence[str]) -> dict[str, Curve]:
        return {name: Curve.joined(self._parts[name]) for name in names if name in self._parts}


def measure(
    plan: Plan,
    head: str,
    store: CellStore,
    failed: Mapping[Cell, str],
    yardsticks: Yardsticks,
    strengths: Sequence[float],
    table: CellTable,
) -> Measured:
    """Measures the finished cells of one head, and adds the rows of all its cells to the table.

    Args:
        failed: reasons by cell that could not be fitted.
        strengths: of regularisation.
    """
    overall = _Curves(yardsticks.overall)
    by_source = {name: _Curves(one) for name, one in yardsticks.by_source.items()}
    by_category = {name: _Curves(one) for name, one in yardsticks.by_category.items()}
    measured = Measured({}, {}, {})
    for block in progress(blocks := plan.blocks(head), total=len(blocks), what="measuring heads"):
        name, size = plan.curve(block[0].arm, head), block[0].n_unsafe
        finished = store.get(block)
        thresholds = dict(_thresholds(plan, finished, measured.failed))
        usable = {cell: finished[cell] for cell in thresholds}
        for curves in (overall, *by_source.values(), *(by_category.values() if size == plan.table_size else ())):
            curves.add(name, size, list(usable.values()), list(thresholds.values()))
        figures = yardsticks.figures(usable, list(thresholds.values()))
        for cell in block:
            reason = measured.failed.get(cell) or (None if cell in finished else failed.get(cell, "not fitted"))
            table.add(cell, finished.get(cell), figures.get(cell, {}), reason)
        if finished:
            _count(measured, name, size, list(finished.values()), strengths)
    names = plan.curves(head)
    measured.curves = overall.joined(names)
    measured.by_source = {source: curves.joined(names) for source, curves in by_source.items()}
    measured.by_category = {category: curves.joined(names) for category, curves in by_category.items()}
    return measured


def _thresholds(plan: Plan, finished: Mapping[Cell, FittedCell], failed: dict[Cell, str]) -> Iterator[tuple[Cell, float]]:
    """The threshold of each cell, in logits; where its validation images give none, the reason goes to `failed`."""
    for cell, one in finished.items():
        points = {}
        if isinstance(plan.threshold, str):
            points = operating_points(one.validation_labels, 1 / (1 + np.exp(-np.clip(one.validation_logits.astype(float), -700, 700))))
            if not points:
                failed[cell] = f"threshold={plan.threshold} needs validation images of both labels"
                continue
        try:
            share = choose_threshold(plan.threshold, points)
        except InputError as error:
            failed[cell] = str(error)
            continue
        yield cell, -math.inf if share <= 0 else math.inf if share >= 1 else math.log(share / (1 - share))


def _count(measured: Measured, name: str, size: int, finished: Sequence[FittedCell], strengths: Sequence[float]) -> None:
    measured.n_cells += len(finished)
    measured.seconds += sum(one.seconds for one in finished)
    chosen = measured.chosen.setdefault(name, {f"{value:g}": 0 for value in strengths})
    for one in finished:
        chosen[f"{strengths[one.chosen]:g}"] += 1
    costs: dict[str, Any] = {
        "labels_safe": [one.counts["n_safe"] for one in finished],
        "edits_requested": [one.counts["n_requested"] for one in finished],
        "edits_accepted": [one.counts["n_accepted"] for one in finished],
        "fit_seconds": [one.seconds for one in finished],
    }
    mine = {"labels_unsafe": size} | {what: float(np.mean(values)) for what, values in costs.items()}
    measured.cost.setdefault(name, {})[str(size)] = mine
