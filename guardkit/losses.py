"""Losses on logits, as pure functions. Each class counts by a stated prevalence, not by how often it happens to occur."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
    """A soft margin between twins: the mean of softplus(margin - (unsafe - counterfactual)).

    The logistic form of the pairwise ranking loss (RankNet, Burges et al., 2005), shifted by a margin.

    Args:
        unsafe_logits: (p,) decision logits of unsafe images.
        counterfactual_logits: (p,) those of their twins, in the same order.
        margin: in logits, at least 0.
    Returns:
        A scalar; 0 when there is no pair.
    """
    if len(unsafe_logits) == 0:
        return unsafe_logits.sum()
    return functional.softplus(margin - (unsafe_logits - counterfactual_logits)).mean()


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values, 0.0).sum() / where.sum().clamp(min=1)
