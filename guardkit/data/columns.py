"""Records in columns: millions of rows as arrays, each a `Record` only when somebody looks at it.

What splits, arms and reports ask of many records at once is a function here. It takes any sequence of records, and a `RecordTable`
without making one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard, overload
from weakref import WeakValueDictionary

import numpy as np

from guardkit.embedding_folder import StoredVectors
from guardkit.schema import InputError, Record, Rejected

LARGE = 1 << 17
"""Rows of a folder from which on its texts stay on disk, and its vectors are read batch by batch."""
MAX_LISTED = 10_000
"""Rejected inputs that a report names."""
WITHOUT_DIRECTION = "its vector is zero or not finite"
_AT_ONCE = 1024  # records made at once by whoever looks at one after the other


@dataclass(frozen=True, eq=False)
class Columns:
    """What is known of the n rows of a source that stores embeddings.

    Attributes:
        labels: (n,) int8, as of a `Record`.
        categories: (n,) int16, positions among `category_names`; -1: none.
        category_names: of the policy.
        sources: (n,) int16, positions among `source_names`.
        source_names: where rows come from.
        groups: (n,) int, the row that each row's group is called after; None: groups are those that are listed.
        names, captions, listed: of (m,) rows, rising, the m ids, captions, and groups as listed (None without one).
        name_keys: (n,) uint64, hashes of the ids.
        vectors: the embeddings.
        is_checked: whether they are known to have a direction each.
    """

    labels: np.ndarray
    categories: np.ndarray
    category_names: tuple[str, ...]
    sources: np.ndarray
    source_names: tuple[str, ...]
    groups: np.ndarray | None
    names: Callable[[np.ndarray], list[str]]
    captions: Callable[[np.ndarray], list[str]]
    listed: Callable[[np.ndarray], list[str | None]]
    name_keys: np.ndarray
    vectors: StoredVectors
    is_checked: bool
    # so that a record is itself as long as somebody holds it
    made: WeakValueDictionary[int, Record] = field(default_factory=WeakValueDictionary)

    @cached_property
    def is_large(self) -> bool:
        """Whether the folder has more than `LARGE` rows."""
        return are_many(len(self.labels))

    @cached_property
    def is_ungrouped(self) -> bool:
        """Whether each row is a group of its own."""
        return self.groups is not None and bool((self.groups == np.arange(len(self.groups))).all())


class RecordTable(Sequence[Record]):
    """Some rows of `Columns`, in an order.

    Args:
        columns: of the source.
        rows: (m,) int.
    """

    holds_embeddings = True  # and no image, known without looking at one

    def __init__(self, columns: Columns, rows: np.ndarray) -> None:
        self.columns = columns
        # a folder of two thousand million rows does not fit here anyway
        self.rows = np.asarray(rows, np.int32)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Record: ...
    @overload
    def __getitem__(self, place: slice) -> RecordTable: ...
    def __getitem__(self, place: Any) -> Any:
        """A record, or the table of a slice."""
        if isinstance(place, slice):
            return RecordTable(self.columns, self.rows[place])
        return self._made(self.rows[[place]])[0]

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self.rows), _AT_ONCE):
            yield from self._made(self.rows[start : start + _AT_ONCE])

    def take(self, places: np.ndarray) -> RecordTable:
        """Those at (k,) places, or where a mask is true."""
        return RecordTable(self.columns, self.rows[places])

    def names(self) -> list[str]:
        """Their ids."""
        return sorted_texts(self.columns.names, self.rows)

    def without_vectors(self) -> Iterator[Record]:
        """All records, without their embeddings."""
        for start in range(0, len(self.rows), LARGE):
            yield from self._new(self.rows[start : start + LARGE], None)

    def vectors(self, places: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(k, d) float32 unit vectors; NaN where one is zero or not finite."""
        return self.columns.vectors.take(self.rows[places])

    def _made(self, rows: np.ndarray) -> list[Record]:
        columns = self.columns
        known = {row: record for row in rows.tolist() if (record := columns.made.get(row)) is not None}
        new = np.array([row for row in dict.fromkeys(rows.tolist()) if row not in known], np.int32)
        if len(new):
            for row, record in zip(new.tolist(), self._new(new, columns.vectors.take(new)), strict=True):
                known[row] = columns.made[row] = record
        return [known[row] for row in rows.tolist()]

    def _new(self, rows: np.ndarray, vectors: np.ndarray | None) -> list[Record]:
        columns = self.columns
        names, captions, listed = (sorted_texts(read, rows) for read in (columns.names, columns.captions, columns.listed))
        leaders = rows if columns.groups is None else columns.groups[rows]
        groups = names if (leaders == rows).all() else sorted_texts(columns.names, leaders)
        return [
            Record(
                id=name,
                label=label,
                category=None if category < 0 else columns.category_names[category],
                source=columns.source_names[source],
                group=(of or name) if columns.groups is None else group,
                content=None,
                caption=caption,
                embedding=None if vectors is None else vectors[i].copy(),
                listed_group=None if of == name else of,  # guardkit.embed writes a group for every image
            )
            for i, (name, label, category, source, of, group, caption) in enumerate(
                zip(
                    names,
                    columns.labels[rows].tolist(),
                    columns.categories[rows].tolist(),
                    columns.sources[rows].tolist(),
                    listed,
                    groups,
                    captions,
                    strict=True,
                )
            )
        ]


def sorted_texts(read: Callable[[np.ndarray], list[Any]], rows: np.ndarray) -> list[Any]:
    """What a reader of rising rows gives for (m,) rows in any order."""
    order = np.argsort(rows, kind="stable")
    found: list[Any] = [None] * len(rows)
    for place, value in zip(order.tolist(), read(rows[order]), strict=True):
        found[place] = value
    return found


def are_many(n: int) -> bool:
    """Whether so many rows are read bit by bit."""
    return n > LARGE


def is_large(records: Sequence[Record]) -> bool:
    """Whether these are too many to be held as records."""
    return isinstance(records, RecordTable) and are_many(len(records))


def is_of_large_folder(records: Sequence[Record]) -> TypeGuard[RecordTable]:
    """Whether they come from a folder that is."""
    return isinstance(records, RecordTable) and records.columns.is_large


def check_listable(records: Sequence[Record], what: str, mend: str) -> None:
    """Raises InputError where records are too many to be looked at one by one; `what` wants to, `mend` says what to do."""
    if is_large(records):
        raise InputError(f"{what} looks at every image by itself, and here are {len(records)}, allowed are {LARGE}; {mend}")


def picked(records: Sequence[Record], where: np.ndarray) -> Sequence[Record]:
    """The records at (k,) places, or where an (n,) mask is true, in that order."""
    if isinstance(records, RecordTable):
        return records.take(where)
    places = np.flatnonzero(where) if where.dtype == bool else where
    return [records[place] for place in places.tolist()]


def with_images(records: Sequence[Record]) -> Sequence[Record]:
    """Those whose pixels can be had."""
    return [] if isinstance(records, RecordTable) else [record for record in records if record.content is not None]


def together(first: Sequence[Record], second: Sequence[Record]) -> Sequence[Record]:
    """Both, one after the other."""
    if isinstance(first, RecordTable) and isinstance(second, RecordTable) and first.columns is second.columns:
        return RecordTable(first.columns, np.concatenate([first.rows, second.rows]))
    return second if not first else first if not second else [*first, *second]


def labels_of(records: Sequence[Record]) -> np.ndarray:
    """(n,) int."""
    if isinstance(records, RecordTable):
        return records.columns.labels[records.rows].astype(int)
    return np.array([record.label for record in records], int)


def categories_of(records: Sequence[Record]) -> tuple[np.ndarray, list[str]]:
    """(n,) int, positions among the names that come with it; -1: none."""
    if isinstance(records, RecordTable):
        return records.columns.categories[records.rows].astype(int), list(records.columns.category_names)
    names: dict[str, int] = {}
    found = [-1 if record.category is None else names.setdefault(record.category, len(names)) for record in records]
    return np.array(found, int), list(names)


def sources_of(records: Sequence[Record]) -> set[str]:
    """Where they come from."""
    if isinstance(records, RecordTable):
        return {records.columns.source_names[code] for code in np.unique(records.columns.sources[records.rows])}
    return {record.source for record in records}


def groups_of(records: Sequence[Record]) -> np.ndarray:
    """(n,) int, equal for records of one group, numbered in the order in which groups come."""
    if isinstance(records, RecordTable) and records.columns.groups is not None:
        if records.columns.is_ungrouped:
            return np.arange(len(records))
        _, first, group = np.unique(records.columns.groups[records.rows], return_index=True, return_inverse=True)
        rank = np.empty(len(first), int)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[group]
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(record.group, len(numbers)) for record in records], int)


def corrected_of(records: Sequence[Record]) -> np.ndarray:
    """(n,) bool: which people corrected."""
    if isinstance(records, RecordTable):
        return np.zeros(len(records), bool)
    return np.array([record.is_corrected for record in records], bool)


def order_of_ids(records: Sequence[Record]) -> np.ndarray:
    """(n,) places, such that the ids rise; those of a large folder stay on disk, and the order is that of their hashes."""
    if isinstance(records, RecordTable):
        if records.columns.is_large:
            return np.argsort(records.columns.name_keys[records.rows], kind="stable")
        names: Sequence[str] = records.names()
    else:
        names = [record.id for record in records]
    return np.array(sorted(range(len(names)), key=names.__getitem__), int)


def sharing_groups(records: Sequence[Record], others: Sequence[Record]) -> np.ndarray:
    """(n,) bool: which records are in a group with one of the others."""
    if isinstance(records, RecordTable) and isinstance(others, RecordTable) and records.columns.groups is not None:
        return np.isin(records.columns.groups[records.rows], records.columns.groups[others.rows])
    taken = {record.group for record in others}
    return np.array([record.group in taken for record in records], bool)


class RejectedRows(Sequence[Rejected]):
    """Rows that could not be used, with reasons.

    Args:
        rows: (m,) int.
        codes: (m,) int, positions among `reasons`.
        reasons: in words.
        names: of (k,) rising rows, their ids.
    """

    def __init__(self, rows: np.ndarray, codes: np.ndarray, reasons: Sequence[str], names: Callable[[np.ndarray], list[str]]) -> None:
        self.rows, self.codes, self.reasons, self._names = rows, codes, reasons, names

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Rejected: ...
    @overload
    def __getitem__(self, place: slice) -> RejectedRows: ...
    def __getitem__(self, place: Any) -> Any:
        """One, or those of a slice."""
        if isinstance(place, slice):
            return RejectedRows(self.rows[place], self.codes[place], self.reasons, self._names)
        (name,) = self._names(self.rows[[place]])
        return Rejected(name, self.reasons[self.codes[place]])

    def __iter__(self) -> Iterator[Rejected]:
        for start in range(0, len(self.rows), LARGE):
            rows, codes = self.rows[start : start + LARGE], self.codes[start : start + LARGE]
            for name, code in zip(sorted_texts(self._names, rows), codes.tolist(), strict=True):
                yield Rejected(name, self.reasons[code])


def listing(*several: Sequence[Rejected]) -> dict[str, Any]:
    """What was rejected as a report has it: "rejected", each by name; of very many the first ones, beside "n_rejected", how many there
    are, and "reasons", how many for which reason."""
    n = sum(map(len, several))
    first = [one for rejected in several for one in rejected[:MAX_LISTED]][:MAX_LISTED]
    listed: dict[str, Any] = {"rejected": [{"id": one.id, "reason": one.reason} for one in first]}
    if n > MAX_LISTED:
        reasons = sum(map(reasons_of, several), Counter[str]())
        listed |= {"n_rejected": n, "reasons": dict(reasons.most_common())}
    return listed


def usable(records: Sequence[Record]) -> tuple[Sequence[Record], list[Rejected]]:
    """Those that have a vector with a direction, or an image; and of stored embeddings that nobody looked at before, the others."""
    if not isinstance(records, RecordTable) or records.columns.is_checked:
        return records, []
    bad = np.zeros(len(records), bool)
    for start in range(0, len(records), LARGE):
        places = slice(start, start + LARGE)
        bad[places] = np.isnan(records.vectors(places)[:, 0])
    return records.take(~bad), [Rejected(name, WITHOUT_DIRECTION) for name in records.take(bad).names()]


def reasons_of(rejected: Sequence[Rejected]) -> Counter[str]:
    """How many were rejected for each reason."""
    if isinstance(rejected, RejectedRows):
        found: Counter[str] = Counter()
        for code, n in enumerate(np.bincount(rejected.codes).tolist()):
            if n:
                found[rejected.reasons[code]] += n
        return found
    return Counter(one.reason for one in rejected)
