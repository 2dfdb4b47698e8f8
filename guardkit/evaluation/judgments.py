"""What guards that look at images themselves said, kept: each image is judged once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import parse_json
from guardkit.schema import Content, ImageError, ImageGuard, Judgment
from guardkit.stores import KeyValueStore

_JUDGED_AT_ONCE = 8  # images of full size in memory
_READERS = 2


class JudgmentStore:
    """Asks a guard that looks at images itself, each image once: what it said before is read from disk.

    Args:
        guard: whose judgments.
        cache_dir: where judgments are kept, one file per guard; None keeps them in memory.

    Attributes:
        n_asked: images judged so far; n_found: judgments found in the store so far.
        seconds: spent in the guard so far, without reading images.
    """

    def __init__(self, guard: ImageGuard, cache_dir: Path | None) -> None:
        self.guard = guard
        self.n_asked = self.n_found = 0
        self.seconds = 0.0
        self._store = KeyValueStore(cache_dir, f"judgments/{guard.fingerprint[:16]}.sqlite", {"guard": guard.fingerprint})

    @property
    def n_damaged(self) -> int:
        """Stored judgments so far that did not pass their check, and were asked for again."""
        return self._store.n_damaged

    def lacking(self, keys: Iterable[str]) -> set[str]:
        """Those contents, by their keys, of which no judgment is stored."""
        asked = set(keys)
        return asked - self._store.known(asked, _parsed)

    def held(self) -> dict[str, bytes]:
        """Judgments of a store in memory, as another one takes them (`take`)."""
        return self._store.held()

    def take(self, items: Mapping[str, bytes]) -> None:
        """Keeps what another store of the same guard held."""
        self._store.put(items)

    def judge(self, contents: Sequence[Content]) -> list[Judgment | ImageError]:
        """One judgment a content, or why its image cannot be read. A few images are judged at a time, and kept at once."""
        keys = [_attempt(lambda content: content.key, content) for content in contents]
        names = [key for key in keys if isinstance(key, str)]
        known = self._store.get(names, _parsed)
        self.n_found += sum(name in known for name in names)
        missing = {key: content for key, content in zip(keys, contents, strict=True) if isinstance(key, str) and key not in known}
        failed: dict[str, ImageError] = {}
        with self._store, ThreadPoolExecutor(_READERS) as readers:
            for chunk in _chunks(missing.items(), _JUDGED_AT_ONCE):
                images = dict(zip([key for key, _ in chunk], readers.map(lambda item: _attempt(_load, item[1]), chunk), strict=True))
                failed |= {key: image for key, image in images.items() if isinstance(image, ImageError)}
                readable = {key: image for key, image in images.items() if key not in failed}
                if readable:
                    started = time.perf_counter()
                    made = dict(zip(readable, self.guard.judge(list(readable.values())), strict=True))
                    self.seconds += time.perf_counter() - started
                    self.n_asked += len(made)
                    self._store.put({key: _stored(one) for key, one in made.items() if not one.transient and _is_valid(one)})
                    known |= made
        outcomes: list[Judgment | ImageError] = []
        for key in keys:
            outcomes.append(key if isinstance(key, ImageError) else failed[key] if key in failed else known[key])
        return outcomes


def _attempt(work: Callable[[Any], Any], content: Content) -> Any:
    try:
        return work(content)
    except ImageError as error:
        return error


def _load(content: Content) -> np.ndarray:
    return content.load()


def _is_valid(one: Judgment) -> bool:
    """Whether it is a score, or says why there is none. Any other is shown as what it is, and asked for again."""
    return 0 <= one.score <= 1 if one.reason is None else math.isnan(one.score)


def _stored(one: Judgment) -> bytes:
    return json.dumps([None if one.reason else float(one.score), one.reason]).encode()


def _parsed(value: bytes) -> Judgment:
    """Raises ValueError when the value is no judgment."""
    match parse_json(value):
        case [float() | int() as score, None] if not isinstance(score, bool) and 0 <= score <= 1:
            return Judgment(float(score))
        case [None, str() as reason] if reason:
            return Judgment(math.nan, reason)
    raise ValueError("not a judgment")


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk
