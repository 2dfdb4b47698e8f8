"""What stands before every route of the service: whose requests are heard, what is counted, which headers all answers carry."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Collection
from typing import Any

from guardkit.moderation.gate import App, Message, Receive, Refused, Send
from guardkit.serving.figures import Figures
from guardkit.terminal import one_line

_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Door:
    """An ASGI application around the service's.

    Args:
        app: the service's.
        figures: counts requests.
        paths: the routes there are; others are counted together.
        hosts: names that the service answers to, and pages of no other origin; None: any.
    """

    def __init__(self, app: App, *, figures: Figures, paths: Collection[str], hosts: Collection[str] | None) -> None:
        self._app, self._figures, self._paths = app, figures, frozenset(paths)
        self._hosts = None if hosts is None else frozenset(one.lower() for one in hosts)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        try:
            self._check_origin(scope)
        except Refused as refusal:
            await _answer(sent, refusal)
        else:
            await self._app(scope, receive, sent)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._figures.add("guardkit_requests_total", path=path, status=str(status))
            self._figures.observe("guardkit_request_seconds", time.perf_counter() - started)

    def _check_origin(self, scope: Message) -> None:
        """A page from elsewhere, whose name was bent to this address, must not ask a service that is for this machine only."""
        if self._hosts is None:
            return
        hosts, origins = _header(scope, "host"), _header(scope, "origin")
        if len(hosts) != 1 or _name(hosts[0]) not in self._hosts:
            raise Refused(403, f"this service answers to {', '.join(sorted(self._hosts))} only; allowed_hosts names others")
        if any(_name(re.sub(r"^https?://", "", one)) not in self._hosts for one in origins):
            raise Refused(403, "pages of other origins get nothing here")


def answer_json(value: Any) -> bytes:
    """A value as JSON in ASCII: what a caller sent is repeated whatever characters it has."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii")


def said(why: object) -> dict[str, str]:
    """The body of every refusal: one line."""
    return {"detail": one_line(why)}


def _header(scope: Message, name: str) -> list[str]:
    return [value.decode("latin-1").strip().lower() for key, value in scope["headers"] if key.decode("latin-1").lower() == name]


def _name(host: str) -> str:
    return re.sub(r":\d*$", "", host).strip("[]")


async def _answer(send: Send, refusal: Refused) -> None:
    body = answer_json(said(refusal))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
