"""What finished cells say of the test set: the figures of summary.json, and cells.parquet. Their scores are read, measured and let go, one arm
and label budget at a time, so that memory does not grow with the number of cells."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import written
from guardkit.data.datamodule import TestSet
from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.curves import SWEPT, Curve, Yardstick, compare, difference, samples_to_target
from guardkit.efficiency.engine import FittedCell
from guardkit.efficiency.plan import Plan
from guardkit.efficiency.results import TABLE, CellStore, CellTable
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
    folder: Path,
    plan: Plan,
    store: CellStore,
    failed: Mapping[Cell, str],
    stock: Stock,
    strengths: Sequence[float],
    *,
    engine: Mapping[str, Any],
    became: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Measures the finished cells of a sweep, and writes the rows of all cells to cells.parquet.

    Args:
        folder: to write to.
        plan: what is compared, and how.
        store: the finished cells.
        failed: reasons by cell that could not be fitted.
        stock: what they were fitted to.
        strengths: of regularisation.
        engine: its name, and what else summary.json says of it beside the number of fits and their seconds.
        became: by name, what each head is that chose for itself, such as "auto".
        notes: what there was too little of, in sentences.
    Returns:
        The content of summary.json.
    """
    test = stock.test
    with written(folder / TABLE) as temporary, CellTable(temporary, strengths, FIGURES) as table:
        work = _Measuring(plan, store, failed, stock, strengths, table)
        summary: dict[str, Any] = {
            "arms": [name for head in plan.heads for name in plan.curves(head)],
            "heads": list(plan.heads),
            "heads_became": dict(became or {}),
            "sizes": list(plan.sizes),
            "seeds": list(plan.seeds),
            "metric": plan.metric,
            "baseline": plan.baseline,
            "n_test": {
                "units": work.yardsticks.overall.n,
                "groups": len({record.group for record in test.records}),
                "pairs_made_by": test.pairs_made_by,
            },
        }
        for head in plan.heads:
            summary = _joined(summary, work.of_head(head))
    return summary | {
        "left_out": plan.left_out(work.failed),
        "notes": list(notes),
        "threshold": plan.threshold,
        "n_resamples": plan.n_resamples,
        "engine": {"name": engine["name"], "fits": work.n_cells * len(strengths), "seconds": work.seconds, **engine},
    }


def _joined(first: Any, second: Any) -> Any:
    """Tables key by key, lists one after the other; of anything else the second."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first | {key: _joined(first[key], value) if key in first else value for key, value in second.items()}
    return first + second if isinstance(first, list) and isinstance(second, list) else second


class _Measuring:
    """Measures the cells of one head after the other.

    Attributes:
        yardsticks: what they are measured on.
        failed: reasons by cell that could not be fitted, or not be measured so far.
        n_cells, seconds: finished cells so far, and what fitting them took, in this run or before.
    """

    def __init__(
        self, plan: Plan, store: CellStore, failed: Mapping[Cell, str], stock: Stock, strengths: Sequence[float], table: CellTable
    ) -> None:
        self._plan, self._store, self._stock, self._strengths, self._table = plan, store, stock, strengths, table
        self.yardsticks = Yardsticks(plan, stock.test)
        self.failed, self.n_cells, self.seconds = dict(failed), 0, 0.0

    def of_head(self, head: str) -> dict[str, Any]:
        """The part of summary.json that is about one head; heads are not compared with each other."""
        plan, stock, baseline, names = self._plan, self._stock, self._plan.curve(self._plan.baseline, head), self._plan.curves(head)
        overall = _Curves(self.yardsticks.overall)
        by_source = {name: _Curves(one) for name, one in self.yardsticks.by_source.items()}
        by_category = {name: _Curves(one) for name, one in self.yardsticks.by_category.items()}
        cost: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
        chosen: dict[str, dict[str, int]] = {}
        for block in progress(blocks := plan.blocks(head), total=len(blocks), what="measuring heads"):
            name, size = plan.curve(block[0].arm, head), block[0].n_unsafe
            finished = self._store.get(block)
            thresholds = dict(_thresholds(plan, finished, self.failed))
            usable = {cell: finished[cell] for cell in thresholds}
            for curves in (overall, *by_source.values(), *(by_category.values() if size == plan.table_size else ())):
                curves.add(name, size, list(usable.values()), list(thresholds.values()))
            figures = self.yardsticks.figures(usable, list(thresholds.values()))
            for cell in block:
                reason = None if cell in usable else self.failed.get(cell, "not fitted")
                self._table.add(cell, finished.get(cell), figures.get(cell, {}), reason)
            if finished:
                self.n_cells += len(finished)
                self.seconds += sum(one.seconds for one in finished.values())
                cost[name][str(size)] = _cost(size, list(finished.values()))
                counts = chosen.setdefault(name, {f"{value:g}": 0 for value in self._strengths})
                for one in finished.values():
                    counts[f"{self._strengths[one.chosen]:g}"] += 1

        def about(known: Mapping[str, Curve]) -> dict[str, Any]:
            return {
                "curves": _points(plan, head, known, self.failed),
                "samples_to_target": samples_to_target(known, baseline, plan.target_sizes, plan.target_scores),
            }

        seconds = {plan.curve(arm, head): stock.edit_counts[arm].seconds for arm in plan.arms}
        known = overall.joined(names)
        return {
            **about(known),
            "tests": compare(known, baseline),
            "by_source": {
                name: {"in_training": name in stock.train_sources, **about(curves.joined(names))} for name, curves in by_source.items()
            },
            "by_category": {
                "size": plan.table_size,
                "categories": {name: _category(plan.table_size, curves.joined(names), baseline) for name, curves in by_category.items()},
            },
            # labels, edits and seconds: means over seeds
            "cost": {name: {"sizes": sizes, "seconds_for_edits_now": seconds[name]} for name, sizes in cost.items()},
            # a grid that is chosen at its ends is too narrow
            "chosen_strengths": chosen,
        }


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


def _cost(size: int, finished: Sequence[FittedCell]) -> dict[str, float]:
    """Labels, edits and seconds of cells of one size, means over seeds."""
    costs: dict[str, Any] = {
        "labels_safe": [one.counts["n_safe"] for one in finished],
        "edits_requested": [one.counts["n_requested"] for one in finished],
        "edits_accepted": [one.counts["n_accepted"] for one in finished],
        "fit_seconds": [one.seconds for one in finished],
    }
    return {"labels_unsafe": size} | {what: float(np.mean(values)) for what, values in costs.items()}


def _points(plan: Plan, head: str, known: Mapping[str, Curve], failed: Mapping[Cell, str]) -> dict[str, dict[str, dict[str, Any]]]:
    reasons = {(plan.curve(cell.arm, cell.head), cell.n_unsafe): reason for cell, reason in failed.items()}
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for name in plan.curves(head):
        mine = points.setdefault(name, {})
        for size in plan.sizes:
            if name in known and size in known[name].sizes:
                found = known[name].interval(size)
                n_seeds = known[name].n_seeds[known[name].sizes.index(size)]
                mine[str(size)] = {"mean": found.estimate, "ci_low": found.low, "ci_high": found.high, "n_seeds": n_seeds}
            else:
                mine[str(size)] = {"mean": None, "ci_low": None, "ci_high": None, "n_seeds": 0}
            if (name, size) in reasons:
                mine[str(size)]["reason"] = reasons[name, size]
    return points


def _category(size: int, known: Mapping[str, Curve], baseline: str) -> dict[str, Any]:
    """Metric and difference to the baseline at one size."""
    row: dict[str, Any] = {}
    for name, one in known.items():
        found = one.interval(size)
        row[name] = {"mean": found.estimate, "ci_low": found.low, "ci_high": found.high}
        if baseline in known and name != baseline:
            gain = difference(one, known[baseline], size)
            row[name]["against_baseline"] = {"difference": gain.estimate, "ci_low": gain.low, "ci_high": gain.high}
    return row
