"""The parts of the report: tables and charts as plain values, for a page and for a text alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guardkit.charts import Dot, Line, dot_chart, line_chart
from guardkit.evaluation.effectiveness import Row, covered_rows
from guardkit.evaluation.outcome import TITLES, Evaluation, interval, plain, shown
from guardkit.metrics.figures import METRICS, OF_IMAGES, OF_PAIRS
from guardkit.metrics.intervals import clopper_pearson
from guardkit.schema import takes_embeddings

_RELIABILITY_BINS = 10
_MIN_SHARE_OF_BIN = 0.01
_MAX_POINTS = 150  # of a curve
_HEATS = (
    (
        "f1",
        "F1, by UnsafeBench's arithmetic",
        "on the images collected for the category; where it has no safe ones, against all safe images",
    ),
    ("recall", "Recall", "of the category's unsafe images"),
    ("auroc", "AUROC", "the category's unsafe images against all safe ones"),
)
SOURCE_METRICS = ("f1", "recall", "fpr", "auroc")


# --- what both say ----------------------------------------------------------------------------------------------------


def classifiers(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Who was measured, in the order of their colours."""
    return [
        {
            "name": one.name,
            "colour": colour,
            "origin": one.origin,
            "encoder": one.guard.encoder.name if takes_embeddings(one.guard) else None,
            "covers": sorted(one.guard.covers) if one.guard.covers is not None else None,
            "covers_all": evaluation.covers_all(one),
            "threshold": one.guard.threshold,
            "n_abstained": len(evaluation.sheet.reasons[colour]),
            "abstentions": evaluation.sheet.abstentions(colour),
            "fingerprint": one.guard.fingerprint,
        }
        for colour, one in enumerate(evaluation.contenders)
    ]


def glance(evaluation: Evaluation, scope: str) -> list[dict[str, Any]]:
    """A row a classifier; the best of each column is marked among those measured on the same images, where they differ."""
    rows = []
    for colour, one in enumerate(evaluation.contenders):
        figures = [evaluation.figure(one.name, metric, scope=scope) for metric in OF_IMAGES]
        if figures[0] is None:
            continue
        first = figures[0]
        share = first["n_unsafe"] / first["n"] if first["n"] else 0.0
        rows.append(
            {
                "name": one.name,
                "colour": colour,
                "n": first["n"],
                "n_unsafe": first["n_unsafe"],
                "n_abstained": first["n_abstained"],
                "threshold": one.guard.threshold,
                "cells": [_cell(figure) for figure in figures],
                "always_unsafe": 2 * share / (1 + share) if share else None,
            }
        )
    for i, metric in enumerate(OF_IMAGES):
        best = {"higher": max, "lower": min, None: None}[METRICS[metric].better]
        same = [row["cells"][i] for row in rows if (row["n"], row["n_unsafe"]) == (rows[0]["n"], rows[0]["n_unsafe"])]
        values = [cell["value"] for cell in same if cell["value"] is not None]
        if best and len(set(values)) > 1:
            for cell in same:
                cell["is_best"] = cell["value"] == best(values)
    return rows


def _cell(row: Row | None) -> dict[str, Any]:
    """A figure for a table: what is read, and what is said when pointed at."""
    if row is None:
        return {"text": "–", "interval": "", "title": "not covered", "value": None, "is_best": False}
    said = f"n = {row['n']} ({row['n_unsafe']} unsafe)"
    if row["threshold"] is not None:
        said += f", threshold {row['threshold']:.4g}"
    if row["n_abstained"]:
        said += f", {row['n_abstained']} abstained"
    if interval(row):
        said += f", 95 % interval {interval(row)}"
    if row["reason"]:
        said += f"; {row['reason']}"
    return {"text": shown(row), "interval": interval(row), "title": said, "value": row["value"], "is_best": False}


def heats(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Category by classifier, a table a figure; uncovered categories have no value."""
    heats = []
    for metric, title, about in _HEATS:
        rows = []
        for category in evaluation.sheet.categories:
            found = []
            for one in evaluation.contenders:
                row = evaluation.figure(one.name, metric, category=category, negatives="same_category") if metric == "f1" else None
                found.append(row or evaluation.figure(one.name, metric, category=category))
            if any(found):
                n = next((row["n_unsafe"] for row in found if row), 0)
                rows.append({"name": category, "n_unsafe": n, "cells": [_cell(row) for row in found]})
        if rows:
            heats.append({"metric": metric, "title": title, "about": about, "rows": rows})
    return heats


def sources(evaluation: Evaluation) -> dict[str, Any] | None:
    """Every source by itself; a chart where there are several."""
    if len(evaluation.sources) < 2:
        return None
    rows, dots = [], {metric: [] for metric in ("f1", "auroc")}  # type: ignore[var-annotated]
    for colour, one in enumerate(evaluation.contenders):
        scope = evaluation.scope(one)
        cuts = [(source, {"source": source}) for source in evaluation.sources]
        cuts += [(name, {"distribution": side}) for side, name in (("in", "all in distribution"), ("out", "all out of distribution"))]
        for source, cut in cuts:
            figures = {metric: evaluation.figure(one.name, metric, scope=scope, **cut) for metric in SOURCE_METRICS}
            first = figures["f1"]
            if first is None:
                continue
            rows.append(
                {
                    "name": one.name,
                    "colour": colour,
                    "source": source,
                    "distribution": {"in": "yes", "out": "no", None: "unknown"}[first["distribution"]],
                    "n": first["n"],
                    "cells": [_cell(figure) for figure in figures.values()],
                }
            )
        for metric, into in dots.items():
            mine = []
            for place, source in enumerate(evaluation.sources):
                row = evaluation.figure(one.name, metric, source=source, scope=scope)
                if row is not None and row["value"] is not None:
                    mine.append(
                        Dot(
                            row["value"],
                            row["ci_low"],
                            row["ci_high"],
                            place,
                            f"{one.name}, {source}: {shown(row)} ({interval(row)}), n = {row['n']}",
                        )
                    )
            if mine:
                into.append((one.name, mine))
    charts = [
        {"title": TITLES[metric], "svg": dot_chart(into, label=f"{TITLES[metric]} by source", x_label=TITLES[metric])}
        for metric, into in dots.items()
        if into
    ]
    return {"rows": rows, "charts": charts, "names": evaluation.sources, "metrics": SOURCE_METRICS}


def pairs(evaluation: Evaluation) -> dict[str, Any] | None:
    """Figures of the pairs, all of them and by how similar the two images are; None without pairs."""
    if not len(evaluation.sheet.pair_rows):
        return None
    rows, lines = [], []
    for colour, one in enumerate(evaluation.contenders):
        scope = evaluation.scope(one)
        cuts = sorted(
            {
                row["similarity_low"]
                for row in evaluation.rows
                if row["classifier"] == one.name and row["similarity_low"] is not None and row["scope"] == scope
            }
        )
        places = []
        for low in [None, *cuts]:
            figures = [evaluation.figure(one.name, metric, scope=scope, similarity_low=low) for metric in OF_PAIRS]
            first = figures[0]
            if first is None:
                continue
            high = first["similarity_high"]
            rows.append(
                {
                    "name": one.name,
                    "colour": colour,
                    "similarity": "any" if low is None else f"{low:.3f} to {high:.3f}",
                    "is_any": low is None,
                    "n": first["n"],
                    "cells": [_cell(figure) for figure in figures],
                }
            )
            if low is not None and first["value"] is not None:
                places.append(((low + high) / 2, first))
        if places:
            lines.append(
                Line(
                    one.name,
                    [(x, row["value"]) for x, row in places],
                    colour,
                    [row["ci_low"] for _, row in places],
                    [row["ci_high"] for _, row in places],
                    has_dots=True,
                )
            )
    chart = None
    if lines:
        spread = [x for line in lines for x, _ in line.points]
        margin = 0.05 * (max(spread) - min(spread)) or 0.05
        chart = line_chart(
            lines,
            label="Pair accuracy against how similar the pairs' images are",
            x_label=f"cosine of a pair's embeddings ({evaluation.sheet.similarity_by})",
            y_label="pair accuracy",
            x_range=(min(spread) - margin, max(spread) + margin),
        )
    return {"rows": rows, "chart": chart, "metrics": OF_PAIRS, "similarity_by": evaluation.sheet.similarity_by}


def points(evaluation: Evaluation) -> list[dict[str, Any]]:
    """What the thresholds that were chosen before do on this benchmark."""
    rows = []
    for colour, one in enumerate(evaluation.contenders):
        for name, threshold in one.points.items():
            figures = [evaluation.figure(one.name, metric, point=name) for metric in ("recall", "fpr", "precision", "f1")]
            rows.append(
                {"name": one.name, "colour": colour, "point": name, "threshold": threshold, "cells": [_cell(figure) for figure in figures]}
            )
    return rows


# --- curves -----------------------------------------------------------------------------------------------------------


def curves(evaluation: Evaluation) -> dict[str, Any] | None:
    """Precision against recall, and reliability; constant classifiers have neither."""
    precision_recall, reliability, constant = [], [], []
    for colour, one in enumerate(evaluation.contenders):
        covered = covered_rows(evaluation.sheet, one) & evaluation.sheet.counted
        chosen = covered & ~np.isnan(evaluation.sheet.scores[:, colour])
        labels, scores = evaluation.sheet.labels[chosen], evaluation.sheet.scores[chosen, colour]
        if len(set(labels)) < 2 or len(set(scores)) < 2:
            constant.append(one.name)
            continue
        precision_recall.append(Line(f"{one.name}, n = {len(labels)}", _precision_recall(labels, scores), colour, is_stepped=True))
        reliability.append(_reliability(f"{one.name}, n = {len(labels)}", labels, scores, colour))
    if not precision_recall:
        return None
    return {
        "left_out": constant,
        "precision_recall": line_chart(precision_recall, label="Precision against recall", x_label="recall", y_label="precision"),
        "reliability": line_chart(
            reliability,
            label="Reliability: share of unsafe images against score",
            x_label="mean score in the bin",
            y_label="share unsafe",
            diagonal=True,
        ),
    }


def _precision_recall(labels: np.ndarray, scores: np.ndarray) -> list[tuple[float, float]]:
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])
    hits = np.cumsum(labels[order])[ends]
    recall, precision = hits / labels.sum(), hits / (ends + 1)
    if len(recall) > _MAX_POINTS:
        keep = np.unique(np.searchsorted(recall, np.linspace(recall[0], 1, _MAX_POINTS)))
        recall, precision = recall[keep], precision[keep]
    return list(zip(recall.tolist(), precision.tolist(), strict=True))


def _reliability(name: str, labels: np.ndarray, scores: np.ndarray, colour: int) -> Line:
    member = np.minimum((scores * _RELIABILITY_BINS).astype(int), _RELIABILITY_BINS - 1)
    points, low, high = [], [], []
    for i in sorted(set(member)):
        mine = labels[member == i]
        hits, n = int(mine.sum()), len(mine)
        if n < _MIN_SHARE_OF_BIN * len(labels):
            continue  # noise that would hide the rest
        points.append((float(scores[member == i].mean()), hits / n))
        ends = clopper_pearson(hits, n)
        low.append(ends[0])
        high.append(ends[1])
    return Line(name, points, colour, low, high, has_dots=True)


# --- robustness -------------------------------------------------------------------------------------------------------


def robustness(evaluation: Evaluation) -> dict[str, Any] | None:
    """Charts over epsilon, and a table a protocol."""
    rows = evaluation.robustness
    if not rows:
        return None
    names = [one.name for one in evaluation.contenders]
    colours = {name: colour for colour, name in enumerate(names)}
    charts = []
    in_levels = [
        row for row in rows if row["protocol"] == "pixels" and "8-bit levels" in row["unit"] and row["attack"] != "noise" and row["n"]
    ]
    for attack in sorted({row["attack"] for row in in_levels}):
        lines = []
        for name in names:
            mine = sorted((row for row in in_levels if (row["guard"], row["attack"]) == (name, attack)), key=lambda row: row["strength"])
            if mine:
                points = [(0.0, mine[0]["clean_accuracy"]), *((row["strength"], row["robust_accuracy"]) for row in mine)]
                low, high = ([None, *(row[f"robust_accuracy_{end}"] for row in mine)] for end in ("low", "high"))
                lines.append(Line(f"{name}, n = {mine[0]['n']}", points, colours[name], low, high, has_dots=True))
        ticks = sorted({x for line in lines for x, _ in line.points})
        charts.append(
            {
                "attack": attack,
                "svg": line_chart(
                    lines,
                    label=f"Robust accuracy against epsilon, attack {attack}",
                    x_label="epsilon in 8-bit levels",
                    y_label="robust accuracy",
                    x_range=(0.0, max(ticks)),
                    x_ticks=ticks,
                ),
            }
        )
    tables = []
    for protocol, title in (("unsafebench", "Robust accuracy, UnsafeBench's protocol"), ("pixels", "Robust accuracy on pixels")):
        mine = [row for row in rows if row["protocol"] == protocol]
        kinds = list(dict.fromkeys((row["attack"], row["strength"], row["unit"]) for row in mine))
        if kinds:
            body = []
            for attack, strength, unit in kinds:
                cells = [_robust_cell(mine, name, attack, strength) for name in names]
                body.append({"name": f"{attack} {strength:g}", "title": unit, "cells": cells})
                # without gradients every image that is asked about has 8 bits already
                by_gradient = [row for row in mine if row["n_passes"]]
                cells = [_robust_cell(by_gradient, name, attack, strength, "robust_accuracy_8bit") for name in names]
                if any(cell["value"] is not None for cell in cells):
                    what = "the same images rounded to 8 bits, as a file holds them, and preprocessed as every image is"
                    body.append({"name": f"{attack} {strength:g}, in 8 bits", "title": what, "cells": cells})
            clean = {"name": "untouched", "title": "the same images before", "cells": [_clean_cell(mine, name) for name in names]}
            tables.append({"protocol": protocol, "title": title, "first": "attack, strength", "columns": names, "rows": [clean, *body]})
    return {
        "charts": charts,
        "tables": tables,
        "violations": [row["violation"] for row in rows if row["violation"]],
        "notes": list(dict.fromkeys(f"{row['guard']}: {row['note']}" for row in rows if row["note"])),
    }


def _robust_cell(rows: Sequence[Row], name: str, attack: str, strength: float, figure: str = "robust_accuracy") -> dict[str, Any]:
    row = next((row for row in rows if (row["guard"], row["attack"], row["strength"]) == (name, attack, strength)), None)
    if row is None or row[figure] is None:
        return {"text": "–", "interval": "", "title": (row or {}).get("note") or "not measured", "value": None, "is_best": False}
    low, high = row[f"{figure}_low"], row[f"{figure}_high"]
    recall, fpr = (row[figure.replace("robust_accuracy", other)] for other in ("recall", "fpr"))
    said = f"n = {row['n']}, threshold {row['threshold']:.4g}, 95 % interval {low:.3f}–{high:.3f}, recall {plain(recall)}, FPR {plain(fpr)}"
    return {
        "text": f"{row[figure]:.3f}",
        "interval": f"{low:.3f}–{high:.3f}",
        "title": said,
        "value": row[figure],
        "is_best": False,
    }


def _clean_cell(rows: Sequence[Row], name: str) -> dict[str, Any]:
    row = next((row for row in rows if row["guard"] == name and row["clean_accuracy"] is not None), None)
    if row is None:
        return {"text": "–", "interval": "", "title": "not measured", "value": None, "is_best": False}
    return {
        "text": f"{row['clean_accuracy']:.3f}",
        "interval": "",
        "title": f"n = {row['n']}",
        "value": row["clean_accuracy"],
        "is_best": False,
    }
