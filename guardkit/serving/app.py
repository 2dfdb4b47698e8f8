"""The application: routes, the key, refusals in one line."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.security import APIKeyHeader, HTTPBearer
from fastapi.security.http import HTTPAuthorizationCredentials
from starlette.exceptions import HTTPException

from guardkit import __version__
from guardkit.moderation.draining import Drained
from guardkit.moderation.gate import Refused
from guardkit.schema import InputError, shortened
from guardkit.serving import described
from guardkit.serving.bodies import asked, scope_of
from guardkit.serving.door import Door, answer_json, said
from guardkit.serving.figures import CONTENT_TYPE
from guardkit.serving.guards import Given
from guardkit.serving.limits import Limits
from guardkit.serving.service import Service

_MIN_KEY = 8  # characters
_MORE_HEADERS = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}
_REFUSED = {
    "_400": "The body is malformed.",
    "_403": "The request is for another host, or of a page of another origin.",
    "_408": "The body came too slowly.",
    "_413": "More bytes or images than a request may have; or its one image has more bytes, pixels or frames than are decided over.",
    "_415": "A body of another type.",
    "_422": "An unknown guard or category, or fields of another shape.",
    "_429": "The queue is full.",
}


class _Json(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return answer_json(content)


def create_app(
    guard: Given | Mapping[str, Given],
    *,
    key: str | None = None,
    limits: Limits | None = None,
    allowed_hosts: Collection[str] | None = None,
    trust: Sequence[str] = (),
) -> FastAPI:
    """A service that decides over images; see docs/serving.md for its routes.

    Args:
        guard: a guard, its folder or Hub id, or a map of names to these. Guards on one encoder embed an image once.
        key: what a request must carry as `X-API-Key` or `Authorization: Bearer`, for every route but /healthz and /openapi.json; None: anybody may ask.
        limits: of bytes, pixels, images and the queue; None: the usual ones.
        allowed_hosts: names and addresses that the service answers to; pages of other origins are refused then. None: any.
        trust: packages that saved guards may take their heads and encoders from.
    Returns:
        The application; `app.state.service` is the `Service` behind it.
    Raises:
        InputError: a key that is too short or that no header can carry, or as `GuardClassifier.from_pretrained`.
    """
    checked = _key_check(key)
    service = Service(guard, limits=limits, trust=trust)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # the interactive pages of FastAPI load scripts from elsewhere
    app = FastAPI(title="guardkit", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan, default_response_class=_Json)
    app.state.service = service
    protected = [Depends(checked)] if checked is not None else []
    locked = {"_401": "The key is missing or wrong."} if checked is not None else {}

    @app.post(
        "/v1/moderate",
        summary="Decides over one image or many",
        dependencies=protected,
        openapi_extra=described.body(service.limits.max_images),
        responses=described.answers(described.DECISIONS, **_REFUSED, **locked),
    )
    async def moderate(
        request: Request,
        guard: Annotated[list[str], Query(description="names of guards; none: all")] = [],  # noqa: B006 - FastAPI copies it
        scope: Annotated[list[str], Query(description="only what violates one of these categories is flagged")] = [],  # noqa: B006
        id: Annotated[str | None, Query(description="names an image that comes as it is")] = None,
    ) -> Response:
        """Files of a form, an image as it is, or base64 within JSON. One that cannot be decided has the action `error`, and the others are decided."""
        if service.is_full:
            raise Refused(429, f"the queue is full ({service.limits.max_queue} images); try again in a second")
        async with asked(request, service, name=id) as found:
            verdicts = await service.decide(found.uploads, guards=guard, scope=scope_of(scope, found.scope))
        if len(found.uploads) == 1 and verdicts[0].is_too_large:
            raise Refused(413, f"the image is too large: {verdicts[0].decision.error}")
        return _Json({"decisions": [one.to_dict() for one in verdicts]})

    @app.get(
        "/v1/guard",
        summary="What the guards decide, by which thresholds, with which promises",
        dependencies=protected,
        responses=described.answers(described.GUARDS, _403=_REFUSED["_403"], **locked),
    )
    async def about() -> Response:
        guards = [one.to_dict() for one in service.guards.values()]
        return _Json({"guards": guards, "limits": dataclasses.asdict(service.limits)})

    @app.post(
        "/v1/reload",
        summary="Reads the guards' folders again",
        dependencies=protected,
        responses=described.answers(
            described.RELOADED, _403="The service has no key; or as elsewhere.", _409="It cannot be done; all stay as they are.", **locked
        ),
    )
    async def reload() -> Response:
        """All guards are taken up together, or none. Without a key the service does it at the signal SIGHUP only."""
        if checked is None:
            raise Refused(
                403, "a service without a key reads its guards again at the signal SIGHUP only; start it with a key to ask for it here"
            )
        try:
            return _Json({"guards": await asyncio.to_thread(service.reload)})
        except InputError as error:
            raise Refused(409, f"the guards stay as they are: {error}") from error

    @app.get("/healthz", summary="Whether it works", responses=described.answers(described.HEALTH, _403=_REFUSED["_403"]))
    async def healthz() -> Response:
        return _Json({"status": "ok"}) if service.is_alive else _Json({"status": "failed"}, status_code=503)

    text: dict[int | str, dict[str, Any]] = {200: {"description": "OK", "content": {"text/plain": {"schema": {"type": "string"}}}}}
    refusals = {status: one for status, one in described.answers({}, _403=_REFUSED["_403"], **locked).items() if status != 200}

    @app.get("/metrics", summary="Figures for Prometheus", dependencies=protected, response_class=Response, responses={**text, **refusals})
    async def metrics() -> Response:
        return Response(service.figures.text(service.gauges), media_type=CONTENT_TYPE)

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _failed)
    paths = ("/v1/moderate", "/v1/guard", "/v1/reload", "/healthz", "/metrics", "/openapi.json")
    app.add_middleware(Door, figures=service.figures, paths=paths, hosts=allowed_hosts)
    app.add_middleware(Drained)
    return app


def _key_check(key: str | None) -> Any:
    """A dependency that asks for the key; None where there is none."""
    if key is None:
        return None
    if len(key) < _MIN_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError(f"the key must have at least {_MIN_KEY} characters, all of them printable ASCII, and no space at its ends")
    expected = hashlib.sha256(key.encode()).digest()
    by_header, by_bearer = APIKeyHeader(name="X-API-Key", auto_error=False), HTTPBearer(auto_error=False)

    async def check(
        own: Annotated[str | None, Depends(by_header)], bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(by_bearer)]
    ) -> None:
        given = own if own is not None else bearer.credentials if bearer is not None else ""
        # hashes are equally long, and are compared in constant time
        if not hmac.compare_digest(hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest(), expected):
            raise Refused(401, "the key is missing or wrong; send it as X-API-Key or as Authorization: Bearer")

    # what the annotations name is known in here only
    check.__annotations__ = {
        "own": Annotated[str | None, Depends(by_header)],
        "bearer": Annotated[HTTPAuthorizationCredentials | None, Depends(by_bearer)],
    }
    return check


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return _Json(said(error), status_code=error.status, headers=_MORE_HEADERS.get(error.status))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    why, place, root = error.detail, shortened(request.url.path), request.scope.get("root_path", "")
    if error.status_code == 404:
        why = f"there is nothing at {place}; images go to POST {root}/v1/moderate, and GET {root}/openapi.json lists all routes"
    elif error.status_code == 405:
        why = f"{place} does not take {request.method}; it takes {(error.headers or {}).get('Allow', 'another method')}"
    return _Json(said(why), status_code=error.status_code, headers=error.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return _Json(said(f"{'.'.join(map(str, first['loc']))}: {first['msg']}"), status_code=422)


async def _failed(_: Request, error: Exception) -> Response:
    return _Json(said(f"a fault of the service: {type(error).__name__}; its log says more"), status_code=500)
