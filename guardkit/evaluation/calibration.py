"""Thresholds with a promise and scores that are probabilities, for one guard, from labelled images that it was not trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from guardkit.checks import check_flag, check_number
from guardkit.classifier import GuardClassifier
from guardkit.metrics.calibrators import Fitted, fit_score_map
from guardkit.metrics.intervals import clopper_pearson
from guardkit.metrics.promises import Promise, promise_fpr, promise_queue, promise_recall
from guardkit.schema import SAFE, UNSAFE, InputError, Record
from guardkit.score_maps import Calibration, ScoreMap
from guardkit.thresholds import Band, Thresholds

DECISION = "decision"
SCORES = "scores.parquet"  # of the images that a guard was calibrated on
_USUAL_PREVALENCE = 0.5  # that heads are trained for: of the decision unless somebody says otherwise, of categories always


@dataclass(frozen=True)
class Asked:
    """What thresholds shall promise. What nobody asks for is not promised.

    Attributes:
        max_fpr: at most this share of safe images is blocked, in (0, 1).
        min_recall: at least this share of unsafe images is blocked or reviewed, in (0, 1).
        queue_per_day: at most so many images a day are reviewed.
        volume_per_day: images in a day; needed for that.
        prevalence: share of unsafe images among those the guard will see, in (0, 1).
        confidence: that a promise holds, each by itself, in (0, 1).
        by_category: promise the same shares of each category's own thresholds.
    Raises:
        InputError: a value out of range, nothing is asked for, or things that do not fit each other.
    """

    max_fpr: float | None = None
    min_recall: float | None = None
    queue_per_day: float | None = None
    volume_per_day: float | None = None
    prevalence: float = 0.01
    confidence: float = 0.9
    by_category: bool = True

    def __post_init__(self) -> None:
        for name in ("max_fpr", "min_recall"):
            check_number(name, getattr(self, name), "(0, 1)", optional=True)
        for name in ("queue_per_day", "volume_per_day"):
            check_number(name, getattr(self, name), "(0, inf)", optional=True)
        for name in ("prevalence", "confidence"):
            check_number(name, getattr(self, name), "(0, 1)")
        check_flag("by_category", self.by_category)
        if self.max_fpr is None and self.min_recall is None and self.queue_per_day is None:
            raise InputError(
                "no promise is asked for; give max_fpr=0.01 (at most 1 % of safe images blocked), min_recall=0.9 (at least 90 % of unsafe ones "
                "found), or max_fpr with queue_per_day=200 volume_per_day=100000 (a queue that people can look through)"
            )
        if self.queue_per_day is not None:
            if self.volume_per_day is None or self.max_fpr is None:
                raise InputError(
                    "queue_per_day needs volume_per_day, how many images there are in a day, and max_fpr, above which images are blocked"
                )
            if self.min_recall is not None:
                raise InputError("min_recall and queue_per_day both choose from where on images are reviewed; give one of them")
            if self.queue_per_day >= self.volume_per_day:
                raise InputError(f"queue_per_day must be below volume_per_day, got {self.queue_per_day:g} and {self.volume_per_day:g}")


@dataclass(frozen=True)
class Column:
    """What calibration found for the decision, or for a category.

    Attributes:
        name: "decision", or the category.
        fitted: the map of its logits.
        promises: those that were asked for, kept or not.
        band: its thresholds from now on.
        before: those of the guard, as numbers of the new scores.
        n_safe, n_unsafe: images, each of another group; unsafe ones of the category.
        safe, unsafe: their new scores.
        figures: what the thresholds do on these very images, plain JSON.
    """

    name: str
    fitted: Fitted
    promises: tuple[Promise, ...]
    band: Band
    before: Band
    n_safe: int
    n_unsafe: int
    safe: np.ndarray
    unsafe: np.ndarray
    figures: Mapping[str, Any]


def calibrated(
    guard: GuardClassifier, records: Sequence[Record], embeddings: np.ndarray, asked: Asked, *, about: Mapping[str, Any]
) -> tuple[GuardClassifier, list[Column]]:
    """A guard with new thresholds, and scores that are probabilities.

    Promises are about images that are drawn one by one, so one image of each group is used.

    Args:
        guard: stays as it is.
        records: labelled images that it was not trained on.
        embeddings: (n, d) theirs.
        asked: what to promise.
        about: facts for the saved guard, plain JSON.
    Returns:
        The new guard, and what was found: the decision first, then each category.
    Raises:
        InputError: a class is missing, or a promise of the decision cannot be made of so few images.
    """
    rows = _one_of_each_group(records)
    labels = np.array([records[row].label for row in rows], int)
    categories = [records[row].category for row in rows]
    n_safe, n_unsafe = int((labels == SAFE).sum()), int((labels == UNSAFE).sum())
    if not n_safe or not n_unsafe:
        raise InputError(
            f"calibration needs safe and unsafe images, got {n_safe} safe and {n_unsafe} unsafe ones; give a source with both, or another split="
        )
    logits = guard.head_logits(embeddings[rows]).numpy()
    usual = guard.training.get("prevalence") or _USUAL_PREVALENCE
    fitted = fit_score_map(logits[:, 0], labels, trained_for=usual, prevalence=asked.prevalence)
    old, old_maps = (None, {}) if guard.calibration is None else (guard.calibration.decision, guard.calibration.categories)
    before = _moved_band(guard.thresholds.decision, old, fitted.map)
    decision = _column(DECISION, fitted, _scores(fitted, logits[:, 0]), labels, before, asked)
    broken = [promise.reason for promise in decision.promises if promise.threshold is None]
    if broken:
        raise InputError("; ".join(broken))
    columns, maps = [decision], {}
    for i, name in enumerate(guard.policy.category_names, 1):
        own = np.array([category == name for category in categories]) & (labels == UNSAFE)
        # unsafe images whose category nobody knows may be of this one
        known = (labels == SAFE) | np.array([category is not None for category in categories])
        share = max(int(own.sum()), 1) / max(int((known & (labels == UNSAFE)).sum()), 1)
        found = fit_score_map(logits[known, i], own[known].astype(int), trained_for=_USUAL_PREVALENCE, prevalence=asked.prevalence * share)
        maps[name] = found.map
        scores = _scores(found, logits[:, i])
        mine = own | (labels == SAFE)
        before = _moved_band(guard.thresholds.categories[name], old_maps.get(name), found.map)
        wanted = asked if asked.by_category else None
        columns.append(_column(name, found, scores[mine], own[mine].astype(int), before, wanted, others=scores[known & ~mine]))
    thresholds = Thresholds(decision.band, {column.name: column.band for column in columns[1:]})
    promised = [[sentence(promise, column.name) for promise in column.promises if promise.threshold is not None] for column in columns]
    made = copy.copy(guard)
    made.history = [
        *guard.history,
        {
            "thresholds": guard.thresholds.to_dict(),
            "calibration": None if guard.calibration is None else guard.calibration.to_dict(),
            "reason": f"calibrated for {', '.join(f'{name}={value}' for name, value in asdict(asked).items() if value is not None)}",
        },
    ]
    made.thresholds = thresholds
    made.calibration = Calibration(
        fitted.map,
        maps,
        {
            **about,
            "n_safe": n_safe,
            "n_unsafe": n_unsafe,
            "prevalence": asked.prevalence,
            "promises": promised[0],
            "promises_by_category": [one for each in promised[1:] for one in each],
        },
    )
    made.operating_points = {
        name: point | {"threshold": None if point["threshold"] is None else _moved(point["threshold"], old, fitted.map)}
        for name, point in guard.operating_points.items()
    }
    return made, columns


def scores_of(guard: GuardClassifier, records: Sequence[Record], embeddings: np.ndarray) -> dict[str, list[Any]]:
    """What a calibrated guard makes of the images that it was calibrated on: `label`, `category`, and `score` of the decision and of each category.

    Args:
        guard: as `calibrated` gave it.
        records, embeddings: as `calibrated` took them.
    Returns:
        Columns, a row for each image that was used.
    """
    rows = _one_of_each_group(records)
    scores = guard.probabilities(embeddings[rows])
    return {
        "label": [records[row].label for row in rows],
        "category": [records[row].category for row in rows],
        **{score_column(name): scores[:, i].tolist() for i, name in enumerate((DECISION, *guard.policy.category_names))},
    }


def score_column(name: str) -> str:
    """The column of `scores_of` that has the scores of the decision, or of a category."""
    return "score" if name == DECISION else f"score_{name}"


def sentence(promise: Promise, name: str) -> str:
    """What a promise says, for a reader."""
    of = "" if name == DECISION else f" of {name}"
    doubt = f"with {promise.confidence:.0%} confidence, from {promise.n} images"
    if promise.kind in ("max_fpr", "max_fpr_of_others"):
        done = "blocked" if name == DECISION else f"blocked for {name}"
        whom = "safe images" if promise.kind == "max_fpr" else "unsafe images of other categories"
        return f"at most {promise.target:.3g} of {whom} are {done} ({doubt})"
    if promise.kind == "min_recall":
        return f"at least {promise.target:.3g} of unsafe images{of} are reviewed or blocked ({doubt})"
    return f"at most {promise.target:g} images a day are reviewed ({doubt})"


def _column(
    name: str, fitted: Fitted, scores: np.ndarray, labels: np.ndarray, before: Band, asked: Asked | None, others: np.ndarray | None = None
) -> Column:
    safe, unsafe = scores[labels == SAFE], scores[labels == UNSAFE]
    promises: list[Promise] = []
    floor = 0.0
    if asked is not None and asked.max_fpr is not None:
        promises.append(promise_fpr(safe, asked.max_fpr, asked.confidence))
        if others is not None and len(others):
            # what violates another category is not to be taken for this one either
            of_others = promise_fpr(others, asked.max_fpr, asked.confidence)
            if of_others.threshold is not None:
                promises.append(replace(of_others, kind="max_fpr_of_others"))
            else:  # too few for a promise: the share is kept on these images
                floor = math.nextafter(float(np.quantile(others, 1 - asked.max_fpr, method="higher")), 2.0)
    if asked is not None and asked.min_recall is not None:
        promises.append(promise_recall(unsafe, asked.min_recall, asked.confidence))
    found = {promise.kind: promise.threshold for promise in promises}
    floor = max(floor, found.pop("max_fpr_of_others", None) or 0.0)
    block = found.get("max_fpr")
    if block is not None:
        block = found["max_fpr"] = max(block, floor)
    if asked is not None and asked.queue_per_day is not None and block is not None and name == DECISION:
        assert asked.volume_per_day is not None
        promises.append(
            promise_queue(
                safe,
                unsafe,
                block,
                per_day=asked.queue_per_day,
                volume=asked.volume_per_day,
                prevalence=asked.prevalence,
                confidence=asked.confidence,
            )
        )
        found["queue_per_day"] = promises[-1].threshold
    kept = [value for value in found.values() if value is not None]
    band = Band(min(kept), kept[0]) if kept else before
    prevalence = asked.prevalence if asked is not None else 0.5
    return Column(
        name, fitted, tuple(promises), band, before, len(safe), len(unsafe), safe, unsafe, at_band(safe, unsafe, band, prevalence)
    )


def at_band(safe: np.ndarray, unsafe: np.ndarray, band: Band, prevalence: float) -> dict[str, Any]:
    """Shares of images at both thresholds of a band, with 95 % intervals, and precision at the prevalence; as calibration.json has them.

    Args:
        safe, unsafe: scores of both.
        band: the thresholds.
        prevalence: share of unsafe images among those the guard will see.
    """
    found: dict[str, Any] = {}
    for name, threshold in (("flagged", band.review), ("blocked", band.block)):
        for kind, scores in (("safe", safe), ("unsafe", unsafe)):
            n, hits = len(scores), int((scores >= threshold).sum())
            low, high = clopper_pearson(hits, n) if n else (None, None)
            found[f"{name}_of_{kind}"] = {"value": hits / n if n else None, "ci": [low, high], "n": n}
        found[f"precision_of_{name}"] = _precision(safe, unsafe, threshold, prevalence)
    return found


def _precision(safe: np.ndarray, unsafe: np.ndarray, threshold: float, prevalence: float) -> dict[str, Any]:
    """By Bayes' rule; from the ends of the intervals of both rates, so that the interval is a careful one, also where no image is flagged."""
    if not len(safe) or not len(unsafe):
        return {"value": None, "ci": [None, None]}

    def of(recall: float, fpr: float) -> float | None:
        found, alarms = recall * prevalence, fpr * (1 - prevalence)
        return found / (found + alarms) if found + alarms else None

    hits = [int((scores >= threshold).sum()) for scores in (unsafe, safe)]
    recall, fpr = (clopper_pearson(n, len(scores)) for n, scores in zip(hits, (unsafe, safe), strict=True))
    return {"value": of(hits[0] / len(unsafe), hits[1] / len(safe)), "ci": [of(recall[0], fpr[1]), of(recall[1], fpr[0])]}


def _moved(threshold: float, old: ScoreMap | None, new: ScoreMap) -> float:
    """A threshold of earlier scores among the new ones."""
    return new.of_score(threshold if old is None else old.inverse().of_score(threshold))


def _moved_band(band: Band, old: ScoreMap | None, new: ScoreMap) -> Band:
    review, block = (_moved(threshold, old, new) for threshold in (band.review, band.block))
    return Band(review, max(review, block))


def _one_of_each_group(records: Sequence[Record]) -> np.ndarray:
    """Rows of the first image of each label in each group: near-duplicates, or frames of a film, are no independent images."""
    first: dict[tuple[str, int], int] = {}
    for row, record in enumerate(records):
        first.setdefault((record.group, record.label), row)
    return np.array(sorted(first.values()), int)


def _scores(fitted: Fitted, logits: np.ndarray) -> np.ndarray:
    return torch.sigmoid(fitted.map(torch.from_numpy(logits))).numpy()
