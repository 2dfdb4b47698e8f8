"""What an evaluation says: effectiveness.parquet, predictions.parquet, summary.json, report.md, report.html, a short table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit import __version__
from guardkit.artifacts import write_json, written
from guardkit.evaluation.benchmark import Benchmark
from guardkit.evaluation.effectiveness import Row, Sheet, uncovered_categories
from guardkit.evaluation.held_out import Seen
from guardkit.evaluation.scoring import Contender, Scored
from guardkit.metrics.figures import METRICS, OF_IMAGES, OF_PAIRS, always_unsafe_f1
from guardkit.policy import Policy

TITLES = {name: metric.heading for name, metric in METRICS.items()}
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


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found.

    Attributes:
        benchmark, policy: what was measured on, and under which rules.
        scored, sheet: the scores.
        rows, tests: figures and tests of `effectiveness.measure`.
        robustness: rows of `robustness.measure_robustness`, of all classifiers.
        prevalence: share of unsafe images that precision is stated for.
        settings: that lead to the same evaluation again, plain JSON.
        command: the same as a line to type.
        seen: what guards with a list of their training images had seen of the benchmark.
        notes: what a reader must know before the figures, in sentences.
        timing_s: seconds by stage.
    """

    benchmark: Benchmark
    policy: Policy
    scored: Scored
    sheet: Sheet
    rows: list[Row]
    tests: list[Row]
    robustness: list[Row]
    prevalence: float
    settings: Mapping[str, Any]
    command: str
    seen: Mapping[str, Seen] = field(default_factory=dict)
    notes: Sequence[str] = ()
    timing_s: Mapping[str, float] = field(default_factory=dict)

    @property
    def contenders(self) -> list[Contender]:
        """In the order of all tables."""
        return self.sheet.contenders

    def figure(self, classifier: str, metric: str, **cut: Any) -> Row | None:
        """The row of one figure: of all images a classifier covers, unless `cut` says otherwise. None: there is none."""
        wanted = {
            "part": METRICS[metric].of,
            "negatives": "twins" if METRICS[metric].of == "pairs" else "all_safe",
            "scope": "covered",
            "point": None,
            "category": None,
            "source": None,
            "similarity_low": None,
        } | cut
        wanted |= {"classifier": classifier, "metric": metric}
        if "source" not in cut and "distribution" not in cut:
            wanted["distribution"] = None
        return next(
            (row for row in self._index.get((classifier, metric), []) if all(row[key] == value for key, value in wanted.items())), None
        )

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[Row]]:
        index: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            index.setdefault((row["classifier"], row["metric"]), []).append(row)
        return index

    @property
    def sources(self) -> list[str]:
        """Of the images that were counted."""
        return sorted({record.source for record, counted in zip(self.sheet.records, self.sheet.counted, strict=True) if counted})

    def scope(self, contender: Contender) -> str:
        """The images to show a classifier on: what it covers, or all where it covers nothing of the benchmark."""
        recall = self.figure(contender.name, "recall")
        return "covered" if recall is not None and recall["value"] is not None else "all"

    def covers_all(self, contender: Contender) -> bool:
        """Whether the classifier covers every category of the policy."""
        covers = contender.guard.covers
        return covers is None or set(self.sheet.categories) <= covers


def write_tables(folder: Path, evaluation: Evaluation) -> None:
    """effectiveness.parquet and predictions.parquet."""
    with written(folder / "effectiveness.parquet") as temporary:
        pq.write_table(pa.Table.from_pylist(evaluation.rows, schema=EFFECTIVENESS), temporary)
    sheet, scored = evaluation.sheet, evaluation.scored
    with written(folder / "predictions.parquet") as temporary:
        names = [contender.name for contender in sheet.contenders]
        n, k = len(sheet.records), len(names)
        columns = {
            "id": pa.array([record.id for record in sheet.records for _ in names], pa.string()),
            "label": pa.array(np.repeat(sheet.labels, k), pa.int8()),
            "category": pa.array([record.category for record in sheet.records for _ in names], pa.string()),
            "source": pa.array([record.source for record in sheet.records for _ in names], pa.string()),
            "group": pa.array([record.group for record in sheet.records for _ in names], pa.string()),
            "is_counterfactual": pa.array(np.repeat(np.arange(n) >= sheet.n_natural, k)),
            "classifier": pa.array(names * n, pa.string()),
            "score": pa.array(sheet.scores.ravel(), pa.float64(), mask=np.isnan(sheet.scores.ravel())),
            "threshold": pa.array([contender.guard.threshold for contender in sheet.contenders] * n, pa.float64()),
            "abstained": pa.array([scored.reasons[column].get(row) for row in range(n) for column in range(k)], pa.string()),
        }
        pq.write_table(pa.table(columns), temporary)


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """The figures for machines: summary.json."""
    sheet, benchmark, scored = evaluation.sheet, evaluation.benchmark, evaluation.scored
    labels = sheet.labels[sheet.counted]
    return {
        "benchmark": {
            "name": benchmark.name,
            "chosen": benchmark.chosen,
            "policy": evaluation.policy.name,
            "given": benchmark.given,
            "scored": sheet.n_natural,
            "n_seen_left_out": benchmark.n_left_out,
            "rejected": [{"id": one.id, "reason": one.reason} for one in [*benchmark.rejected, *scored.rejected]],
            "n": len(labels),
            "n_unsafe": int((labels == 1).sum()),
            "n_safe": int((labels == 0).sum()),
            "safe_images_are_counterfactuals": benchmark.twins_are_the_safe_images,
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
        "passes": scored.counts,
        "timing_s": dict(evaluation.timing_s),
        "command": evaluation.command,
        "settings": evaluation.settings,
        "guardkit_version": __version__,
    }


def _classifier_summary(evaluation: Evaluation, column: int) -> dict[str, Any]:
    contender, scored = evaluation.contenders[column], evaluation.scored
    guard, seen = contender.guard, evaluation.seen.get(contender.name)

    def figures(metrics: Sequence[str], **cut: Any) -> dict[str, Any]:
        found = {metric: evaluation.figure(contender.name, metric, **cut) for metric in metrics}
        return {metric: {key: row[key] for key in ("value", "ci_low", "ci_high", "n", "reason")} for metric, row in found.items() if row}

    result = {
        "origin": contender.origin,
        "fingerprint": guard.fingerprint,
        "encoder": guard.encoder.name if guard.encoder is not None else None,
        "covers": sorted(guard.covers) if guard.covers is not None else None,
        "threshold": float(guard.threshold),
        "points": {name: float(value) for name, value in contender.points.items()},
        "trained_on": sorted(contender.trained_on) if contender.trained_on is not None else None,
        "policy": {"name": contender.policy.name, "digest": contender.policy.digest} if contender.policy is not None else None,
        # null: it brings no list of its training images
        "n_seen_left_out": seen.n if seen is not None else None,
        "seen_left_out_by": seen.by if seen is not None else None,
        "n_seen_unlabelled": seen.n_unlabelled if seen is not None else None,
        "n_abstained": len(scored.reasons[column]),
        "abstentions": scored.abstentions(column),
        "effectiveness": figures(OF_IMAGES),
        "by_source": {source: figures(OF_IMAGES, source=source) for source in evaluation.sources},
        "by_category": {
            category: figures(OF_IMAGES, category=category) | _unsafebench(figures(("f1",), category=category, negatives="same_category"))
            for category in evaluation.sheet.categories
            if evaluation.figure(contender.name, "f1", category=category)
        },
        "pairs": figures(OF_PAIRS),
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
            f"  {one.name:<{width}}  "
            + "  ".join(f"{shown(row):>6}" for row in values)
            + f"  {len(evaluation.scored.reasons[column]):>9}{mark}"
        )
    lines += [f"  {note}" for note in evaluation.notes]
    lines.append(f"  F1 of flagging everything: {_number(always_unsafe_f1(sheet.labels[sheet.counted]))}")
    return "\n".join(lines)


def shown(row: Row | None, digits: int = 3) -> str:
    """A figure's value, or a dash."""
    return "–" if row is None else _number(row["value"], digits)


def interval(row: Row | None) -> str:
    """A figure's interval, or nothing."""
    return "" if row is None or row["ci_low"] is None or row["ci_high"] is None else f"{row['ci_low']:.3f}–{row['ci_high']:.3f}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def write_report(folder: Path, evaluation: Evaluation) -> dict[str, Any]:
    """Everything but robustness.parquet. summary.json comes last.

    Returns:
        The content of summary.json.
    """
    from guardkit.evaluation.report_page import html, markdown

    write_tables(folder, evaluation)
    facts = summary(evaluation)
    for name, text in (("report.html", html(evaluation, facts)), ("report.md", markdown(evaluation, facts))):
        with written(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    write_json(folder / "summary.json", facts)
    return facts
