"""Folders of embeddings that other CLIP tools can read and write: `embed` writes them (`shards.embedding`), `source=embeddings` reads them.

The layout is clip-retrieval's: numbered `.npy` parts beside Parquet tables of the same rows. Ours add a manifest, written
last, that names the encoder.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from guardkit.artifacts import read_json
from guardkit.folders import is_unfinished
from guardkit.reading import count_rows, map_array, read_schema, read_table
from guardkit.schema import InputError

MANIFEST, REJECTED = "manifest.json", "rejected.parquet"
_COPY = "copy the shard anew"
_BLOCK = 512  # records embedded between two looks at the clock
_AT_ONCE = 512  # rows that are brought to unit length while the processor's cache holds them
_MAX_OPEN = 256  # files of vectors: a process may open few, and an epoch looks into all of a folder again and again
_GAP_BYTES = 1 << 16  # between two rows that are read over: quicker than to begin anew
_READ_BYTES = 1 << 21  # read at once


def _read_manifest(path: Path) -> dict[str, Any]:
    return read_json(path, "the manifest of an embedding folder", "embed the images into another folder")


@dataclass(frozen=True)
class StoredEmbeddings:
    """What an embedding folder holds.

    Attributes:
        vectors: (n, d) float32 unit vectors; NaN where a stored one was zero or not finite.
        table: the metadata, n rows.
        manifest: None when another tool wrote the folder.
        parts: (n,) int, the number of each row's file.
    """

    vectors: np.ndarray
    table: pa.Table
    manifest: dict[str, Any] | None
    parts: np.ndarray


def read_embedding_folder(folder: Path) -> tuple[np.ndarray, pa.Table, dict[str, Any] | None]:
    """Vectors, table and manifest of a folder; see `read_stored_embeddings`."""
    stored = read_stored_embeddings(folder)
    return stored.vectors, stored.table, stored.manifest


@dataclass(frozen=True)
class EmbeddingParts:
    """The files of an embedding folder, looked at but not read.

    Attributes:
        folder: they are in.
        manifest: None when another tool wrote the folder.
        vectors: number -> file of vectors, in order.
        tables: number -> file of metadata; of all parts, or of none.
        n_rows: in all.
        sizes: number -> rows of that part.
        width: d; None where no part has a row.
        unmatched: files of vectors without metadata and the reverse, in a folder of another tool, see `find_embedding_parts`.
        stamps: number -> size in bytes and time of change in ns of that part's vectors, when they were looked at.
    """

    folder: Path
    manifest: dict[str, Any] | None
    vectors: dict[int, Path]
    tables: dict[int, Path]
    n_rows: int
    sizes: dict[int, int] = field(default_factory=dict)
    width: int | None = None
    unmatched: tuple[Path, ...] = ()
    stamps: dict[int, tuple[int, int]] = field(default_factory=dict)

    def mapped(self) -> Iterator[np.ndarray]:
        """(n, d) floating-point numbers of each part, where they lie; one after the other, because each is an open file."""
        return (map_array(path, _COPY) for path in self.vectors.values())


class StoredVectors:
    """The vectors of a folder where they lie: rows are read when they are asked for, a few files open at a time.

    Args:
        parts: of the folder, with at least one row.
    """

    def __init__(self, parts: EmbeddingParts) -> None:
        assert parts.width is not None
        self.width = parts.width
        self._files = [(path, parts.sizes[number]) for number, path in parts.vectors.items() if parts.sizes[number]]
        # of the look at the folder: labels of one version are not given to vectors of the next
        self._stamps = [parts.stamps[number] for number in parts.vectors if parts.sizes[number]]
        self.firsts = np.cumsum([0, *(size for _, size in self._files)])
        self._opened: OrderedDict[int, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """See `take`."""
        return self.take(np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows)

    def take(self, rows: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
        """(m, d) float32 unit vectors of (m,) rows, best in rising order; NaN where a stored one is zero or not finite.

        Args:
            rows: to read.
            into: (m, d) float32, where they are put; None: new memory.
        Raises:
            InputError: a file was changed since it was first looked at.
        """
        vectors = np.empty((len(rows), self.width), np.float32) if into is None else into
        order = None if (rows[1:] >= rows[:-1]).all() else np.argsort(rows, kind="stable")
        wanted = rows if order is None else rows[order]
        bounds = np.searchsorted(wanted, self.firsts).tolist()
        room = np.empty(_READ_BYTES, np.uint8)  # the same memory again and again is quicker than new one
        with self._lock:
            for part, (begin, end) in enumerate(pairwise(bounds)):
                for start in range(begin, end, _AT_ONCE):
                    stop = min(start + _AT_ONCE, end)
                    file = self._open(part)
                    stored = file.take(wanted[start:stop] - self.firsts[part], room)
                    file.check_unchanged()  # now: what was written over it before was read, too
                    if order is None:
                        unit_rows(stored, vectors[start:stop])
                    else:
                        vectors[order[start:stop]] = unit_rows(stored)
        return vectors

    def _open(self, part: int) -> _File:
        if part in self._opened:
            self._opened.move_to_end(part)
            return self._opened[part]
        path, size = self._files[part]
        file = _File(path)
        if file.shape != (size, self.width) or file.dtype.kind != "f" or self._stamps[part] != file.stamp:
            raise _changed(path)
        self._opened[part] = file
        if len(self._opened) > _MAX_OPEN:
            self._opened.popitem(last=False)
        return file


class _File:
    """An open file of vectors, read in spans of rows. That is several times quicker than looking at pages of a mapped one here and there,
    and one that is cut short meanwhile is an error, where a mapped one would end the process.

    Args:
        path: of a .npy file.
    """

    def __init__(self, path: Path) -> None:
        mapped = map_array(path, _COPY)  # which reads the header with care
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.row_bytes = int(np.prod(mapped.shape[1:], dtype=np.int64)) * mapped.dtype.itemsize
        # laid out column by column there are no spans of rows
        self._columns = mapped if mapped.ndim > 1 and mapped.size and not mapped.flags.c_contiguous else None
        self._start = int(getattr(mapped, "offset", 0))
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror}); {_COPY}") from error
        self.stamp = _stamp(os.fstat(self._descriptor))

    def check_unchanged(self) -> None:
        """Raises InputError where somebody has written to the file since it was opened. One that was replaced or deleted stays readable."""
        if _stamp(os.fstat(self._descriptor)) != self.stamp:
            raise _changed(self.path)

    def take(self, rows: np.ndarray, room: np.ndarray) -> np.ndarray:
        """(m, d) rising rows as they are stored; `room` are bytes to read into, and what is returned may lie there."""
        if self._columns is not None:
            return np.ascontiguousarray(self._columns[rows])
        runs = list(_runs(rows, self.row_bytes, len(room)))
        if len(runs) == 1 and rows[-1] - rows[0] == len(rows) - 1:
            return self._read(int(rows[0]), int(rows[-1]) + 1, room)
        taken = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for start, end in runs:
            read = self._read(int(rows[start]), int(rows[end - 1]) + 1, room)
            np.take(read, rows[start:end] - rows[start], axis=0, out=taken[start:end], mode="clip")
        return taken

    def _read(self, first: int, end: int, room: np.ndarray) -> np.ndarray:
        n_bytes = (end - first) * self.row_bytes
        held = room[:n_bytes] if n_bytes <= len(room) else np.empty(n_bytes, np.uint8)  # of a single long row
        left, at = memoryview(held.data), self._start + first * self.row_bytes
        while left:
            try:
                n = os.preadv(self._descriptor, [left], at)
            except OSError as error:
                raise InputError(f"{self.path} cannot be read ({error.strerror}); {_COPY}") from error
            if not n:
                raise _changed(self.path)
            left, at = left[n:], at + n
        return held.view(self.dtype).reshape(end - first, *self.shape[1:])

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _stamp(seen: os.stat_result) -> tuple[int, int]:
    return seen.st_size, seen.st_mtime_ns


def _changed(path: Path) -> InputError:
    return InputError(f"{path} was changed while it was read; start again when nothing writes to the folder")


def _runs(rows: np.ndarray, row_bytes: int, n_bytes: int) -> Iterator[tuple[int, int]]:
    """Bounds of rising rows that are read at once: those with small gaps between them, `n_bytes` at most."""
    far, most = (max(1, length // max(1, row_bytes)) for length in (_GAP_BYTES, n_bytes))
    for first, end in pairwise([0, *(np.flatnonzero(np.diff(rows) > far) + 1).tolist(), len(rows)]):
        start = first
        while start < end:
            stop = start + int(np.searchsorted(rows[start:end], rows[start] + most))
            yield start, stop
            start = stop


def unit_rows(block: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """(n, d) of any number type -> (n, d) float32 of unit length; NaN where that is not possible.

    Args:
        block: as stored.
        into: (n, d) float32, where they are put; None: new memory.
    """
    into = np.empty(block.shape, np.float32) if into is None else into
    vectors = torch.from_numpy(into)
    with np.errstate(over="ignore", invalid="ignore"):  # of numbers that float32 does not hold
        # PyTorch converts float16 many times faster than NumPy
        if block.dtype == np.float16 and block.dtype.isnative:
            vectors.copy_(torch.from_numpy(block))
        else:
            into[:] = block
    norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    norms[~norms.isfinite() | (norms == 0)] = torch.nan
    vectors /= norms
    return into


def find_embedding_parts(folder: Path, *, with_tables: bool = False, only_matched: bool = False) -> EmbeddingParts:
    """Looks at the files of an embedding folder, ours or clip-retrieval's.

    Args:
        folder: of the files.
        with_tables: whether there must be metadata.
        only_matched: of a folder of another tool, pass over numbers that only vectors or only metadata have, and list their files.
    Raises:
        InputError: no such folder, or shards that do not fit each other or the manifest.
    """
    folder = Path(folder)
    if is_unfinished(folder):
        raise InputError(f"{folder} is not complete; run python -m guardkit.embed with output_dir={folder} again")
    manifest = _checked_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    vector_files, table_files = _numbered(folder, "img_emb", ".npy"), _numbered(folder, "metadata", ".parquet")
    if not vector_files:
        found = "holds no embeddings" if manifest else "is no embedding folder: img_emb/img_emb_0.npy is missing"
        raise InputError(f"{folder} {found}; write one with python -m guardkit.embed")
    odd = sorted(set(vector_files) ^ set(table_files))
    unmatched: tuple[Path, ...] = ()
    if only_matched and manifest is None and set(vector_files) & set(table_files):
        unmatched = tuple({**vector_files, **table_files}[number] for number in odd)
        vector_files, table_files = (
            {number: path for number, path in files.items() if number not in odd} for files in (vector_files, table_files)
        )
        odd = []
    if with_tables and manifest is None and not table_files:
        raise lacking_metadata(folder)
    if odd and (table_files or with_tables):
        raise InputError(f"{folder} has shards {odd} in only one of img_emb/ and metadata/; copy the folder anew")
    if manifest and manifest["n_shards"] != len(vector_files):
        raise InputError(f"{folder} has {len(vector_files)} shards, its {MANIFEST} says {manifest['n_shards']}; copy the folder anew")
    width, sizes, stamps = None, dict[int, int](), dict[int, tuple[int, int]]()
    for number, path in vector_files.items():
        shard = map_array(path, _COPY)
        stamps[number] = _stamp(path.stat())
        sizes[number] = len(shard)
        if shard.dtype.kind != "f":
            raise InputError(f"{path} must hold floating-point numbers, got {shard.dtype}; copy the shard anew")
        if shard.ndim != 2 and len(shard):
            raise InputError(f"{path} has shape {shard.shape}, it must have two dimensions; copy the shard anew")
        if not len(shard):
            continue
        if shard.shape[1] != (width or shard.shape[1]):
            raise InputError(f"{path} has {shard.shape[1]} columns, earlier shards {width}; all must come from one encoder")
        width = shard.shape[1]
    n_rows = sum(sizes.values())
    if manifest and width not in (None, manifest["dim"]):
        raise InputError(f"{folder} has vectors of {width} columns, its {MANIFEST} says {manifest['dim']}; copy the folder anew")
    if manifest and n_rows != manifest["written"]:
        raise InputError(f"{folder} holds {n_rows} embeddings, its {MANIFEST} says {manifest['written']}; copy the folder anew")
    return EmbeddingParts(folder, manifest, vector_files, table_files, n_rows, sizes, width, unmatched, stamps)


def lacking_metadata(folder: object) -> InputError:
    """Of a folder of another tool that has vectors alone."""
    return InputError(
        f"{folder} has vectors and no metadata; write metadata/metadata_<i>.parquet beside each img_emb/img_emb_<i>.npy: a table of as many rows, "
        "with what is known of each image"
    )


def read_stored_embeddings(folder: Path) -> StoredEmbeddings:
    """Reads an embedding folder, ours or clip-retrieval's. Empty parts are passed over, as long as one has a row.

    Raises:
        InputError: no such folder, or shards that do not fit each other or the manifest.
    """
    found = find_embedding_parts(folder, with_tables=True)
    schema = table_schema(found)
    tables = [read_part(found, number, schema) for number, size in found.sizes.items() if size]
    vectors = StoredVectors(found)
    return StoredEmbeddings(vectors[:], pa.concat_tables(tables), found.manifest, part_numbers(found))


def unmatched_rows(parts: EmbeddingParts) -> dict[Path, int]:
    """Files that have no counterpart, and how many rows each holds. Raises InputError where one cannot be read."""
    return {path: len(map_array(path, _COPY)) if path.suffix == ".npy" else count_rows(path, _COPY) for path in parts.unmatched}


def part_numbers(parts: EmbeddingParts) -> np.ndarray:
    """(n,) int, the number of each row's file."""
    return np.repeat(list(parts.sizes), list(parts.sizes.values()))


def table_schema(parts: EmbeddingParts) -> pa.Schema:
    """The columns of the metadata, in types that hold those of all parts that have rows.

    Raises:
        InputError: no part has rows, a table cannot be read or has other rows than its vectors, or tables do not fit each other.
    """
    if not parts.n_rows:
        raise InputError(f"{parts.folder} holds no embeddings, all its parts are empty; write some with python -m guardkit.embed")
    schemas = [read_schema(path, n_rows=parts.sizes[number], mend=_COPY) for number, path in parts.tables.items()]
    try:
        return pa.unify_schemas(
            [schema.remove_metadata() for schema, size in zip(schemas, parts.sizes.values(), strict=True) if size],
            promote_options="permissive",
        )
    except pa.ArrowException as error:
        raise InputError(f"the tables of {parts.folder}/metadata do not fit each other ({error}); all must come from one run") from error


def read_part(parts: EmbeddingParts, number: int, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """The metadata of one part.

    Args:
        parts: of the folder.
        number: of the part.
        schema: of `table_schema`.
        columns: to read; None: all. One that this part lacks is null.
    Raises:
        InputError: it cannot be read.
    """
    wanted = pa.schema([schema.field(name) for name in (schema.names if columns is None else columns)])
    table = read_table(parts.tables[number], n_rows=parts.sizes[number], mend=_COPY, columns=wanted.names)
    missing = [field.name for field in wanted if field.name not in table.column_names]
    for name in missing:
        table = table.append_column(name, pa.nulls(len(table), wanted.field(name).type))
    try:
        # an empty table in front lends its types
        return pa.concat_tables(
            [wanted.empty_table(), table.select(wanted.names).replace_schema_metadata(None)], promote_options="permissive"
        )
    except pa.ArrowException as error:
        raise InputError(f"the tables of {parts.folder}/metadata do not fit each other ({error}); all must come from one run") from error


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    counts = ("n_shards", "dim", "given", "written", "rejected")
    wrong = [name for name in counts if type(manifest.get(name)) is not int or manifest[name] < 0]
    wrong += ["encoder_fingerprint"] * (not isinstance(manifest.get("encoder_fingerprint"), str))
    wrong += ["written + rejected = given"] * (not wrong and manifest["written"] + manifest["rejected"] != manifest["given"])
    if wrong:
        raise InputError(f"{path} is not as guardkit wrote it ({', '.join(wrong)}); copy the folder anew")
    return manifest


def _numbered(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """Shards by number, which may be zero-padded, in order."""
    shards: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{kind}/{kind}_*{suffix}")):
        number = _number(path)
        if number in shards or number < 0:
            raise InputError(f"{path} has no number of its own (expected {kind}_<i>{suffix}); move it elsewhere")
        shards[number] = path
    return dict(sorted(shards.items()))


def _number(path: Path) -> int:
    match = re.search(r"_(\d+)$", path.stem)
    return int(match.group(1)) if match else -1
