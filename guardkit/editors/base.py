"""What an image editor is: requests in, images or reasons out. Editors know pixels, not policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from guardkit.schema import Content, Region

NULL_INSTRUCTION = "Change nothing that matters to the policy."
NO_ROUND_TRIP = "no round trip: this editor has no autoencoder that images pass through"
NEEDS_REGION = (
    "needs a box around the feature; give one (x_min, y_min, x_max, y_max beside file_name), or an editor without: editor=diffusers"
)
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


@dataclass(frozen=True)
class Photograph:
    """A safe image with a box around an object, to paste from.

    Attributes:
        content: the image.
        region: where the object is.
        caption: what it is, in words; may be empty.
        is_look_alike: it looks like something that is unsafe.
    """

    content: Content
    region: Region
    caption: str = ""
    is_look_alike: bool = False


class Editor(Protocol):
    """Edits images. One that cannot edit some images whatever they show may say so ahead, see `refusal`; one that pastes
    from other images is given them, see `supply` and `lent`.

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


def lacks_region(request: EditRequest) -> bool:
    """Whether an editor that changes a box does not know which: only a null edit of a safe image may choose its own."""
    return request.region is None and request.kind != "round_trip" and not (request.kind == "null" and request.label == 0)


def refusal(editor: Editor, request: EditRequest) -> str | None:
    """Why an editor will not edit an image, as far as it is known without its pixels; None where it may be tried.

    An editor says so by a method `refuses` that takes the request; one without it refuses nothing ahead.
    """
    refuses = getattr(editor, "refuses", None)
    return None if refuses is None else refuses(request)


def supply(editor: Editor, photographs: Sequence[Photograph]) -> None:
    """Gives an editor the images that it may paste from, before its `config` is asked for or anything is edited.

    An editor takes them by a method `supply`; one without it needs none.

    Args:
        editor: of any kind.
        photographs: of the images that are trained on, never of those that are tested on.
    Raises:
        InputError: they are fewer than the editor's settings ask for.
    """
    take = getattr(editor, "supply", None)
    if take is not None:
        take(photographs)


def lent(editor: Editor) -> Sequence[Photograph]:
    """The images that it was given and may paste from: parts of them show in its edits, so a guard that saw these saw them.

    An editor names them by an attribute `lent`; one without it pastes nothing.
    """
    photographs: Sequence[Photograph] = getattr(editor, "lent", ())
    return photographs
