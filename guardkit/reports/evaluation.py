"""What an evaluation says: effectiveness.parquet, predictions.parquet, summary.json, report.md, report.html, a short table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit import __version__
from guardkit.artifacts import write_json, write_table, written
from guardkit.data.columns import listing
from guardkit.evaluation.costs import cost
from guardkit.evaluation.effectiveness import uncovered_categories
from guardkit.evaluation.outcome import Evaluation, plain, shown
from guardkit.evaluation.scoring import Sheet
from guardkit.metrics.figures import OF_IMAGES, OF_PAIRS, always_unsafe_f1
from guardkit.reports.evaluation_page import html, markdown
from guardkit.schema import takes_embeddings

_TEXT, _SHARE, _COUNT = pa.string(), pa.float64(), pa.int64()
EFFECTIVENESS = pa.schema(
    {
        "classifier": _TEXT, "part": _TEXT, "metric": _TEXT, "value": _SHARE, "ci_low": _SHARE, "ci_high": _SHARE,
        "n": _COUNT, "n_unsafe": _COUNT, "n_abstained": _COUNT, "threshold": pa.float64(), "point": _TEXT,
        "scope": _TEXT, "negatives": _TEXT, "category": _TEXT, "source": _TEXT, "distribution": _TEXT,
        "similarity_low": pa.float64(), "similarity_high": pa.float64(), "reason": _TEXT,
    }
)  # fmt: skip
"""One row a figure; what cannot be computed is null, with the reason."""


def write_tables(folder: Path, evaluation: Evaluation) -> None:
    """effectiveness.parquet and predictions.parquet."""
    write_table(folder / "effectiveness.parquet", pa.Table.from_pylist(evaluation.rows, schema=EFFECTIVENESS))
    write_table(folder / "predictions.parquet", pa.table(prediction_columns(evaluation.sheet)))


def prediction_columns(sheet: Sheet) -> dict[str, pa.Array]:
    """The columns of predictions.parquet, a row an image and classifier."""
    names = [contender.name for contender in sheet.contenders]
    n, k = len(sheet.records), len(names)
    return {
        "id": pa.array([record.id for record in sheet.records for _ in names], pa.string()),
        "label": pa.array(np.repeat(sheet.labels, k), pa.int8()),
        "category": pa.array([record.category for record in sheet.records for _ in names], pa.string()),
        "source": pa.array([record.source for record in sheet.records for _ in names], pa.string()),
        "group": pa.array([record.group for record in sheet.records for _ in names], pa.string()),
        "is_counterfactual": pa.array(np.repeat(np.arange(n) >= sheet.n_natural, k)),
        "classifier": pa.array(names * n, pa.string()),
        "score": pa.array(sheet.scores.ravel(), pa.float64(), mask=np.isnan(sheet.scores.ravel())),
        "threshold": pa.array([contender.guard.threshold for contender in sheet.contenders] * n, pa.float64()),
        "abstained": pa.array([sheet.reasons[column].get(row) for row in range(n) for column in range(k)], pa.string()),
    }


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The figures for machines: summary.json."""
    sheet, benchmark = evaluation.sheet, evaluation.benchmark
    labels = sheet.labels[sheet.counted]
    return {
        "benchmark": {
            "name": benchmark.name,
            "chosen": benchmark.chosen,
            "policy": evaluation.policy.name,
            "given": benchmark.given,
            "scored": sheet.n_natural,
            "n_seen_left_out": benchmark.n_left_out,
            **listing(benchmark.rejected, sheet.rejected),
            "n": len(labels),
            "n_unsafe": int((labels == 1).sum()),
            "n_safe": int((labels == 0).sum()),
            "safe_images_are_counterfactuals": benchmark.counterfactuals_are_the_safe_images,
            "n_pairs": len(sheet.pair_rows),
            "similarity_by": sheet.similarity_by,
            "sources": evaluation.sources,
            "categories_nobody_covers": uncovered_categories(sheet),
        },
        "notes": list(evaluation.notes),
        "prevalence": evaluation.prevalence,
        "always_unsafe": {"f1": always_unsafe_f1(labels)},
        "classifiers": {one.name: _classifier_summary(evaluation, column) for column, one in enumerate(sheet.contenders)},
        "tests": evaluation.tests,
        "robustness": [
            {key: row[key] for key in ("guard", "protocol", "attack", "strength", "unit", "n", "robust_accuracy", "note", "violation")}
            for row in evaluation.robustness
        ],
        "passes": sheet.counts,
        "timing_s": dict(evaluation.timing_s),
        "command": evaluation.command,
        "settings": evaluation.settings,
        "guardkit_version": __version__,
    }


def _classifier_summary(evaluation: Evaluation, column: int) -> dict[str, Any]:
    contender, sheet = evaluation.contenders[column], evaluation.sheet
    guard, seen = contender.guard, evaluation.seen.get(contender.name)

    def figures(metrics: Sequence[str], **cut: Any) -> dict[str, Any]:
        found = {metric: evaluation.figure(contender.name, metric, **cut) for metric in metrics}
        return {metric: {key: row[key] for key in ("value", "ci_low", "ci_high", "n", "reason")} for metric, row in found.items() if row}

    result = {
        "origin": contender.origin,
        "fingerprint": guard.fingerprint,
        "encoder": guard.encoder.name if takes_embeddings(guard) else None,
        "covers": sorted(guard.covers) if guard.covers is not None else None,
        "threshold": float(guard.threshold),
        "points": {name: float(value) for name, value in contender.points.items()},
        "trained_on": sorted(contender.trained_on) if contender.trained_on is not None else None,
        "policy": {"name": contender.policy.name, "digest": contender.policy.digest} if contender.policy is not None else None,
        # null: it brings no list of its training images
        "n_seen_left_out": seen.n if seen is not None else None,
        "seen_left_out_by": seen.by if seen is not None else None,
        "n_seen_unlabelled": seen.n_unlabelled if seen is not None else None,
        "n_abstained": len(sheet.reasons[column]),
        "abstentions": sheet.abstentions(column),
        "effectiveness": figures(OF_IMAGES),
        "by_source": {source: figures(OF_IMAGES, source=source) for source in evaluation.sources},
        "by_category": {
            category: figures(OF_IMAGES, category=category) | _unsafebench(figures(("f1",), category=category, negatives="same_category"))
            for category in sheet.categories
            if evaluation.figure(contender.name, "f1", category=category)
        },
        "pairs": figures(OF_PAIRS),
        "cost": cost(
            contender, sheet.own_seconds[column], sheet.encoder_seconds[guard.encoder.fingerprint] if takes_embeddings(guard) else None
        ),
    }
    if not evaluation.covers_all(contender):
        result["outside_its_coverage_too"] = {"effectiveness": figures(OF_IMAGES, scope="all"), "pairs": figures(OF_PAIRS, scope="all")}
    return result


def _unsafebench(figures: dict[str, Any]) -> dict[str, Any]:
    return {"f1_unsafebench": figures["f1"]} if figures else {}


def short_table(evaluation: Evaluation) -> str:
    """The main numbers, for the terminal."""
    columns = [("F1", "f1"), ("AUROC", "auroc"), ("recall", "recall"), ("FPR", "fpr"), ("pairs", "pair_accuracy")]
    sheet = evaluation.sheet
    width = max(len(one.name) for one in evaluation.contenders)
    lines = [
        f"{evaluation.benchmark.name}: {int(sheet.counted.sum())} images, {int((sheet.labels[sheet.counted] == 1).sum())} unsafe, "
        f"{len(sheet.pair_rows)} pairs ({evaluation.benchmark.chosen})",
        f"  {'':<{width}}  " + "  ".join(f"{title:>6}" for title, _ in columns) + "  abstained",
    ]
    for column, one in enumerate(evaluation.contenders):
        # a classifier that covers nothing of the benchmark is shown on all of it, and marked
        scope = evaluation.scope(one)
        values = [evaluation.figure(one.name, metric, scope=scope) for _, metric in columns]
        mark = "" if scope == "covered" else "  outside what it covers"
        lines.append(
            f"  {one.name:<{width}}  " + "  ".join(f"{shown(row):>6}" for row in values) + f"  {len(sheet.reasons[column]):>9}{mark}"
        )
    lines += [f"  {note}" for note in evaluation.notes]
    lines.append(f"  F1 of flagging everything: {plain(always_unsafe_f1(sheet.labels[sheet.counted]))}")
    return "\n".join(lines)


def write_report(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Everything but robustness.parquet. summary.json comes last.

    Returns:
        The content of summary.json.
    """
    write_tables(folder, evaluation)
    facts = summary(evaluation)
    for name, text in (("report.html", html(evaluation, facts)), ("report.md", markdown(evaluation, facts))):
        with written(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # it shows paths, which may be no text
    write_json(folder / "summary.json", facts)
    return facts
