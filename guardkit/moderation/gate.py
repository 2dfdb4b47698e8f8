"""What stands in front of the review page: it lets through what the page itself asks, from the page's own address, and no more.

A web framework brings routes for uploads, for other people's files, for an interface of its own. None is reachable here,
and an event that the page would not send is answered without reaching the framework.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVENT, _ANSWERS = "/gradio_api/queue/join", "/gradio_api/queue/data"
_READABLE = re.compile(rf"/|/theme\.css|/favicon\.ico|/manifest\.json|{_ANSWERS}|/(?:assets|static)(?:/[\w-][\w.-]*)+", re.ASCII)
_SESSION = re.compile(r"[0-9A-Za-z]{1,64}")
_MAX_BODY_BYTES = 64_000
_HEADERS = {
    # the browser itself sees to it that nothing comes from elsewhere, whatever Gradio's pages contain
    "content-security-policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'self'",
    "cache-control": "no-store",  # images that may be unsafe stay out of the browser's cache
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


class Refused(Exception):
    """A request that is not answered otherwise.

    Args:
        status: of HTTP.
        why: one line.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass(frozen=True)
class Gate:
    """An ASGI application around the page's.

    Attributes:
        app: the page's.
        host: the address that is listened at; 0.0.0.0 or :: for all of this machine.
        port: the port.
        events: for each event of the page, by number, a check for each of its inputs: what is wrong with a value, or None.
    """

    app: App
    host: str
    port: int
    events: Mapping[int, Sequence[Callable[[Any], str | None]]]

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # the page opens no web sockets
            return await send({"type": "websocket.close", "code": 1008})
        try:
            self._check_origin(scope)
            self._check_route(scope)
            if scope["method"] == "POST":
                receive = await self._checked_event(scope, receive)
        except Refused as refusal:
            return await _answer(send, refusal)
        return await self.app(scope, receive, _with_headers(send))

    def _check_origin(self, scope: Message) -> None:
        """The name of this server in the address bar, and no other page that asks."""
        hosts, origins = _header(scope, "host"), _header(scope, "origin")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            # a page from elsewhere whose name was bent to this address must not read the images
            raise Refused(403, f"this page is served at {page_address(self.host, self.port)} and under no other name or port")
        if origins and origins != [f"http://{hosts[0]}"]:
            raise Refused(403, "pages of other origins get nothing here")
        # browsers say with requests for scripts and images, which carry no origin, whose page asks; a link may be followed
        sites, is_link = _header(scope, "sec-fetch-site"), scope["path"] == "/" and _header(scope, "sec-fetch-dest") == ["document"]
        if sites and sites[0] not in ("same-origin", "none") and not is_link:
            raise Refused(403, "pages of other origins get nothing here")

    def _is_ours(self, host: str) -> bool:
        name, _, port = host.rpartition(":") if re.search(r":\d+$", host) else (host, "", "80")
        name = name.strip("[]")
        if port != str(self.port):
            return False
        if self.host in LOOPBACK:
            return name in LOOPBACK
        if name in (self.host.lower(), socket.gethostname().lower()):
            return True
        # an address by number cannot be bent
        return self.host in ("0.0.0.0", "::") and (name == "localhost" or _is_number(name))

    def _check_route(self, scope: Message) -> None:
        method, path = scope["method"], scope["path"]
        is_read, is_event = _READABLE.fullmatch(path), path == _EVENT
        if not is_read and not is_event:
            raise Refused(404, "the page has no such address")
        if method not in (("POST",) if is_event else ("GET", "HEAD")):
            raise Refused(405, "the page is not asked in this way")
        name, _, session = scope["query_string"].decode("latin-1").partition("=")
        if path == _ANSWERS and not (name == "session_hash" and _SESSION.fullmatch(session)):
            raise Refused(422, "session_hash must be 1 to 64 letters and digits")

    async def _checked_event(self, scope: Message, receive: Receive) -> Receive:
        """Gives the body once more to who comes after."""
        kinds = _header(scope, "content-type")
        if len(kinds) != 1 or kinds[0].split(";")[0].strip() != "application/json":
            raise Refused(415, "an event must be application/json")
        body, is_more = b"", True
        while is_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the event was cut short")
            body, is_more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > _MAX_BODY_BYTES:
                raise Refused(413, f"an event has at most {_MAX_BODY_BYTES} bytes")
        self._check_event(body)
        waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return waiting.pop() if waiting else await receive()

        return again

    def _check_event(self, body: bytes) -> None:
        try:
            event = json.loads(body)
        except (ValueError, RecursionError):
            raise Refused(400, "an event must be JSON") from None
        allowed = {"data", "event_data", "fn_index", "trigger_id", "session_hash"}
        if not isinstance(event, dict) or not {"data", "fn_index", "session_hash"} <= set(event) <= allowed:
            raise Refused(422, f"an event must be an object of {', '.join(sorted(allowed))}")
        number, data, session = event["fn_index"], event["data"], event["session_hash"]
        if type(number) is not int or number not in self.events:
            raise Refused(422, "fn_index must be the number of an event of this page; reload it")
        if not isinstance(session, str) or not _SESSION.fullmatch(session):
            raise Refused(422, "session_hash must be 1 to 64 letters and digits")
        trigger = event.get("trigger_id")
        if event.get("event_data") is not None or (trigger is not None and not (type(trigger) is int and 0 <= trigger < 10_000)):
            raise Refused(422, "event_data must be null and trigger_id the number of a part of this page; reload it")
        checks = self.events[number]
        if not isinstance(data, list) or len(data) != len(checks):
            raise Refused(422, f"data must be a list of {len(checks)} values; reload the page")
        for check, value in zip(checks, data, strict=True):
            wrong = check(value)
            if wrong is not None:
                raise Refused(422, wrong)


def page_address(host: str, port: int) -> str:
    """What is typed into the browser's address bar."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _header(scope: Message, name: str) -> list[str]:
    return [value.decode("latin-1").lower() for key, value in scope["headers"] if key.decode("latin-1").lower() == name]


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            kept = [
                (name, value)
                for name, value in message.get("headers", [])
                if name.decode("latin-1").lower() not in _HEADERS and not name.lower().startswith(b"access-control-")
            ]
            ours = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*kept, *ours]}
        await send(message)

    return sent


async def _answer(send: Send, refusal: Refused) -> None:
    body = json.dumps({"detail": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    send = _with_headers(send)
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
