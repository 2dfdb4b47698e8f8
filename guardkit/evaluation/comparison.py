"""An old guard and a new one on the same images, which neither has seen: what the new one wins and loses, by category, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from guardkit.classifier import GuardClassifier
from guardkit.metrics.draws import GroupDraws
from guardkit.metrics.figures import Images, weighted
from guardkit.metrics.intervals import percentile_interval
from guardkit.schema import SAFE, UNSAFE, Decision, Record

ALL = "all"
_FIGURES = ("auroc", "recall", "fpr", "precision_at_prevalence")
_AT = {"flagged": "review", "blocked": "block"}
_BETTER = {"auroc": 1, "recall": 1, "precision_at_prevalence": 1, "fpr": -1}


@dataclass(frozen=True)
class Change:
    """An image that the two guards decide differently about, counting reviewed and blocked as flagged.

    Attributes:
        record: the image.
        old, new: what they said.
        is_win: the new one is right.
    """

    record: Record
    old: Decision
    new: Decision
    is_win: bool


def compared(
    old: GuardClassifier,
    new: GuardClassifier,
    records: Sequence[Record],
    decisions: Sequence[Sequence[Decision]],
    *,
    prevalence: float,
    n_resamples: int,
    seed: int,
) -> tuple[list[dict[str, Any]], list[Change]]:
    """Figures of both, their differences, and the images that they decide differently about.

    Differences are taken on the same redrawn test sets, whole groups at a time.

    Args:
        old, new: the guards.
        records: labelled images that neither was trained on.
        decisions: of the old guard, and of the new one.
        prevalence: share of unsafe images to state precision for.
        n_resamples, seed: of the bootstrap.
    Returns:
        Rows: part ("all" or a category), at ("flagged" or "blocked"), metric, n, old, new, difference (new - old), its 95 % interval, and verdict ("better", "worse",
        "open": the interval reaches 0). And the changes, those first that a user has to know of.
    """
    labels = np.array([record.label for record in records], int)
    categories = np.array([record.category or "" for record in records])
    scores = np.array([[one.score for one in mine] for mine in decisions])
    thresholds = {name: [getattr(guard.thresholds.decision, at) for guard in (old, new)] for name, at in _AT.items()}
    draws = GroupDraws([record.group for record in records], n_resamples=n_resamples, seed=seed)
    parts = {ALL: np.arange(len(records))}
    for name in dict.fromkeys((*old.policy.category_names, *new.policy.category_names)):
        mine = np.flatnonzero((labels == SAFE) | (categories == name))
        if (labels[mine] == UNSAFE).any():
            parts[name] = mine
    rows = []
    for part, chosen in parts.items():
        for at, both in thresholds.items():
            if at == "blocked" and both == thresholds["flagged"]:
                continue
            names = (
                _FIGURES
                if part == ALL and at == "flagged"
                else [name for name in _FIGURES if name != "auroc"]
                if part == ALL
                else ["recall"]
            )
            images = Images(labels[chosen], scores[:, chosen], np.array(both), draws, chosen, prevalence)
            found = weighted(names, images)
            rows += [_row(part, at, name, values, labels[chosen]) for name, values in found.items()]
    return rows, _changes(records, decisions)


def _row(part: str, at: str, metric: str, values: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    difference = values[1] - values[0]
    interval = percentile_interval(difference[1:], float(difference[0]))
    old, new, estimate, low, high = (
        None if not np.isfinite(one) else float(one) for one in (values[0][0], values[1][0], interval.estimate, interval.low, interval.high)
    )
    if low == high:
        low = high = None  # of a few images that both decide alike, every redraw is the same: that is no certainty
    verdict = "open"
    if low is not None and high is not None and (low > 0 or high < 0):
        verdict = "better" if (low > 0) == (_BETTER[metric] > 0) else "worse"
    n = {"recall": int((labels == UNSAFE).sum()), "fpr": int((labels == SAFE).sum())}.get(metric, len(labels))
    return {
        "part": part,
        "at": at,
        "metric": metric,
        "n": n,
        "old": old,
        "new": new,
        "difference": estimate,
        "ci": [low, high],
        "verdict": verdict,
    }


def _changes(records: Sequence[Record], decisions: Sequence[Sequence[Decision]]) -> list[Change]:
    found = []
    for record, old, new in zip(records, *decisions, strict=True):
        said = [one.action != "allow" for one in (old, new)]
        if said[0] != said[1]:
            found.append(Change(record, old, new, is_win=said[1] == (record.label == UNSAFE)))
    # misses that are new go first, then alarms that are new, then what was won
    found.sort(key=lambda one: (one.is_win, one.record.label == SAFE, -abs(one.new.score - one.old.score)))
    return found


def flips(changes: Sequence[Change]) -> dict[str, Any]:
    """How many images each guard alone decides rightly, of unsafe and of safe ones, and how sure that is no chance (McNemar's exact test)."""
    found: dict[str, Any] = {}
    for name, label in (("unsafe", UNSAFE), ("safe", SAFE)):
        won = sum(one.is_win for one in changes if one.record.label == label)
        lost = sum(not one.is_win for one in changes if one.record.label == label)
        found[name] = {"won": won, "lost": lost, "p": float(binomtest(won, won + lost).pvalue) if won + lost else None}
    return found


def sentence(rows: Sequence[Mapping[str, Any]], old: str, new: str) -> str:
    """What a reader should take away."""
    said = {verdict: [_named(row) for row in rows if row["verdict"] == verdict] for verdict in ("better", "worse")}
    if not said["better"] and not said["worse"]:
        return f"As far as these images tell, {new} is neither better nor worse than {old}: every interval reaches 0."
    parts = [f"{verdict} in {', '.join(names)}" for verdict, names in said.items() if names]
    return f"{new} is {' and '.join(parts)}; elsewhere the intervals reach 0. Each interval is for itself: of twenty, one misses by chance."


def _named(row: Mapping[str, Any]) -> str:
    metric = {"fpr": "false-positive rate", "auroc": "AUROC", "precision_at_prevalence": "precision"}.get(row["metric"], row["metric"])
    where = "" if row["part"] == ALL else f" of {row['part']}"
    return f"{metric}{where}" + (f" ({row['at']})" if row["metric"] != "auroc" else "")
