"""The exact editor of the scenes world: it draws the same scene again with the one thing changed."""

from __future__ import annotations

from collections.abc import Sequence

from guardkit.editors.base import NO_ROUND_TRIP, EditRequest, EditResult
from guardkit.scenes.content import SceneContent, drawing_fingerprint


class ScenesEditor:
    """Counterfactuals and null edits of drawn scenes, with no trace of an editor in the pixels."""

    name = "scenes"

    def __init__(self) -> None:
        self.config = {"editor": self.name, "drawing": drawing_fingerprint()}

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """One result per request. Rejected: an image that is not a drawn scene, or shows no feature to replace."""
        return [self._edit_one(request) for request in requests]

    def refuses(self, request: EditRequest) -> str | None:
        """Why an image will not be edited, or None."""
        if isinstance(request.content, SceneContent):
            return None
        return "not a drawn scene: editor=scenes edits source=scenes only; use editor=inpaint or editor=diffusers"

    def _edit_one(self, request: EditRequest) -> EditResult:
        content = request.content
        if not isinstance(content, SceneContent):
            return EditResult(None, self.refuses(request))
        if request.kind == "round_trip":
            return EditResult(None, NO_ROUND_TRIP)
        if request.kind == "null":
            return EditResult(SceneContent(content.scene.null_edit(request.seed), content.size).load())
        if content.scene.category is None:
            return EditResult(None, "the scene shows no feature to replace")
        return EditResult(SceneContent(content.scene.counterfactual(request.seed, wanted=request.instruction), content.size).load())
