"""A guard around the call of a pipeline that generates images: SDXL, SD3, Flux, Qwen-Image and whatever else gives `.images`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from PIL import Image

from guardkit.checks import check_choice
from guardkit.classifier import GuardClassifier
from guardkit.integrations.reactions import REACTIONS, changed, decide, replaced
from guardkit.schema import Decision, InputError
from guardkit.thresholds import check_scope


def guarded(pipeline: Callable[..., Any], guard: GuardClassifier, on_unsafe: str = "black", scope: Sequence[str] | None = None) -> Guarded:
    """Puts a guard around a pipeline: images that are not allowed do not leave it as they are.

    What is to be blocked or reviewed is flagged, and so is an image that cannot be decided. Images that are not flagged are the very
    ones that the pipeline gave.

    Args:
        pipeline: of diffusers or anybody, whose call gives an output with `images` (a PIL image or a list of them, an (n, h, w, c) array or an (n, c, h, w)
            tensor in [0, 1]), such a dictionary, or a tuple that begins with them.
        guard: decides.
        on_unsafe: what is done with a flagged image: "black", "blur" (12 cells are left of it), "tag" (it stays as it is; look at the decisions),
            or "raise" (`UnsafeImageError`, no image is given).
        scope: categories of the guard's policy that count; None: all.
    Returns:
        A pipeline that is called in the same way. Its output has `decisions` too, one an image, in order; with `return_dict=False` they are
        the tuple's last element. Everything else of the pipeline is there and can be set; what gives the pipeline itself, as `to` does, gives the
        guarded one.
    Raises:
        InputError: an unknown reaction or category; at a call: latents are asked for, or no images come.
    """
    check_choice("on_unsafe", on_unsafe, REACTIONS)
    check_scope(scope, guard.policy.category_names)
    return Guarded(pipeline, guard, on_unsafe, scope)


class Guarded:
    """A pipeline with a guard around its call; see `guarded`."""

    _own = ("_pipeline", "_guard", "_on_unsafe", "_scope")

    def __init__(self, pipeline: Callable[..., Any], guard: GuardClassifier, on_unsafe: str, scope: Sequence[str] | None) -> None:
        self._pipeline, self._guard, self._on_unsafe, self._scope = pipeline, guard, on_unsafe, scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline, and looks at what it gives."""
        if _asked(self._pipeline, "output_type", args, kwargs) == "latent":
            raise InputError(
                'output_type="latent" gives no image that a guard could look at; ask for "pil", "np" or "pt", or call the pipeline itself'
            )
        output = self._pipeline(*args, **kwargs)
        if isinstance(output, tuple):
            images, decisions = self._decided(output[0] if output else None)
            return (images, *output[1:], decisions)
        # only where the place of the images is known for sure: an object may keep them in another one too
        if isinstance(output, MutableMapping) and "images" in output:  # diffusers' outputs, in which a key is an attribute too
            output["images"], output["decisions"] = self._decided(output["images"])
            return output
        if "images" in getattr(output, "__dict__", ()):
            output.images, output.decisions = self._decided(output.images)
            return output
        raise InputError(
            f"the pipeline gives {type(output).__name__}, and a guard looks at `images` of an output, at a dictionary's or at a tuple's first element; "
            'ask a modular pipeline for output=["images"]'
        )

    def _decided(self, images: Any) -> tuple[Any, list[Decision]]:
        """The images as they may be shown, in the form they came in, and the decisions on them."""
        if isinstance(images, Image.Image):
            (shown,), decisions = self._decided([images])
            return shown, decisions
        is_many = isinstance(images, (list, tuple)) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4)
        if not is_many:
            shape = f" of shape {tuple(images.shape)}" if hasattr(images, "shape") else ""
            raise InputError(
                f"the pipeline's images must be PIL images, or arrays or tensors of four dimensions, got {type(images).__name__}{shape}"
            )
        decisions, unsafe = decide(self._guard, images, self._on_unsafe, self._scope)
        return replaced(images, {i: changed(images[i], self._on_unsafe) for i, is_so in enumerate(unsafe) if is_so}), decisions

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in self._own:  # asked of a copy that has nothing yet
            raise AttributeError(name)
        value = getattr(self._pipeline, name)
        if not inspect.ismethod(value):
            return value

        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self if result is self._pipeline else result

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._own:
            object.__setattr__(self, name, value)
        else:
            setattr(self._pipeline, name, value)

    def __repr__(self) -> str:
        return f"guarded({self._pipeline!r}, {self._guard!r}, on_unsafe={self._on_unsafe!r}, scope={self._scope!r})"


def _asked(pipeline: Callable[..., Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The value of an argument in a call, by position, name or default; None where there is none."""
    if name in kwargs:
        return kwargs[name]
    try:
        bound = inspect.signature(pipeline).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):  # the call itself says what is wrong
        return None
    bound.apply_defaults()
    return bound.arguments.get(name)
