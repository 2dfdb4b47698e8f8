"""What is exported, as modules of torch: from embeddings or pixels to the scores that a guard gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from guardkit.classifier import GuardClassifier


class HeadScores(nn.Module):
    """(n, d) unit vectors -> (n,) probability of unsafe, (n, k) of each category.

    A row for which `GuardClassifier.decide` gives an error is NaN.

    Args:
        guard: whose head, calibration and categories it takes.
    """

    def __init__(self, guard: GuardClassifier) -> None:
        super().__init__()
        self.head = guard.head
        self._calibration, self._categories = guard.calibration, guard.policy.category_names

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        logits = self.head(embeddings)
        if self._calibration is not None:
            logits = self._calibration.apply(logits, self._categories)
        is_sound = embeddings.isfinite().all(dim=1) & (embeddings != 0).any(dim=1)
        logits = logits.where(logits.isfinite() & is_sound[:, None], torch.nan)
        # ONNX Runtime's own sigmoid is off by 1e-7, which is a lot where thresholds are for one unsafe image in ten thousand
        probabilities = 1 / (1 + torch.exp(-logits))
        return probabilities[:, 0], probabilities[:, 1:]


class ImageScores(nn.Module):
    """(n, 3, height, width) pixels as the encoder's `preprocess` gives them -> the same as `HeadScores`.

    Args:
        guard: whose head it takes.
        tower: pixels -> (n, d) vectors, see `Traceable`.
    """

    def __init__(self, guard: GuardClassifier, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.scores = tower, HeadScores(guard)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        scores: tuple[Tensor, Tensor] = self.scores(functional.normalize(self.tower(pixels), dim=-1))
        return scores
