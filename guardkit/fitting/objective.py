"""What a head is trained for: the terms of `guardkit.fitting.terms` with their settings, and the pull towards the start.

Each class counts by a stated prevalence, not by how often it happens to occur.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from guardkit.checks import check_number
from guardkit.fitting.terms import CategoryTerm, DecisionTerm, PairTerm, Term
from guardkit.schema import InputError, shortened


@dataclass(frozen=True)
class Objective:
    """What a head is trained for.

    Attributes:
        prevalence: share of unsafe images to train for, in (0, 1); classes are weighted to it.
        pair_weight: of the pair loss beside cross-entropy, at least 0; 0 leaves it out.
        pair_margin: between an unsafe image and its counterfactual, in logits, at least 0.
        category_weight: of the category loss, at least 0; 0 leaves it out.
        l2: at least 0; half of it times the squared distance of the weights from where they started is added: from zero for
            a linear head (ridge), from the policy's texts for an anchored or a prompt head. None: as the head has it (`Head.usual_l2`).
        terms: further ones, by a name that settings and messages call them.
    Raises:
        InputError: a value out of range, or something that is no `Term`.
    """

    prevalence: float = 0.5
    pair_weight: float = 1.0
    pair_margin: float = 1.0
    category_weight: float = 0.5
    l2: float | None = None
    terms: Mapping[str, Term] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_number("loss.prevalence", self.prevalence, "(0, 1)")
        for name in ("pair_weight", "pair_margin", "category_weight", "l2"):
            check_number(f"loss.{name}", getattr(self, name), "[0, inf)", optional=name == "l2")
        for name, term in self.terms.items():
            if not isinstance(term, Term):
                raise InputError(f"loss.terms.{name} must be a guardkit.Term, got {term!r}; docs/extension has one")
            check_number(f"loss.terms.{name}.weight", term.weight, "[0, inf)")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Objective:
        """The objective with these settings in place of the defaults.

        Raises:
            InputError: a name that there is not, or a value out of range.
        """
        if not isinstance(settings, Mapping):
            raise InputError(f"loss must be a dictionary of settings, got {shortened(repr(settings))}")
        names = [one.name for one in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise InputError(f"there is no loss.{unknown[0]}; there are {', '.join(names)}")
        return cls(**settings)

    @property
    def settings(self) -> dict[str, Any]:
        """In plain values; further terms with their classes."""
        known = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "terms"}
        further = {
            name: {"kind": f"{type(term).__module__}:{type(term).__qualname__}", **asdict(term)} for name, term in self.terms.items()
        }
        return known | ({"terms": further} if further else {})

    @cached_property
    def active(self) -> tuple[Term, ...]:
        """All terms that count."""
        own = (DecisionTerm(1.0, self.prevalence), CategoryTerm(self.category_weight), PairTerm(self.pair_weight, self.pair_margin))
        return tuple(term for term in (*own, *self.terms.values()) if term.weight)

    @property
    def is_convex(self) -> bool:
        """Whether linear heads have an optimum to be brought to."""
        return all(term.is_convex for term in self.active)

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """All terms, without the pull towards the start.

        Args:
            logits: (n, 1 + k), the decision first.
            batch: see `guardkit.data.arms.make_batch`.
        Returns:
            A scalar.
        """
        total = logits.new_zeros(())
        for term in self.active:
            total = total + term.weight * term.loss(logits, batch)
        return total


def start_of(weights: Mapping[str, Tensor], n_axes: int = 0) -> dict[str, Tensor]:
    """Where weights are pulled to: a copy of all that are matrices. Biases and scales are free.

    Args:
        weights: of a head, or of several in one tensor each.
        n_axes: in front of each for the heads.
    """
    return {name: value.detach().clone() for name, value in weights.items() if value.ndim > n_axes + 1}


def penalised(loss: Tensor, weights: Mapping[str, Tensor], start: Mapping[str, Tensor], l2: float | Tensor) -> Tensor:
    """The loss with the pull of the weights towards their start: of one head, or (m,) losses of m heads, each with its own l2."""
    for name, there in start.items():
        loss = loss + 0.5 * l2 * (weights[name] - there.to(weights[name])).flatten(loss.ndim).square().sum(-1)
    return loss
