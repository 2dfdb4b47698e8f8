"""Who decides whether an edit is kept. What every verifier may rely on is checked first, by `sanity`.

Verifiers see originals and edits, never who made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from guardkit.editors.base import EditRequest
from guardkit.schema import Record


@dataclass(frozen=True)
class Candidate:
    """One edit before it is judged. As a content it is the edited image.

    Attributes:
        key: of everything the edit depends on; the content's key, so that its embedding is shared with training.
        record: that was edited.
        request: as the editor got it.
        original: (h, w, 3) uint8 RGB.
        edited: (h, w, 3) uint8 RGB.
    """

    key: str
    record: Record
    request: EditRequest
    original: np.ndarray
    edited: np.ndarray

    def load(self) -> np.ndarray:
        """The edited image."""
        return self.edited


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one edit.

    Attributes:
        reason: why it is rejected; None when it is accepted.
        flip_score: how surely the label flipped, in [0, 1]; None when not judged.
        preservation_score: how well the rest was kept, in [0, 1]; None when not judged.
        transient: it says nothing of the edit (an endpoint was down, say), and judging again may help.
    """

    reason: str | None = None
    flip_score: float | None = None
    preservation_score: float | None = None
    transient: bool = False


class Verifier(Protocol):
    """Judges edits.

    Attributes:
        name: a short name for tables.
        config: everything its verdicts depend on, in plain JSON types; part of the key under which they are stored.
    """

    name: str

    @property
    def config(self) -> dict: ...

    def verify(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        """One verdict per candidate, in order."""
        ...


class NoVerifier:
    """Accepts every edit that is an image of the right size and differs from its original."""

    name = "none"

    @classmethod
    def build(cls, store: object, policy: object) -> NoVerifier:  # noqa: ARG003 - it needs neither
        """Like the other verifiers."""
        return cls()

    @property
    def config(self) -> dict:
        """Its name."""
        return {"verifier": self.name}

    def verify(self, candidates: Sequence[Candidate]) -> list[Verdict]:
        """Accepts all."""
        return [Verdict() for _ in candidates]


def sanity(original: np.ndarray, edited: np.ndarray) -> str | None:
    """Why an edited image cannot be a counterfactual of any image, or None.

    Args:
        original: (h, w, 3) uint8 RGB.
        edited: what the editor returned for it.
    """
    if edited.dtype != np.uint8 or edited.ndim != 3 or edited.shape[2] != 3:
        return f"editor returned {edited.dtype} of shape {edited.shape}, not (h, w, 3) uint8"
    if edited.shape != original.shape:
        return f"editor changed the size from {original.shape[1]}x{original.shape[0]} to {edited.shape[1]}x{edited.shape[0]}"
    if np.array_equal(edited, original):
        return "editor changed nothing"
    if edited.max() == edited.min():
        return "editor returned a blank image"
    return None
