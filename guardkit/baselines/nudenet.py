"""NudeNet: a detector of body parts, through its own package; the weights lie in the package.

Bedapudi (2019-2024), github.com/notAI-tech/NudeNet, version 3: a YOLOv8n at 320 pixels. The package's metadata say MIT, the
licence file in it is the AGPL 3. UnsafeBench (2024) measured the image classifier of version 2, which the package no longer
has; its figures are not this detector's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from guardkit.artifacts import fingerprint, hash_file
from guardkit.baselines.base import checked_share, covered
from guardkit.checks import is_whole
from guardkit.limits import shrink
from guardkit.policy import Policy
from guardkit.schema import InputError, Judgment

# what version 3 detects
CLASSES = (
    "FEMALE_GENITALIA_COVERED", "FACE_FEMALE", "BUTTOCKS_EXPOSED", "FEMALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED",
    "MALE_BREAST_EXPOSED", "ANUS_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FEET_COVERED", "ARMPITS_COVERED",
    "ARMPITS_EXPOSED", "FACE_MALE", "BELLY_EXPOSED", "MALE_GENITALIA_EXPOSED", "ANUS_COVERED", "FEMALE_BREAST_COVERED",
    "BUTTOCKS_COVERED",
)  # fmt: skip
# the package pads an image to a square of its longer side, whatever that costs
_MAX_SIDE = 8192


class NudeNetGuard:
    """Scores an image by NudeNet's most confident detection of a class that counts, 0 without any.

    NudeNet reports detections of a confidence of 0.25 and more, so scores are 0 or at least 0.25. It has no gradients here.
    Meets the `ImageGuard` protocol.

    Args:
        policy: of the evaluation.
        classes: that count, out of `CLASSES`.
        weights: an .onnx file of the project's releases; None: the one in the package (320n).
        resolution: in pixels, that the weights were made for.
        covers: category names, None for all.
        threshold: flag when score >= threshold; 0.25 takes every detection that NudeNet reports.
    Raises:
        InputError: an unknown class, a file that is none, or no NudeNet installed.
    """

    name = "nudenet"
    reads_policy = False

    def __init__(
        self,
        policy: Policy,
        *,
        classes: Sequence[str],
        weights: str | None = None,
        resolution: int = 320,
        covers: Sequence[str] | None,
        threshold: float = 0.25,
    ) -> None:
        unknown = [one for one in classes if one not in CLASSES]
        if isinstance(classes, str) or unknown or not classes:
            raise InputError(f"baseline.nudenet.classes must be some of {', '.join(CLASSES)}, got {classes!r}")
        if not is_whole(resolution) or resolution < 32 or resolution % 32:
            raise InputError(
                f"baseline.nudenet.resolution must be a multiple of 32 pixels, as the weights were made for, got {resolution!r}"
            )
        self.classes, self.resolution = frozenset(classes), resolution
        self.covers, self.threshold = covered("nudenet", covers, policy), checked_share("nudenet", "threshold", threshold)
        self._weights = None if weights is None else Path(weights).expanduser()
        self._detector, path = _load(self._weights, resolution)
        self.fingerprint = fingerprint(
            {
                "baseline": self.name,
                "version": version("nudenet"),
                "weights": hash_file(path),
                "resolution": resolution,
                "classes": sorted(self.classes),
            }
        )

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """(h, w, 3) uint8 RGB images -> one judgment each; one longer than 8192 pixels is scaled down first."""
        return [self._judge(image) for image in images]

    def _judge(self, image: np.ndarray) -> Judgment:
        try:
            # the package takes arrays in OpenCV's order of channels
            found = self._detector.detect(cv2.cvtColor(shrink(image, _MAX_SIDE), cv2.COLOR_RGB2BGR))
        except Exception as error:  # whatever OpenCV and ONNX raise, such as too little memory
            return Judgment(math.nan, f"NudeNet failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})", transient=True)
        return Judgment(max((float(one["score"]) for one in found if one["class"] in self.classes), default=0.0))


def _load(weights: Path | None, resolution: int) -> tuple[Any, Path]:
    try:
        import nudenet
    except ImportError as error:
        raise InputError('baseline=nudenet needs NudeNet; install it with: pip install "guardkit[baselines]"') from error
    path = Path(nudenet.__file__).with_name("320n.onnx") if weights is None else weights
    if not path.is_file():
        raise InputError(f"baseline.nudenet.weights {path} does not exist; give an .onnx file, or null for the one in the package")
    try:
        return nudenet.NudeDetector(str(path), inference_resolution=resolution), path
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"baseline.nudenet.weights {path} could not be loaded ({reason}); give an .onnx file of NudeNet's releases"
        ) from error
