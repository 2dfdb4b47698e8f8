"""A baseline: a classifier that an evaluation measures beside guards. This one looks at images itself, as an `ImageGuard`.

An `EmbeddingGuard` takes `encoder` beside `policy`, keeps it as its attribute, and has `is_normalized` and `logits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from guardkit import InputError, Judgment, Policy


class RednessGuard:
    """Scores an image by its reddest pixel.

    Args:
        policy: of the evaluation; it makes no difference to this one.
        threshold: flag when score >= threshold, in [0, 1].
    """

    covers = None  # all categories of the policy

    def __init__(self, policy: Policy, *, threshold: float = 0.5) -> None:  # noqa: ARG002
        if not 0 <= threshold <= 1:
            raise InputError(f"baseline.redness.threshold must lie in [0, 1], got {threshold!r}")
        self.name, self.threshold = "redness", threshold
        self.fingerprint = sha256(b"redness, version 1").hexdigest()  # judgments are stored under it

    def judge(self, images: Sequence[np.ndarray]) -> list[Judgment]:
        """(h, w, 3) uint8 RGB images -> one judgment each; one that cannot be judged has a NaN score and a reason."""
        pixels = (image.astype(float) / 255 for image in images)
        return [Judgment(float(np.clip((one[..., 0] - one[..., 1:].max(axis=2)).max(), 0, 1))) for one in pixels]
