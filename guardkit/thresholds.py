"""What is done with a score: a band for the decision and one for each category, and which of them decide within a scope.

Knows no model. Scores and thresholds are numbers in [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from guardkit.schema import SAFE, UNSAFE, Decision, InputError

DEFAULT = 0.5


@dataclass(frozen=True)
class Band:
    """Two thresholds of one score: below `review` an image is allowed, from `review` on a person looks at it, from `block` on it is blocked.

    Where both are the same, nothing goes to a person.

    Raises:
        InputError: one is no number in [0, 1], or `review` is above `block`.
    """

    review: float
    block: float

    def __post_init__(self) -> None:
        for name in ("review", "block"):
            object.__setattr__(self, name, checked_threshold(getattr(self, name), name))
        if self.review > self.block:
            raise InputError(f"review must not be above block, got review={self.review:g} and block={self.block:g}; swap the two")

    @classmethod
    def at(cls, threshold: float) -> Band:
        """Nothing for a person: blocked from there on. Raises InputError unless it is a number in [0, 1]."""
        return cls(checked_threshold(threshold), threshold)


@dataclass(frozen=True)
class Thresholds:
    """The bands of a guard.

    Attributes:
        decision: of the score of unsafe, by which an image is decided as long as no scope is given.
        categories: category -> the band of its own score. Within a scope those decide, and without one they say what an image that is
            flagged violates.
    """

    decision: Band
    categories: Mapping[str, Band] = field(default_factory=dict)

    @classmethod
    def usual(cls, categories: Collection[str], threshold: float = DEFAULT) -> Thresholds:
        """Those of a guard that nobody calibrated: one threshold for the decision, 0.5 for each category."""
        return cls(Band.at(threshold), dict.fromkeys(categories, Band.at(DEFAULT)))

    def decide(self, score: float, categories: Mapping[str, float], scope: Collection[str] | None = None) -> Decision:
        """The decision on an image.

        Without a scope the score of unsafe decides. Within one, the categories in it do: the one that is furthest above its thresholds, by
        action first, gives the decision its score and its thresholds.

        Args:
            score: of unsafe.
            categories: category -> its score, of all.
            scope: as `check_scope` gives it; None: all that the policy forbids.
        """
        violated = [
            name for name, value in categories.items() if (scope is None or name in scope) and value >= self.categories[name].review
        ]
        if scope is None:
            band = self.decision
            if score < band.review:
                violated = []
            elif not violated and categories:
                violated = [max(categories, key=categories.__getitem__)]
        else:
            name = max(scope, key=lambda one: _rank(categories[one], self.categories[one]))
            score, band = categories[name], self.categories[name]
        violated.sort(key=lambda one: -categories[one])
        return Decision(
            UNSAFE if score >= band.review else SAFE, score, band.review, categories, threshold_block=band.block, violated=tuple(violated)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"decision": _plain(self.decision), "categories": {name: _plain(band) for name, band in self.categories.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Thresholds:
        """From what `to_dict` gives, checked before."""
        return cls(Band(**data["decision"]), {name: Band(**band) for name, band in data["categories"].items()})


def undecided(thresholds: Thresholds, reason: str) -> Decision:
    """The decision on an image without a score."""
    return Decision(None, math.nan, thresholds.decision.review, {}, reason, threshold_block=thresholds.decision.block)


def check_scope(scope: Any, categories: Collection[str]) -> tuple[str, ...] | None:
    """The categories that decide, each once; None: all, by the score of unsafe.

    Args:
        scope: a list of names, or None.
        categories: those that a guard knows.
    Raises:
        InputError: no list, an empty one, or a category that the guard does not know.
    """
    if scope is None:
        return None
    if isinstance(scope, str) or not isinstance(scope, Collection):
        raise InputError(f"scope must be a list of categories, as in scope=[{scope}], got {scope!r}")
    names = tuple(dict.fromkeys(scope))
    if not names:
        raise InputError(
            f"scope is empty: nothing would ever be flagged; name categories ({', '.join(categories)}), or leave scope out for all"
        )
    unknown = [name for name in names if name not in categories]
    if unknown:
        raise InputError(f"scope names the category {unknown[0]!r}, which this guard does not know; it knows {', '.join(categories)}")
    return names


def checked_threshold(value: Any, name: str = "threshold") -> float:
    """A threshold as a number. Raises InputError unless it is one in [0, 1]."""
    is_real = isinstance(value, Real) and not isinstance(value, bool)
    if not is_real or not 0 <= value <= 1:
        raise InputError(f"{name} must lie in [0, 1], got {value!r}")
    return float(value)


def _rank(score: float, band: Band) -> tuple[int, float]:
    """Orders categories by what they have done with an image, then by how clearly."""
    if score >= band.block:
        return 2, score - band.block
    return (1, score - band.review) if score >= band.review else (0, score - band.review)


def _plain(band: Band) -> dict[str, float]:
    return {"review": band.review, "block": band.block}
