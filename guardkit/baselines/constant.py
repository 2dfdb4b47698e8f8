"""Two classifiers that look at nothing: what every other one must beat."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardkit.artifacts import fingerprint
from guardkit.baselines.base import checked_share
from guardkit.policy import Policy
from guardkit.schema import Judgment


class ConstantGuard:
    """Gives every image one score. Meets the `ImageGuard` protocol.

    Args:
        name: for tables.
        score: in [0, 1].
        threshold: flag when score >= threshold, in [0, 1].
    Raises:
        InputError: an argument out of range.
    """

    covers = None
    reads_policy, n_labels, n_parameters = False, 0, 0

    def __init__(self, name: str, score: float, *, threshold: float = 0.5) -> None:
        self.name = name
        self.score, self.threshold = checked_share(name, "score", score), checked_share(name, "threshold", threshold)
        self.fingerprint = fingerprint({"baseline": "constant", "score": self.score})

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """One judgment per image, all alike."""
        return [Judgment(self.score)] * len(images)


def always_unsafe(policy: Policy, *, threshold: float = 0.5) -> ConstantGuard:  # noqa: ARG001 - like the others
    """Flags everything: recall 1, and the F1 that a prevalence alone gives, 2 p / (1 + p). The policy makes no difference."""
    return ConstantGuard("always_unsafe", 1.0, threshold=threshold)


def prevalence(policy: Policy, share: float, *, threshold: float = 0.5) -> ConstantGuard:  # noqa: ARG001 - like the others
    """Gives every image the share of unsafe ones as its score: calibrated where the share is right, and blind.

    Args:
        policy: of the evaluation; it makes no difference.
        share: of unsafe images, in [0, 1].
        threshold: flag when score >= threshold.
    """
    return ConstantGuard("prevalence", checked_share("prevalence", "share", share), threshold=threshold)
