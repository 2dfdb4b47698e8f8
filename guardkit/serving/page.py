"""A page on this machine for one guard: drop an image, look at what its score comes from, move a threshold, work through a queue."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Collection
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Query, Request
from fastapi.responses import HTMLResponse, Response

from guardkit.classifier import GuardClassifier
from guardkit.counterfactual.review import MAX_NAME
from guardkit.images import encode_png
from guardkit.limits import shrink
from guardkit.moderation.gate import Refused
from guardkit.pages import render
from guardkit.schema import InputError
from guardkit.serving.app import create_app
from guardkit.serving.bodies import asked
from guardkit.serving.costs import Costs
from guardkit.serving.door import answer_json
from guardkit.serving.guards import ONE
from guardkit.serving.limits import EXPLAINED_PIXELS, Limits
from guardkit.serving.queue import ModerationQueue
from guardkit.thresholds import Band

_OVERLAY_PX = 1024  # of the longer side
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_page(
    guard: GuardClassifier,
    *,
    costs: Costs | None = None,
    queue: ModerationQueue | None = None,
    reviewer: str | None = None,
    limits: Limits | None = None,
    allowed_hosts: Collection[str] | None = None,
) -> FastAPI:
    """The service of `create_app` with a page at /, which asks it and a few routes of its own.

    Nothing is written but what people say of a queue. Every route of the page needs a secret that only the page knows, so that no other
    page of this machine's browser can ask for it.

    Args:
        guard: decides.
        costs: of other thresholds; None: the page says how to get them.
        queue: that people work through; None: none.
        reviewer: the name that the page starts with; None: the one that the browser remembers.
        limits: as of the service.
        allowed_hosts: as of the service.
    Raises:
        InputError: as `create_app`.
    """
    app = create_app(guard, limits=limits, allowed_hosts=allowed_hosts)
    service, token = app.state.service, secrets.token_urlsafe(24)

    def known(given: str) -> None:
        if not secrets.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode()):
            raise Refused(403, "only the page itself gets an answer here; reload it")

    def by_header(x_guardkit_page: Annotated[str, Header()] = "") -> None:
        known(x_guardkit_page)

    own = [Depends(by_header)]

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        text = render("guard.html", nonce=nonce, **_about(guard, costs, queue, reviewer, token, service.limits))
        return HTMLResponse(text, headers={"content-security-policy": _POLICY.format(nonce=nonce)})

    async def explain(request: Request, category: str | None = None, frame: Annotated[int | None, Query(ge=0)] = None) -> Response:
        async with asked(request, service) as found:
            explanation = await service.explain(found.uploads[0].data, guard=ONE, category=category or None, frame=frame)
        # both in a thread: of a hundred megapixels the overlay takes seconds, in which nobody else would get an answer
        picture = await asyncio.to_thread(lambda: encode_png(shrink(explanation.overlay(), _OVERLAY_PX)))
        about = {"method": explanation.method, "category": explanation.category, "score": explanation.score}
        return _json({**about, "overlay": "data:image/png;base64," + base64.b64encode(picture).decode()})

    async def cost(column: str, review: float, block: float) -> Response:
        if costs is None:
            raise Refused(404, "this guard has no calibration here")
        try:
            return _json(costs.of(column, Band(review, block)))
        except InputError as error:
            raise Refused(422, str(error)) from error

    async def rows() -> Response:
        return _json(_there(queue).to_dict())

    async def picture(row: int, key: str = "") -> Response:
        known(key)
        data = await asyncio.to_thread(_there(queue).picture, row)
        return Response(data, media_type="image/jpeg")

    async def verdict(
        row: int,
        verdict: Annotated[str, Query(max_length=40)],
        reviewer: Annotated[str, Query(max_length=4 * MAX_NAME)],
        category: Annotated[str | None, Query(max_length=400)] = None,
    ) -> Response:
        said = await asyncio.to_thread(_there(queue).add, row, verdict, category, reviewer)
        return _json({"verdicts": said})

    async def corrections() -> Response:
        return _json(await asyncio.to_thread(_there(queue).corrections))

    app.post("/page/explain", dependencies=own, include_in_schema=False)(explain)
    app.get("/page/costs", dependencies=own, include_in_schema=False)(cost)
    app.get("/page/queue", dependencies=own, include_in_schema=False)(rows)
    app.get("/page/picture/{row}", include_in_schema=False)(picture)
    app.post("/page/verdict", dependencies=own, include_in_schema=False)(verdict)
    app.post("/page/corrections", dependencies=own, include_in_schema=False)(corrections)
    return app


def _json(value: Any) -> Response:
    return Response(answer_json(value), media_type="application/json")


def _there(queue: ModerationQueue | None) -> ModerationQueue:
    if queue is None:
        raise Refused(404, "this page has no queue; start it with queue=DIR")
    return queue


def _about(
    guard: GuardClassifier, costs: Costs | None, queue: ModerationQueue | None, reviewer: str | None, token: str, limits: Limits
) -> dict[str, Any]:
    bands = {"decision": guard.thresholds.decision, **guard.thresholds.categories}
    return {
        "guard": guard.name,
        "policy": guard.policy.name,
        "encoder": guard.encoder.name,
        "categories": [{"name": one.name, "definition": one.definition} for one in guard.policy.categories],
        "megapixels": {"decided": limits.max_pixels // 1_000_000, "explained": min(limits.max_pixels, EXPLAINED_PIXELS) // 1_000_000},
        "promises": [] if guard.calibration is None else guard.calibration.promises,
        "facts": {
            "token": token,
            "categories": list(guard.policy.category_names),
            "bands": {name: {"review": band.review, "block": band.block} for name, band in bands.items()},
            "columns": [] if costs is None else list(costs.columns),
            "volume": None if costs is None else costs.asked.get("volume_per_day"),
            "has_queue": queue is not None,
            "reviewer": reviewer or "",
            "max_bytes": limits.max_bytes,
        },
    }
