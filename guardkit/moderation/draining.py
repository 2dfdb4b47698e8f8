"""Answers that come before a request is read whole: the rest of the body is taken in and dropped, within bounds.

A server that closes a connection while bytes wait in it resets it, and the client may never see why it was refused.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from guardkit.moderation.gate import App, Message, Receive, Send

_MAX_BYTES = 128 << 20
_MAX_S = 5.0


@dataclass(frozen=True)
class Drained:
    """An ASGI application around another one.

    Attributes:
        app: what answers.
    """

    app: App

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        is_read = b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0"
        # who asks first whether to send a body sends none after a refusal
        may_come = b"expect" not in headers

        async def received() -> Message:
            nonlocal is_read
            message = await receive()
            is_read = is_read or not message.get("more_body", False)
            return message

        async def rest() -> None:
            n = 0
            while not is_read and n < _MAX_BYTES:
                n += len((await received()).get("body", b""))

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and not is_read:
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            if message["type"] == "http.response.body" and not message.get("more_body", False) and not is_read and may_come:
                await send({**message, "more_body": True})
                try:
                    async with asyncio.timeout(_MAX_S):
                        await rest()
                except TimeoutError:
                    pass
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        await self.app(scope, received, sent)
