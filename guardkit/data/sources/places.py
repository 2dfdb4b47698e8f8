"""Folders of images, on this machine or in object storage: what lies there, by names that nobody vouches for."""

from __future__ import annotations

import os
import posixpath
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from guardkit.checks import check_path
from guardkit.data.sources.files import Files, printable
from guardkit.images import FileContent, bytes_key, read_image
from guardkit.limits import check_bytes
from guardkit.local_copies import local_copy
from guardkit.schema import Content, ImageError, InputError, Rejected
from guardkit.storage import Item, check_url, is_url, items, joined, local_path, read, unusable_name
from guardkit.storage_errors import ChangedError, MissingError, shown

_RECENT_BYTES = 64 << 20  # of objects that were read last: whoever hashes an image will mostly want its pixels too


class Place(Protocol):
    """A folder, as a text its path or URL. Names are relative to it, with "/"; hidden ones are passed over.

    Attributes:
        name: its own.
    """

    name: str

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted. Raises InputError when it cannot be listed."""
        ...

    def files(self) -> list[str]:
        """Names of the files in it, sorted. Raises InputError when it cannot be listed."""
        ...

    def below(self, folder: str, rejected: list[Rejected]) -> Iterator[str]:
        """Names of all files below a folder in it; what cannot be looked into, or has no usable name, is added to `rejected`."""
        ...

    def table(self, name: str) -> Path | None:
        """A file of that name, on this machine; None: there is none."""
        ...

    def spelled(self, name: str) -> str:
        """The name, in its shortest form, under which a file is there, whatever system the name was written on; or as it was given."""
        ...

    def content(self, name: str, max_pixels: int) -> Content | str:
        """The image of that name, or why the name means none."""
        ...


def place_of(setting: str, root: str) -> Place:
    """The folder that a setting names by its path or URL.

    Raises:
        InputError: it is not there, or cannot be listed.
    """
    if is_url(root) and local_path(root) is None:
        return Bucket(setting, root)
    return LocalFolder(setting, root)


class LocalFolder:
    """A folder on this machine; see `Place`."""

    def __init__(self, setting: str, root: str) -> None:
        self._setting, self.root = setting, check_path(setting, root)
        if not self.root.is_dir():
            raise InputError(
                f"{setting} {root} is {'not a folder' if self.root.exists() else 'not there'}; give the folder that holds the images"
            )
        self.name = self.root.name
        self._files = Files(self.root)

    def __str__(self) -> str:
        return str(self.root)

    def _visible(self) -> list[Path]:
        try:
            return sorted(path for path in self.root.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise InputError(f"{self._setting} {self.root} cannot be listed ({error.strerror}); give a folder that you may read") from error

    def folders(self) -> list[str]:
        """See `Place`."""
        return [path.name for path in self._visible() if path.is_dir()]

    def files(self) -> list[str]:
        """See `Place`."""
        return [path.name for path in self._visible() if path.is_file()]

    def below(self, folder: str, rejected: list[Rejected]) -> Iterator[str]:
        """See `Place`."""

        def name(path: str) -> str:
            return Path(path).relative_to(self.root).as_posix()

        def unlisted(error: OSError) -> None:
            rejected.append(Rejected(printable(name(error.filename)), f"folder cannot be listed: {error.strerror}"))

        for parent, folders, files in os.walk(self.root / folder, onerror=unlisted):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            for one in folders:
                if os.path.islink(os.path.join(parent, one)):
                    rejected.append(Rejected(printable(name(os.path.join(parent, one))), "link to a folder, which is not followed"))
            yield from (name(os.path.join(parent, one)) for one in sorted(files) if not one.startswith("."))

    def table(self, name: str) -> Path | None:
        """See `Place`."""
        path = self.root / name
        return path if path.is_file() else None

    def spelled(self, name: str) -> str:
        """See `Place`."""
        return self._files.name(name)

    def content(self, name: str, max_pixels: int) -> Content | str:
        """See `Place`."""
        path = self._files.path(name)
        return path if isinstance(path, str) else FileContent(path, max_pixels)


class Bucket:
    """A folder in object storage, listed once; see `Place`. Images are read when somebody asks for one."""

    def __init__(self, setting: str, root: str) -> None:
        self.url = check_url(setting, root)
        self.name = self.url.rpartition("/")[2]
        self._items: dict[str, Item] = {}
        self._refused: dict[str, str] = {}  # why, by the name that cannot be used
        for item in items(self.url):
            if any(part.startswith(".") and part not in (".", "..") for part in item.name.split("/")):
                continue
            reason = unusable_name(item.name)
            if reason is None:
                self._items[item.name] = item
            else:
                self._refused[item.name] = reason
        if not self._items and not self._refused:
            raise InputError(f"{setting} {shown(root)} is not there, or empty; give the URL of the folder that holds the images")

    def __str__(self) -> str:
        return self.url

    def folders(self) -> list[str]:
        """See `Place`. What has no usable name counts as lying in the folder that it seems to begin with."""
        return sorted({name.split("/")[0] for name in (*self._items, *self._refused) if "/" in name} - {"", ".", ".."})

    def files(self) -> list[str]:
        """See `Place`."""
        return sorted(name for name in self._items if "/" not in name)

    def below(self, folder: str, rejected: list[Rejected]) -> Iterator[str]:
        """See `Place`."""
        start = f"{folder}/"
        rejected += [Rejected(printable(name), reason) for name, reason in sorted(self._refused.items()) if name.startswith(start)]
        yield from (name for name in sorted(self._items) if name.startswith(start))

    def table(self, name: str) -> Path | None:
        """See `Place`."""
        return local_copy(joined(self.url, name)) if name in self._items else None

    def spelled(self, name: str) -> str:
        """See `Place`."""
        plain = posixpath.normpath(name)
        if plain in self._items:
            return plain
        for one in dict.fromkeys((plain, posixpath.normpath(name.replace("\\", "/")))):
            found = self._by_normal_form.get(unicodedata.normalize("NFC", one))
            if found is not None:
                return found
        return plain

    @cached_property
    def _by_normal_form(self) -> dict[str, str]:
        return {unicodedata.normalize("NFC", name): name for name in self._items}

    def content(self, name: str, max_pixels: int) -> Content | str:
        """See `Place`."""
        if name.startswith("/"):
            return "absolute path, where one relative to the folder was expected"
        if name.split("/")[0] == "..":
            return "path outside the folder"
        item = self._items.get(name)
        return "file does not exist" if item is None else ObjectContent(item.url, item.size, item.version, max_pixels)


@dataclass(frozen=True)
class ObjectContent:
    """An image in object storage, read when somebody asks.

    Attributes:
        url: of the object.
        size, version: of when it was listed: another object under that name is not read.
        max_pixels: larger images are rejected.
    """

    url: str
    size: int
    version: str
    max_pixels: int

    def __str__(self) -> str:
        return self.url

    def _encoded(self) -> bytes:
        """Raises ImageError where this object cannot be had; where the storage cannot, that is an InputError, which ends a run."""
        check_bytes(self.size)
        try:
            return _recent.read(self.url, self.version)
        except MissingError as error:
            raise ImageError("file does not exist any more") from error
        except ChangedError as error:
            raise ImageError("it has changed since it was listed") from error

    @cached_property
    def key(self) -> str:
        """Of the encoded bytes, the same as that of a file. Raises ImageError."""
        return bytes_key(self._encoded())

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self._encoded(), max_pixels=self.max_pixels)

    def load_reduced(self, at_least: int) -> np.ndarray:
        """The same, a JPEG decoded at a fraction; see `read_image`."""
        return read_image(self._encoded(), max_pixels=self.max_pixels, at_least=at_least)


class _Recent:
    """Objects that were read last, of all threads."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._n_bytes = 0
        self._lock = threading.Lock()

    def read(self, url: str, version: str) -> bytes:
        key = (url, version)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        data = read(url, version=version or None)
        with self._lock:
            if key not in self._kept and version:
                self._kept[key] = data
                self._n_bytes += len(data)
                while self._n_bytes > _RECENT_BYTES:
                    self._n_bytes -= len(self._kept.popitem(last=False)[1])
        return data


_recent = _Recent()


def _start_anew() -> None:
    # a lock that another thread held when a process was forked is never released in the child
    global _recent
    _recent = _Recent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
