"""What a sweep says: cells.parquet, summary.json, sample_efficiency.png, report.md and report.html."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardkit.artifacts import write_json, written
from guardkit.efficiency.cells import Cell, Stock
from guardkit.efficiency.curves import Curve, compare, difference, samples_to_target
from guardkit.efficiency.measure import FIGURES, Measured, Yardsticks, measure
from guardkit.efficiency.plan import Plan
from guardkit.efficiency.results import TABLE, CellStore, CellTable
from guardkit.reports import sweep_page as pages
from guardkit.reports import sweep_plots as plots

SUMMARY, PICTURE = "summary.json", "sample_efficiency.png"


def write_report(
    folder: Path,
    plan: Plan,
    store: CellStore,
    failed: Mapping[Cell, str],
    stock: Stock,
    strengths: Sequence[float],
    engine: Mapping[str, Any],
    notes: Sequence[str] = (),
) -> tuple[dict[str, Any], str]:
    """Measures finished cells and writes everything but the cells themselves.

    Args:
        folder: to write to.
        plan: what is compared, and how.
        store: the finished cells.
        failed: reasons by cell that could not be fitted.
        stock: what they were fitted to.
        strengths: of regularisation.
        engine: its name, and what else summary.json says of it beside the number of fits and their seconds.
        notes: what there was too little of, in sentences.
    Returns:
        The figures of summary.json, and a short table to print.
    """
    yardsticks = Yardsticks(plan, stock.test)
    summary: dict[str, Any] = {
        "arms": [name for head in plan.heads for name in plan.curves(head)],
        "heads": list(plan.heads),
        "sizes": list(plan.sizes),
        "seeds": list(plan.seeds),
        "metric": plan.metric,
        "baseline": plan.baseline,
        "n_test": {
            "units": yardsticks.overall.n,
            "groups": len({record.group for record in stock.test.records}),
            "pairs_made_by": stock.test.pairs_made_by,
        },
    }
    failed, n_cells, seconds = dict(failed), 0, 0.0
    with written(folder / TABLE) as temporary, CellTable(temporary, strengths, FIGURES) as table:
        for head in plan.heads:
            measured = measure(plan, head, store, failed, yardsticks, strengths, table)
            failed |= measured.failed
            n_cells, seconds = n_cells + measured.n_cells, seconds + measured.seconds
            summary = _joined(summary, _of_head(plan, head, measured, failed, stock))
    summary |= {
        "left_out": plan.left_out(failed),
        "notes": list(notes),
        "threshold": plan.threshold,
        "n_resamples": plan.n_resamples,
        "engine": {"name": engine["name"], "fits": n_cells * len(strengths), "seconds": seconds, **engine},
    }
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


def _joined(first: Any, second: Any) -> Any:
    """Tables key by key, lists one after the other; of anything else the second."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first | {key: _joined(first[key], value) if key in first else value for key, value in second.items()}
    return first + second if isinstance(first, list) and isinstance(second, list) else second


def _of_head(plan: Plan, head: str, measured: Measured, failed: Mapping[Cell, str], stock: Stock) -> dict[str, Any]:
    """The part of summary.json that is about one head; heads are not compared with each other."""
    baseline = plan.curve(plan.baseline, head)

    def about(known: Mapping[str, Curve]) -> dict[str, Any]:
        return {
            "curves": _points(plan, head, known, failed),
            "samples_to_target": samples_to_target(known, baseline, plan.target_sizes, plan.target_scores),
        }

    seconds = {plan.curve(arm, head): stock.edit_counts[arm].seconds for arm in plan.arms}
    return {
        **about(measured.curves),
        "tests": compare(measured.curves, baseline),
        "by_source": {name: {"in_training": name in stock.train_sources, **about(known)} for name, known in measured.by_source.items()},
        "by_category": {
            "size": plan.table_size,
            "categories": {name: _category(plan.table_size, known, baseline) for name, known in measured.by_category.items()},
        },
        # labels, edits and seconds: means over seeds
        "cost": {name: {"sizes": measured.cost.get(name, {}), "seconds_for_edits_now": seconds[name]} for name in plan.curves(head)},
        # a grid that is chosen at its ends is too narrow
        "chosen_strengths": measured.chosen,
    }


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
