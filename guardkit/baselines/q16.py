"""Q16: two soft prompts, compared with the image by CLIP.

Schramowski, Tauchmann, Kersting (2022), "Can Machines Help Us Answering Question 16 in Datasheets, and In Turn Reflecting
on Inappropriate Content?", FAccT, section 4. Weights: github.com/ml-research/Q16, data/<model>/prompts.p, a pickled float16
array (2, d) whose row 0 stands for acceptable and row 1 for inappropriate; also on the Hub as yiting/Q16 for ViT-L/14.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from guardkit.baselines.base import HeadGuard, covered
from guardkit.baselines.weights import locate, read_array
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy
from guardkit.schema import InputError

_NAMES = ("prompts.safetensors", "prompts.npy", "prompts.p")
_SCALE = 100.0  # of the cosine, CLIP's own


class Q16Head(nn.Module):
    """softmax(100 * cosine) over the two prompts, as the log-odds of the second.

    Args:
        prompts: (2, d).
    """

    def __init__(self, prompts: np.ndarray) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.from_numpy(prompts))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) unit vectors -> (n,) logits."""
        safe, unsafe = functional.normalize(self.prompts, dim=1)
        return _SCALE * (embeddings @ unsafe - embeddings @ safe)


def q16(policy: Policy, weights: str, encoder: Encoder, *, covers: Sequence[str] | None, threshold: float = 0.5) -> HeadGuard:
    """Q16 with its published prompts.

    Args:
        policy: of the evaluation.
        weights: a file (.p, .npy or .safetensors), a folder with such a file named prompts, or a Hub id of one.
        encoder: the OpenAI CLIP that the prompts were made for.
        covers: category names, None for all; UnsafeBench (2024) counts all of its eleven but sexual and spam.
        threshold: flag when score >= threshold; 0.5 is the published decision.
    Raises:
        InputError: weights that are not there, unsafe to read or of another shape than the encoder's.
    """
    path = locate("q16", weights, _NAMES)
    prompts = read_array(path)
    if prompts.ndim != 2 or len(prompts) != 2:
        raise InputError(f"{path} must hold two prompts as an array (2, d), got shape {prompts.shape}")
    return HeadGuard("q16", Q16Head(prompts), encoder, dim=prompts.shape[1], covers=covered("q16", covers, policy), threshold=threshold)
