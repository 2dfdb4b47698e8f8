"""Objects in object storage, by URL: listed, read, written and deleted through fsspec (s3://, gs://, hf://, memory://, ...).

What is asked is bounded in time and in tries, and whatever goes wrong is one line. Settings of a storage come from where its own
tools have them (AWS_ENDPOINT_URL, AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN) and from fsspec's configuration; a URL
with credentials in it is refused, and no message shows any. Knows nothing of what the objects hold.

A `file://` URL is a path of this machine: `local_path` gives it, and everything here takes it.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

from guardkit import artifacts
from guardkit.schema import InputError, shortened
from guardkit.storage_errors import ChangedError, StorageError, asking, code_of, shown

_URL = re.compile(r"([a-z][a-z0-9+.-]+)://(.*)", re.IGNORECASE | re.DOTALL)
_LOCAL = frozenset({"file", "local"})
# pages of anybody, which may lead anywhere, are no storage
_REFUSED = frozenset({"http", "https", "ftp", "sftp", "ssh"})
_CONNECT_S, _READ_S, _TRIES = 10, 20, 5
_BLOCK = 8 << 20  # bytes asked for at once; a stream holds at most three blocks
_BUFFER = 1 << 18
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_SAME = {"s3a": "s3", "gcs": "gs"}  # further names of a protocol
_SETTINGS = (  # of the environment: where one of them changes, the storage is another
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN",
    "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "GOOGLE_APPLICATION_CREDENTIALS", "HF_TOKEN", "HF_ENDPOINT",
)  # fmt: skip
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "xet_hash", "md5Hash", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class Item:
    """One object.

    Attributes:
        url: of the object.
        name: below the place that was listed, with "/"; its last part where the object itself was asked for. It is the name that
            somebody gave it: see `unusable_name`.
        size: in bytes.
        version: changes whenever the bytes do (an ETag where there are any, else times); "" where the storage has no such mark.
    """

    url: str
    name: str
    size: int
    version: str


# --- URLs -------------------------------------------------------------------------------------------------------------


def is_url(place: object) -> bool:
    """Whether a setting is a URL, `s3://bucket/x`, and no path: `C:\\x`, `./a`, `s3:x`."""
    return isinstance(place, str) and _URL.match(place) is not None


def check_url(setting: str, url: str) -> str:
    """A URL in its plain form: protocol in small letters, under one name (`s3a://` is `s3://`), no "/" at the end.

    Args:
        setting: that holds it, for messages.
        url: of an object, a folder of objects or a bucket.
    Raises:
        InputError: no URL, of a protocol that is no storage or that nothing here knows, with credentials in it, or without a bucket.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise InputError(f"{setting} must be a URL such as s3://bucket/folder, got {shortened(url, 100)!r}")
    protocol, rest = _SAME.get(match[1].lower(), match[1].lower()), match[2]
    first = rest.partition("/")[0]
    if "@" in first and (":" in first.rpartition("@")[0] or protocol in _PACKAGES):
        # without the URL: it holds a secret
        raise InputError(
            f"{setting} is a {protocol}:// URL with credentials in it, which would end up in logs and results; "
            "give s3://bucket/folder and set AWS_PROFILE or the like in the environment"
        )
    if protocol in _REFUSED:
        raise InputError(
            f"{setting} {shortened(url, 100)} is not read: {protocol}:// is no object storage; fetch it first, or give a path, s3://, gs:// or hf://"
        )
    if not rest.strip("/"):
        raise InputError(f"{setting} {url} names no {'path' if protocol in _LOCAL else 'bucket'}; give {protocol}://bucket/folder")
    if unusable_name(rest.strip("/").replace("//", "/")):
        raise InputError(f"{setting} {shown(url)} cannot be used ({unusable_name(rest.strip('/'))}); give a plain URL")
    if protocol not in _LOCAL:
        _class(protocol)
    return f"{protocol}://{rest.rstrip('/')}"


def local_path(url: str) -> Path | None:
    """The path that a `file://` URL stands for; None for all others."""
    match = _URL.fullmatch(url)
    if match is None or match[1].lower() not in _LOCAL:
        return None
    return Path("/" + unquote(match[2].removeprefix("localhost/"), errors="surrogateescape").lstrip("/"))


def joined(url: str, name: str) -> str:
    """The URL of an object by its name below another URL."""
    return f"{url.rstrip('/')}/{quote(name, errors='surrogateescape') if local_path(url) else name}"


def unusable_name(name: str) -> str | None:
    """Why an object's name is not one that a file below a folder may have; None: it is. Names come from whoever writes to the bucket."""
    if not name or name.startswith("/"):
        return "absolute path, where one relative to the folder was expected"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "path with an empty part, . or .. in it"
    if any(unicodedata.category(one) in ("Cc", "Cs") for one in name):
        return "control character in the name, or not valid UTF-8"
    return None


# --- asking -----------------------------------------------------------------------------------------------------------


def items(url: str) -> list[Item]:
    """All objects below a place, in the order of their names; of an object itself nothing. Placeholders of folders are passed over.

    Raises:
        StorageError: no such bucket, or not to be listed. A folder without objects is empty, as storages know no folders.
    """
    folder = local_path(url)
    if folder is not None:
        return [_local_item(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]
    url = check_url("the URL", url)
    system, place = _system(url)
    with asking(url):
        try:
            found = system.find(place, detail=True)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise
            return []
    start = place.rstrip("/") + "/"
    below = [
        _item(joined(url, name[len(start) :]), name[len(start) :], about)
        for name, about in found.items()
        if name.startswith(start) and about["type"] == "file" and not (name.endswith("/") and not about["size"])
    ]
    return sorted(below, key=lambda item: item.name)


def item(url: str) -> Item | None:
    """What is known of an object; None: there is none of that name, though there may be some below it.

    Raises:
        StorageError: the storage cannot say.
    """
    path = local_path(url)
    if path is not None:
        return _local_item(path, path.name) if path.is_file() else None
    url = check_url("the URL", url)
    about = _about(url)
    return _item(url, url.rpartition("/")[2], about) if about is not None and about["type"] == "file" else None


def _about(url: str) -> dict[str, Any] | None:
    """What fsspec knows of an object or a folder; None: there is none."""
    system, place = _system(url)
    with asking(url):
        try:
            found: dict[str, Any] = system.info(place)
            return found
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise
            return None


def exists(url: str) -> bool:
    """Whether there is an object of that name, or some below it. Raises StorageError where the storage cannot say."""
    path = local_path(url)
    if path is not None:
        return path.exists()
    return _about(check_url("the URL", url)) is not None


# --- reading ----------------------------------------------------------------------------------------------------------


def read(url: str, *, version: str | None = None, limit: int | None = None) -> bytes:
    """The bytes of an object.

    Args:
        url: of it.
        version: that it must have; None: any.
        limit: of its size.
    Raises:
        StorageError: it is not there or cannot be read whole, is larger, or another one (`ChangedError`).
    """
    with opened(url, version=version) as file:
        size = file.seek(0, os.SEEK_END)
        if limit is not None and size > limit:
            raise StorageError(f"{shown(url)} has {size} bytes, allowed are {limit}")
        file.seek(0)
        return file.read()


@contextmanager
def opened(url: str, *, version: str | None = None, ahead: bool = False) -> Iterator[BinaryIO]:
    """An object as a file to read, in bounded memory. It can be sought in, as Parquet's readers do.

    Args:
        url: of it.
        version: that it must have; None: any.
        ahead: it is read from front to end, as a tar file is: the next block is fetched while this one is used.
    Raises:
        StorageError: it is not there or another one; reading raises it too, where bytes are missing or the object has changed.
    """
    path = local_path(url)
    if path is not None:
        with asking(url):
            file = artifacts.open_regular(path)
        with file:
            _compare(url, version, _local_item(path, path.name).version)
            yield file
        return
    url = check_url("the URL", url)
    system, place = _system(url)
    with asking(url):
        cache = {"cache_type": "background", "cache_options": {"maxblocks": 2}} if ahead else {"cache_type": "readahead"}
        raw = system.open(place, "rb", block_size=_BLOCK, **cache)
        # most files have asked for it, and are of this very version
        about = getattr(raw, "details", None) or system.info(place)
        if about["type"] != "file":
            raise FileNotFoundError(place)
        _compare(url, version, _version(about))
        if hasattr(raw, "getvalue"):  # in memory, one file with one position is shared by all who open it
            raw = io.BytesIO(raw.getvalue())
    reader = _Reader(raw, url, about["size"], _version(about), lambda: _version(system.info(place)))
    try:
        yield io.BufferedReader(reader, _BUFFER)
    finally:
        reader.close()


class _Reader(io.RawIOBase):
    """A file of fsspec whose failures are one line, and which never gives fewer bytes than the object has."""

    def __init__(self, raw: Any, url: str, size: int, version: str, version_now: Callable[[], str]) -> None:
        self._raw, self._url, self._size, self._version, self._version_now = raw, url, size, version, version_now
        self._is_sure = "ETag" in (getattr(raw, "details", None) or {})  # each of its requests says which version it wants

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._raw.tell())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return int(self._raw.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        data = self._take(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._take(self._size)

    def _take(self, n: int) -> bytes:
        start = self.tell()
        wanted = max(0, min(n, self._size - start))
        with asking(self._url):
            data: bytes = self._raw.read(wanted) if wanted else b""
            if len(data) != wanted:
                raise StorageError(
                    f"{shown(self._url)} ended after {start + len(data)} of {self._size} bytes; read it again, or copy it anew"
                )
            if wanted and start + wanted == self._size and not self._is_sure:
                _compare(self._url, self._version, self._version_now())
        return data

    def close(self) -> None:
        if not self.closed:
            with suppress(Exception):
                self._raw.close()
            # fsspec waits for its thread only here, in some versions not when the file is closed
            close = getattr(getattr(self._raw, "cache", None), "close", None)
            if close is not None:
                close()
        super().close()


# --- writing ----------------------------------------------------------------------------------------------------------


def write(url: str, data: bytes) -> None:
    """Writes an object, whole or not at all; one of that name is replaced. Raises StorageError."""
    path = local_path(url)
    if path is not None:
        with asking(url), artifacts.written(path) as temporary:
            temporary.write_bytes(data)
        return
    url = check_url("the URL", url)
    system, place = _system(url)
    with asking(url, "written"):
        system.pipe_file(place, data)


def upload(path: Path, url: str) -> None:
    """Writes a file's bytes as an object, whole or not at all, in bounded memory. Raises StorageError."""
    target = local_path(url)
    if target is not None:
        with asking(url, "written"), artifacts.written(target) as temporary:
            shutil.copyfile(path, temporary)
        return
    url = check_url("the URL", url)
    system, place = _system(url)
    with asking(url, "written"):
        # the thousands of parts that an object may have are enough for 5 TB; each waits in memory a few times
        size = path.stat().st_size
        parts = {"chunksize": max(_BLOCK, -(-size // 9000))} if _is_s3(system) else {}
        system.put_file(str(path), place, **parts)


@contextmanager
def written(url: str) -> Iterator[Path]:
    """Gives a local path to write to, whose file becomes the object when the block ends without an error; see `artifacts.written`.

    Raises:
        StorageError: it cannot be written.
    """
    target = local_path(url)
    if target is not None:
        with artifacts.written(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory(prefix="guardkit-") as folder:
        path = Path(folder) / (url.rpartition("/")[2] or "object")
        yield path
        upload(path, url)


def delete(url: str) -> None:
    """Takes an object away; nothing happens where there is none. Raises StorageError."""
    path = local_path(url)
    if path is not None:
        with asking(url, "deleted"):
            path.unlink(missing_ok=True)
        return
    url = check_url("the URL", url)
    system, place = _system(url)
    with asking(url, "deleted"):
        try:
            system.rm_file(place)
        except FileNotFoundError as error:
            if code_of(error) == "NoSuchBucket":
                raise


# --- file systems -----------------------------------------------------------------------------------------------------

_systems: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def _start_anew() -> None:
    # a lock that another thread held when a process was forked is never released in the child
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, one for all threads, and what it calls the place."""
    protocol = url.partition("://")[0]
    from fsspec.config import conf

    # of this process: connections of the one that it was forked from are not its own, and not to be closed either
    key = (os.getpid(), protocol, repr(conf.get(protocol)), *(os.environ.get(name) for name in _SETTINGS))
    with _lock:
        if key not in _systems:
            kind = _class(protocol)
            with asking(url):
                system = kind(skip_instance_cache=True, **_settings(protocol, conf.get(protocol) or {}))
            if _is_s3(system):
                system.retries = 2  # of a body that broke off; it multiplies with those of botocore
            _systems[key] = system
        system = _systems[key]
    return system, system._strip_protocol(url)


def _class(protocol: str) -> Any:
    from fsspec import get_filesystem_class
    from fsspec.registry import known_implementations

    try:
        return get_filesystem_class(protocol)
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        if package is not None:
            raise InputError(f'{protocol}:// needs the package {package}; pip install "guardkit[cloud]"') from error
        raise InputError(f"{protocol}:// needs a package of fsspec ({shortened(str(error), 150)}); install it") from error
    except ValueError as error:
        known = ", ".join(f"{one}://" for one in ("s3", "gs", "hf", "file", "memory") if one in known_implementations or one == "hf")
        raise InputError(f"{protocol}:// is a protocol that fsspec does not know; use {known}, or install what brings it") from error


def _settings(protocol: str, given: dict[str, Any]) -> dict[str, Any]:
    """Limits of time and tries, under those that the user's configuration of fsspec has. Listings are asked for each time, so that what
    another process wrote meanwhile is there."""
    if protocol == "s3":
        # botocore repeats what failed with 500, 503, SlowDown or on the way, with growing pauses
        usual = {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"mode": "standard", "total_max_attempts": _TRIES}}
        return {"use_listings_cache": False, "config_kwargs": usual | dict(given.get("config_kwargs") or {})}
    if protocol == "gs":
        return {
            "use_listings_cache": False,
            "requests_timeout": given.get("requests_timeout", _READ_S),
            "timeout": given.get("timeout", 10 * _READ_S),
        }
    return {}


def _is_s3(system: Any) -> bool:
    return "s3" in (system.protocol if isinstance(system.protocol, (tuple, list)) else (system.protocol,))


def _item(url: str, name: str, about: dict[str, Any]) -> Item:
    return Item(url, name, int(about["size"] or 0), _version(about))


def _local_item(path: Path, name: str) -> Item:
    status = path.stat()
    return Item(path.as_uri(), name, status.st_size, f"{status.st_mtime_ns}-{status.st_size}")


def _version(about: dict[str, Any]) -> str:
    mark = next((about[name] for name in _VERSIONS if about.get(name)), None)
    if isinstance(mark, datetime):  # file systems give a time now like this, now as a number
        mark = mark.timestamp()
    return "" if mark is None else f"{str(mark).strip(chr(34))}-{about['size']}"


def _compare(url: str, wanted: str | None, found: str) -> None:
    if wanted is not None and found != wanted:
        raise ChangedError(f"{shown(url)} has changed while it was read (it was {wanted}, now it is {found}); run again when it is at rest")
