"""The Stable Diffusion safety checker, as diffusers ships it: 17 concepts, 3 of which ask for special care.

Rombach et al. (2022) ship it with Stable Diffusion; Rando et al. (2022), "Red-Teaming the Stable Diffusion Safety Filter",
describe it. Code: diffusers, `StableDiffusionSafetyChecker`; weights: CompVis/stable-diffusion-safety-checker on the Hub,
and the folder `safety_checker` of Stable Diffusion pipelines. It brings its own CLIP vision model. Where diffusers would
return a black image, there is a score here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from guardkit.artifacts import fingerprint, weights_variant
from guardkit.baselines.base import HeadGuard, covered, hash_weights
from guardkit.baselines.weights import weights_folder
from guardkit.checks import check_number
from guardkit.encoders.base import encode_in_batches, prepare_pixels
from guardkit.policy import Policy
from guardkit.schema import InputError

_CARE = 0.01  # what an image close to a concept of special care is pushed towards all others
# diffusers rounds a margin to three digits and flags it above 0; this is the smallest float32 of which that holds
_FLAGGED_FROM = 0.0005000000819563866
_CHECKER, _EXTRACTOR, _PROCESSOR = "safety_checker", "feature_extractor", "preprocessor_config.json"
_FILES = ("config.json", "model.safetensors", _PROCESSOR)
_PATTERNS = (*_FILES, *(f"{_CHECKER}/{name}" for name in _FILES), f"{_EXTRACTOR}/{_PROCESSOR}")
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class ConceptHead(nn.Module):
    """The largest margin of an image over the checker's 17 concepts, as a logit.

    A margin is a cosine minus the concept's own threshold, plus 0.01 when any concept of special care is exceeded. The
    logit is `scale` times what the largest margin has above the point from which diffusers flags; so a score of 0.5 or
    more says what diffusers says, and with a scale of 100 a margin of 0.01 is one unit of log-odds.

    Args:
        checker: diffusers' StableDiffusionSafetyChecker.
        scale: log-odds per unit of cosine.
    """

    concepts: Tensor
    thresholds: Tensor
    care_concepts: Tensor
    care_thresholds: Tensor
    scale: Tensor

    def __init__(self, checker: Any, scale: float) -> None:
        super().__init__()
        for name, value in {
            "concepts": checker.concept_embeds,
            "thresholds": checker.concept_embeds_weights,
            "care_concepts": checker.special_care_embeds,
            "care_thresholds": checker.special_care_embeds_weights,
            "scale": torch.tensor(float(scale)),
        }.items():
            self.register_buffer(name, value.detach().to("cpu", torch.float32, copy=True))

    def forward(self, embeddings: Tensor) -> Tensor:
        """(n, d) -> (n,) logits."""
        embeddings = functional.normalize(embeddings)
        care = embeddings @ functional.normalize(self.care_concepts).T - self.care_thresholds
        adjustment = _CARE * (care >= _FLAGGED_FROM).any(dim=1, keepdim=True)
        margins = embeddings @ functional.normalize(self.concepts).T - self.thresholds + adjustment
        return self.scale * (margins.amax(dim=1) - _FLAGGED_FROM)


class SafetyCheckerEncoder:
    """The checker's CLIP vision model and projection, as an `Encoder` of images; it has no text encoder.

    Args:
        weights: a folder with config.json, model.safetensors and maybe preprocessor_config.json; a folder of a whole
            pipeline; or a Hub id of either.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        batch_size: images encoded at once.
    Raises:
        InputError: weights that are not there or incomplete, or a preprocessing that is not CLIP's.
    """

    def __init__(self, weights: str, *, device: str = "auto", batch_size: int = 32) -> None:
        self._weights, self.batch_size = weights, batch_size
        self.name = f"Stable Diffusion safety checker ({Path(weights).name if Path(weights).exists() else weights})"
        root = Path(weights).expanduser()
        root = root if root.is_dir() else weights_folder("sd_filter", weights, _PATTERNS)
        folder = root / _CHECKER if (root / _CHECKER).is_dir() else root
        processors = [one for one in (folder / _PROCESSOR, root / _EXTRACTOR / _PROCESSOR) if one.is_file()]
        self.checker, self._processor = _load(folder, processors[0].parent if processors else None)
        self.checker.to("cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device)
        self.preprocessing = _preprocessing(self._processor, self.checker.config.vision_config.image_size, root)

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return int(self.checker.config.projection_dim)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build this encoder again."""
        return {"weights": self._weights}

    @cached_property
    def fingerprint(self) -> str:
        """Over the weights, the architecture's settings and the preprocessing."""
        settings = self.checker.config.vision_config.to_diff_dict()
        vision = {name: value for name, value in settings.items() if isinstance(value, (int, float, str)) and "version" not in name}
        parts = nn.ModuleList([self.checker.vision_model, self.checker.visual_projection])
        return fingerprint({"weights": hash_weights(parts), "vision": vision, "preprocessing": self.preprocessing})

    def preprocess(self, image: np.ndarray) -> Tensor:
        """(h, w, 3) uint8 RGB -> (3, height, width) float32, by the checker's own image processor."""
        return self._processor(images=Image.fromarray(image), return_tensors="pt")["pixel_values"][0]

    def encode_images(self, images: Sequence[np.ndarray], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(h, w, 3) uint8 RGB images -> (n, d) float32; see `Encoder`."""
        size = self.batch_size
        chunks = [[self.preprocess(image) for image in images[start : start + size]] for start in range(0, len(images), size)]
        parts = [self.encode_preprocessed(chunk, fixed_batch=fixed_batch, normalize=normalize) for chunk in chunks]
        return np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)

    def encode_preprocessed(self, images: Sequence[Tensor], *, fixed_batch: bool = False, normalize: bool = True) -> np.ndarray:
        """(3, height, width) images from `preprocess` -> (n, d) float32."""
        return encode_in_batches(
            lambda batch: self._encode(batch, normalize), images, batch_size=self.batch_size, dim=self.dim, fixed_batch=fixed_batch
        )

    def encode_pixels(self, pixels: Tensor, *, normalize: bool = True, prepared: bool = False) -> Tensor:
        """(n, 3, h, w) float in [0, 1] -> (n, d), differentiable with respect to the pixels; see `Differentiable`."""
        return self._encode(prepare_pixels(pixels.float(), self.preprocessing, prepared=prepared, crop_rounds_down=True), normalize)

    def _encode(self, standardised: Tensor, normalize: bool) -> Tensor:
        pooled = self.checker.vision_model(standardised.to(self.checker.device))[1]
        vectors = self.checker.visual_projection(pooled)
        return functional.normalize(vectors, dim=-1) if normalize else vectors


def sd_filter(
    policy: Policy,
    weights: str,
    *,
    covers: Sequence[str] | None,
    threshold: float = 0.5,
    scale: float = 100.0,
    device: str = "auto",
    batch_size: int = 32,
) -> HeadGuard:
    """The Stable Diffusion safety checker.

    Args:
        policy: of the evaluation.
        weights: a folder or Hub id of the checker, or of a pipeline that has it. Safetensors only.
        covers: category names, None for all; UnsafeBench (2024) counts sexual.
        threshold: flag when score >= threshold; at 0.5 it flags what diffusers makes black.
        scale: log-odds of unsafe per unit of cosine, above 0 (see `ConceptHead`).
        device: "auto", "cpu", "cuda", ...
        batch_size: images encoded at once.
    Raises:
        InputError: weights that are not there or incomplete, or an argument out of range.
    """
    check_number("baseline.sd_filter.scale", scale, "(0, inf)")
    encoder = SafetyCheckerEncoder(weights, device=device, batch_size=batch_size)
    head = ConceptHead(encoder.checker, scale)
    return HeadGuard("sd_filter", head, encoder, dim=encoder.dim, covers=covered("sd_filter", covers, policy), threshold=threshold)


def _load(folder: Path, processor: Path | None) -> tuple[Any, Any]:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    try:
        loaded: Any = StableDiffusionSafetyChecker.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            variant=weights_variant(os.listdir(folder)),
        )
        checker, report = loaded
        # without a file of its own it is CLIP's, which is what transformers gives by default
        made = CLIPImageProcessor() if processor is None else CLIPImageProcessor.from_pretrained(processor, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"baseline.sd_filter.weights {folder} could not be loaded ({type(error).__name__}: {reason}); it must hold the checker's "
            "config.json and model.safetensors"
        ) from error
    if report["missing_keys"]:  # by itself transformers would only warn, and go on with random ones
        raise InputError(f"baseline.sd_filter.weights {folder} lacks {', '.join(sorted(report['missing_keys'])[:3])}; get its files anew")
    if bad := [name for name, value in checker.state_dict().items() if not bool(value.isfinite().all())]:
        raise InputError(
            f"baseline.sd_filter.weights {folder}: {bad[0]} holds NaN or infinite values, which decide nothing; get its files anew"
        )
    return checker.eval().requires_grad_(False), made


def _preprocessing(processor: Any, image_size: int, root: Path) -> dict[str, Any]:
    """The image processor in the terms of `prepare_pixels`: the shorter side to `image_size`, then the middle."""
    crop = processor.crop_size
    if [processor.size["shortest_edge"], crop["height"], crop["width"]] != [image_size] * 3 or int(
        processor.resample
    ) not in _INTERPOLATIONS:
        raise InputError(
            f"{root}: the image processor must resize and crop to {image_size} pixels as CLIP's does, got {processor.size} and {crop}"
        )
    return {
        "size": [image_size, image_size],
        "mean": [float(value) for value in processor.image_mean],
        "std": [float(value) for value in processor.image_std],
        "interpolation": _INTERPOLATIONS[int(processor.resample)],
        "resize_mode": "shortest",
    }
