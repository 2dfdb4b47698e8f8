"""What a calibration shows: the facts of calibration.json, a short table, and a picture of the scores with their thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from guardkit.classifier import GuardClassifier
from guardkit.data.columns import listing
from guardkit.evaluation.benchmark import Benchmark
from guardkit.evaluation.calibration import DECISION, Asked, Column, sentence
from guardkit.schema import Rejected

_UNSAFE, _SAFE, _GREY = "#b3362b", "#2b6cb3", "#777777"
_N_BINS = 10


def facts(
    before: GuardClassifier,
    after: GuardClassifier,
    columns: Sequence[Column],
    asked: Asked,
    benchmark: Benchmark,
    rejected: Sequence[Rejected],
    notes: Sequence[str],
) -> dict[str, Any]:
    """All that calibration.json says, in plain JSON types."""
    n_used = columns[0].n_safe + columns[0].n_unsafe
    n_grouped = benchmark.given - benchmark.n_left_out - len(rejected) - n_used
    return {
        "guard": {"name": before.name, "fingerprint_before": before.fingerprint, "fingerprint": after.fingerprint},
        "images": {
            "source": benchmark.name,
            "chosen": benchmark.chosen,
            "given": benchmark.given,
            "used": n_used,
            "n_safe": columns[0].n_safe,
            "n_unsafe": columns[0].n_unsafe,
            "trained_on": benchmark.n_left_out,
            "of_a_group_that_is_there": n_grouped,
            **listing(rejected),
        },
        "asked": {name: value for name, value in vars(asked).items() if value is not None},
        "thresholds": after.thresholds.to_dict(),
        "thresholds_before": before.thresholds.to_dict(),
        "columns": {column.name: _column(column) for column in columns},
        "notes": list(notes),
    }


def _column(column: Column) -> dict[str, Any]:
    return {
        "review": column.band.review,
        "block": column.band.block,
        "review_before": column.before.review,
        "block_before": column.before.block,
        "n_safe": column.n_safe,
        "n_unsafe": column.n_unsafe,
        "promises": [
            {
                "kind": promise.kind,
                "target": promise.target,
                "confidence": promise.confidence,
                "n": promise.n,
                "threshold": promise.threshold,
                "says": sentence(promise, column.name) if promise.threshold is not None else None,
                "reason": promise.reason or None,
            }
            for promise in column.promises
        ],
        "scores": {"map": column.fitted.map.kind, "log_loss": dict(column.fitted.log_losses), "reason": column.fitted.reason or None},
        "on_these_images": dict(column.figures),
    }


def table(figures: dict[str, Any]) -> str:
    """The main numbers, what is promised, and why something is not."""
    images, asked, columns = figures["images"], figures["asked"], figures["columns"]
    rows = [
        (
            "images",
            f"{images['used']}",
            f"{images['n_safe']} safe and {images['n_unsafe']} unsafe, of {images['given']}{_left_out(images)}",
        ),
        *_rows(columns[DECISION], asked["prevalence"]),
    ]
    names, values = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"  {name:<{names}}  {value:<{values}}  {meaning}".rstrip() for name, value, meaning in rows]
    others = {name: column for name, column in columns.items() if name != DECISION}
    if others:
        width = max(map(len, others))
        lines.append(f"  {'by category':<{width + 2}}  {'review':<8}  {'block':<8}  {'safe':>5}  {'unsafe':>6}  promised")
        for name, column in others.items():
            said = ", ".join(f"{one['kind']}={one['target']:g}" for one in column["promises"] if one["says"])
            not_said = ", ".join(f"{one['kind']} ({one['n']} images are too few)" for one in column["promises"] if not one["says"])
            shown = (
                "; ".join(text for text in (said, f"not {not_said}" if not_said else "") if text)
                or "nothing: its thresholds are as they were"
            )
            row = f"{_short(column['review']):<8}  {_short(column['block']):<8}  {column['n_safe']:>5}  {column['n_unsafe']:>6}"
            lines.append(f"    {name:<{width}}  {row}  {shown}")
    return "\n".join([*lines, *(f"  note: {note}" for note in figures["notes"])])


def _left_out(images: dict[str, Any]) -> str:
    parts = [
        (images["trained_on"], "the guard was trained on"),
        (images["of_a_group_that_is_there"], "of a group that is there already"),
        (images.get("n_rejected", len(images["rejected"])), "rejected"),
    ]
    said = ", ".join(f"{n} {what}" for n, what in parts if n)
    return f" ({said})" if said else ""


def _rows(column: dict[str, Any], prevalence: float) -> list[tuple[str, str, str]]:
    promised = {one["kind"]: one["says"] for one in column["promises"]}
    review = promised.get("min_recall") or promised.get("queue_per_day")
    block = promised.get("max_fpr") or "the same: nothing is reviewed"
    here, losses = column["on_these_images"], column["scores"]["log_loss"]
    compared = ", ".join(f"{kind} {loss:.3f}" for kind, loss in losses.items())
    rows = [
        ("review from", _short(column["review"]), review or "the same as block: nothing is reviewed"),
        ("block from", _short(column["block"]), block),
        (
            "scores",
            column["scores"]["map"],
            column["scores"]["reason"] or f"held-out log loss: {compared}; probabilities for {prevalence:.3g} unsafe",
        ),
    ]
    for name, what in (("flagged", "reviewed or blocked"), ("blocked", "blocked")):
        if name == "flagged" and column["review"] == column["block"]:
            continue
        for kind in ("safe", "unsafe"):
            rows.append((f"{kind} images {name}", _with_interval(here[f"{name}_of_{kind}"]), f"{what}, of the {kind} images here"))
        rows.append(
            (
                f"precision of {name}",
                _with_interval(here[f"precision_of_{name}"]),
                f"unsafe among the {what}, where {prevalence:.3g} are unsafe",
            )
        )
    return rows


def _with_interval(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "-"
    low, high = figure["ci"]
    return f"{figure['value']:.3f}" + ("" if low is None else f" ({low:.3f}–{high:.3f})")


def _short(threshold: float) -> str:
    """Thresholds may be small numbers."""
    return f"{threshold:.3g}"


def draw(column: Column, prevalence: float, path: Path) -> None:
    """Scores of safe and unsafe images with the thresholds, and how often images of a score are unsafe."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    both = np.concatenate([column.safe, column.unsafe])
    logits = np.log(np.clip(both, 1e-12, None)) - np.log(np.clip(1 - both, 1e-12, None))
    edges = np.linspace(logits.min() - 0.5, logits.max() + 0.5, 31)
    for scores, colour, name in ((column.safe, _SAFE, "safe"), (column.unsafe, _UNSAFE, "unsafe")):
        values = np.log(np.clip(scores, 1e-12, None)) - np.log(np.clip(1 - scores, 1e-12, None))
        weights = np.full(len(values), 1 / max(1, len(values)))
        left.hist(values, edges, weights=weights, alpha=0.6, color=colour, label=f"{name} ({len(scores)})")
    marks = (
        {"review": column.band.review, "block": column.band.block}
        if column.band.review < column.band.block
        else {"block": column.band.block}
    )
    for name, threshold in marks.items():
        at = float(np.log(max(threshold, 1e-12)) - np.log(max(1 - threshold, 1e-12)))
        left.axvline(at, color=_GREY, linestyle=":" if name == "review" else "-", label=f"{name} from {_short(threshold)}")
    left.set_xlabel("log odds of the score")
    left.set_ylabel("share of images of that label")
    left.legend(frameon=False, fontsize=8)
    _reliability(right, column, prevalence)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def _reliability(axis: Any, column: Column, prevalence: float) -> None:
    """Scores restated at the share of unsafe images that there is here, where they can be compared with what the images are."""
    scores = np.concatenate([column.safe, column.unsafe])
    labels = np.r_[np.zeros(len(column.safe)), np.ones(len(column.unsafe))]
    own = labels.mean()
    odds = scores / np.clip(1 - scores, 1e-12, None) * (own / (1 - own)) / (prevalence / (1 - prevalence))
    here = odds / (1 + odds)
    parts = [part for part in np.array_split(np.argsort(here), min(_N_BINS, len(here))) if len(part)]
    axis.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="a probability")
    axis.plot(
        [here[part].mean() for part in parts],
        [labels[part].mean() for part in parts],
        "o-",
        color=_UNSAFE,
        label="tenths of the images here",
    )
    axis.set_xlabel(f"score, restated for the images here ({own:.0%} unsafe)")
    axis.set_ylabel("share that is unsafe")
    axis.legend(frameon=False, fontsize=8)
