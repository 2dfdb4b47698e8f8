"""LAION's detector of images that are not safe for work: a small network on CLIP ViT-L/14.

LAION-AI (2022), github.com/LAION-AI/CLIP-based-NSFW-Detector (MIT); described in Schuhmann et al. (2022), "LAION-5B", appendix.
The original is a Keras archive; its weights as tensors are on the Hub as yiting/NSFWDetector.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from guardkit.baselines.base import HeadGuard, covered
from guardkit.baselines.weights import load_into, locate
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy

_DIM = 768
_NAMES = ("ViT-L-14.safetensors", "model.safetensors", "clip_autokeras_binary_nsfw.pth")


class _Standardize(nn.Module):
    """(x - mean) / sqrt(variance), stored with the weights."""

    mean: Tensor
    variance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(_DIM))
        self.register_buffer("variance", torch.ones(_DIM))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.variance.sqrt()


class NSFWHead(nn.Module):
    """768-64-512-256-1 with ReLU, on standardised unit vectors; names as in the published weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _Standardize()
        self.linear_1, self.linear_2 = nn.Linear(_DIM, 64), nn.Linear(64, 512)
        self.linear_3, self.linear_4 = nn.Linear(512, 256), nn.Linear(256, 1)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, 768) unit vectors -> (n,) logits."""
        x = self.norm(embeddings)
        for layer in (self.linear_1, self.linear_2, self.linear_3):
            x = torch.relu(layer(x))
        return self.linear_4(x)[:, 0]


def nsfw_detector(policy: Policy, weights: str, encoder: Encoder, *, covers: Sequence[str] | None, threshold: float = 0.5) -> HeadGuard:
    """LAION's NSFW detector.

    Args:
        policy: of the evaluation.
        weights: a file of tensors (.safetensors, .pt or .pth), a folder that holds one, or a Hub id.
        encoder: OpenAI's CLIP ViT-L/14.
        covers: category names, None for all; UnsafeBench (2024) counts sexual and harassment.
        threshold: flag when score >= threshold; 0.5 is what UnsafeBench applies.
    Raises:
        InputError: weights that are not there, unsafe to read or of another shape.
    """
    head = NSFWHead()
    load_into(head, locate("nsfw_detector", weights, _NAMES))
    return HeadGuard("nsfw_detector", head, encoder, dim=_DIM, covers=covered("nsfw_detector", covers, policy), threshold=threshold)
