"""Ways to damage what the project reads back from disk: for tests, and for campaigns over many files.

`tampered(path)` gives what a file might hold instead, by the kind of file, and never changes it.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from guardkit.schema import InputError
from guardkit.stores import KeyValueStore

_VALUES = (None, True, -1, 7, 10**400, "x", "", [], ["x", 3], {}, {"x": {}}, float("nan"), float("inf"), "\ud800")
_DEEP = b"[" * 200_000 + b"]" * 200_000


def tampered(path: Path) -> Iterator[tuple[str, bytes]]:
    """What the file might hold instead: (what was done, bytes)."""
    data = path.read_bytes()
    yield "empty", b""
    yield "half", data[: len(data) // 2]
    yield "its last byte lost", data[:-1]
    yield "zeros", bytes(len(data))
    yield "something else", b"\x93\xff<html>\x00\xfe" * 40
    yield from _BY_SUFFIX[path.suffix](data)


def survives(path: Path, data: bytes, read: Callable[[], Any], is_right: Callable[[Any], bool]) -> str | None:
    """Reads with other bytes in a file, and puts the right ones back.

    Returns:
        None where it was refused in one line, or what came of it is right; else what went wrong.
    """
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        found = read()
    except InputError as error:
        return None if "\n" not in str(error) and len(str(error)) < 2000 else f"not one line: {str(error)[:200]}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    finally:
        for left in path.parent.glob(path.name + "-*"):  # SQLite's
            left.unlink()
        path.write_bytes(before)
    return None if is_right(found) else "a wrong value was taken for a right one"


def resign(path: Path, key: str, value: bytes) -> None:
    """Puts a value of one's own into a store, with the checksum that belongs to it."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM entries WHERE key = ?", (key,))
        (about,) = connection.execute("SELECT inputs FROM purpose").fetchone()
    KeyValueStore(path.parent, path.name, json.loads(about)).put({key: value})


def stored(path: Path) -> dict[str, bytes]:
    """All that a store holds."""
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT key, value FROM entries ORDER BY key"))


def swap(path: Path, one: str, other: str) -> None:
    """Puts the entry of one key, its checksum included, under the other."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "UPDATE entries SET (value, checksum) = (SELECT value, checksum FROM entries WHERE key = ?) WHERE key = ?", (one, other)
        )


def _json(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "deep", _DEEP
    yield "deep inside", b'{"given": ' + _DEEP + b"}"
    yield "a huge number", b'{"given": ' + b"9" * 10_000 + b"}"
    yield "not UTF-8", data.replace(b'"', b'"\xff', 1)
    for value in _VALUES:
        yield f"{value!r} alone", json.dumps(value).encode()
    whole = json.loads(data)
    for name in whole if isinstance(whole, dict) else ():
        yield f"{name} missing", json.dumps({key: value for key, value in whole.items() if key != name}).encode()
        for value in _VALUES:
            if type(value) is not type(whole[name]) or value != value:
                yield f"{name} {str(value)[:20]!r}", json.dumps(whole | {name: value}).encode()


def _jsonl(data: bytes) -> Iterator[tuple[str, bytes]]:
    lines = data.splitlines(keepends=True)
    for what, line in _json(lines[0].strip()):
        yield what, b"".join([line + b"\n", *lines[1:]])


def _yaml(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "deep", b"a: " + _DEEP[:5000]
    yield "deep flow", b"{a: " * 3000
    yield "a circle", b"&a [*a]"
    laughs = ["a0: &a0 {x: 1, y: 2}", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20))]
    yield "aliases", "\n".join(laughs).encode()
    merges = ["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 20))]
    yield "merged aliases", "\n".join(merges).encode()
    yield "a tag", b"!!python/object/apply:os.getcwd []"
    yield "a date", b"name: 2026-99-99"
    whole = yaml.safe_load(data)
    for name in whole:
        for value in _VALUES[:-1]:
            if type(value) is not type(whole[name]):
                yield f"{name} {str(value)[:20]!r}", yaml.safe_dump(whole | {name: value}).encode()


def _npy(data: bytes) -> Iterator[tuple[str, bytes]]:
    array = np.load(io.BytesIO(data))
    yield (
        "terabytes",
        _array_bytes(array).replace(
            str(array.shape).encode(), f"({10**12}, 7)".encode()[: len(str(array.shape))].ljust(len(str(array.shape)))
        ),
    )
    header = str({"descr": array.dtype.str, "fortran_order": False, "shape": (10**11, array.shape[1])})
    yield "terabytes in its header", _with_header(header, array)
    for shape in ((-1, 4), (10**30, 4), (2**63, 2), "x", (1.5, 2), ()):
        yield f"shape {shape}", _with_header(str({"descr": array.dtype.str, "fortran_order": False, "shape": shape}), array)
    yield "a deep header", _with_header("(" * 5000, array)
    yield "objects", _with_header(str({"descr": "|O", "fortran_order": False, "shape": array.shape}), array)
    yield "an unknown version", data[:6] + b"\x09" + data[7:]
    yield "a tail", data + b"\0"
    yield "one dimension", _array_bytes(array.ravel())
    yield "three dimensions", _array_bytes(array[None])
    yield "whole numbers", _array_bytes(array.astype(np.int32))
    yield "complex numbers", _array_bytes(array.astype(np.complex64))
    yield "a row less", _array_bytes(array[1:])
    yield "a column less", _array_bytes(array[:, 1:])
    for value in (np.nan, np.inf, 0):
        wrong = array.copy()
        wrong[0] = value
        yield f"a row of {value}", _array_bytes(wrong)
    archive = io.BytesIO()
    np.savez(archive, array)
    yield "an archive", archive.getvalue()


def _with_header(header: str, array: np.ndarray) -> bytes:
    text = header.encode().ljust(118) + b"\n" if len(header) < 118 else header.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + array.tobytes()


def _array_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _parquet(data: bytes) -> Iterator[tuple[str, bytes]]:
    table = pq.read_table(io.BytesIO(data))
    yield "its middle changed", data[: len(data) // 2] + b"\xff" * 16 + data[len(data) // 2 + 16 :]
    yield "its footer's length changed", data[:-8] + b"\xff\xff\xff\x7f" + data[-4:]
    yield "a row less", _table_bytes(table.slice(1))
    yield "a row twice", _table_bytes(pa.concat_tables([table, table.slice(0, 1)]))
    n = len(table)
    wrong: dict[str, pa.Array] = {
        "null": pa.nulls(n),
        "numbers": pa.array([7] * n, pa.int64()),
        "huge numbers": pa.array([2**63 - 1] * n, pa.int64()),
        "NaN": pa.array([np.nan] * n),
        "texts": pa.array(["x"] * n),
        "a null character": pa.array(["a\0b"] * n),
        "lists": pa.array([["x"]] * n),
        "bytes": pa.array([b"\xff\xfe"] * n),
        "not UTF-8": pa.StringArray.from_buffers(
            n, pa.py_buffer(np.arange(0, 2 * n + 1, 2, dtype=np.int32).tobytes()), pa.py_buffer(b"\xff\xfe" * n)
        ),
    }
    for i, name in enumerate(table.column_names):
        yield f"{name} missing", _table_bytes(table.remove_column(i))
        yield f"{name} twice", _table_bytes(table.append_column(name, table.column(i)))
        for what, column in wrong.items():
            yield f"{name} all {what}", _table_bytes(table.set_column(i, name, column))
        first = pa.chunked_array([pa.nulls(1, table.schema.types[i]), *table.column(i).slice(1).chunks])
        yield f"{name} null once", _table_bytes(table.set_column(i, name, first))


def _table_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _sqlite(data: bytes) -> Iterator[tuple[str, bytes]]:
    yield "a page lost", data[:4096] + data[8192:]
    yield "its pages changed", data[:4096] + b"\xff" * (len(data) - 4096)
    yield "a bit changed", data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


_BY_SUFFIX: dict[str, Callable[[bytes], Iterator[tuple[str, bytes]]]] = {
    ".json": _json,
    ".jsonl": _jsonl,
    ".yaml": _yaml,
    ".npy": _npy,
    ".parquet": _parquet,
    ".sqlite": _sqlite,
}
