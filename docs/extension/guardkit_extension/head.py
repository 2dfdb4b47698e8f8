"""A head: from (n, d) embeddings to (n, 1 + k) logits, the decision first, then one per category of the policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardkit import Encoder, Head, InputError, Policy


class CosineHead(Head):
    """Compares an embedding by cosine with one learned direction for each logit.

    Args:
        dim: d.
        n_categories: k.
        scale: of the cosine.
    """

    def __init__(self, dim: int, n_categories: int, *, scale: float = 30.0) -> None:
        super().__init__()
        if scale <= 0:
            raise InputError(f"head.scale must be above 0, got {scale!r}")
        self.config = {"dim": dim, "n_categories": n_categories, "scale": scale}  # builds it again: CosineHead(**config)
        self.directions = nn.Parameter(0.1 * torch.randn(1 + n_categories, dim))  # the seed is set before
        self.bias = nn.Parameter(torch.zeros(1 + n_categories))

    @classmethod
    def build(cls, encoder: Encoder, policy: Policy, *, scale: float = 30.0) -> CosineHead:
        """A new head for this encoder and policy; what conf/head names."""
        return cls(encoder.dim, len(policy.categories), scale=scale)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n, 1 + k) logits."""
        return self.config["scale"] * functional.normalize(embeddings, dim=1) @ functional.normalize(self.directions, dim=1).T + self.bias
