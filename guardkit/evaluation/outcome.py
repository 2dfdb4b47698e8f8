"""Everything one evaluation found, for all that tells of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from guardkit.data.by_policy import Verdict
from guardkit.evaluation.benchmark import Benchmark
from guardkit.evaluation.effectiveness import Row
from guardkit.evaluation.held_out import Seen
from guardkit.evaluation.policies import Compliance, Entrant
from guardkit.evaluation.scoring import Contender, Sheet
from guardkit.metrics.figures import METRICS
from guardkit.policy import Policy

TITLES = {name: metric.heading for name, metric in METRICS.items()}


@dataclass(frozen=True)
class Evaluation:
    """Everything one evaluation found.

    Attributes:
        benchmark, policy: what was measured on, and under which rules.
        sheet: the scores.
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
            "negatives": "counterfactuals" if METRICS[metric].of == "pairs" else "all_safe",
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


@dataclass(frozen=True)
class PolicyEvaluation:
    """Everything one evaluation under several policies found.

    Attributes:
        benchmark: what was measured on.
        policies: the first is the one that exceptions are exceptions to.
        entrants: what was measured.
        sheet: the scores of all of them.
        found: the figures.
        verdicts: by policy, what it says of each image.
        seen, notes, prevalence, settings, command, timing_s: as of `Evaluation`.
    """

    benchmark: Benchmark
    policies: list[Policy]
    entrants: list[Entrant]
    sheet: Sheet
    found: Compliance
    verdicts: Mapping[str, Mapping[str, Verdict]]
    seen: Mapping[str, Seen]
    notes: Sequence[str]
    prevalence: float
    settings: Mapping[str, Any]
    command: str
    timing_s: Mapping[str, float]

    def under(self, policy: Policy) -> Evaluation:
        """The same under one policy alone."""
        rows = [row for row in self.found.rows if row["policy"] == policy.name]
        sheet, tests = self.found.sheets[policy.name], self.found.tests[policy.name]
        return Evaluation(self.benchmark, policy, sheet, rows, tests, [], self.prevalence, self.settings, self.command)


def shown(row: Row | None, digits: int = 3) -> str:
    """A figure's value, or a dash."""
    return "–" if row is None else plain(row["value"], digits)


def interval(row: Row | None) -> str:
    """A figure's interval, or nothing."""
    return "" if row is None or row["ci_low"] is None or row["ci_high"] is None else f"{row['ci_low']:.3f}–{row['ci_high']:.3f}"


def plain(value: float | None, digits: int = 3) -> str:
    """A number for a table, or a dash."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"
