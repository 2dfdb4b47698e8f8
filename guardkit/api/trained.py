"""What is said and kept of a guard that was trained, by whatever command: figures, notes, files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import write_json, written
from guardkit.classifier import GuardClassifier
from guardkit.data.arms import Arm
from guardkit.data.columns import labels_of, sources_of
from guardkit.data.training_images import training_images
from guardkit.encoders.known import MAX_IMAGES, unknown_images
from guardkit.evaluation.training import measure, out_of_fold_figures
from guardkit.evaluation.verdicts import editor_trace, lacks_a_label, no_better, texts, unusable, unused
from guardkit.fitting.cross_validation import N_FOLDS, OutOfFold
from guardkit.fitting.module import Fitted, scalars
from guardkit.fitting.parts import Parts
from guardkit.reports.training import summary_table, write_pictures, write_predictions
from guardkit.reports.training_mistakes import mistakes_page
from guardkit.schema import SAFE, UNSAFE, InputError

WRITTEN = ("guard", "metrics.json", "predictions.parquet", "*.png", "mistakes.html", "checkpoints", "csv", "wandb")


@dataclass(frozen=True)
class TrainingReport:
    """What training gives.

    Attributes:
        guard: trained, with its threshold.
        metrics: the figures of metrics.json.
        table: the main ones, to print.
        folder: where everything is written; None: nothing was.
    """

    guard: GuardClassifier
    metrics: dict[str, Any]
    table: str
    folder: Path | None


def reported(
    fitted: Fitted,
    parts: Parts,
    arm: Arm,
    *,
    seed: int,
    out_of_fold: Callable[[], OutOfFold],
    notes: Sequence[str],
    is_trained: bool,
    extend: GuardClassifier | None,
    folder: Path | None,
    logger: Any,
    started: float,
) -> TrainingReport:
    """Measures a trained guard, says what a reader should know of it, and writes both beside it.

    Args:
        fitted: the guard.
        parts: whose data it was trained on, embedded by its own encoder.
        arm: that it was trained in.
        seed: of the training.
        out_of_fold: scores its training images by guards that have not seen them; raises InputError, with the reason, where that cannot be.
        notes: what is known before anything is measured.
        is_trained: whether labels were learned from.
        extend: a guard that gets its categories.
        folder: where files go; None: nowhere.
        logger: Lightning's; False: none.
        started: by time.perf_counter.
    """
    data = parts.data
    metrics, measured = measure(fitted, data, experiment=arm.name, seed=seed)
    held_out: OutOfFold | None
    try:
        held_out = out_of_fold()
        figures = out_of_fold_figures(fitted.guard, held_out.records, held_out.scores[:, 0])
        metrics["cross_validated"] = {"n_folds": N_FOLDS, **figures}
    except InputError as error:
        held_out, metrics["cross_validated"] = None, {"n_folds": None, "reason": str(error)}
    metrics["notes"] = [*unusable(metrics["inputs"]), *notes]
    if metrics["test"]["safe_images_are_counterfactuals"]:
        metrics["notes"].append(
            f"source={data.source.name} has no natural safe images to test on: counterfactuals stand for them, and test AUROC and F1 "
            "do not say how a guard does on ordinary images"
        )
    labelled = [record for kind in ("unsafe", "natural", "look_alike") for record in data.choice.of(kind)[:MAX_IMAGES]]
    metrics["notes"] += data.unusable()
    metrics["notes"] += unknown_images(parts.encoder, lambda: data.views.embed(labelled))
    n_of = np.bincount(labels_of(data.load()), minlength=2).tolist()
    if extend is not None:
        metrics["notes"].append(
            f"these figures are of {', '.join(parts.policy.category_names)} alone, which were added to {', '.join(extend.policy.category_names)}; "
            "calibrate the guard for thresholds of the decision, and measure what both decide together with python -m guardkit.evaluate guard=GUARD"
        )
    metrics["notes"] += [
        *(unused(metrics, n_of[UNSAFE], n_of[SAFE]) if is_trained else []),
        *lacks_a_label(metrics, brings_test_images=data.loaded.test is not None),
        *no_better(metrics, is_trained=is_trained),
        *texts(metrics),
        *editor_trace(metrics, arm, parts.pipeline.editor.name),
    ]
    guard = fitted.guard
    guard.training = {
        "prevalence": fitted.module.objective.prevalence,
        "experiment": arm.name,
        "seed": seed,
        "sources": sorted(sources_of(data.choice.train["unsafe"])),
        **{key: metrics[key] for key in ("n_unsafe", "n_safe", "n_counterfactuals")},
    }
    guard.training_images = training_images(data, parts.unlabelled)
    guard.metrics = {key: metrics[key] for key in ("test", "pairs", "always_unsafe", "notes")}
    if extend is not None:
        guard = extend.extended_by(guard)
    if folder is not None:
        guard.save_pretrained(folder / "guard")
        write_predictions(folder / "predictions.parquet", measured)
        write_pictures(folder, fitted, data, measured)
        page = mistakes_page(metrics, measured, held_out, policy=parts.policy.name, threshold=guard.threshold)
        with written(folder / "mistakes.html") as temporary:
            temporary.write_text(page, encoding="utf-8", errors="backslashreplace")  # it shows paths, which may be no text
    metrics["timing_s"] = {
        "total": time.perf_counter() - started,
        "encode": parts.store.seconds,
        "edit": data.edits.seconds + data.other_edits.seconds,
        "fit": fitted.seconds,
    }
    if logger:
        logger.log_metrics(scalars({key: metrics[key] for key in ("test", "pairs")}), step=len(fitted.curve))
    if folder is not None:
        write_json(folder / "metrics.json", metrics)
    return TrainingReport(guard, metrics, summary_table(metrics), folder)
