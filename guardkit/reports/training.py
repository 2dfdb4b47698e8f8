"""What a training run shows: predictions.parquet, pairs.png, learning.png, a short table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.artifacts import write_table, written
from guardkit.data.datamodule import GuardDataModule
from guardkit.evaluation.training import Fitted, Measured
from guardkit.reports import training_plots as plots
from guardkit.schema import Record

N_PICTURED_PAIRS = 8


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
    """The main numbers in a few lines."""
    test, pairs, edits = metrics["test"], metrics["pairs"], metrics["edits"]
    rows = [
        ("labelled unsafe images", str(metrics["n_unsafe"])),
        ("natural safe images", str(metrics["n_safe"])),
        ("counterfactuals", str(metrics["n_counterfactuals"])),
        ("edits rejected", f"{edits['requested'] - edits['accepted']} of {edits['requested']}"),
        (f"pair accuracy (n={pairs['n']})", _with_interval(pairs, "pair_accuracy")),
        ("ranking accuracy", _with_interval(pairs, "ranking_accuracy")),
        (f"test AUROC (n={test['n']})", _with_interval(test, "auroc")),
        ("test F1", _with_interval(test, "f1")),
        ("F1 of flagging everything", _shown(metrics["always_unsafe"]["f1"])),
        ("edited-versus-original AUROC", _shown(metrics["edited_vs_original_auroc"])),
        *(
            [("the same after LEACE", _shown(metrics["edited_vs_original_auroc_after_leace"]))]
            if "edited_vs_original_auroc_after_leace" in metrics
            else []
        ),
        *((f"{name}-versus-original AUROC", _shown(metrics["controls"][name]["auroc"])) for name in ("autoencoder", "jpeg")),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{metrics['experiment']}, seed {metrics['seed']}", *(f"  {name:<{width}}  {text}" for name, text in rows)]
    return "\n".join([*lines, *(f"  note: {note}" for note in metrics["notes"])])


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _with_interval(figures: dict[str, Any], name: str) -> str:
    ends = figures["ci"].get(name)
    return _shown(figures[name]) + (f" ({ends[0]:.3f}–{ends[1]:.3f})" if ends else "")


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
