"""An editor that fails on purpose, at a stated rate: to measure what an imperfect editor costs a guard.

A failure is the commonest one of instruction editors: the violation stays, and something else changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from guardkit.artifacts import fingerprint
from guardkit.checks import check_number
from guardkit.editors.base import NULL_INSTRUCTION, Editor, EditRequest, EditResult, Photograph, lent, refusal, supply


class ImperfectEditor:
    """Does what another editor does, or an irrelevant edit in its place.

    Args:
        editor: the other one.
        success_rate: share of edits that are done as asked, in [0, 1]; which ones follows from image and seed.
    Raises:
        InputError: a rate out of range.
    """

    name = "imperfect"

    def __init__(self, editor: Editor, success_rate: float) -> None:
        check_number("editor.success_rate", success_rate, "[0, 1]")
        self.editor, self.success_rate = editor, float(success_rate)

    @property
    def config(self) -> dict:
        """The other editor's, and the rate."""
        return {"editor": self.name, "success_rate": self.success_rate, "of": self.editor.config}

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request, in order."""
        return self.editor.edit(
            [one if self._succeeds(one) else replace(one, kind="null", instruction=NULL_INSTRUCTION, target="") for one in requests]
        )

    def refuses(self, request: EditRequest) -> str | None:
        """Why an image will not be edited, or None."""
        return refusal(self.editor, request)

    def supply(self, photographs: Sequence[Photograph]) -> None:
        """Hands them on."""
        supply(self.editor, photographs)

    @property
    def lent(self) -> Sequence[Photograph]:
        """What the editor within may paste from."""
        return lent(self.editor)

    def _succeeds(self, request: EditRequest) -> bool:
        # the same draw at every rate, so that a better editor does well what a worse one did
        draw = int(fingerprint([request.content.key, request.seed])[:12], 16) / 16**12
        return request.kind != "counterfactual" or draw < self.success_rate
