"""What a threshold would have cost on the images that a guard was calibrated on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import read_json
from guardkit.classifier import GuardClassifier
from guardkit.evaluation.calibration import DECISION, SCORES, at_band, score_column
from guardkit.reading import read_table
from guardkit.schema import SAFE, UNSAFE, InputError
from guardkit.thresholds import Band

log = logging.getLogger(__name__)

_FACTS = "calibration.json"


class Costs:
    """The scores of calibration images, and what was promised.

    Args:
        folder: that `calibrate` wrote.
        guard: whose scores they are.
    Raises:
        InputError: no such folder, or it is of another guard.
    """

    def __init__(self, folder: Path, guard: GuardClassifier) -> None:
        table = read_table(folder / SCORES, mend="run calibrate again")
        facts = read_json(folder / _FACTS, "a calibration", mend="run calibrate again")
        if (table.schema.metadata or {}).get(b"guard") != guard.fingerprint.encode():
            raise InputError(f"{folder} is the calibration of another guard than this one; give the folder that calibrate wrote with it")
        names = (DECISION, *guard.policy.category_names)
        try:
            self._labels = np.array(table["label"].to_pylist(), int)
            self._categories = np.array([one or "" for one in table["category"].to_pylist()])
            self._scores = {name: table[score_column(name)].to_numpy().astype(float) for name in names}
            self._columns: Mapping[str, Any] = {name: facts["columns"][name] for name in names}
            self.asked: Mapping[str, Any] = facts["asked"]
            if not all(((scores >= 0) & (scores <= 1)).all() for scores in self._scores.values()) or not 0 < self.asked["prevalence"] < 1:
                raise ValueError("scores and prevalence must lie between 0 and 1")
            for name, one in self._columns.items():
                self.of(name, Band(one["review"], one["block"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder} was changed after calibrate wrote it ({type(error).__name__}: {error}); run calibrate again"
            ) from error

    @property
    def columns(self) -> tuple[str, ...]:
        """The decision and the categories."""
        return tuple(self._scores)

    def of(self, column: str, band: Band) -> dict[str, Any]:
        """Plain JSON: shares, precision and what is left of the promises at other thresholds of the decision, or of a category.

        Raises:
            InputError: no such column.
        """
        if column not in self._scores:
            raise InputError(f"there is no {column!r}; there are {', '.join(self._scores)}")
        own = self._labels == UNSAFE if column == DECISION else (self._labels == UNSAFE) & (self._categories == column)
        scores, prevalence = self._scores[column], float(self.asked["prevalence"])
        return {
            "figures": at_band(scores[self._labels == SAFE], scores[own], band, prevalence),
            "prevalence": prevalence,
            "promises": [
                {"says": one["says"], "holds": _holds(one, band, self._columns[column]["block"])}
                for one in self._columns[column]["promises"]
                if one["says"] is not None
            ],
            "line": _line(column, band),
        }


def costs_of(guard: GuardClassifier, place: str | Path, calibration: str | Path | None = None) -> Costs | None:
    """From the folder that `calibrate` wrote: the one that is named, or the one that the guard lies in.

    Args:
        guard: as it was loaded.
        place: where from.
        calibration: the folder; None: look beside the guard.
    Returns:
        None where nothing is beside the guard, or only what is of another one.
    Raises:
        InputError: the folder that is named holds no calibration, or that of another guard.
    """
    if calibration is not None:
        folder = Path(calibration).expanduser()
        if not (folder / SCORES).is_file():
            raise InputError(f"calibration={folder} holds no {SCORES}; give a folder that calibrate wrote")
        return Costs(folder, guard)
    for folder in (Path(place).expanduser(), Path(place).expanduser().parent):
        if (folder / SCORES).is_file() and (folder / _FACTS).is_file():
            try:
                return Costs(folder, guard)
            except InputError as error:
                log.warning("%s", error)
    return None


def _holds(promise: Mapping[str, Any], band: Band, block: float) -> bool:
    # what is blocked may only become less, what is found only more, and what lies between the two only less
    if promise["kind"] in ("max_fpr", "max_fpr_of_others"):
        return bool(band.block >= promise["threshold"])
    if promise["kind"] == "min_recall":
        return bool(band.review <= promise["threshold"])
    return bool(band.review >= band.block or (band.review >= promise["threshold"] and band.block <= block))


def _line(column: str, band: Band) -> str:
    """What sets it in Python."""
    here = f"Band({band.review:.6g}, {band.block:.6g})"
    if column == DECISION:
        return f"guard.thresholds = Thresholds({here}, guard.thresholds.categories)"
    return f"guard.thresholds = Thresholds(guard.thresholds.decision, {{**guard.thresholds.categories, {column!r}: {here}}})"
