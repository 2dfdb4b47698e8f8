"""A guard in the slot `safety_checker` that diffusers' Stable Diffusion pipelines have, and those that came after them with the same call.

Read in diffusers 0.42 (`run_safety_checker` of `StableDiffusionPipeline` and `IFPipeline`): the slot is called with `images` and
`clip_input`, gives both images and flags, and what it flagged is not brought from [-1, 1] to [0, 1] any more. So a flagged image must
come back in [0, 1]. `clip_input` is made for OpenAI's CLIP, whatever encoder a guard has, and is not looked at.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin

from guardkit.artifacts import read_json, write_json
from guardkit.checks import check_choice, check_flag
from guardkit.classifier import GuardClassifier
from guardkit.integrations.reactions import REACTIONS, changed, decide, replaced
from guardkit.schema import Decision, InputError
from guardkit.thresholds import check_scope

_GUARD, _SETTINGS = "guard", "safety_checker.json"


def safety_checker(
    guard: GuardClassifier, *, on_unsafe: str = "black", scope: Sequence[str] | None = None, watermarks: bool = False
) -> SafetyChecker:
    """A guard for the slot of a Stable Diffusion pipeline: `from_pretrained(..., safety_checker=safety_checker(guard))`.

    Into a pipeline that is there it is put by `pipeline.register_modules(safety_checker=...)`. What is to be blocked or reviewed is flagged, and
    so is an image that cannot be decided; the pipeline's `nsfw_content_detected` says which. A pipeline that is saved saves it too, guard
    included, and has it again when it is loaded; not one whose slot was empty and then assigned to, which diffusers leaves out.

    Args:
        guard: decides. It stays on its device and in its precision, wherever the pipeline is moved.
        on_unsafe: what is done with a flagged image: "black", "blur", "tag" (it stays as it is) or "raise" (`UnsafeImageError`).
        scope: categories of the guard's policy that count; None: all.
        watermarks: give a third value, as the pipelines of DeepFloyd IF expect: that no image has a watermark, which nobody looked for.
    Raises:
        InputError: an unknown reaction or category.
    """
    return SafetyChecker(guard, on_unsafe=on_unsafe, scope=scope, watermarks=watermarks)


class SafetyChecker(ModelMixin):
    """What stands in the slot; see `safety_checker`.

    Attributes:
        decisions: of the last call, one an image, in order.
    """

    def __init__(
        self, guard: GuardClassifier, *, on_unsafe: str = "black", scope: Sequence[str] | None = None, watermarks: bool = False
    ) -> None:
        super().__init__()
        check_choice("on_unsafe", on_unsafe, REACTIONS)
        check_scope(scope, guard.policy.category_names)
        check_flag("watermarks", watermarks)
        self.guard, self.on_unsafe, self.scope, self.watermarks = guard, on_unsafe, scope, watermarks
        self.decisions: list[Decision] = []
        # by which a pipeline asks where its parts are, and in which precision
        self.register_buffer("place", torch.zeros(1), persistent=False)  # type: ignore[attr-defined]  # mypy sees a stand-in

    @torch.no_grad()
    def forward(self, clip_input: Any = None, images: Any = None) -> tuple[Any, ...]:
        """Decides over images.

        Args:
            clip_input: not looked at.
            images: an (n, c, h, w) tensor in [-1, 1], or an (n, h, w, c) array, or a list of arrays, in [0, 1].
        Returns:
            The images, and whether each is flagged; a third list where `watermarks` are wanted. Images that are not flagged are as they
            came; flagged ones are in [0, 1].
        Raises:
            UnsafeImageError: one is flagged, and the reaction is "raise".
            InputError: other images.
        """
        del clip_input
        if not isinstance(images, (torch.Tensor, np.ndarray, list)):
            raise InputError(f"images must be an (n, c, h, w) tensor in [-1, 1] or (n, h, w, c) in [0, 1], got {type(images).__name__}")
        shown = (images * 0.5 + 0.5).clamp(0, 1) if isinstance(images, torch.Tensor) else images
        self.decisions, unsafe = decide(self.guard, shown, self.on_unsafe, self.scope)
        images = replaced(images, {i: changed(shown[i], self.on_unsafe) for i, is_so in enumerate(unsafe) if is_so})
        return (images, unsafe, [False] * len(unsafe)) if self.watermarks else (images, unsafe)

    def save_pretrained(self, save_directory: str | os.PathLike, **_: Any) -> None:
        """Writes the guard and the settings into a folder."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.guard.save_pretrained(folder / _GUARD)
        scope = None if self.scope is None else list(self.scope)
        write_json(folder / _SETTINGS, {"on_unsafe": self.on_unsafe, "scope": scope, "watermarks": self.watermarks})

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **_: Any) -> SafetyChecker:
        """Loads what `save_pretrained` wrote.

        Raises:
            InputError: the folder holds something else, or the guard's encoder is not found.
        """
        path = Path(folder) / _SETTINGS
        mend = "save the pipeline anew, or pass safety_checker=guardkit.safety_checker(guard)"
        settings = read_json(path, "the settings of a safety checker", mend)
        if set(settings) != {"on_unsafe", "scope", "watermarks"}:
            raise InputError(f"{path} is not as guardkit wrote it; {mend}")
        return cls(GuardClassifier.from_pretrained(Path(folder) / _GUARD), **settings)
