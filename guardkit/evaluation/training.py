"""The figures of a training run: what metrics.json says of a guard on the test set of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from guardkit import __version__
from guardkit.classifier import GuardClassifier
from guardkit.data.columns import categories_of, labels_of, listing
from guardkit.data.controls import Control
from guardkit.data.datamodule import GuardDataModule, TestSet
from guardkit.evaluation.effectiveness import N_RESAMPLES, PREVALENCE, SEED, Row
from guardkit.evaluation.effectiveness import measure as measure_sheet
from guardkit.evaluation.scoring import Contender, Sheet
from guardkit.heads import Head
from guardkit.metrics.figures import METRICS, OF_IMAGES, OF_PAIRS, always_unsafe_f1
from guardkit.metrics.intervals import clopper_pearson
from guardkit.metrics.probe import PROBE_MIN_IMAGES, edited_vs_original_auroc
from guardkit.schema import SAFE, Record


@dataclass(frozen=True)
class Measured:
    """Scores on the test set.

    Attributes:
        test: what was scored.
        scores: (n, 1 + k) probabilities of its images.
        counterfactual_scores: (p, 1 + k) those of the counterfactuals.
        category_names: of the k columns.
    """

    test: TestSet
    scores: np.ndarray
    counterfactual_scores: np.ndarray
    category_names: tuple[str, ...]


class Fitted(Protocol):
    """What is told of a training: see `guardkit.fitting.module.Fitted`."""

    @property
    def guard(self) -> GuardClassifier: ...
    @property
    def curve(self) -> list[dict[str, float]]: ...
    @property
    def best_epoch(self) -> int: ...


def test_figures(guard: GuardClassifier, data: GuardDataModule) -> tuple[dict[str, dict[str, Any]], Measured]:
    """A guard on the test set of its data.

    Returns:
        "test", "pairs" and "always_unsafe" of metrics.json, and the scores they come from.
    """
    test = data.test_set()
    scores = guard.probabilities(test.embeddings)
    twins = guard.probabilities(test.counterfactuals) if len(test.counterfactuals) else np.zeros((0, scores.shape[1]))
    sheet = _sheet(guard, test, scores[:, 0], twins[:, 0])
    rows, _ = measure_sheet(sheet, prevalence=PREVALENCE, n_resamples=N_RESAMPLES, seed=SEED)
    figures = {
        **_figures(rows, OF_IMAGES),
        "stated_prevalence": PREVALENCE,
        "safe_images_are_counterfactuals": bool(sheet.counted[sheet.n_natural :].any()),
        "by_category": {
            category: _figures(rows, OF_IMAGES, category=category)
            for category in sheet.categories
            if any(row["category"] == category for row in rows)
        },
        "by_source": {source: _figures(rows, OF_IMAGES, source=source) for source in _sources(rows, "images")},
        "look_alikes": _on_look_alikes(test, scores[:, 0], guard.threshold),
    }
    paired = _figures(rows, OF_PAIRS)
    pairs: dict[str, Any] = {
        **paired,
        "made_by": test.pairs_made_by,
        "by_source": {source: _figures(rows, OF_PAIRS, source=source) for source in _sources(rows, "pairs")},
    }
    if not paired["n"]:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in data.other_edits.rejected.items())
        pairs["reason"] = f"no counterfactual of a test image was accepted ({reasons or 'no unsafe test image'})"
    always = {"f1": always_unsafe_f1(sheet.labels[sheet.counted])}
    return {"test": figures, "pairs": pairs, "always_unsafe": always}, Measured(test, scores, twins, guard.policy.category_names)


def texts_alone(guard: GuardClassifier, measured: Measured) -> dict[str, Any] | None:
    """AUROC and ranking accuracy of the policy's texts without a label on the same images; None where the head holds no texts."""
    test = measured.test
    logits = guard.head.of_texts_alone(torch.from_numpy(np.concatenate([test.embeddings, test.counterfactuals]).astype(np.float32)))
    if logits is None:
        return None
    scores = torch.sigmoid(logits[:, 0].double()).numpy()
    n = len(test.records)
    rows, _ = measure_sheet(_sheet(guard, test, scores[:n], scores[n:]), prevalence=PREVALENCE, n_resamples=N_RESAMPLES, seed=SEED)
    both = [_figures(rows, OF_IMAGES), _figures(rows, OF_PAIRS)]
    return {name: figures[name] for name, figures in zip(("auroc", "ranking_accuracy"), both, strict=True)} | {
        key: {name: one for figures in both for name, one in figures[key].items() if name in ("auroc", "ranking_accuracy")}
        for key in ("ci", "reasons")
    }


def out_of_fold_figures(guard: GuardClassifier, records: list[Record], scores: np.ndarray) -> dict[str, Any]:
    """The figures of images that were scored by guards which had not seen them, at the threshold of the one that is kept.

    Args:
        guard: it.
        records: labelled images.
        scores: (n,) probabilities of unsafe.
    Returns:
        As "test" of metrics.json, without categories and sources.
    """
    nothing = np.zeros((0, 0), np.float32)
    test = TestSet(records, nothing, np.zeros(0, int), nothing, "", 0.0)
    rows, _ = measure_sheet(_sheet(guard, test, scores, np.zeros(0)), prevalence=PREVALENCE, n_resamples=N_RESAMPLES, seed=SEED)
    return _figures(rows, OF_IMAGES)


def measure(fitted: Fitted, data: GuardDataModule, *, experiment: str, seed: int) -> tuple[dict[str, Any], Measured]:
    """All figures of metrics.json but the timing.

    Returns:
        The figures, and the scores they come from.
    """
    guard = fitted.guard
    tested, measured = test_figures(guard, data)
    choice = data.choice
    controls = {name: _control(one) for name, one in data.controls().items()}
    metrics: dict[str, Any] = {
        "experiment": experiment,
        "seed": seed,
        "n_unsafe": len(choice.of("unsafe")),
        "n_safe": choice.n_safe,
        "n_look_alikes": len(choice.of("look_alike")),  # of n_safe
        "n_counterfactuals": data.n_counterfactuals,
        "n_transplants": data.n_transplants,
        "n_validation": {
            "unsafe": len(choice.validation["unsafe"]),
            "safe": sum(len(choice.validation.get(kind, [])) for kind in ("natural", "look_alike")),
        },
        "inputs": {"given": data.loaded.given, **listing(data.loaded.rejected)},
        **tested,
        "texts_alone": texts_alone(guard, measured),
        "edits": data.edits.as_dict(),
        "edited_vs_original_auroc": controls["null_edit"]["auroc"],
        "controls": controls,
        "best_epoch": fitted.best_epoch,
        "operating_points": guard.operating_points,
        "fingerprints": {
            "encoder": guard.encoder.fingerprint,
            "policy": guard.policy.digest,
            "source": data.source.asked,
            "editor": data.pipeline.editor.config,
            "verifier": data.pipeline.verifier.config,
            "guardkit": __version__,
        },
    }
    if guard.head.is_erased:
        metrics["edited_vs_original_auroc_after_leace"] = _after_erasure(guard.head, data.controls()["null_edit"])
    if controls["null_edit"]["auroc"] is None:
        metrics["edited_vs_original_auroc_reason"] = controls["null_edit"]["reason"]
    return metrics, measured


def _sheet(guard: GuardClassifier, test: TestSet, scores: np.ndarray, twins: np.ndarray) -> Sheet:
    """The test set as an evaluation of this one guard has it."""
    labels = labels_of(test.records)
    n, n_pairs = len(labels), len(test.pair_rows)
    counted = np.arange(n + n_pairs) < n
    if n_pairs and not (labels == SAFE).any():
        counted[:] = True  # the counterfactuals stand for the safe images that there are not
    return Sheet(
        contenders=[Contender("guard", guard)],
        records=[*test.records, *(replace(test.records[row], label=SAFE) for row in test.pair_rows)],
        labels=np.concatenate([labels, np.full(n_pairs, SAFE)]),
        scores=np.concatenate([scores, twins])[:, None],
        n_natural=n,
        pair_rows=np.stack([test.pair_rows, n + np.arange(n_pairs)], axis=1).astype(int),
        similarity=None,
        similarity_by=None,
        counted=counted,
        categories=guard.policy.category_names,
    )


def _figures(rows: Sequence[Row], names: Sequence[str], *, category: str | None = None, source: str | None = None) -> dict[str, Any]:
    """Values, 95 % intervals and, where there is no value, reasons of one cut; how many images or pairs it holds."""
    found = {
        row["metric"]: row
        for row in rows
        if row["metric"] in names and row["negatives"] != "same_category" and (row["category"], row["source"]) == (category, source)
    }
    values: dict[str, Any] = {name: found[name]["value"] if found else None for name in names}
    values["ci"] = {name: [row["ci_low"], row["ci_high"]] for name, row in found.items() if row["ci_low"] is not None}
    values["reasons"] = {name: row["reason"] for name, row in found.items() if row["reason"] is not None}
    first = next(iter(found.values()), None)
    values["n"] = first["n"] if first else 0
    if METRICS[names[0]].of == "images":
        values["prevalence"] = first["n_unsafe"] / first["n"] if first and first["n"] else None
        values["threshold"] = first["threshold"] if first else None  # F1 is the first, and has one
    return values


def _on_look_alikes(test: TestSet, scores: np.ndarray, threshold: float) -> dict[str, Any]:
    """False-positive rate on safe images that are marked by a category, because they look like what violates it, with a 95 % interval."""
    alike = (labels_of(test.records) == SAFE) & (categories_of(test.records)[0] >= 0)
    n, hits = int(alike.sum()), int((scores[alike] >= threshold).sum())
    if not n:
        return {"fpr": None, "ci": {}, "n": 0, "reason": "no safe test image is marked by a category"}
    return {"fpr": hits / n, "ci": {"fpr": list(clopper_pearson(hits, n))}, "n": n}


def _sources(rows: Sequence[Row], part: str) -> list[str]:
    return sorted({row["source"] for row in rows if row["part"] == part and row["source"] is not None})


def _after_erasure(head: Head, control: Control) -> float | None:
    """What a probe still finds in what the head's weights see."""
    original, altered = (
        head.features(torch.from_numpy(vectors)).numpy() / vectors.shape[1] ** 0.5 for vectors in (control.original, control.altered)
    )
    found = edited_vs_original_auroc(original, altered)
    return None if found is None else found.estimate


def _control(control: Control) -> dict[str, Any]:
    """How well a probe tells altered images from untouched ones, and how far the embeddings moved."""
    found, n = edited_vs_original_auroc(control.original, control.altered), len(control.original)
    cosine = float((control.original * control.altered).sum(axis=1).mean()) if n else None
    figures: dict[str, Any] = {"auroc": None, "ci": {}, "mean_cosine": cosine, "n": n}
    if found is None:
        missing = f" ({control.reason})" if control.reason else ""
        few = f"needs {PROBE_MIN_IMAGES} images that came through, there are {n}" if n else "no image came through"
        return figures | {"reason": f"{few}{missing}"}
    return figures | {"auroc": found.estimate, "ci": {"auroc": [found.low, found.high]}}
