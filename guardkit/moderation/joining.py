"""Decisions of all shards as one table, in the order of the inputs; which of these are the same as earlier ones is found here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from guardkit.artifacts import write_table
from guardkit.data.duplicates import earliest_near
from guardkit.moderation.deciding import HIDDEN
from guardkit.reading import read_table
from guardkit.shards.output import Output

_MEND = "delete it, and run the same command again"
_NEEDED = pa.schema(
    {
        "id": pa.string(), "action": pa.string(), "score": pa.float64(), "duplicate_of": pa.string(), "near_duplicate_of": pa.string(),
        "bank": pa.string(), "sha256": pa.string(), "error": pa.string(), "_hash": pa.uint64(), "_thumbnail": pa.binary(),
    }
)  # fmt: skip


class Repeated:
    """Which inputs have the bytes of an earlier one, and which look like one; about fifty bytes an input are in memory.

    Args:
        parts: files of `deciding.Deciding`, in the order of the inputs.
        near: bits of 64 in which the perceptual hashes of near-duplicates differ at most.
    """

    def __init__(self, parts: Sequence[Path], near: int) -> None:
        digests, hashes, is_hashed = [np.zeros(0, "V16")], [np.zeros(0, np.uint64)], [np.zeros(0, bool)]
        for path in parts:
            table = part_table(path)
            known = pc.and_(pc.is_valid(table["sha256"]), pc.is_null(table["bank"]))  # decided by the guard
            said = [
                bytes.fromhex(one)[:16] if one and use else bytes(16)
                for one, use in zip(table["sha256"].to_pylist(), known.to_pylist(), strict=True)
            ]
            digests.append(np.frombuffer(b"".join(said), "V16"))
            hashes.append(table["_hash"].fill_null(0).to_numpy().astype(np.uint64))
            is_hashed.append(pc.is_valid(table["_hash"]).to_numpy(zero_copy_only=False))
        digest = np.concatenate(digests).view("<u8").reshape(-1, 2)
        self.first = _first_equal(digest)
        rows = np.flatnonzero((self.first < 0) & np.concatenate(is_hashed))
        near_to = earliest_near(np.concatenate(hashes)[rows], near)
        self.near = np.full(len(digest), -1)
        self.near[rows[near_to >= 0]] = rows[near_to[near_to >= 0]]
        self._names = _names(parts, np.unique(np.concatenate([self.first[self.first >= 0], self.near[self.near >= 0]])))

    def marked(self, table: pa.Table, start: int) -> pa.Table:
        """The rows of a part, of which the first is input number `start`, with what they repeat."""
        rows = slice(start, start + len(table))
        first = self.first[rows]
        columns = {
            "duplicate_of": pa.array([self._names.get(one) for one in first.tolist()], pa.string()),
            "near_duplicate_of": pa.array([self._names.get(one) for one in self.near[rows].tolist()], pa.string()),
            # of what is shown already
            "_thumbnail": pc.if_else(pa.array(first >= 0), pa.scalar(None, pa.binary()), table["_thumbnail"]),
        }
        for name, values in columns.items():
            table = table.set_column(table.column_names.index(name), name, values)
        return table


def _first_equal(digest: np.ndarray) -> np.ndarray:
    """(n,) int: the row before a row of (n, 2) uint64 that is the first with its numbers; -1: there is none, or they are zero."""
    order = np.lexsort((np.arange(len(digest)), digest[:, 1], digest[:, 0]))
    found = np.full(len(digest), -1)
    if not len(digest):
        return found
    ordered = digest[order]
    is_first = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)]
    leaders = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    is_repeated = ~is_first & ordered.any(axis=1)
    found[order[is_repeated]] = leaders[is_repeated]
    return found


def _names(parts: Sequence[Path], wanted: np.ndarray) -> dict[int, str]:
    names: dict[int, str] = {}
    start = 0
    for path in parts:
        table = part_table(path)
        mine = wanted[(wanted >= start) & (wanted < start + len(table))]
        if len(mine):
            names |= dict(zip(mine.tolist(), table["id"].take(pa.array(mine - start)).to_pylist(), strict=True))
        start += len(table)
    return names


def part_table(path: Path) -> pa.Table:
    """The rows of a part. Raises InputError: it is damaged."""
    return read_table(path, _NEEDED, required=("id", "action"), mend=_MEND)


def each_part(parts: Sequence[Path], repeated: Repeated) -> Iterator[pa.Table]:
    """The rows of all parts, with what they repeat, a part at a time in memory."""
    start = 0
    for path in parts:
        table = part_table(path)
        yield repeated.marked(table, start)
        start += len(table)


def write_decisions(parts: Sequence[Path], repeated: Repeated, output: Output, *, json_lines: bool) -> dict[str, int]:
    """Writes decisions.parquet, rejected.parquet and, where asked for, decisions.jsonl; decided + rejected = given."""
    schema = _schema([pq.read_schema(path) for path in parts])
    rejected: list[dict[str, Any]] = []
    given = 0
    with output.written("decisions.parquet") as temporary, open(temporary, "wb") as file, pq.ParquetWriter(file, schema) as writer:
        for table in each_part(parts, repeated):
            writer.write_table(_cast(table, schema))
            given += len(table)
            ids, errors = (table.column(name).to_pylist() for name in ("id", "error"))
            rejected += [{"id": name, "reason": error} for name, error in zip(ids, errors, strict=True) if error is not None]
    with output.written("rejected.parquet") as temporary:
        write_table(temporary, pa.Table.from_pylist(rejected, schema=pa.schema({"id": pa.string(), "reason": pa.string()})))
    if json_lines:
        with output.written("decisions.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as lines:
            for table in each_part(parts, repeated):
                for row in _cast(table, schema).to_pylist():
                    lines.write(json.dumps(row, default=str) + "\n")
    else:
        output.delete("decisions.jsonl")
    return {"given": given, "decided": given - len(rejected), "rejected": len(rejected)}


def rows(parts: Sequence[Path], repeated: Repeated) -> Iterator[Mapping[str, Any]]:
    """Every row of all parts, with its thumbnail."""
    for table in each_part(parts, repeated):
        yield from table.to_pylist()


def _schema(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Of all parts together, without what only parts have; a column that differs in type is text."""
    kinds: dict[str, pa.DataType] = {}
    for schema in schemas:
        for one in schema:
            if one.name in HIDDEN:
                continue
            before = kinds.setdefault(one.name, one.type)
            if before == one.type:
                continue
            try:
                fields = [pa.schema({one.name: kind}) for kind in (before, one.type)]
                kinds[one.name] = pa.unify_schemas(fields, promote_options="permissive").field(0).type
            except pa.ArrowException:
                kinds[one.name] = pa.string()
    # a column that is empty everywhere has no type of its own
    return pa.schema({name: pa.string() if pa.types.is_null(kind) else kind for name, kind in kinds.items()})


def _cast(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = []
    for one in schema:
        if one.name not in table.column_names:
            columns.append(pa.nulls(len(table), one.type))
            continue
        column = table.column(one.name)
        try:
            columns.append(column.cast(one.type))
        except pa.ArrowException:
            columns.append(pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string()))
    return pa.table(columns, schema=schema)
