"""What the rows of tables say, by the million: `RowRule` reads each different row once. Labels from a table of their own, joined by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from guardkit.data.sources.rows import Row, RowRule, text
from guardkit.data.sources.tables import SUFFIXES
from guardkit.data.sources.tables import read_table as read_any_table
from guardkit.data.sources.texts import as_texts, hashed
from guardkit.reading import read_table
from guardkit.schema import UNLABELLED, InputError

CONTRADICTORY = "listed as safe and as unsafe"
_MEND = "correct it or give another source.labels_file"


class RowReader:
    """Reads columns by a rule.

    Args:
        rule: of the source.
        source: where a row comes from that does not say.

    Attributes:
        kinds: all different rows so far -> their numbers.
        sources: the same of where they come from.
    """

    def __init__(self, rule: RowRule, source: str) -> None:
        self._rule, self._source = rule, source
        self.kinds: dict[Row, int] = {}
        self.sources: dict[str, int] = {}

    def kind(self, row: Row) -> int:
        """Its number."""
        return self.kinds.setdefault(row, len(self.kinds))

    def read(self, cells: Mapping[str, pa.ChunkedArray], n: int, where: str, first: int) -> tuple[np.ndarray, np.ndarray]:
        """What rows say.

        Args:
            cells: columns by role; of labels, categories and sources.
            n: how many rows.
            where: names the table in errors.
            first: number of the first row there, from 0.
        Returns:
            (n,) numbers of label and category, and of the source.
        Raises:
            InputError: a label or category that nothing explains.
        """
        said = {role: column for role, column in cells.items() if role in ("label", "category")}
        code = np.zeros(n, np.int64)
        values: dict[str, tuple[np.ndarray, list[Any]]] = {}
        for role, column in said.items():
            values[role] = codes, different = _coded(column)
            code = code * len(different) + codes
        _, at, kind = np.unique(code, return_index=True, return_inverse=True)
        numbers = np.zeros(len(at), np.int32)
        for i in np.argsort(at):  # in the order of the rows, so that it is the first wrong one that is named
            row = int(at[i])
            found = self._rule.read(
                {role: different[codes[row]] for role, (codes, different) in values.items()}, f"{where} row {first + row + 1}"
            )
            assert isinstance(found, Row), "only boxes are a reason of their own"
            numbers[i] = self.kind(found)
        return numbers[kind], self._read_sources(cells.get("source"), n)

    def _read_sources(self, column: pa.ChunkedArray | None, n: int) -> np.ndarray:
        codes, different = (np.zeros(n, int), [None]) if column is None else _coded(column)
        found = [self.sources.setdefault(text(value) or self._source, len(self.sources)) for value in different]
        if len(self.sources) > np.iinfo(np.int16).max:
            raise InputError(
                f"the source column has more than {np.iinfo(np.int16).max} different values; set source.source_column=null, or name a column "
                "that says which collection an image is of"
            )
        return np.array(found, np.int16)[codes]


def _coded(column: pa.ChunkedArray) -> tuple[np.ndarray, list[Any]]:
    """(n,) int, and the different values that they stand for."""
    try:
        coded = column.combine_chunks().dictionary_encode(null_encoding="encode")
        coded = coded.combine_chunks() if isinstance(coded, pa.ChunkedArray) else coded
        return coded.indices.to_numpy(zero_copy_only=False).astype(np.int64), coded.dictionary.to_pylist() or [None]
    except (pa.ArrowException, AttributeError):  # of lists and the like
        values = column.to_pylist()
        return np.arange(len(values)), values or [None]


class LabelTable:
    """A table of labels whose rows belong to images by a key.

    Rows of one key that say the same, or nothing, are one; those that contradict each other are no label.

    Args:
        path: of a .parquet, .csv or .jsonl file.
        key_column: holds what the folder calls `image_path`.
        rule: reads the rows.
        reader: gives numbers to what they say.
        elsewhere: columns of the folder, where one that is missing here may be.
    Raises:
        InputError: it cannot be read, has no such column or no row, or a label that nothing explains.
    """

    def __init__(self, path: Path, key_column: str, rule: RowRule, reader: RowReader, elsewhere: Sequence[str]) -> None:
        self.path = path
        table = _read(path, key_column)
        where = path.name
        if key_column not in table.column_names:
            raise InputError(
                f"{path} has no column {key_column!r}; it has {', '.join(table.column_names) or 'none'}; set source.key_column"
            )
        rule.find([*table.column_names, *elsewhere], str(path))
        columns = {role: one for role, one in rule.columns.items() if role != "path" and one is not None and one in table.column_names}
        if not {"label", "category"} & columns.keys():
            raise InputError(f"{path} has no column of labels; it has {', '.join(table.column_names)}; set source.label_column")
        keys = as_texts(table.column(key_column))
        self.roles = frozenset(columns)
        kinds, sources = reader.read({role: table.column(column) for role, column in columns.items()}, len(table), where, 0)
        self._texts = {role: as_texts(table.column(columns[role])) for role in ("group", "caption") if role in columns}
        hashes, checks = hashed(keys), hashed(keys, 1)
        named = np.asarray(pc.binary_length(keys)) > 0
        self.n_without_key = int((~named).sum())
        order = np.flatnonzero(named)[np.argsort(hashes[named], kind="stable")]
        labels = np.array([row.label for row in reader.kinds], int)[kinds]
        starts = np.flatnonzero(np.r_[True, np.diff(hashes[order]) != 0]) if len(order) else np.zeros(0, int)
        # of several rows of a key the first that says something
        rank = np.where(labels[order] == UNLABELLED, len(labels), 0) + order
        chosen = np.minimum.reduceat(rank, starts) % max(1, len(labels)) if len(starts) else np.zeros(0, int)
        high, low = (
            op.reduceat(np.where(labels[order] == UNLABELLED, empty, labels[order]), starts) if len(starts) else np.zeros(0, int)
            for op, empty in ((np.maximum, -1), (np.minimum, 2))
        )
        kinds[chosen[(high == 1) & (low == 0)]] = reader.kind(Row(UNLABELLED, left_out=CONTRADICTORY))
        self.n_repeated = len(order) - len(starts)
        self.first_key = keys[int(order.min())].as_py() if len(order) else ""
        self._hashes, self._checks, self._kinds, self._sources = hashes[chosen], checks[chosen], kinds[chosen], sources[chosen]
        self._rows, self._keys = chosen, keys
        self.is_used = np.zeros(len(chosen), bool)
        self._none = reader.kind(Row(UNLABELLED, left_out=f"not in {path.name}"))
        self._no_source = reader.sources.setdefault(reader._source, len(reader.sources))

    def join(self, names: pa.Array, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, pa.Array]]:
        """What the table says of images.

        Args:
            names: (n,) of them; "" for one without a name.
            keys: (n,) hashes of the names.
        Returns:
            (n,) numbers of label and category, and of the source; texts by role, "" where it says nothing.
        """
        place = np.minimum(np.searchsorted(self._hashes, keys), max(0, len(self._hashes) - 1))
        found = np.zeros(len(keys), bool) if not len(self._hashes) else self._hashes[place] == keys
        # a second hash, because a wrong label is worse than none
        found &= (np.asarray(pc.binary_length(names)) > 0) & (found if not found.any() else self._checks[place] == hashed(names, 1))
        self.is_used[place[found]] = True
        if not len(self._hashes):
            return np.full(len(keys), self._none), np.full(len(keys), self._no_source), {}
        rows = pa.array(self._rows[place], mask=~found)
        texts: dict[str, pa.Array] = {role: pc.fill_null(column.take(rows), "") for role, column in self._texts.items()}
        return np.where(found, self._kinds[place], self._none), np.where(found, self._sources[place], self._no_source), texts

    def notes(self, where: str) -> list[str]:
        """What of the table was of no use, in sentences; `where` names the folder."""
        said, n = [], int((~self.is_used).sum())
        if n:
            first = shown(self._keys[int(self._rows[~self.is_used].min())].as_py())
            said.append(f"{n} of the {len(self.is_used)} images that {self.path.name} names are not in {where}, the first is {first}")
        if self.n_without_key:
            said.append(f"{self.n_without_key} rows of {self.path.name} have no key and were passed over")
        if self.n_repeated:
            said.append(f"{self.n_repeated} rows of {self.path.name} name an image once more")
        return said


def shown(name: str) -> str:
    """A name in a message."""
    return repr(name[:100])


def _read(path: Path, key_column: str) -> pa.Table:
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"source.labels_file {path} {'is not there' if not path.is_file() else 'is no table'}; give a .parquet, .csv or .jsonl file"
        )
    if path.suffix.lower() == ".parquet":
        return read_table(path, mend=_MEND)
    names, rows = read_any_table(path, key_column)
    try:
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    except pa.ArrowException as error:
        raise InputError(f"{path} has a column of several kinds of values ({error}); {_MEND}") from error
