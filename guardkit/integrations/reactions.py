"""What is done with a generated image that is unsafe, or that nobody could decide over: the same for every form that pipelines give images in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from guardkit.classifier import GuardClassifier
from guardkit.schema import Decision, InputError

REACTIONS = ("black", "blur", "tag", "raise")
_CELLS = 12  # on the longer side, which is all that a blurred image keeps


class UnsafeImageError(Exception):
    """At least one image is unsafe, or could not be decided.

    Attributes:
        decisions: on all images that were made, in order.
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        self.decisions = list(decisions)
        flagged = [one for one in self.decisions if is_unsafe(one)]
        reasons = "; ".join(dict.fromkeys(_reason(one) for one in flagged))
        super().__init__(f"{len(flagged)} of {len(self.decisions)} images not allowed by the guard: {reasons}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.decisions,)


def is_unsafe(decision: Decision) -> bool:
    """Whether an image must not be shown as it is: to be blocked or reviewed, or not decided at all."""
    return decision.action != "allow"


def decide(guard: GuardClassifier, images: Any, on_unsafe: str, scope: Sequence[str] | None) -> tuple[list[Decision], list[bool]]:
    """Decides over a list, array or tensor of images, and whether each is unsafe.

    Raises:
        UnsafeImageError: one is, and the reaction is "raise".
    """
    decisions = guard.predict(list(images), scope=scope)
    unsafe = [is_unsafe(decision) for decision in decisions]
    if on_unsafe == "raise" and any(unsafe):
        raise UnsafeImageError(decisions)
    return decisions, unsafe


def changed(image: Any, on_unsafe: str) -> Any:
    """An unsafe image as it may be shown.

    Args:
        image: a PIL image, an (h, w, c) array or a (c, h, w) tensor, with values in [0, 1] unless it is uint8.
        on_unsafe: "black" or "blur"; after anything else it stays as it is.
    Returns:
        A new image of the same form.
    Raises:
        InputError: an image of another form.
    """
    if on_unsafe not in ("black", "blur"):
        return image
    if isinstance(image, Image.Image):
        shown = image.convert("RGB") if image.mode not in ("L", "RGB") else image  # nothing is left behind transparency
        array = np.asarray(shown)
        return Image.fromarray(np.zeros_like(array) if on_unsafe == "black" else _blurred(array), shown.mode).convert(image.mode)
    if isinstance(image, np.ndarray) and image.ndim == 3:
        return np.zeros_like(image) if on_unsafe == "black" else _blurred(image)
    if isinstance(image, torch.Tensor) and image.ndim == 3:
        if on_unsafe == "black":
            return torch.zeros_like(image)
        array = image.detach().to("cpu", torch.float32).permute(1, 2, 0).numpy()
        return torch.from_numpy(_blurred(array)).permute(2, 0, 1).to(image)
    raise InputError(f"an image must be a PIL image, an array or a tensor of three dimensions, got {type(image).__name__}")


def replaced(images: Any, instead: Mapping[int, Any]) -> Any:
    """Images with some of them replaced, in the form they came in; the very ones where none is.

    Args:
        images: a list, an array or a tensor.
        instead: place -> image.
    """
    if not instead:
        return images
    new = images.clone() if isinstance(images, torch.Tensor) else images.copy() if isinstance(images, np.ndarray) else list(images)
    for place, image in instead.items():
        new[place] = image
    return tuple(new) if isinstance(images, tuple) else new


def _blurred(image: np.ndarray) -> np.ndarray:
    """(h, w) or (h, w, c) -> the means of a few cells, smoothly joined. What was between them is gone, and no filter brings it back."""
    height, width = image.shape[:2]
    scale = _CELLS / max(height, width, _CELLS)
    cells = max(1, round(width * scale)), max(1, round(height * scale))
    values = np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0)
    smooth = cv2.resize(cv2.resize(values, cells, interpolation=cv2.INTER_AREA), (width, height), interpolation=cv2.INTER_CUBIC)
    most = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    smooth = smooth.reshape(image.shape).clip(0, most)
    return (smooth.round() if image.dtype.kind == "u" else smooth).astype(image.dtype)


def _reason(decision: Decision) -> str:
    if decision.action == "error":
        return f"not decided ({decision.error})"
    return f"{', '.join(decision.violated) or 'unsafe'} {decision.score:.2f}"
