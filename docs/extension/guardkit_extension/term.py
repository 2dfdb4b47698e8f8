"""A term of the objective: which gaps between logits it looks at, and the function of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from guardkit import Gaps, Term


@dataclass(frozen=True)
class SquaredHinge(Term):
    """Unsafe images shall have higher logits than their counterfactuals: the squared lack of a margin.

    Attributes:
        margin: in logits.
    """

    margin: float = 1.0
    is_convex: ClassVar[bool] = True  # and smooth, so that linear heads can be brought to their optimum

    def gaps(self, batch: Mapping[str, Tensor]) -> Gaps:
        """One for each pair of a batch, all in one part of weight 1."""
        unsafe, counterfactual = batch["unsafe_rows"], batch["counterfactual_rows"]
        shall_be_high = torch.ones_like(unsafe, dtype=torch.float)
        return Gaps(shall_be_high, [(1.0, shall_be_high == 1)], columns=0, rows=unsafe, others=counterfactual)

    def each(self, values: Tensor, labels: Tensor) -> Tensor:  # noqa: ARG002
        """Of one gap, in logits."""
        return (self.margin - values).clamp(min=0).square()
