"""What a request to decide may hold: an image as it is, files of a form, or base64 within JSON. Nothing in it is believed."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from guardkit.moderation.gate import Refused
from guardkit.schema import shortened
from guardkit.serving.limits import Limits
from guardkit.serving.service import Service, Upload
from guardkit.terminal import one_line

_MAX_ID = 300  # characters
_MAX_FIELD_BYTES = 64_000
_MAX_FIELDS = 100
_FORM = "a form with files (multipart/form-data), an image as it is (image/* or application/octet-stream) or JSON with base64 (application/json)"


@dataclass(frozen=True)
class Asked:
    """A request, read.

    Attributes:
        uploads: at least one.
        scope: the categories that the body names; None where it names none.
    """

    uploads: list[Upload]
    scope: list[str] | None = None


@asynccontextmanager
async def asked(request: Request, service: Service, *, name: str | None = None) -> AsyncIterator[Asked]:
    """The images of a request; what they take is counted until they are decided.

    Args:
        request: not read yet.
        service: whose limits hold.
        name: of an image that comes as it is.
    Raises:
        Refused: the request is malformed (400, 415, 422), too large (413), too slow (408), or too much beside the others (429).
    """
    body = _Body(request, service)
    try:
        async with asyncio.timeout(service.limits.read_timeout_s):
            found = await _parsed(request, body, service, name)
    except TimeoutError as error:
        body.give_back()
        raise Refused(408, f"the body did not come within {service.limits.read_timeout_s:g} seconds") from error
    except ClientDisconnect as error:
        body.give_back()
        raise Refused(400, "the request was cut short") from error
    except BaseException:
        body.give_back()
        raise
    try:
        yield found
    finally:
        body.give_back()


class _Body:
    """The bytes of a request, as they come, within the limits of one and of all."""

    def __init__(self, request: Request, service: Service) -> None:
        self._request, self._service, self._held = request, service, 0
        if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refused(415, "a body must come as it is, without content-encoding")
        stated = request.headers.get("content-length", "0")
        if stated.isascii() and stated.isdigit() and len(stated) < 20:
            self._check(int(stated))

    def _check(self, n: int) -> None:
        most = self._service.limits.max_request_bytes
        if n > most:
            raise Refused(413, f"a request has at most {most} bytes")
        if self._service.n_bytes + n - self._held > self._service.limits.max_queue_bytes:
            raise Refused(429, f"the bodies under way are {self._service.limits.max_queue_bytes} bytes already; try again in a second")

    async def parts(self) -> AsyncGenerator[bytes, None]:
        async for part in self._request.stream():
            self._check(self._held + len(part))
            self._held += len(part)
            self._service.n_bytes += len(part)
            yield part

    async def whole(self) -> bytes:
        return b"".join([part async for part in self.parts()])

    def give_back(self) -> None:
        self._service.n_bytes -= self._held
        self._held = 0


async def _parsed(request: Request, body: _Body, service: Service, name: str | None) -> Asked:
    kinds = request.headers.getlist("content-type")
    kind = kinds[0].split(";")[0].strip().lower() if len(kinds) == 1 else "" if not kinds else "several types"
    if kind == "multipart/form-data":
        return await _of_form(request, body, service.limits)
    if kind == "application/json":
        # in a thread: others are answered while many megabytes are taken apart
        return await asyncio.to_thread(_of_json, await body.whole(), service.limits)
    if kind in ("", "application/octet-stream") or kind.startswith("image/"):
        image = await body.whole()
        if not image:
            raise Refused(422, f"the request has no body; send {_FORM}")
        return Asked([Upload(_named(name, 0), image)])
    raise Refused(415, f"a request must be {_FORM}, got {shortened(one_line(kind))}")


# --- forms ------------------------------------------------------------------------------------------------------------


class _InMemory(MultiPartParser):
    """Keeps files in memory, where they are bounded: nothing is written to a disk."""

    def __init__(self, request: Request, parts: AsyncGenerator[bytes, None], limits: Limits) -> None:
        super().__init__(request.headers, parts, max_files=limits.max_images, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
        self.spool_max_size = limits.max_request_bytes + 1
        self._is_whole = False

    def on_end(self) -> None:
        """The last boundary has come."""
        self._is_whole = True

    async def parse(self) -> FormData:
        """The form. Raises MultiPartException also where its end is missing."""
        form = await super().parse()
        if not self._is_whole:
            for file in self._files_to_close_on_error:
                file.close()
            raise MultiPartException("its end is missing")
        return form

    def on_headers_finished(self) -> None:
        """Of one file: more than there may be are another refusal than a malformed form."""
        try:
            super().on_headers_finished()
        except MultiPartException as error:
            if self._current_files > self.max_files:
                raise _too_many(int(self.max_files)) from error
            raise


async def _of_form(request: Request, body: _Body, limits: Limits) -> Asked:
    try:
        form = await _InMemory(request, body.parts(), limits).parse()
    except MultiPartException as error:
        raise Refused(400, f"the form cannot be read: {shortened(one_line(error.message), 200)}") from error
    uploads: list[Upload] = []
    scope: list[str] = []
    for field, value in form.multi_items():
        if isinstance(value, UploadFile):
            uploads.append(Upload(_named(value.filename, len(uploads)), await value.read()))
            await value.close()
        elif field == "scope":
            scope += _split(value)
        else:
            raise Refused(422, f"a form has files and the field scope, got the field {_quoted(field)}; nothing is fetched from an address")
    if not uploads:
        raise Refused(422, "the form holds no file; send each image as a part with a file name")
    return Asked(uploads, scope or None)


# --- JSON -------------------------------------------------------------------------------------------------------------


def _of_json(body: bytes, limits: Limits) -> Asked:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(given, dict) or not {"images"} <= given.keys() <= {"images", "scope"}:
        raise Refused(
            422, 'JSON must be {"images": [...]}, and may have "scope": [...]; each image is base64, or {"id": ..., "data": base64}'
        )
    images, scope = given["images"], given.get("scope")
    if not isinstance(images, list) or not images:
        raise Refused(422, "images must be a list of at least one image")
    if len(images) > limits.max_images:
        raise _too_many(limits.max_images)
    if scope is not None and not (isinstance(scope, list) and all(isinstance(one, str) for one in scope)):
        raise Refused(422, "scope must be a list of categories")
    return Asked([_of_entry(at, one) for at, one in enumerate(images)], scope)


def _of_entry(at: int, entry: Any) -> Upload:
    name = None
    if isinstance(entry, dict):
        unknown = sorted(entry.keys() - {"id", "data"})
        if unknown:
            raise Refused(422, f"image {at} has {_quoted(unknown[0])}, and may have id and data; nothing is fetched from an address")
        name, entry = entry.get("id"), entry.get("data")
        if name is not None and not isinstance(name, str):
            raise Refused(422, f"the id of image {at} must be a text")
    if not isinstance(entry, str):
        raise Refused(422, f"image {at} must be base64, or an object with base64 as data")
    try:
        return Upload(_named(name, at), base64.b64decode(entry, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Refused(422, f"image {at} is not base64 (RFC 4648, with padding, without line breaks or a data: address in front)") from error


# --- what all have ----------------------------------------------------------------------------------------------------


def scope_of(query: list[str], body: list[str] | None) -> list[str] | None:
    """The categories that a request names, in its address or in its body.

    Raises:
        Refused: in both (422).
    """
    named = [name for one in query for name in _split(one)]
    if named and body is not None:
        raise Refused(422, "scope is given in the address and in the body; give it once")
    return named or body


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _named(name: str | None, at: int) -> str:
    """A caller's name of an image, which is only ever repeated to the caller; else its place in the request."""
    return (name if len(name) <= _MAX_ID else shortened(name, _MAX_ID)) if name else str(at)


def _quoted(name: str) -> str:
    return repr(shortened(one_line(name)))


def _too_many(most: int) -> Refused:
    return Refused(413, f"a request has at most {most} images")
