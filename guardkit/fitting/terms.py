"""The terms of the training objective. Each is written here once, and every optimizer reads it: Lightning's training, heads that are
trained side by side, and the solver of linear heads.

A term is a weighted mean of one function over *gaps*: logits of images, or differences between the logits of two images. So it says
which gaps a batch has, how they count, and the function. A term of another package is one more subclass of `Term`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Gaps:
    """Where a term looks in a batch of n images, and how much each place counts.

    Attributes:
        labels: (u,) or (u, c) float, of each gap: 1 where it shall be high and 0 where it shall be low.
        parts: weights with the places that they belong to, bool like the labels. A term is the sum over its parts of the
            weight times the mean over the part. An empty part adds nothing, and what is in no part does not count.
        columns: which of an image's logits: a number for gaps (u,), a slice for (u, c). 0 is the decision, 1 + i category i.
        rows: (u,) int64, the images; None: all of them, u = n.
        others: (u,) int64, images whose logits are taken off; None: nothing is.
    """

    labels: Tensor
    parts: Sequence[tuple[float, Tensor]]
    columns: int | slice = 0
    rows: Tensor | None = None
    others: Tensor | None = None

    def values(self, logits: Tensor) -> Tensor:
        """(n, 1 + k) logits -> gaps like the labels; with an axis in front of both for several batches."""
        found, axis = logits[..., self.columns], logits.ndim - 2

        def at(rows: Tensor) -> Tensor:
            return found.gather(axis, rows if found.ndim == rows.ndim else rows[..., None].expand(*rows.shape, found.shape[-1]))

        values = found if self.rows is None else at(self.rows)
        return values if self.others is None else values - at(self.others)

    def shares(self, weight: float) -> Tensor:
        """What each gap is multiplied with in a term of this weight, float64 like the labels."""
        total = torch.zeros_like(self.labels, dtype=torch.double)
        for part, where in self.parts:
            total[where] += weight * part / max(1, int(where.sum()))
        return total


@dataclass(frozen=True)
class Term(ABC):
    """One term of the objective.

    A subclass is a frozen dataclass whose fields are numbers or texts: they are what is known of it in a run's settings.

    Attributes:
        weight: beside the other terms, at least 0; 0 leaves it out.
        is_convex: whether `each` is convex in the gap and its slope has no jumps. Linear heads then have an optimum and are
            brought to it; with a term that says no they are trained as other heads are.
    """

    weight: float = 1.0
    is_convex: ClassVar[bool] = False

    @abstractmethod
    def gaps(self, batch: Mapping[str, Tensor]) -> Gaps:
        """Of a batch, see `guardkit.data.arms.assemble`."""

    @abstractmethod
    def each(self, values: Tensor, labels: Tensor) -> Tensor:
        """The function, number by number: gaps and labels of any one shape -> losses of that shape."""

    def softplus_margin(self) -> float | None:
        """m where `each` is softplus(m - gap), with the gap's sign turned where its label is 0; None: another function.

        The solver has the derivatives of the softplus by heart, and differentiates other functions.
        """
        return None

    def loss(self, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """(n, 1 + k) logits -> a scalar, without the weight."""
        gaps = self.gaps(batch)
        each = self.each(gaps.values(logits), gaps.labels.to(logits))
        total = logits.new_zeros(())
        for part, where in gaps.parts:
            total = total + part * (torch.where(where, each, 0.0).sum() / where.sum().clamp(min=1))
        return total


@dataclass(frozen=True)
class DecisionTerm(Term):
    """Binary cross-entropy of the decision.

    Attributes:
        prevalence: weight of the mean over unsafe images; safe ones have the rest. Weighting the classes shifts the scores as
            a change of prevalence would (Elkan, 2001, "The foundations of cost-sensitive learning").
    """

    prevalence: float = 0.5
    is_convex: ClassVar[bool] = True

    def gaps(self, batch: Mapping[str, Tensor]) -> Gaps:
        """Every image."""
        labels = batch["labels"]
        return Gaps(labels, [(self.prevalence, labels == 1), (1 - self.prevalence, labels == 0)])

    def each(self, values: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return functional.binary_cross_entropy_with_logits(values, labels, reduction="none")

    def softplus_margin(self) -> float:
        """Cross-entropy is a softplus without a margin."""
        return 0.0


@dataclass(frozen=True)
class CategoryTerm(Term):
    """Multi-label cross-entropy over the policy's categories, present and absent ones balanced; unknown ones are left out."""

    is_convex: ClassVar[bool] = True

    def gaps(self, batch: Mapping[str, Tensor]) -> Gaps:
        """Every image with every category."""
        targets = batch["targets"]
        return Gaps(torch.nan_to_num(targets), [(0.5, targets == 1), (0.5, targets == 0)], slice(1, None))

    def each(self, values: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return functional.binary_cross_entropy_with_logits(values, labels, reduction="none")

    def softplus_margin(self) -> float:
        """Cross-entropy is a softplus without a margin."""
        return 0.0


@dataclass(frozen=True)
class PairTerm(Term):
    """A soft margin between unsafe images and their counterfactuals.

    The logistic form of the pairwise ranking loss (RankNet, Burges et al., 2005), shifted by a margin.

    Attributes:
        margin: in logits, at least 0.
    """

    margin: float = 1.0
    is_convex: ClassVar[bool] = True

    def gaps(self, batch: Mapping[str, Tensor]) -> Gaps:
        """Every pair."""
        rows = batch["unsafe_rows"]
        everywhere = torch.ones_like(rows, dtype=torch.bool)
        return Gaps(everywhere.float(), [(1.0, everywhere)], rows=rows, others=batch["counterfactual_rows"])

    def each(self, values: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """softplus(margin - gap)."""
        return functional.softplus(self.margin - values)

    def softplus_margin(self) -> float:
        """As it stands."""
        return self.margin
