"""What a training run shows: predictions.parquet, pairs.png, learning.png, mistakes.html, a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.artifacts import write_table, written
from guardkit.data.datamodule import GuardDataModule
from guardkit.editors.none import NoEditor
from guardkit.evaluation.training import Fitted, Measured
from guardkit.reports import training_plots as plots
from guardkit.schema import Record

N_PICTURED_PAIRS = 8
_TRACE = {
    "null_edit": "traces of the editor that a guard could learn; 0.5 is none",
    "autoencoder": "the same of its autoencoder alone",
    "jpeg": "the same of JPEG, to compare with",
}


def write_predictions(path: Path, measured: Measured) -> None:
    """One row per test image and per counterfactual of a test pair."""
    test = measured.test
    pair_of = {int(row): test.records[row].id for row in test.pair_rows}
    rows: list[tuple[Record, str, int, str | None, np.ndarray]] = [
        (record, record.id, record.label, pair_of.get(i), measured.scores[i]) for i, record in enumerate(test.records)
    ]
    for row, scores in zip(test.pair_rows, measured.counterfactual_scores, strict=True):
        record = test.records[row]
        rows.append((record, f"{record.id}#counterfactual", 0, record.id, scores))
    table = pa.table(
        {
            "id": [one[1] for one in rows],
            "label": pa.array([one[2] for one in rows], pa.int8()),
            "category": pa.array([one[0].category for one in rows], pa.string()),
            "source": [one[0].source for one in rows],
            "pair_id": pa.array([one[3] for one in rows], pa.string()),
            "is_counterfactual": [one[1].endswith("#counterfactual") for one in rows],
            "score": [float(one[4][0]) for one in rows],
            **{f"score_{name}": [float(one[4][1 + i]) for one in rows] for i, name in enumerate(measured.category_names)},
        }
    )
    write_table(path, table)


def write_pictures(folder: Path, fitted: Fitted, data: GuardDataModule, measured: Measured) -> None:
    """pairs.png and learning.png."""
    with written(folder / "learning.png") as temporary:
        plots.learning(fitted.curve, fitted.best_epoch, temporary)
    shown = _pictured_pairs(data, measured)
    with written(folder / "pairs.png") as temporary:
        plots.pairs(shown, fitted.guard.threshold, temporary)


def summary_table(metrics: dict[str, Any]) -> str:
    """The main numbers with their 95 % intervals, and what each means; beside a dash, why there is no number.

    Where no editor was asked for, rows of what an editor would have made are left out.
    """
    test, pairs, edits, threshold = metrics["test"], metrics["pairs"], metrics["edits"], metrics["test"]["threshold"]
    has_editor = metrics["fingerprints"]["editor"] != NoEditor().config
    traces = {"edited": "null_edit", "autoencoder": "autoencoder", "jpeg": "jpeg"} if has_editor else {}
    rows = [
        ("labelled unsafe images", str(metrics["n_unsafe"]), ""),
        ("natural safe images", str(metrics["n_safe"]), ""),
        *_counted("of these look-alikes", metrics["n_look_alikes"], "safe images that look like unsafe ones"),
        ("counterfactuals", str(metrics["n_counterfactuals"]), ""),
        *_counted(
            "transplants", metrics["n_transplants"], "unsafe objects in safe photographs; as many safe ones stand in the same places"
        ),
        (
            "edits rejected",
            f"{edits['requested'] - edits['accepted']} of {edits['requested']}",
            "; ".join(f"{n} x {why}" for why, n in edits["rejected"].items()),
        ),
        ("threshold", _shown(threshold), "an image is flagged when its score reaches it"),
        *(_pairs(pairs) if has_editor or pairs["n"] else []),
        _row(f"test AUROC (n={test['n']})", test, "auroc", "an unsafe image scores above a safe one; 0.5 is chance"),
        _row("test recall", test, "recall", "unsafe images that are flagged"),
        _row("test false-positive rate", test, "fpr", "safe images that are flagged"),
        _row("test F1", test, "f1", "of recall and precision; to compare with the next line"),
        ("F1 of flagging everything", _shown(metrics["always_unsafe"]["f1"]), "what any useful guard must beat"),
        *_texts_alone(metrics["texts_alone"]),
        *_cross_validated(metrics["cross_validated"]),
        *(_row(f"{name}-versus-original AUROC", metrics["controls"][key], "auroc", _TRACE[key]) for name, key in traces.items()),
        *_after_leace(metrics),
    ]
    names, values = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"{metrics['experiment']}, seed {metrics['seed']}"]
    lines += [f"  {name:<{names}}  {value:<{values}}  {meaning}".rstrip() for name, value, meaning in rows]
    return "\n".join([*lines, *(f"  note: {note}" for note in metrics["notes"])])


def _pairs(pairs: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [
        _row(f"pair accuracy (n={pairs['n']})", pairs, "pair_accuracy", "unsafe image flagged and its counterfactual not"),
        _row("ranking accuracy", pairs, "ranking_accuracy", "unsafe image scores above its counterfactual"),
    ]


def _counted(title: str, n: int, meaning: str) -> list[tuple[str, str, str]]:
    """A row of what only some arms have; none without it."""
    return [(title, str(n), meaning)] if n else []


def _texts_alone(figures: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """None where the head holds no texts."""
    return [] if figures is None else [_row("AUROC of the texts alone", figures, "auroc", "by the policy's words, without a label")]


def _after_leace(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is left of the editor's trace, where it was erased."""
    name = "edited_vs_original_auroc_after_leace"
    if name not in metrics:
        return []
    about = (
        "what is left of the editor's traces in what the head sees"
        if metrics[name] is not None
        else metrics["controls"]["null_edit"]["reason"]
    )
    return [("edited, the same after LEACE", _shown(metrics[name]), about)]


def _cross_validated(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The test figures once more, of all labelled images; none where that was not done."""
    if figures["n_folds"] is None:
        return []
    said = {
        "auroc": f"{figures['n_folds']} guards, each trained without a part of the labelled images and tested on it",
        "recall": "the same of all labelled images, where a test set is small",
        "fpr": "",
        "f1": "",
    }
    names = {"auroc": f"AUROC (n={figures['n']})", "recall": "recall", "fpr": "false-positive rate", "f1": "F1"}
    return [_row(f"cross-validated {names[name]}", figures, name, meaning) for name, meaning in said.items()]


def _row(title: str, figures: dict[str, Any], name: str, meaning: str) -> tuple[str, str, str]:
    """Title, value with its interval, and what it means or why there is none."""
    value, ends = figures[name], figures.get("ci", {}).get(name)
    if value is None:
        return title, "-", figures.get("reason") or figures["reasons"][name]
    return title, _shown(value) + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else ""), meaning


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pictured_pairs(data: GuardDataModule, measured: Measured) -> list[plots.PicturedPair]:
    """Test pairs spread over categories and sources."""
    test = measured.test
    chosen: list[int] = []
    seen: set[tuple[str | None, str]] = set()
    for i, row in enumerate(test.pair_rows):
        key = (test.records[row].category, test.records[row].source)
        if key not in seen and test.records[row].content is not None:
            seen.add(key)
            chosen.append(i)
    rest = [i for i in range(len(test.pair_rows)) if i not in set(chosen)]
    shown = []
    for i in [*chosen, *rest][:N_PICTURED_PAIRS]:
        record = test.records[test.pair_rows[i]]
        twin = data.counterfactual_of(record)
        if record.content is None or twin is None:
            continue
        shown.append(
            plots.PicturedPair(
                title=f"{record.category or 'unsafe'} · {record.source}",
                original=record.content.load(),
                counterfactual=twin.load(),
                scores=(float(measured.scores[test.pair_rows[i], 0]), float(measured.counterfactual_scores[i, 0])),
            )
        )
    return shown
