"""What each classifier costs, as a table for a page and a text alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COST_TITLE = "What each classifier costs"
COST_ABOUT = (
    "Parameters are numbers in its weights. Milliseconds an image are those of this run on this machine: its own come on top of its encoder's, "
    "which all classifiers on it share; reading images is in neither. Labels are images that it was trained on."
)
COST_HEADER = (
    "classifier",
    "own parameters",
    "parameters of its encoder",
    "own ms an image",
    "ms an image of its encoder",
    "reads the policy",
    "labels seen",
)
_FIELDS = ("parameters", "encoder_parameters", "ms_per_image", "encoder_ms_per_image", "reads_policy", "n_labels")


def cost_rows(costs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a classifier: its name, and a cell for each further column of `COST_HEADER`.

    Args:
        costs: classifier -> what `guardkit.evaluation.costs.cost` says.
    """
    return [{"name": name, "cells": [_cell(cost, field) for field in _FIELDS]} for name, cost in costs.items()]


def _cell(cost: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = cost[field]
    if value is None:
        return {"text": "–", "interval": "", "title": cost["reasons"][field], "is_best": False, "is_text": False}
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif field.endswith("ms_per_image"):
        text = f"{value:.2g}" if value < 1 else f"{value:,.1f}"
    else:
        text = f"{value:,}"
    return {"text": text, "interval": "", "title": "", "is_best": False, "is_text": False}
