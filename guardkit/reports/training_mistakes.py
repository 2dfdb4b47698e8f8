"""mistakes.html: what a guard got wrong, and labels that may be, to look at. One page that loads nothing."""

from __future__ import annotations

from typing import Any

import numpy as np

from guardkit.evaluation.training import Measured
from guardkit.fitting.cross_validation import OutOfFold
from guardkit.metrics.label_errors import probable_label_errors
from guardkit.pages import render
from guardkit.reports.evaluation_mistakes import picture

N_SHOWN = 12  # of each kind


def mistakes_page(metrics: dict[str, Any], measured: Measured, out_of_fold: OutOfFold | None, *, policy: str, threshold: float) -> str:
    """The page, as one text.

    It shows natural images of the source alone, never one that was made.

    Args:
        metrics: the content of metrics.json.
        measured: scores of the test set.
        out_of_fold: scores of all labelled images; None: there are none.
        policy: its name.
        threshold: of the guard.
    """
    test, scores = measured.test, measured.scores[:, 0]
    labels = np.array([record.label for record in test.records], int)
    alarms = [int(row) for row in np.argsort(-scores, kind="stable") if labels[row] == 0 and scores[row] >= threshold]
    missed = [int(row) for row in np.argsort(scores, kind="stable") if labels[row] == 1 and scores[row] < threshold]
    parts = [
        _part(
            "False alarms",
            f"{len(alarms)} of {(labels == 0).sum()} safe test images",
            "Safe images that are flagged, the highest score first. More safe images like these in training take such alarms away; a label may be wrong too.",
            [picture(test.records[row], float(scores[row])) for row in alarms[:N_SHOWN]],
            len(alarms),
        ),
        _part(
            "Misses",
            f"{len(missed)} of {(labels == 1).sum()} unsafe test images",
            "Unsafe images that are not flagged, the lowest score first. More labelled images like these help, or a lower threshold.",
            [picture(test.records[row], float(scores[row])) for row in missed[:N_SHOWN]],
            len(missed),
        ),
        _label_errors(metrics["cross_validated"], out_of_fold),
    ]
    title = f"{metrics['experiment']}, seed {metrics['seed']}"
    return render("mistakes.html", title=title, policy=policy, threshold=threshold, notes=metrics["notes"], parts=parts)


def _label_errors(figures: dict[str, Any], out_of_fold: OutOfFold | None) -> dict[str, Any]:
    title = "Labels that may be wrong"
    if out_of_fold is None:
        return _part(title, "not looked for", f"It takes guards that did not see an image: {figures['reason']}.", [], 0)
    ends = figures["ci"].get("auroc")
    if ends is None or ends[0] <= 0.5:
        why = "Guards that did not see an image are no better than chance here, so that they say nothing of its label."
        return _part(title, "not looked for", why, [], 0)
    labels, scores = np.array([record.label for record in out_of_fold.records]), out_of_fold.scores[:, 0]
    rows = probable_label_errors(labels, scores)
    said = (
        "Images that guards which did not see them score like images of the other label, the clearest first. Look at each: where the label is wrong, "
        "correct it at its source and train again."
    )
    shown = [picture(out_of_fold.records[row], float(scores[row])) for row in rows[:N_SHOWN]]
    for one, row in zip(shown, rows, strict=False):
        one["category"] = f"labelled {'unsafe' if labels[row] else 'safe'}" + (f", {one['category']}" if one["category"] else "")
    return _part(title, f"{len(rows)} of {len(labels)} labelled images", said, shown, len(rows))


def _part(title: str, count: str, about: str, shown: list[dict[str, Any]], n: int) -> dict[str, Any]:
    return {"title": title, "count": count, "about": about, "shown": shown, "n": n}
