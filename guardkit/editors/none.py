"""No editor: for arms without counterfactuals, and to see what a pipeline does when nothing is ever edited."""

from __future__ import annotations

from collections.abc import Sequence

from guardkit.editors.base import EditRequest, EditResult


class NoEditor:
    """Rejects every request."""

    name = "none"

    def __init__(self) -> None:
        self.config = {"editor": self.name}

    def edit(self, requests: Sequence[EditRequest]) -> list[EditResult]:
        """A rejection per request."""
        return [EditResult(None, self.refuses(request)) for request in requests]

    def refuses(self, request: EditRequest) -> str:  # noqa: ARG002 - whatever it is
        """Why an image will not be edited."""
        return "editor=none edits nothing; choose another editor"
