"""What guards that look at images themselves said, kept: each image is judged once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import KeyValueStore
from guardkit.schema import Content, Guard, ImageError, Judgment

_JUDGED_AT_ONCE = 8  # images of full size in memory
_READERS = 2


class JudgmentStore:
    """Asks a guard that looks at images itself, each image once: what it said before is read from disk.

    Args:
        guard: without an encoder.
        cache_dir: where judgments are kept, one file per guard; None keeps them in memory.

    Attributes:
        n_asked: images judged so far; n_found: judgments found in the store so far.
    """

    def __init__(self, guard: Guard, cache_dir: Path | None) -> None:
        self.guard = guard
        self.n_asked = self.n_found = 0
        self._memory: dict[str, bytes] = {}
        self._disk = (
            None
            if cache_dir is None
            else KeyValueStore(Path(cache_dir) / "judgments" / f"{guard.fingerprint[:16]}.sqlite", {"guard": guard.fingerprint})
        )

    def judge(self, contents: Sequence[Content]) -> list[Judgment | ImageError]:
        """One judgment a content, or why its image cannot be read. A few images are judged at a time, and kept at once."""
        keys = [_attempt(lambda content: content.key, content) for content in contents]
        names = [key for key in keys if isinstance(key, str)]
        known = {name: _parsed(value) for name, value in (self._disk.get(names) if self._disk else self._memory).items()}
        self.n_found += sum(name in known for name in names)
        missing = {key: content for key, content in zip(keys, contents, strict=True) if isinstance(key, str) and key not in known}
        failed: dict[str, ImageError] = {}
        with ThreadPoolExecutor(_READERS) as readers:
            for chunk in _chunks(missing.items(), _JUDGED_AT_ONCE):
                images = dict(zip([key for key, _ in chunk], readers.map(lambda item: _attempt(_load, item[1]), chunk), strict=True))
                failed |= {key: image for key, image in images.items() if isinstance(image, ImageError)}
                readable = {key: image for key, image in images.items() if key not in failed}
                if readable:
                    made = dict(zip(readable, self.guard.judge(list(readable.values())), strict=True))
                    self.n_asked += len(made)
                    self._put(
                        {key: json.dumps([_finite(one.score), one.reason]).encode() for key, one in made.items() if not one.transient}
                    )
                    known |= made
        outcomes: list[Judgment | ImageError] = []
        for key in keys:
            outcomes.append(key if isinstance(key, ImageError) else failed[key] if key in failed else known[key])
        return outcomes

    def _put(self, items: dict[str, bytes]) -> None:
        if self._disk is None:
            self._memory |= items
        else:
            self._disk.put(items)


def _attempt(work: Callable[[Any], Any], content: Content) -> Any:
    try:
        return work(content)
    except ImageError as error:
        return error


def _load(content: Content) -> np.ndarray:
    return content.load()


def _parsed(value: bytes) -> Judgment:
    score_, reason = json.loads(value)
    return Judgment(math.nan if score_ is None else score_, reason)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    stream = iter(items)
    while chunk := list(islice(stream, size)):
        yield chunk
