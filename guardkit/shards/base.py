"""What is worked on: inputs, and shards of them, each a bounded piece of work."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.limits import MAX_BYTES
from guardkit.reading_ahead import read_ahead
from guardkit.schema import Content, ImageError
from guardkit.storage import read
from guardkit.storage_errors import ChangedError, MissingError

_FETCHED_AT_ONCE = 16  # objects of an object storage


@dataclass(frozen=True)
class Stored:
    """An object in object storage.

    Attributes:
        url: of it.
        version: of when it was listed: another one is not read; None: whichever is there.
        size: in bytes, where it was listed.
    """

    url: str
    version: str | None = None
    size: int = 0

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ImageError: it is not there, has changed since, or is too large.
            InputError: the storage cannot be asked, which is nothing that another image could do better.
        """
        try:
            return read(self.url, version=self.version, limit=MAX_BYTES)
        except MissingError as error:
            raise ImageError("file does not exist") from error
        except ChangedError as error:
            raise ImageError("it has changed since it was listed") from error


@dataclass(frozen=True)
class Given:
    """One input.

    Attributes:
        id: its path below the folder, its name in the shard after the shard's, its row after the file's; or as the list has it.
        data: encoded bytes, a file, an object, an image that is read when somebody asks, or in its place a vector that an encoder made of it, (d,)
            float32 of unit length; None: there is none, and `reason` says why.
        reason: see there.
        columns: what else the input says, to be kept beside what comes out.
    """

    id: str
    data: bytes | Path | Stored | Content | np.ndarray | None
    reason: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def fetched(inputs: Iterable[Given]) -> Generator[Given]:
    """The same inputs, in order, objects as their bytes: many are asked for at once, because each takes its time to come."""
    each = read_ahead(inputs, _fetch, ahead=_FETCHED_AT_ONCE, is_needed=_is_stored, n_bytes=n_bytes, n_threads=_FETCHED_AT_ONCE)
    with closing(each):
        for given, found in each:
            yield given if found is None else found


def _is_stored(given: Given) -> bool:
    return isinstance(given.data, Stored)


def n_bytes(given: Given) -> int:
    """Of an input in memory, or of an object that will be."""
    if isinstance(given.data, Stored):
        return given.data.size
    return len(given.data) if isinstance(given.data, bytes) else 0


def _fetch(given: Given) -> Given:
    assert isinstance(given.data, Stored)
    try:
        return replace(given, data=given.data.read())
    except ImageError as error:
        return replace(given, data=None, reason=str(error))


@dataclass(frozen=True)
class Shard:
    """Some of the inputs, which become one piece of the output.

    Attributes:
        number: of its place, from 0.
        name: for people, and the same in every run over the same inputs.
        version: of what it holds; another one means that it changed.
        items: gives its inputs, every time in the same order.
        n: how many there are, where that is known without reading them.
        most: only the first so many count; None: all.
        schema: types of the columns of its inputs; None: they follow from the values.
    """

    number: int
    name: str
    version: str
    items: Iterable[Given]
    n: int | None = None
    most: int | None = None
    schema: pa.Schema | None = None

    def __iter__(self) -> Iterator[Given]:
        return islice(iter(self.items), self.most)
