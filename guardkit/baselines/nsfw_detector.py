"""LAION's detectors of images that are not safe for work: small networks on CLIP, one for each of three sizes of it.

LAION-AI (2022), github.com/LAION-AI/CLIP-based-NSFW-Detector (MIT); described in Schuhmann et al. (2022), "LAION-5B", appendix.
The originals for ViT-B/32 and ViT-L/14 are Keras archives; their weights as tensors are in the repository's models/ (.pth), and for
ViT-L/14 on the Hub as yiting/NSFWDetector. That for OpenCLIP's ViT-H/14 is the repository's h14_nsfw.pth. A file says itself which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from guardkit.baselines.base import HeadGuard, covered
from guardkit.baselines.weights import locate, read_tensors
from guardkit.encoders.base import Encoder
from guardkit.policy import Policy
from guardkit.schema import InputError


@dataclass(frozen=True)
class Network:
    """A published network on an encoder's unit vectors: linear layers, ReLU between them, one logit.

    Attributes:
        encoder: that it was trained on.
        widths: of the embedding, of each layer's output, 1 at the end.
        layers: what the file calls them, in order.
        norm: what it calls mean and variance that the input is standardised by; None: it is taken as it is.
        linear_end: layers at the end with no ReLU between them.
    """

    encoder: str
    widths: tuple[int, ...]
    layers: tuple[str, ...]
    norm: str | None = None
    linear_end: int = 1

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the file's tensors, by name."""
        found: dict[str, tuple[int, ...]] = {}
        for name, (width, output) in zip(self.layers, pairwise(self.widths), strict=True):
            found |= {f"{name}.weight": (output, width), f"{name}.bias": (output,)}
        if self.norm is not None:
            found |= {f"{self.norm}.{one}": (self.widths[0],) for one in ("mean", "variance")}
        return found


PUBLISHED = (
    Network("ViT-B/32 of OpenAI", (512, 32, 32, 1), ("linear_1", "linear_2", "linear_3"), norm="norm"),
    Network("ViT-L/14 of OpenAI", (768, 64, 512, 256, 1), ("linear_1", "linear_2", "linear_3", "linear_4"), norm="norm"),
    Network(
        "ViT-H/14 of OpenCLIP",
        (1024, 1024, 2048, 1024, 256, 128, 16, 1),
        tuple(f"layers.{place}" for place in (0, 3, 6, 9, 12, 15, 16)),  # between them are ReLU and dropout; not between the last two
        linear_end=2,
    ),
)
_NAMES = ("ViT-L-14.safetensors", "model.safetensors", "clip_autokeras_binary_nsfw.pth", "h14_nsfw.pth")


class NSFWHead(nn.Module):
    """A `Network` with the weights of a file.

    Args:
        network: that the weights fit.
        weights: by their names in the file.
    """

    mean: Tensor | None
    scale: Tensor | None

    def __init__(self, network: Network, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        values = {name: value.float() for name, value in weights.items()}
        self._n_with_relu = len(network.layers) - network.linear_end
        self.layers = nn.ModuleList()
        for name in network.layers:
            weight = values[f"{name}.weight"]
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": values[f"{name}.bias"]})
            self.layers.append(layer)
        norm = network.norm
        self.register_buffer("mean", None if norm is None else values[f"{norm}.mean"])
        self.register_buffer("scale", None if norm is None else values[f"{norm}.variance"].sqrt())

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) unit vectors -> (n,) logits."""
        x = embeddings if self.mean is None or self.scale is None else (embeddings - self.mean) / self.scale
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < self._n_with_relu:
                x = torch.relu(x)
        return x[:, 0]


def nsfw_detector(policy: Policy, weights: str, encoder: Encoder, *, covers: Sequence[str] | None, threshold: float = 0.5) -> HeadGuard:
    """One of LAION's NSFW detectors.

    Args:
        policy: of the evaluation.
        weights: a file of tensors (.safetensors, .pt or .pth), a folder that holds one, or a Hub id.
        encoder: the CLIP that it was trained on, see `PUBLISHED`.
        covers: category names, None for all; UnsafeBench (2024) counts sexual and harassment.
        threshold: flag when score >= threshold; 0.5 is what UnsafeBench applies.
    Raises:
        InputError: weights that are not there, unsafe to read or of another shape, or another encoder's width.
    """
    path = locate("nsfw_detector", weights, _NAMES)
    found = read_tensors(path)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    network = next((one for one in PUBLISHED if one.shapes == shapes), None)
    if network is None:
        known = "; ".join(f"{one.encoder}: {'-'.join(map(str, one.widths))}" for one in PUBLISHED)
        some = ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items())[:3]) or "no tensors"
        raise InputError(f"{path} holds none of the published networks ({known}), it has {some}; get the published file anew")
    head = NSFWHead(network, found)
    return HeadGuard(
        "nsfw_detector", head, encoder, dim=network.widths[0], covers=covered("nsfw_detector", covers, policy), threshold=threshold
    )
