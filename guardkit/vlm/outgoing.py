"""One call to an endpoint, within bounds: in turn and counted, to no other address, not for long, no more than can be meant.

The official client repeats failed calls by itself, and each repetition comes through here.
"""

from __future__ import annotations

import asyncio
import math
import time
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import openai

from guardkit.schema import InputError
from guardkit.vlm.base import Answer, one_line
from guardkit.vlm.turns import Turns

MAX_REPLY_BYTES = 4_000_000
_MAX_RETRY_AFTER_S = 120.0  # the client's own bound: it does not wait for longer


class Ended(openai.OpenAIError):
    """Ends a question without further calls, because the client repeats every failure but one of its own kind.

    Args:
        outcome: what to answer, or what to raise.
    """

    def __init__(self, outcome: Answer | InputError) -> None:
        super().__init__(str(outcome))
        self.outcome = outcome


class BoundedClient(httpx2.AsyncClient):
    """The transport of the official client.

    Args:
        turns: each call takes one.
        timeout_s: from the start of a call to the last byte of its answer.
    """

    def __init__(self, turns: Turns, timeout_s: float) -> None:
        super().__init__(timeout=timeout_s, follow_redirects=False)
        self._turns, self._timeout_s = turns, timeout_s

    async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
        """The whole answer.

        Raises:
            Ended: the budget is spent, the endpoint redirects, or its answer is too long or compressed.
            httpx2.RequestError: no connection, or no whole answer in time.
        """
        if not await self._turns.take():
            raise Ended(Answer(None, f"budget of {self._turns.max_calls} calls is spent", transient=True))
        request.headers["accept-encoding"] = "identity"  # a small compressed answer may be a huge one
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await super().send(request, **(options | {"stream": True, "follow_redirects": False}))
                try:
                    return await self._whole(request, response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise httpx2.ReadTimeout("no whole answer in time", request=request) from None

    async def _whole(self, request: httpx2.Request, response: httpx2.Response) -> httpx2.Response:
        if response.next_request is not None:
            target = response.next_request.url
            shown = one_line(f"{target.scheme}://{target.netloc.decode(errors='replace')}{target.path}")
            raise Ended(
                InputError(
                    f"{request.url} redirects to {shown}, and questions are not sent on; if that is where the model is, give its vlm.base_url"
                )
            )
        if response.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise Ended(Answer(None, "endpoint sent a compressed answer", transient=True))
        body = bytearray()
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_REPLY_BYTES:
                raise Ended(Answer(None, f"endpoint sent more than {MAX_REPLY_BYTES / 1e6:g} MB", transient=True))
        headers = httpx2.Headers([(name, value) for name, value in response.headers.multi_items() if name != "transfer-encoding"])
        if response.status_code == 429:
            if b'"insufficient_quota"' in body:
                headers["x-should-retry"] = "false"  # a quota does not come back by waiting
            wanted = _retry_after(headers.get("retry-after"))
            if wanted is not None and wanted <= _MAX_RETRY_AFTER_S:
                self._turns.hold(wanted)
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=request)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a Retry-After header in either of its forms (RFC 9110, section 10.2.3)."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value or "").timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)
