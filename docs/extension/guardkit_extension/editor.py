"""An editor: requests in, edited images or reasons out. It knows pixels, not policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardkit import EditRequest, EditResult, InputError
from guardkit_extension.source import COLOURS


class Repainter:
    """Paints a red dot blue and a blue one red.

    Args:
        min_saturation: of a dot's pixels: how far their colours are apart at least, in [1, 255].
    """

    name = "repaint"

    def __init__(self, *, min_saturation: int = 60) -> None:
        if not isinstance(min_saturation, int) or not 1 <= min_saturation <= 255:
            raise InputError(f"editor.min_saturation must be a whole number from 1 to 255, got {min_saturation!r}")
        self.min_saturation = min_saturation
        # all that an edit depends on besides its request: edits are stored under it
        self.config = {"editor": self.name, "version": 1, "min_saturation": min_saturation}

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request, in order."""
        return [self._edit_one(request) for request in requests]

    def _edit_one(self, request: EditRequest) -> EditResult:
        if request.kind == "round_trip":
            return EditResult(None, "no round trip: there is no autoencoder that images pass through")
        image = request.content.load()
        dot = np.ptp(image.astype(int), axis=2) >= self.min_saturation
        if not dot.any():
            return EditResult(None, "no dot is to be seen")
        edited = image.copy()
        if request.kind == "null":  # changes as many pixels, and nothing that matters
            edited[dot] = image[dot] * 0.9
        else:
            edited[dot] = COLOURS[1 - request.label]
        return EditResult(edited)
