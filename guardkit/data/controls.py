"""Controls: does a guard learn the unsafe feature, or the traces of those who handled the images?

Untouched training images are compared with what is left of them after each step that edits pass through and that should not
matter: the editor with an irrelevant edit, its autoencoder alone, and a lossy codec. A probe that tells the two apart
(`guardkit.metrics.probe.edited_vs_original_auroc`) has found a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from guardkit.counterfactual.pipeline import EditCounts
from guardkit.data.views import ViewMaker
from guardkit.editors.base import Kind
from guardkit.schema import Content, Record

JPEG_QUALITY = 75  # Pillow's default


@dataclass(frozen=True)
class JpegContent:
    """A content after JPEG compression, as if somebody had saved it once more."""

    original: Content
    quality: int = JPEG_QUALITY

    def __str__(self) -> str:
        return str(self.original)

    @property
    def key(self) -> str:
        """Of the original and the quality."""
        return f"jpeg-1:{self.quality}:{self.original.key}"

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB of the original's size."""
        buffer = BytesIO()
        Image.fromarray(self.original.load()).save(buffer, "JPEG", quality=self.quality)
        return np.asarray(Image.open(buffer))


@dataclass(frozen=True)
class Control:
    """Images before and after a step.

    Attributes:
        original: (n, d) embeddings.
        altered: (n, d) of the same images after it.
        reason: why some are missing; None when none is.
    """

    original: np.ndarray
    altered: np.ndarray
    reason: str | None = None


def make_controls(views: ViewMaker, records: Sequence[Record], counts: EditCounts) -> dict[str, Control]:
    """The controls of one label's images.

    Args:
        views: makes and embeds them.
        records: untouched images.
        counts: of null edits and round trips; added to.
    Returns:
        "null_edit", "autoencoder" and "jpeg".
    """
    shown = [record for record in records if record.content is not None]
    original = views.embed(shown)
    found: dict[str, Control] = {}
    kinds: dict[str, Kind] = {"null_edit": "null", "autoencoder": "round_trip"}
    for name, kind in kinds.items():
        mine = EditCounts()
        edited = views.edited(shown, 1, kind, mine)
        there = edited.there[:, 0]
        counts.seconds += mine.seconds
        reasons = "; ".join(f"{n} x {reason}" for reason, n in sorted(mine.rejected.items()))
        found[name] = Control(original[there], edited.vectors[there, 0], reasons or None)
    compressed = views.store.embed([JpegContent(record.content) for record in shown if record.content is not None]) if shown else original
    return found | {"jpeg": Control(original, compressed)}
