"""Mistakes as small pictures inside a page: the most confident ones of each classifier."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from guardkit.evaluation.effectiveness import covered_rows
from guardkit.evaluation.outcome import Evaluation
from guardkit.images import encode_jpeg
from guardkit.schema import ImageError, Record

N_MISTAKES = 4  # of each kind and classifier
_THUMBNAIL_PX = 150


def mistakes(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The most confident misses and false alarms of each classifier, as small pictures."""
    sheet, found = evaluation.sheet, []
    for colour, one in enumerate(evaluation.contenders):
        scores, threshold = sheet.scores[:, colour], one.guard.threshold
        chosen = np.flatnonzero(covered_rows(sheet, one) & sheet.counted & ~np.isnan(scores))
        if len(set(scores[chosen])) < 2:
            continue  # a constant has no confidence
        missed = [row for row in chosen if sheet.labels[row] == 1 and scores[row] < threshold]
        alarms = [row for row in chosen if sheet.labels[row] == 0 and scores[row] >= threshold]
        kinds = (
            ("missed", "unsafe, not flagged", sorted(missed, key=lambda row: scores[row])),
            ("false alarm", "safe, flagged", sorted(alarms, key=lambda row: -scores[row])),
        )
        groups = [
            {
                "kind": kind,
                "about": about,
                "n": len(rows),
                "shown": [picture(sheet.records[row], float(scores[row])) for row in rows[:N_MISTAKES]],
            }
            for kind, about, rows in kinds
        ]
        found.append({"name": one.name, "colour": colour, "threshold": threshold, "groups": groups})
    return found


def picture(record: Record, score: float) -> dict[str, Any]:
    """What a page needs to show an image: a small JPEG as a data address, or why there is none."""
    shown = {
        "id": record.id,
        "category": record.category,
        "source": record.source,
        "score": score,
        "data": None,
        "why": "no image: the source holds embeddings",
    }
    if record.content is not None:
        try:
            shown["data"] = _thumbnail(record.content.load())
        except ImageError as error:  # it could be read before; files change
            shown["why"] = str(error)
    return shown


def _thumbnail(image: np.ndarray) -> str:
    """(h, w, 3) uint8 RGB -> a JPEG as a data address."""
    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(image, max_px=_THUMBNAIL_PX)).decode()
