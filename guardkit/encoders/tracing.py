"""The image tower of an encoder as one module, for programs that trace modules of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn


class ImageTower(nn.Module):
    """(n, 3, height, width) pixels -> (n, d) vectors, on the processor.

    Args:
        model: of a library, frozen; one that is elsewhere is copied.
        encode: model and pixels -> vectors.
    """

    def __init__(self, model: nn.Module, encode: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        is_here = all(value.device.type == "cpu" for value in model.parameters())
        self.model = model if is_here else copy.deepcopy(model).cpu()
        self._encode = encode

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self._encode(self.model, pixels)
