"""Columns of texts by the million: as numbers while they are compared, as texts when a few are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from guardkit.data.sources.rows import text

_AT_ONCE = 1 << 15
_WHITE = "".join(character for character in map(chr, range(0x3001)) if character.isspace())  # what str.strip takes away
_TABLES: dict[int, np.ndarray] = {}


def as_texts(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as `rows.text` reads its cells: without blanks around; "" where there is nothing."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # of several gigabytes
        column = pa.concat_arrays(column.cast(pa.large_string()).chunks)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_null(column.type):
        return pa.array([""] * len(column), pa.large_string())
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return pa.array([text(value) for value in column.to_pylist()], pa.large_string())
    return pc.utf8_trim(pc.fill_null(column, "").cast(pa.large_string()), characters=_WHITE)


def hashed(texts: pa.Array, salt: int = 0) -> np.ndarray:
    """(n,) uint64 hashes of texts, the same in every process.

    Tabulation hashing (Zobrist, 1970; Pătraşcu and Thorup, 2012, "The power of simple tabulation hashing"): a random number for each byte
    at each place, added. Two of ten million different texts have one hash with a probability of 3 in a million.

    Args:
        texts: of `as_texts`.
        salt: another one gives other hashes, independent of these.
    """
    if salt not in _TABLES:
        _TABLES[salt] = np.random.default_rng([salt, 29]).integers(0, 2**64 - 1, 256 * 256, np.uint64, endpoint=True)
    table = _TABLES[salt]
    found = np.zeros(len(texts), np.uint64)
    for start in range(0, len(texts), _AT_ONCE):
        part = texts.slice(start, _AT_ONCE)
        offsets = np.frombuffer(part.buffers()[1], np.int64)[part.offset : part.offset + len(part) + 1]
        lengths = np.diff(offsets)
        if part.buffers()[2] is None or not lengths.any():
            continue
        letters = np.frombuffer(part.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
        starts = offsets[:-1] - offsets[0]
        place = np.arange(len(letters)) - np.repeat(starts, lengths)
        numbers = table[((place & 255) << 8) | letters] + (place >> 8).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        there = lengths > 0
        sums = np.add.reduceat(numbers, starts[there])
        found[start : start + len(part)][there] = sums
    mixed = found ^ (found >> np.uint64(31))
    return mixed * np.uint64(0xBF58476D1CE4E5B9)


class Texts:
    """A column whose cells are read when they are asked for.

    Args:
        read: gives the column of a part, see `as_texts`.
        firsts: (p + 1,) the first row of each part, and the number of all.
        held: the parts, where they are few enough to be kept.
    """

    def __init__(self, read: Callable[[int], pa.Array], firsts: np.ndarray, held: list[pa.Array] | None) -> None:
        self._read, self._firsts, self._held = read, firsts, held
        self._last: tuple[int, Any] = (-1, None)

    def __call__(self, rows: np.ndarray) -> list[str]:
        """Of (m,) rows, rising, the texts."""
        found: list[str] = []
        bounds = np.searchsorted(rows, self._firsts)
        for part in np.flatnonzero(np.diff(bounds)):
            mine = rows[bounds[part] : bounds[part + 1]] - self._firsts[part]
            found += self._part(int(part)).take(pa.array(mine)).to_pylist()
        return found

    def _part(self, part: int) -> pa.Array:
        if self._held is not None:
            return self._held[part]
        if self._last[0] != part:
            self._last = part, self._read(part)
        return self._last[1]
