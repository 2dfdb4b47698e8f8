"""What a sweep says: cells.parquet, summary.json, sample_efficiency.png, report.md and report.html."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import write_json, written
from guardkit.data.datamodule import TestSet
from guardkit.efficiency import pages, plots
from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.curves import METRICS, Curve, Scores, Yardstick, compare, curves, difference, samples_to_target
from guardkit.efficiency.results import TABLE, FinishedCell, write_table
from guardkit.metrics import operating_points
from guardkit.module import choose_threshold
from guardkit.schema import InputError
from guardkit.stats import GroupDraws

SUMMARY, PICTURE = "summary.json", "sample_efficiency.png"


@dataclass(frozen=True)
class Plan:
    """What is compared, and how it is measured.

    Attributes:
        arms, heads, sizes, seeds: the axes of the sweep.
        baseline: the arm that others are compared with.
        metric: one of `guardkit.efficiency.curves.METRICS`.
        target_sizes: targets are the baseline's scores at these sizes.
        target_scores: and these.
        table_size: size of the tables by category.
        threshold: a number in [0, 1], or the name of an operating point of each cell's validation images.
        n_resamples, draw_seed: of the redraws behind the intervals.
    """

    arms: tuple[str, ...]
    heads: tuple[str, ...]
    baseline: str
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    metric: str
    target_sizes: tuple[int, ...]
    target_scores: tuple[float, ...]
    table_size: int
    threshold: float | str
    n_resamples: int
    draw_seed: int

    def check(self, test: TestSet) -> None:
        """Raises InputError where the metric is undefined on the test set, or the threshold is no number in [0, 1]."""
        if not isinstance(self.threshold, str):
            choose_threshold(self.threshold, {})
        reason = Yardstick(self.metric, test, GroupDraws([0], n_resamples=1)).reason_against()
        if reason:
            fits = [name for name in METRICS if Yardstick(name, test, GroupDraws([0], n_resamples=1)).reason_against() is None]
            instead = f"choose sweep.metric from {', '.join(fits)}" if fits else "give a source with test images of both labels"
            raise InputError(f"sweep.metric={self.metric} is undefined: {reason} (pairs made by {test.pairs_made_by}); {instead}")

    def curve_of(self, cell: Cell) -> str:
        """The name of the curve that a cell belongs to."""
        return cell.arm if len(self.heads) == 1 else f"{cell.arm}/{cell.head}"

    def curves_of(self, head: str) -> list[str]:
        """The names of all curves of a head, in the order of the arms."""
        return [self.curve_of(Cell(arm, head, 0, 0)) for arm in self.arms]


def write_report(
    folder: Path,
    plan: Plan,
    cells: Sequence[Cell],
    finished: Mapping[Cell, FinishedCell],
    failed: Mapping[Cell, str],
    stock: Stock,
    strengths: Sequence[float],
    engine: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
    """Measures finished cells and writes everything but the cells themselves.

    Returns:
        The figures of summary.json, and a short table to print.
    """
    test = stock.test
    draws = GroupDraws([record.group for record in test.records], n_resamples=plan.n_resamples, seed=plan.draw_seed)
    scores, unmeasured = _scores(plan, finished)
    failed = {**failed, **unmeasured}
    yardstick = Yardstick(plan.metric, test, draws)
    known = _curves(plan, yardstick, scores)
    sources = np.array([record.source for record in test.records])
    by_source = {str(name): _curves(plan, Yardstick(plan.metric, test, draws, sources == name), scores) for name in sorted(set(sources))}
    summary: dict[str, Any] = {
        "arms": [name for head in plan.heads for name in plan.curves_of(head)],
        "sizes": list(plan.sizes),
        "seeds": list(plan.seeds),
        "metric": plan.metric,
        "baseline": plan.baseline,
        "n_test": {"units": yardstick.n, "groups": len({record.group for record in test.records}), "pairs_made_by": test.pairs_made_by},
        "curves": _points(plan, known, failed),
        "samples_to_target": _targets(plan, known),
        "tests": _tests(plan, known),
        "by_source": {
            name: {
                "in_training": name in stock.train_sources,
                "curves": _points(plan, mine, failed),
                "samples_to_target": _targets(plan, mine),
            }
            for name, mine in by_source.items()
        },
        "by_category": _by_category(plan, test, draws, scores),
        "cost": _cost(plan, finished, stock),
        "chosen_strengths": _chosen(plan, finished, strengths),
        "left_out": _left_out(plan, failed),
        "threshold": plan.threshold,
        "n_resamples": plan.n_resamples,
        "engine": dict(engine),
    }
    write_table(folder / TABLE, cells, finished, failed, strengths, _figures(test, scores))
    write_json(folder / SUMMARY, summary)
    with written(folder / PICTURE) as temporary:
        plots.sample_efficiency(summary, temporary)
    text = pages.markdown(summary, PICTURE)
    with written(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    picture = "data:image/png;base64," + base64.b64encode((folder / PICTURE).read_bytes()).decode()
    with written(folder / "report.html") as temporary:
        temporary.write_text(pages.page(summary, picture), encoding="utf-8")
    return summary, pages.short_table(summary)


def _scores(plan: Plan, finished: Mapping[Cell, FinishedCell]) -> tuple[dict[Cell, Scores], dict[Cell, str]]:
    """Test logits with the threshold of each cell; reasons where its validation images give none."""
    scores, reasons = {}, {}
    for cell, one in finished.items():
        fitted = one.fitted
        points = {}
        if isinstance(plan.threshold, str):
            points = operating_points(
                fitted.validation_labels, 1 / (1 + np.exp(-np.clip(fitted.validation_logits.astype(float), -700, 700)))
            )
            if not points:
                reasons[cell] = f"threshold={plan.threshold} needs validation images of both labels"
                continue
        share = choose_threshold(plan.threshold, points)
        logit = -math.inf if share <= 0 else math.inf if share >= 1 else math.log(share / (1 - share))
        scores[cell] = Scores(fitted.logits, fitted.twin_logits, logit)
    return scores, reasons


def _curves(plan: Plan, yardstick: Yardstick, scores: Mapping[Cell, Scores]) -> dict[str, Curve]:
    found = curves(yardstick, {(plan.curve_of(cell), cell.n_unsafe, cell.seed): one for cell, one in scores.items()})
    return {name: found[name] for head in plan.heads for name in plan.curves_of(head) if name in found}


def _points(plan: Plan, known: Mapping[str, Curve], failed: Mapping[Cell, str]) -> dict[str, dict[str, dict[str, Any]]]:
    reasons = {(plan.curve_of(cell), cell.n_unsafe): reason for cell, reason in failed.items()}
    points: dict[str, dict[str, dict[str, Any]]] = {}
    for head in plan.heads:
        for name in plan.curves_of(head):
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


def _per_head(plan: Plan, known: Mapping[str, Curve]) -> list[tuple[str, dict[str, Curve]]]:
    """The baseline's name and the curves of each head."""
    return [
        (plan.curve_of(Cell(plan.baseline, head, 0, 0)), {name: known[name] for name in plan.curves_of(head) if name in known})
        for head in plan.heads
    ]


def _targets(plan: Plan, known: Mapping[str, Curve]) -> list[dict[str, Any]]:
    rows = [samples_to_target(mine, baseline, plan.target_sizes, plan.target_scores) for baseline, mine in _per_head(plan, known)]
    return [row for part in rows for row in part]


def _tests(plan: Plan, known: Mapping[str, Curve]) -> dict[str, list[dict[str, Any]]]:
    found = [compare(mine, baseline) for baseline, mine in _per_head(plan, known)]
    return {name: [row for part in found for row in part[name]] for name in ("by_size", "overall")}


def _by_category(plan: Plan, test: TestSet, draws: GroupDraws, scores: Mapping[Cell, Scores]) -> dict[str, Any]:
    """Metric and difference to the baseline, category by category, at one size."""
    here = {cell: one for cell, one in scores.items() if cell.n_unsafe == plan.table_size}
    categories = np.array([record.category or "" if record.label else "" for record in test.records])
    labels = np.array([record.label for record in test.records])
    table: dict[str, Any] = {}
    for category in sorted(set(categories) - {""}):
        # as `guardkit.metrics.by_category`: its unsafe images against all safe ones
        yardstick = Yardstick(plan.metric, test, draws, (categories == category) | (labels == 0))
        row: dict[str, Any] = {}
        for baseline, mine in _per_head(plan, _curves(plan, yardstick, here)):
            for name, one in mine.items():
                found = one.interval(plan.table_size)
                row[name] = {"mean": found.estimate, "ci_low": found.low, "ci_high": found.high}
                if baseline in mine and name != baseline:
                    gain = difference(one, mine[baseline], plan.table_size)
                    row[name]["against_baseline"] = {"difference": gain.estimate, "ci_low": gain.low, "ci_high": gain.high}
        table[str(category)] = row
    return {"size": plan.table_size, "categories": table}


def _cost(plan: Plan, finished: Mapping[Cell, FinishedCell], stock: Stock) -> dict[str, Any]:
    """Labels, edits and seconds by arm and size: means over seeds."""
    table: dict[str, Any] = {}
    for head in plan.heads:
        for arm, name in zip(plan.arms, plan.curves_of(head), strict=True):
            sizes = {}
            for size in plan.sizes:
                mine = [one for cell, one in finished.items() if (cell.arm, cell.head, cell.n_unsafe) == (arm, head, size)]
                if mine:
                    sizes[str(size)] = {
                        "labels_unsafe": size,
                        "labels_safe": float(np.mean([one.n_safe for one in mine])),
                        "edits_requested": float(np.mean([one.n_requested for one in mine])),
                        "edits_accepted": float(np.mean([one.n_accepted for one in mine])),
                        "fit_seconds": float(np.mean([one.fitted.seconds for one in mine])),
                    }
            table[name] = {"sizes": sizes, "seconds_for_edits_now": stock.edit_counts[arm].seconds}
    return table


def _chosen(plan: Plan, finished: Mapping[Cell, FinishedCell], strengths: Sequence[float]) -> dict[str, dict[str, int]]:
    """How often each strength was chosen, by curve: a grid that is chosen at its ends is too narrow."""
    counts: dict[str, dict[str, int]] = {}
    for cell, one in finished.items():
        mine = counts.setdefault(plan.curve_of(cell), {f"{value:g}": 0 for value in strengths})
        mine[f"{strengths[one.fitted.chosen]:g}"] += 1
    return counts


def _left_out(plan: Plan, failed: Mapping[Cell, str]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, int, str], list[int]] = {}
    for cell, reason in failed.items():
        rows.setdefault((plan.curve_of(cell), cell.n_unsafe, reason), []).append(cell.seed)
    return [{"arm": arm, "size": size, "seeds": seeds, "reason": reason} for (arm, size, reason), seeds in rows.items()]


def _figures(test: TestSet, scores: Mapping[Cell, Scores]) -> dict[Cell, dict[str, float | None]]:
    """Every metric of every cell."""
    figures: dict[Cell, dict[str, float | None]] = {cell: {} for cell in scores}
    nothing = GroupDraws([record.group for record in test.records], n_resamples=0)
    for metric in METRICS:
        values = Yardstick(metric, test, nothing).values(list(scores.values()))
        for cell, value in zip(scores, values, strict=True):
            figures[cell][metric] = None if np.isnan(value) else float(value)
            figures[cell]["threshold_logit"] = scores[cell].threshold
    return figures
