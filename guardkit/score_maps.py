"""From a head's logits to calibrated ones: increasing maps, so that the order of images, and any threshold's meaning, stay as they are.

What calibration fits (`guardkit.metrics.calibrators`) is kept in this form: straight lines between knots. It works on tensors, can be
differentiated, and exports to other runtimes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

KINDS = ("none", "temperature", "platt", "isotonic")
MAX_KNOTS = 1000
_LARGEST = 1e6  # of a logit or slope in a file
_AT_ONCE = 16  # pieces between knots: few steps for programs that trace this, and little memory where there are millions of logits


@dataclass(frozen=True)
class ScoreMap:
    """An increasing map from logits to logits, straight between its knots and beyond them.

    Attributes:
        kind: how it was fitted, one of `KINDS`.
        knots: (m,) increasing logits.
        values: (m,) what they become, increasing.
        slopes: below the first knot and above the last, both above 0.
    Raises:
        ValueError: it would not increase everywhere.
    """

    kind: str
    knots: tuple[float, ...]
    values: tuple[float, ...]
    slopes: tuple[float, float]

    def __post_init__(self) -> None:
        every = (*self.knots, *self.values, *self.slopes)
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 1 <= len(self.knots) == len(self.values) <= MAX_KNOTS:
            raise ValueError(f"knots and values must be as many, from 1 to {MAX_KNOTS}, got {len(self.knots)} and {len(self.values)}")
        if not all(math.isfinite(value) and abs(value) <= _LARGEST for value in every):
            raise ValueError(f"knots, values and slopes must be numbers of at most {_LARGEST:g}")
        if min(self.slopes) <= 0 or any(a >= b for row in (self.knots, self.values) for a, b in pairwise(row)):
            raise ValueError("knots and values must increase, and slopes be above 0")

    @classmethod
    def line(cls, kind: str, slope: float, shift: float) -> ScoreMap:
        """slope * logit + shift."""
        return cls(kind, (0.0,), (shift,), (slope, slope))

    def shifted(self, by: float) -> ScoreMap:
        """The same, plus a constant."""
        return ScoreMap(self.kind, self.knots, tuple(value + by for value in self.values), self.slopes)

    def inverse(self) -> ScoreMap:
        """The map back."""
        below, above = self.slopes
        return ScoreMap(self.kind, self.values, self.knots, (1 / below, 1 / above))

    def __call__(self, logits: Tensor) -> Tensor:
        """Of any shape, elementwise."""
        first, last = self.knots[0], self.knots[-1]
        mapped = self.values[0] + self.slopes[0] * (logits - first).clamp(max=0) + self.slopes[1] * (logits - last).clamp(min=0)
        # widths and slopes in double precision: knots that are close may be one in the precision of the logits
        pieces = [
            (left, right - left, (high - low) / (right - left))
            for (left, right), (low, high) in zip(pairwise(self.knots), pairwise(self.values), strict=True)
        ]
        for start in range(0, len(pieces), _AT_ONCE):
            lefts, widths, slopes = torch.tensor(pieces[start : start + _AT_ONCE], dtype=logits.dtype, device=logits.device).unbind(1)
            mapped = mapped + (torch.minimum((logits.unsqueeze(-1) - lefts).clamp(min=0), widths) * slopes).sum(dim=-1)
        return mapped

    def of_score(self, score: float) -> float:
        """What becomes of a score, or a threshold, in [0, 1]; 0 and 1 stay."""
        if not 0 < score < 1:
            return score
        logit = torch.tensor(math.log(score) - math.log1p(-score), dtype=torch.float64)
        return float(torch.sigmoid(self(logit)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"kind": self.kind, "knots": list(self.knots), "values": list(self.values), "slopes": list(self.slopes)}

    @classmethod
    def from_dict(cls, data: Any) -> ScoreMap:
        """From what `to_dict` gives.

        Raises:
            ValueError: from anything else.
        """
        lists = ("knots", "values", "slopes")
        if not isinstance(data, Mapping) or set(data) != {"kind", *lists} or not all(_are_numbers(data[name]) for name in lists):
            raise ValueError("a score map must have kind, and numbers as knots, values and slopes")
        if len(data["slopes"]) != 2:
            raise ValueError("a score map must have two slopes")
        return cls(str(data["kind"]), tuple(data["knots"]), tuple(data["values"]), (data["slopes"][0], data["slopes"][1]))


@dataclass(frozen=True)
class Calibration:
    """What makes a guard's scores probabilities.

    Attributes:
        decision: of the logit of unsafe.
        categories: category -> of its logit; those that could not be fitted are restated at the prevalence only, those that are missing stay as
            they are.
        about: on which images, at which prevalence, what was promised; plain JSON.
    """

    decision: ScoreMap
    categories: Mapping[str, ScoreMap] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def promises(self) -> list[str]:
        """What the thresholds of the decision promise, in sentences."""
        return list(self.about.get("promises", []))

    def apply(self, logits: Tensor, categories: Sequence[str]) -> Tensor:
        """(n, 1 + k) logits of a head -> (n, 1 + k) calibrated ones; `categories` are the k names."""
        maps = [self.decision, *(self.categories.get(name) for name in categories)]
        return torch.stack([column if one is None else one(column) for one, column in zip(maps, logits.unbind(1), strict=True)], dim=1)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        maps = {name: one.to_dict() for name, one in self.categories.items()}
        return {"decision": self.decision.to_dict(), "categories": maps, "about": dict(self.about)}

    @classmethod
    def from_dict(cls, data: Any) -> Calibration:
        """From what `to_dict` gives.

        Raises:
            ValueError: from anything else.
        """
        parts = ("categories", "about")
        if not isinstance(data, Mapping) or set(data) != {"decision", *parts} or not all(isinstance(data[part], Mapping) for part in parts):
            raise ValueError("a calibration must have a map for the decision, maps for categories, and facts about it")
        for name in ("promises", "promises_by_category"):
            said = data["about"].get(name, [])
            if not isinstance(said, list) or not all(isinstance(one, str) for one in said):
                raise ValueError(f"the {name} of a calibration must be a list of texts")
        maps = {name: ScoreMap.from_dict(one) for name, one in data["categories"].items()}
        return cls(ScoreMap.from_dict(data["decision"]), maps, data["about"])


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
