"""The training objective, on logits. Each class counts by a stated prevalence, not by how often it happens to occur."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional

from guardkit.checks import check_number
from guardkit.schema import InputError


@dataclass(frozen=True)
class Objective:
    """What a head is trained for.

    Attributes:
        prevalence: share of unsafe images to train for, in (0, 1); classes are weighted to it.
        pair_weight: of the pair loss beside cross-entropy, at least 0; 0 leaves it out.
        pair_margin: between an unsafe image and its counterfactual, in logits, at least 0.
        category_weight: of the category loss, at least 0; 0 leaves it out.
        l2: at least 0; half of it times the squared distance of the weights from where they started is added: from zero for
            a linear head (ridge), from the policy's texts for a prompt head.
    Raises:
        InputError: a value out of range.
    """

    prevalence: float = 0.5
    pair_weight: float = 1.0
    pair_margin: float = 1.0
    category_weight: float = 0.5
    l2: float = 0.0

    def __post_init__(self) -> None:
        check_number("loss.prevalence", self.prevalence, "(0, 1)")
        for name in ("pair_weight", "pair_margin", "category_weight", "l2"):
            check_number(f"loss.{name}", getattr(self, name), "[0, inf)")

    @classmethod
    def of(cls, settings: Mapping[str, float]) -> Objective:
        """The objective with these settings in place of the defaults.

        Raises:
            InputError: a name that there is not, or a value out of range.
        """
        names = [one.name for one in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise InputError(f"there is no loss.{unknown[0]}; there are {', '.join(names)}")
        return cls(**settings)

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """Decision, category and pair loss.

        Args:
            logits: (n, 1 + k), the decision first.
            batch: see `guardkit.data.arms.make_batch`.
        Returns:
            A scalar.
        """
        decision = logits[:, 0]
        total = decision_loss(decision, batch["labels"], self.prevalence)
        if self.category_weight:
            total = total + self.category_weight * category_loss(logits[:, 1:], batch["targets"])
        if self.pair_weight:
            pairs = pair_loss(decision[batch["unsafe_rows"]], decision[batch["counterfactual_rows"]], self.pair_margin)
            total = total + self.pair_weight * pairs
        return total


def decision_loss(logits: Tensor, labels: Tensor, prevalence: float) -> Tensor:
    """Cross-entropy of the decision in a population with the given share of unsafe images.

    Args:
        logits: (n,) decision logits.
        labels: (n,) float, 1 = unsafe, 0 = safe.
        prevalence: share of unsafe images to train for, in (0, 1). Weighting the classes shifts the scores as a change
            of prevalence would (Elkan, 2001, "The foundations of cost-sensitive learning").
    Returns:
        A scalar. A class that is missing from the batch adds nothing.
    """
    each = functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return prevalence * _mean(each, labels == 1) + (1 - prevalence) * _mean(each, labels == 0)


def category_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Multi-label cross-entropy over the policy's categories, present and absent ones balanced.

    Args:
        logits: (n, k) category logits.
        targets: (n, k) float, 1 = violated, 0 = not violated, NaN = unknown: left out.
    """
    known = ~targets.isnan()
    each = functional.binary_cross_entropy_with_logits(logits, torch.nan_to_num(targets), reduction="none")
    return (_mean(each, known & (targets == 1)) + _mean(each, known & (targets == 0))) / 2


def pair_loss(unsafe_logits: Tensor, counterfactual_logits: Tensor, margin: float) -> Tensor:
    """A soft margin between unsafe images and their counterfactuals: the mean of softplus(margin - (unsafe - counterfactual)).

    The logistic form of the pairwise ranking loss (RankNet, Burges et al., 2005), shifted by a margin.

    Args:
        unsafe_logits: (p,) decision logits of unsafe images.
        counterfactual_logits: (p,) those of their counterfactuals, in the same order.
        margin: in logits, at least 0.
    Returns:
        A scalar; 0 when there is no pair.
    """
    if len(unsafe_logits) == 0:
        return unsafe_logits.sum()
    return functional.softplus(margin - (unsafe_logits - counterfactual_logits)).mean()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)
