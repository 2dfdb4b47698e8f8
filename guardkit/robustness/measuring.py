"""How a guard holds out under attack and everyday edits: from a guard and labelled images to rows of one table.

`robustness_protocols.py` attacks; this module makes figures with intervals of what came out, and checks that the
attacks behave as attacks must. docs/robustness.md says what each column means.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.artifacts import write_table
from guardkit.embeddings import EmbeddingStore
from guardkit.metrics.intervals import clopper_pearson
from guardkit.progress import progress
from guardkit.robustness.protocols import PROTOCOLS, Outcome, RobustnessSettings, n_outcomes
from guardkit.robustness.victim import Victim
from guardkit.schema import Guard

__all__ = ["COLUMNS", "RobustnessSettings", "SanityCheck", "measure_robustness", "sanity_checks", "write_robustness"]

_TEXT, _COUNT, _SHARE = pa.string(), pa.int64(), pa.float64()
COLUMNS = pa.schema(
    {
        "guard": _TEXT, "guard_fingerprint": _TEXT, "threshold": pa.float64(),
        "protocol": _TEXT, "attack": _TEXT, "strength": pa.float64(), "unit": _TEXT,
        "n": _COUNT, "n_unsafe": _COUNT, "n_safe": _COUNT,
        "clean_accuracy": _SHARE, "clean_recall": _SHARE, "clean_fpr": _SHARE,
        "robust_accuracy": _SHARE, "robust_accuracy_low": _SHARE, "robust_accuracy_high": _SHARE, "recall": _SHARE, "fpr": _SHARE,
        "robust_accuracy_8bit": _SHARE, "robust_accuracy_8bit_low": _SHARE, "robust_accuracy_8bit_high": _SHARE,
        "recall_8bit": _SHARE, "fpr_8bit": _SHARE,
        "n_abstained_clean": _COUNT, "n_abstained": _COUNT,
        "largest_change": pa.float64(), "n_passes": _COUNT, "n_queries": _COUNT, "seconds": pa.float64(), "seed": _COUNT,
        "note": _TEXT, "violation": _TEXT,
    }
)  # fmt: skip
"""Of a row. Shares are fractions; what cannot be computed is null."""

_GRADIENT_ATTACKS = ("fgsm", "pgd", "square")


def measure_robustness(
    guard: Guard,
    images: Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str] | None,
    settings: RobustnessSettings,
    *,
    name: str | None = None,
    store: EmbeddingStore | None = None,
) -> list[dict[str, Any]]:
    """Attacks one guard.

    Args:
        guard: of either kind.
        images: (h, w, 3) uint8 RGB, of any sizes: those that the guard covers.
        labels: (n,) 1 = unsafe, 0 = safe.
        groups: (n,) images that belong together, such as a pair, have one value; None: each is its own.
        settings: what is measured.
        name: of the guard in the rows, instead of its own.
        store: embeddings of the guard's encoder; guards that share it have edited images embedded once.
    Returns:
        Rows with the columns of `COLUMNS`, one for each attack and strength. A row whose sanity check failed says so in
        `violation`; a row without figures says why in `note`.
    Raises:
        ValueError: lengths differ, a label is neither 0 nor 1, or the store is another encoder's.
    """
    labels = np.asarray(labels, np.int64)
    named = np.array(range(len(images)) if groups is None else list(groups), dtype=object)
    if not len(images) == len(labels) == len(named) or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"images, labels (0 or 1) and groups must be of one length, got {len(images)}, {len(labels)} and {len(named)}")
    victim = Victim(guard, store=store, batch_size=settings.batch_size)
    outcomes: Iterator[Outcome] = chain.from_iterable(
        protocol(victim, images, labels, settings) for name, protocol in PROTOCOLS.items() if name in settings.protocols
    )
    rows = [
        _row(guard, outcome, labels[outcome.rows], named[outcome.rows], settings)
        for outcome in progress(outcomes, total=n_outcomes(victim, settings), what=f"attacking {name or guard.name}")
    ]
    for row in rows:
        row["guard"] = name or guard.name
    for check in sanity_checks(rows):
        if not check.is_held:
            before = rows[check.row]["violation"]
            rows[check.row]["violation"] = check.text if before is None else f"{before}; {check.text}"
    return rows


def write_robustness(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows of any guards as one Parquet table, complete or not at all."""
    write_table(path, pa.Table.from_pylist(list(rows), schema=COLUMNS))


@dataclass(frozen=True)
class SanityCheck:
    """Something that holds of every sound attack.

    Attributes:
        text: what was compared and found, for people.
        is_held: whether it holds.
        row: of the table, where a violation belongs.
    """

    text: str
    is_held: bool
    row: int


def sanity_checks(rows: Sequence[dict[str, Any]]) -> list[SanityCheck]:
    """Checks rows of any guards (Carlini et al., 2019, "On evaluating adversarial robustness", section 5).

    PGD leaves no more images right than FGSM and the Square attack on the same images, a larger epsilon no more than a
    smaller one, and no attack changes a pixel by more than its epsilon. There is no tolerance: one image more is a
    violation, and the text says how many it is.
    """
    checks: list[SanityCheck] = []
    place = {
        (row["guard"], row["guard_fingerprint"], row["protocol"], row["attack"], row["strength"]): i
        for i, row in enumerate(rows)
        if row["n"]
    }

    def compare(stronger: int, weaker: int) -> None:
        a, b = rows[stronger], rows[weaker]
        if a["n"] != b["n"]:  # other images
            return
        more = round((a["robust_accuracy"] - b["robust_accuracy"]) * a["n"])
        said = f"leaves {more} more right of {a['n']} than" if more > 0 else "is at least as strong as"
        text = f"{a['guard']}, {a['protocol']}: {a['attack']} at {a['strength']:g} {said} {b['attack']} at {b['strength']:g}"
        checks.append(SanityCheck(text, more <= 0, stronger))

    for key, i in place.items():
        guard, fingerprint, protocol, attack, strength = key
        if attack == "pgd":
            for other in ("fgsm", "square"):
                if (weaker := place.get((guard, fingerprint, protocol, other, strength))) is not None:
                    compare(i, weaker)
        smaller = [one for one in place if one[:4] == key[:4] and one[4] < strength]
        if attack in _GRADIENT_ATTACKS and smaller:
            compare(i, place[max(smaller, key=lambda one: one[4])])
        change = rows[i]["largest_change"]
        if change is not None:
            # a float32 sum of a pixel and its change may be off by a unit in the last place
            within = change <= strength * (1 + 1e-4) + 1e-4
            text = f"{guard}, {protocol}: {attack} at {strength:g} changes at most {change:.4g} ({rows[i]['unit']})"
            checks.append(SanityCheck(text, within, i))
    return checks


def _row(guard: Guard, outcome: Outcome, labels: np.ndarray, groups: np.ndarray, settings: RobustnessSettings) -> dict[str, Any]:
    low, high = _interval(_right(outcome.values, labels), groups)
    low_8bit, high_8bit = (None, None) if outcome.rounded is None else _interval(_right(outcome.rounded, labels), groups)
    row: dict[str, Any] = {
        "guard": guard.name,
        "guard_fingerprint": guard.fingerprint,
        "threshold": float(guard.threshold),
        "protocol": outcome.protocol,
        "attack": outcome.attack,
        "strength": outcome.strength,
        "unit": outcome.unit,
        "n": len(labels),
        "n_unsafe": int((labels == 1).sum()),
        "n_safe": int((labels == 0).sum()),
        "robust_accuracy_low": low,
        "robust_accuracy_high": high,
        "robust_accuracy_8bit_low": low_8bit,
        "robust_accuracy_8bit_high": high_8bit,
        "n_abstained_clean": int(np.isnan(outcome.clean).sum()),
        "n_abstained": int(np.isnan(outcome.values).sum()),
        "largest_change": outcome.largest_change,
        "n_passes": int(outcome.n_passes),
        "n_queries": int(outcome.n_queries),
        "seconds": outcome.seconds,
        "seed": settings.seed,
        "note": outcome.note,
        "violation": None,
    }
    figures = {
        "clean_accuracy": outcome.clean, "clean_recall": outcome.clean, "clean_fpr": outcome.clean,
        "robust_accuracy": outcome.values, "recall": outcome.values, "fpr": outcome.values,
        "robust_accuracy_8bit": outcome.rounded, "recall_8bit": outcome.rounded, "fpr_8bit": outcome.rounded,
    }  # fmt: skip
    for name, values in figures.items():
        row[name] = None if values is None else _figure(name, values, labels)
    return {name: row[name] for name in COLUMNS.names}


def _figure(name: str, values: np.ndarray, labels: np.ndarray) -> float | None:
    chosen = _right(values, labels) if "accuracy" in name else (values >= 0)[labels == (1 if "recall" in name else 0)]
    return float(chosen.mean()) if len(chosen) else None


def _right(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    # an abstention is never right, also on a safe image: nothing was decided
    return ((values >= 0) == (labels == 1)) & ~np.isnan(values)


def _interval(right: np.ndarray, groups: np.ndarray) -> tuple[float | None, float | None]:
    """95 % Clopper-Pearson interval of a share.

    Where images come in groups, the number of groups stands for that of images, as if all images of a group shared their
    fate: an interval that is rather too wide than too narrow, and that a share of 0 or 1 does not collapse.
    """
    if not len(right):
        return None, None
    n = len(set(groups))
    return clopper_pearson(float(right.mean()) * n, n)
