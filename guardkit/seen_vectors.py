"""Vectors that a guard has seen, by the million: a number of 48 bits each, by which one is known again however it was rounded.

A vector is projected on random directions, and each projection falls into a cell. The number is a hash of the cells. Rounding to half
precision moves a projection by about 0.0003, so that it may leave its cell where it lies at a border: who asks tries the neighbours of
such cells too. Another vector has the number of one of ten million with a probability of less than one in a million.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import written
from guardkit.reading import read_table
from guardkit.schema import InputError

FILE = "training_vectors.parquet"
STEPS = 4096  # of a projection's unit, as `guardkit.seen` counts them
_CELL = STEPS // 8  # steps: wide enough that few projections lie at a border, narrow enough that other images fall elsewhere
_NEAR = STEPS // 500  # steps that rounding moves a projection at most: 0.002
_MOST_DOUBTS = 6  # projections at a border whose two cells are tried, those next to it first
_SCHEMA = pa.schema({"split": pa.uint8(), "number": pa.uint64()})


class SeenVectors:
    """Numbers of vectors, by split.

    Args:
        numbers: split -> (n,) uint64, rising.
    """

    def __init__(self, numbers: dict[str, np.ndarray]) -> None:
        self.numbers = {split: values for split, values in numbers.items() if len(values)}

    @classmethod
    def of(cls, blocks: Iterable[tuple[str, np.ndarray]]) -> SeenVectors:
        """Notes vectors.

        Args:
            blocks: (split, (m, p) int16 projections of vectors).
        """
        found: dict[str, list[np.ndarray]] = {}
        for split, sketches in blocks:
            found.setdefault(split, []).append(_number(sketches // _CELL))
        return cls({split: _different(found.pop(split)) for split in list(found)})

    def __len__(self) -> int:
        return sum(map(len, self.numbers.values()))

    def count(self, split: str) -> int:
        """How many vectors were seen in a split; equal ones count once."""
        return len(self.numbers.get(split, ()))

    def without(self, split: str) -> SeenVectors:
        """The same without the vectors of one split."""
        return SeenVectors({name: values for name, values in self.numbers.items() if name != split})

    def joined(self, more: SeenVectors) -> SeenVectors:
        """The vectors of both."""
        both = {**self.numbers, **more.numbers}
        return SeenVectors({name: np.union1d(self.numbers.get(name, both[name]), more.numbers.get(name, both[name])) for name in both})

    def find(self, sketches: np.ndarray, splits: Iterable[str]) -> list[str | None]:
        """In which of the splits each of (m, p) projections was seen, the first that has it; None: in none."""
        cells, within = sketches // _CELL, sketches % _CELL
        below, above = within < _NEAR, within >= _CELL - _NEAR
        # how far from a border; where it is far there is nothing to try
        distance = np.where(below, within, np.where(above, _CELL - 1 - within, _CELL))
        doubts = np.argsort(distance, axis=1, kind="stable")[:, :_MOST_DOUBTS]
        found: list[str | None] = [None] * len(sketches)
        left = np.arange(len(sketches))
        for choice in range(1 << _MOST_DOUBTS):
            flips = np.array([bool(choice >> bit & 1) for bit in range(_MOST_DOUBTS)])
            mine = left[(np.take_along_axis(distance[left], doubts[left], axis=1)[:, flips] < _CELL).all(axis=1)]
            if not len(mine):
                continue
            tried, columns = cells[mine].copy(), doubts[mine][:, flips]
            step = np.where(np.take_along_axis(below[mine], columns, axis=1), -1, 1)
            np.put_along_axis(tried, columns, np.take_along_axis(tried, columns, axis=1) + step, axis=1)
            numbers = _number(tried)
            for split in splits:
                for row in mine[_among(self.numbers.get(split, np.zeros(0, np.uint64)), numbers)].tolist():
                    found[row] = found[row] or split
            left = np.array([row for row in left.tolist() if found[row] is None], int)
        return found

    def save(self, path: Path, splits: tuple[str, ...]) -> None:
        """Writes Parquet: some three bytes a vector; `splits` are all that there may be."""
        split = np.concatenate([np.full(len(values), splits.index(name), np.uint8) for name, values in self.numbers.items()])
        table = pa.table({"split": split, "number": np.concatenate(list(self.numbers.values()))}, schema=_SCHEMA)
        with written(path) as temporary, open(temporary, "wb") as file:
            # differences of sorted numbers are small
            pq.write_table(table, file, use_dictionary=["split"], column_encoding={"number": "DELTA_BINARY_PACKED"}, compression="zstd")

    @classmethod
    def load(cls, path: Path, splits: tuple[str, ...]) -> SeenVectors:
        """Reads what `save` wrote.

        Raises:
            InputError: a damaged file, or one with other columns, types or values.
        """
        table = read_table(path, _SCHEMA, required=_SCHEMA.names, mend="copy the folder anew")
        split, number = (table.column(name).to_numpy() for name in _SCHEMA.names)
        if split.max(initial=0) >= len(splits):
            raise InputError(f"{path} has the split {split.max()}, expected are {len(splits)}; copy the folder anew")
        return cls({name: np.unique(number[split == i]) for i, name in enumerate(splits)})


def _different(parts: list[np.ndarray]) -> np.ndarray:
    """Rising numbers, each once; sorted in place, because they are many."""
    numbers = np.concatenate(parts)
    parts.clear()
    numbers.sort()
    return numbers[np.r_[True, numbers[1:] != numbers[:-1]][: len(numbers)]]


def _among(seen: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    if not len(seen):
        return np.zeros(len(numbers), bool)
    return seen[np.minimum(np.searchsorted(seen, numbers), len(seen) - 1)] == numbers


def _number(cells: np.ndarray) -> np.ndarray:
    """(m, p) whole numbers -> (m,) uint64 below 2**48."""
    factors = np.random.default_rng(33).integers(0, 2**63, cells.shape[1], np.uint64) * np.uint64(2) + np.uint64(1)
    with np.errstate(over="ignore"):
        mixed = (cells.astype(np.int64).astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return mixed >> np.uint64(16)
