"""Two prompts in CLIP's space, one of what is acceptable and one of what is not, compared with the image: Q16, and LAION's violence detector.

Schramowski, Tauchmann, Kersting (2022), "Can Machines Help Us Answering Question 16 in Datasheets, and In Turn Reflecting
on Inappropriate Content?", FAccT, section 4. Weights: github.com/ml-research/Q16, data/<model>/prompts.p, a pickled float16
array (2, d) whose row 0 stands for acceptable and row 1 for inappropriate; also on the Hub as yiting/Q16 for ViT-L/14, and
elsewhere as tensors of torch.

LAION-AI (2022), github.com/LAION-AI/CLIP-based-NSFW-Detector (MIT), violence_detection_vit_b_32.npy and violence_detection_vit_l_14.npy: float32
arrays (2, d). How they were made is not written down. clip-retrieval, which uses them, calls an image violent when row 1 is the nearer one, and
does not bring them to unit length first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from guardkit.baselines.base import HeadGuard, covered
from guardkit.baselines.weights import locate, read_array
from guardkit.checks import check_flag
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy
from guardkit.schema import InputError

_SCALE = 100.0  # of the cosine, CLIP's own


class TwoPromptsHead(nn.Module):
    """softmax(100 * product) over the two prompts, as the log-odds of the second.

    Args:
        prompts: (2, d).
        unit: bring them to unit length first.
    """

    def __init__(self, prompts: np.ndarray, *, unit: bool) -> None:
        super().__init__()
        given = torch.from_numpy(prompts)
        self.prompts = nn.Parameter(functional.normalize(given, dim=1) if unit else given)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) unit vectors -> (n,) logits."""
        safe, unsafe = self.prompts
        return _SCALE * (embeddings @ unsafe - embeddings @ safe)


def two_prompts(
    policy: Policy,
    weights: str,
    encoder: Encoder,
    *,
    name: str,
    files: Sequence[str],
    unit: bool = True,
    covers: Sequence[str] | None,
    threshold: float = 0.5,
) -> HeadGuard:
    """A classifier of two published prompts.

    Args:
        policy: of the evaluation.
        weights: a file (.p, .npy, .pt or .safetensors) that holds one array, a folder with such a file, or a Hub id of one.
        encoder: the OpenAI CLIP that the prompts were made for.
        name: for tables and messages.
        files: what the file is called in a folder, the preferred name first.
        unit: bring the prompts to unit length first, as Q16 does and LAION's violence detector does not.
        covers: category names, None for all.
        threshold: flag when score >= threshold; 0.5 is the published decision of both: the nearer prompt.
    Raises:
        InputError: weights that are not there, unsafe to read or of another shape than the encoder's.
    """
    check_flag(f"baseline.{name}.unit", unit)
    path = locate(name, weights, files)
    prompts = read_array(path)
    if prompts.ndim != 2 or len(prompts) != 2:
        raise InputError(f"{path} must hold two prompts as an array (2, d), got shape {prompts.shape}")
    head = TwoPromptsHead(prompts, unit=unit)
    return HeadGuard(name, head, encoder, dim=prompts.shape[1], covers=covered(name, covers, policy), threshold=threshold)
