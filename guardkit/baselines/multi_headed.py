"""Multi-headed safety classifier: five small networks on one CLIP embedding, the most alarmed of them decides.

Qu, Shen, He, Backes, Zannettou, Zhang (2023), "Unsafe Diffusion: On the Generation of Unsafe Images and Hateful Memes From
Text-To-Image Models", CCS, section 4. Weights: github.com/YitingQu/unsafe-diffusion, checkpoints/multi-headed/, and on the
Hub as yiting/MultiHeaded: one state dict a head. They were trained on embeddings as `encode_image` gives them, so these
are not normalised. An image is unsafe when any head says more than 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guardkit.baselines.base import HeadGuard, covered
from guardkit.baselines.weights import load_into, locate_all
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy

HEADS = ("sexual", "violent", "disturbing", "hateful", "political")
_DIM, _HIDDEN = 768, 384


class MultiHead(nn.Module):
    """The maximum over five heads; as the sigmoid is monotonic, of their logits as of their probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(_DIM, _HIDDEN), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(_HIDDEN), nn.Linear(_HIDDEN, 1))
                for name in HEADS
            }
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, 768) embeddings, not normalised -> (n,) logits."""
        return torch.cat([head(embeddings) for head in self.heads.values()], dim=1).amax(dim=1)


def multi_headed(policy: Policy, weights: str, encoder: Encoder, *, covers: Sequence[str] | None, threshold: float = 0.5) -> HeadGuard:
    """The multi-headed classifier with its published weights.

    Args:
        policy: of the evaluation.
        weights: a folder with sexual.pt, violent.pt, disturbing.pt, hateful.pt and political.pt (or .safetensors), or a
            Hub id of one.
        encoder: OpenAI's CLIP ViT-L/14.
        covers: category names, None for all; UnsafeBench (2024) counts sexual, violence, shocking, hate and political.
        threshold: flag when score >= threshold; 0.5 is the published decision.
    Raises:
        InputError: weights that are not there, unsafe to read or of another shape.
    """
    head = MultiHead()
    paths = locate_all("multi_headed", weights, [(f"{name}.safetensors", f"{name}.pt") for name in HEADS])
    for name, path in zip(HEADS, paths, strict=True):
        load_into(head.heads[name], path)
    return HeadGuard(
        "multi_headed", head, encoder, dim=_DIM, covers=covered("multi_headed", covers, policy), threshold=threshold, is_normalized=False
    )
