"""In which order people should look at what was decided: the most valuable first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

_ORDER = {"review": 2, "error": 1, "block": 0}


def value(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Uncertain images first, nearest to a threshold; then what could not be decided; then what is blocked, most severe first."""
    score = row["score"]
    if score is None:
        return (_ORDER[row["action"]], 0.0)
    if row["action"] == "review":
        gap = min(abs(_odds(score) - _odds(row[name])) for name in ("threshold_review", "threshold_block"))
        return (_ORDER["review"], -gap)
    return (_ORDER[row["action"]], score)


def queue_order(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What is not allowed, in the order in which people should look at it; repeated inputs left out."""
    return sorted((row for row in rows if row["action"] != "allow" and row["duplicate_of"] is None), key=value, reverse=True)


def _odds(share: float) -> float:
    inside = min(max(share, 1e-12), 1 - 1e-12)
    return math.log(inside) - math.log1p(-inside)
