"""What goes wrong with object storage, in one line each. Knows the errors of fsspec's file systems by their names, and imports none."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guardkit.schema import InputError, shortened

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "HF_TOKEN")
_SECRET_LENGTH = 12  # at least: AWS gives 16 and more, and "test", as for a server on this machine, is a word of messages


class StorageError(InputError):
    """An object, or a storage, cannot be had; the message is one line that names it."""


class MissingError(StorageError):
    """There is no such object, or no such bucket."""


class ChangedError(StorageError):
    """An object is another one than it was when it was listed or opened."""


@contextmanager
def asking(url: str, done: str = "read") -> Iterator[None]:
    """Turns whatever fsspec, its file systems and their HTTP libraries raise into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        chain = _chain(error)
        kind, reason, remedy = _why(chain, url)
        # `from None`: the messages of what lies below may hold headers and signatures
        raise kind(f"{shown(url)} cannot be {done} ({_without_secrets(reason)}); {remedy}") from None


_AGAIN = "try again later"
_RIGHTS = "check the credentials (AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) and what they may do"


def _why(chain: list[BaseException], url: str) -> tuple[type[StorageError], str, str]:
    """What kind of failure it is, why in a few words, and what to do."""
    names = {kind.__name__ for one in chain for kind in type(one).__mro__}
    code, status = next(filter(None, map(code_of, chain)), ""), next(filter(None, map(_status, chain)), 0)
    bucket = url.partition("://")[2].partition("/")[0]
    if "FileExpired" in names or code in ("PreconditionFailed", "412"):
        return ChangedError, "it has changed while it was read", "run again when it is at rest"
    if code == "NoSuchBucket":
        return MissingError, f"there is no bucket {bucket!r}", "correct the URL, or set AWS_ENDPOINT_URL to the server that has it"
    if names & {
        "NoCredentialsError",
        "PartialCredentialsError",
        "DefaultCredentialsError",
        "CredentialRetrievalError",
        "TokenRetrievalError",
    }:
        return StorageError, "no credentials were found", "set AWS_PROFILE or the like, or let fsspec ask without any: FSSPEC_S3_ANON=true"
    if "ProfileNotFound" in names:
        return StorageError, "AWS_PROFILE names a profile that there is not", "correct it, or list it in ~/.aws/config"
    if "PermissionError" in names or status in (401, 403) or code in ("403", "AccessDenied"):
        return StorageError, "access denied" + (f": {code}" if code not in ("", "403", "AccessDenied") else ""), _RIGHTS
    if status in (429, 500, 502, 503, 504) or code in ("SlowDown", "ServiceUnavailable", "InternalError", "503", "500"):
        return StorageError, f"the storage answers {code or status}, again and again", _AGAIN
    if "OfflineModeIsEnabled" in names:
        return StorageError, "the Hub is switched off by HF_HUB_OFFLINE", "unset it"
    if names & {"FileNotFoundError", "EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "BucketNotFoundError"}:
        return MissingError, "it is not there", "correct the URL"
    if names & {"ReadTimeoutError", "ConnectTimeoutError", "TimeoutError", "ServerTimeoutError", "FSTimeoutError", "TimeoutException"}:
        return StorageError, "the storage does not answer in time", f"check the network and AWS_ENDPOINT_URL, or {_AGAIN}"
    if "FlexibleChecksumError" in names:
        return StorageError, "what came does not fit its checksum: bytes are missing or wrong", "read it again, or copy it anew"
    if names & {"ClientPayloadError", "IncompleteRead", "IncompleteReadError", "ResponseStreamingError"}:
        return StorageError, "the answer was cut short, again and again", _AGAIN
    if names & {
        "EndpointConnectionError",
        "ConnectionError",
        "ClientConnectionError",
        "ConnectionClosedError",
        "HTTPClientError",
        "NetworkError",
    }:
        return StorageError, "the storage cannot be reached", f"check the network and AWS_ENDPOINT_URL, or {_AGAIN}"
    if "OSError" in names and any(getattr(one, "errno", None) for one in chain) and not code:
        one = next(one for one in chain if getattr(one, "errno", None))
        return StorageError, shortened(getattr(one, "strerror", None) or str(one), 150), "mend that and run again"
    return StorageError, shortened(f"{code or type(chain[0]).__name__}: {chain[0]}", 200), "correct the URL or the storage's settings"


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or one.__context__
    return chain


def _answer(error: BaseException) -> Any:
    """botocore's, a map, of an error that s3fs raised because of one; None: there is none."""
    for one in _chain(error):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            return answer
    return None


def code_of(error: BaseException) -> str:
    """The word that S3 has for a failure, such as NoSuchBucket; "" where there is none."""
    answer = _answer(error)
    return str((answer or {}).get("Error", {}).get("Code") or "")


def _status(error: BaseException) -> int:
    """Of an HTTP answer; 0 where there is none."""
    answer = _answer(error)
    if answer is not None:
        return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0)
    for one in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            if isinstance(getattr(one, name, None), int):
                return int(getattr(one, name))
    return 0


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        secret = os.environ.get(name)
        if secret and len(secret) >= _SECRET_LENGTH:
            text = text.replace(secret, "***")
    return re.sub(r"(//[^/@\s]*):[^/@\s]*@", r"\1:***@", text)


def shown(url: str) -> str:
    """A URL for messages: printable, and not longer than one line."""
    return shortened("".join(one if one.isprintable() else "?" for one in url), 300)
