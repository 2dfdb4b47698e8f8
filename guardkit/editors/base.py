"""What an image editor is: requests in, images or reasons out. Editors know pixels, not policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from guardkit.schema import Content, Region

NULL_INSTRUCTION = "Change nothing that matters to the policy."
NO_ROUND_TRIP = "no round trip: this editor has no autoencoder that images pass through"
Kind = Literal["counterfactual", "null", "round_trip"]


@dataclass(frozen=True)
class EditRequest:
    """One edit that somebody wants.

    Attributes:
        content: the image to edit.
        instruction: what to change, in words; editors that cannot read ignore it.
        region: where, if known.
        seed: of this edit alone, so that an edit does not depend on what else is in its batch.
        kind: "counterfactual" changes what the instruction names; "null" passes the image through the editor
            with a change of the same size that is irrelevant; "round_trip" passes it through what the editor does to every
            image (its autoencoder) and changes nothing on purpose.
        label: of the image, 1 = unsafe, 0 = safe: on a safe one no place is off limits to a null edit.
        target: what the result shows, a caption; empty when nobody knows.
    """

    content: Content
    instruction: str
    region: Region | None
    seed: int
    kind: Kind = "counterfactual"
    label: int = 1
    target: str = ""


@dataclass(frozen=True)
class EditResult:
    """An edited image, or why there is none (exactly one of the two)."""

    image: np.ndarray | None
    reason: str | None = None


class Editor(Protocol):
    """Edits images.

    Attributes:
        name: a short name for tables.
        config: everything that its edits depend on besides the request, in plain JSON types. It is part of the key
            under which edits are stored.
    """

    name: str

    @property
    def config(self) -> dict: ...

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request, in order. (h, w, 3) uint8 RGB of the same size as the original."""
        ...
