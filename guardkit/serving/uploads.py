"""An upload that somebody else's FastAPI application takes only if a guard lets it through."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

from fastapi import File, HTTPException, Request, UploadFile

from guardkit.checks import check_choice
from guardkit.moderation.gate import Refused
from guardkit.serving.guards import Given
from guardkit.serving.limits import Limits
from guardkit.serving.service import Service, Upload


def refuse_unsafe(
    guard: Given | Mapping[str, Given] | Service,
    *,
    field: str = "file",
    scope: Sequence[str] | None = None,
    refuse: Collection[str] = ("block", "review"),
    limits: Limits | None = None,
) -> Callable[..., Awaitable[UploadFile]]:
    """A dependency of FastAPI: the uploaded file where it may be taken, and else an answer with status 422.

        @app.post("/avatars")
        async def upload(file: Annotated[UploadFile, Depends(refuse_unsafe(guard))]): ...

    The answer names the categories and no score, which would tell how to get past the guard. An image that cannot be decided is always refused.
    What was decided is kept in `request.state.decision`.

    Args:
        guard: a guard, its folder or Hub id, or a map of names to these, each of which must let the image through; or a `Service`, so that several
            dependencies share its encoder.
        field: the form's field.
        scope: categories, see `GuardClassifier.predict`.
        refuse: "block", "review" or both.
        limits: of one file's bytes and pixels, and of the queue. A full queue is answered with 429, a file that is too large with 413.
    Raises:
        InputError: as `GuardClassifier.from_pretrained`; or another action.
    """
    for one in refuse:
        check_choice("refuse", one, ("block", "review"))
    service = guard if isinstance(guard, Service) else Service(guard, limits=limits)
    refused = {*refuse, "error"}

    async def checked(request: Request, **files: UploadFile) -> UploadFile:
        file = files[field]
        # a byte more than is allowed tells that it is too many
        data = await file.read(service.limits.max_bytes + 1)
        await file.seek(0)
        try:
            verdicts = await service.decide([Upload(field, data)], scope=scope)
        except Refused as error:
            raise HTTPException(error.status, str(error)) from error
        if verdicts[0].is_too_large:
            raise HTTPException(413, f"the image is too large: {verdicts[0].decision.error}")
        unread = next((one.decision.error for one in verdicts if one.decision.action == "error"), None)
        if unread is not None:
            raise HTTPException(422, {"reason": f"the image cannot be decided: {unread}", "categories": []})
        stopped = [one for one in verdicts if one.decision.action in refused]
        if stopped:
            categories = list(dict.fromkeys(name for one in stopped for name in one.decision.violated))
            raise HTTPException(422, {"reason": "the image is not allowed here", "categories": categories})
        request.state.decision = verdicts[0].decision
        return file

    asks: list[Any] = [
        inspect.Parameter("request", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Request),
        inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[UploadFile, File()]),
    ]
    checked.__signature__ = inspect.Signature(asks)  # type: ignore[attr-defined]
    return checked
