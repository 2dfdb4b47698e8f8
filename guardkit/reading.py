"""Arrays and tables from disk, which may be damaged or made up by somebody: read within the limits of their files.

What a header claims is compared with what is there before memory is taken for it, and types are checked once, here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import open_regular, parse_json
from guardkit.schema import InputError

T = TypeVar("T")

_LEAST_BYTES, _MOST_TIMES = 1 << 30, 64  # that a table may take in memory, whatever and by its size on disk
_BATCH_ROWS = 512
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_array(path: Path, mend: str = "copy it anew") -> np.ndarray:
    """The array of numbers in a .npy file.

    Args:
        path: to read.
        mend: what to do when it cannot be read.
    Raises:
        InputError: it cannot be read, holds something else, or less or more than its header says.
    """
    return _array(path, mend, lambda file, dtype, shape, order: np.fromfile(file, dtype).reshape(shape, order=order))


def map_array(path: Path, mend: str = "copy it anew") -> np.ndarray:
    """The same array where it lies, read-only: its numbers are read when they are looked at. Arguments and errors as of `read_array`."""
    return _array(path, mend, _mapped)


def _mapped(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray:
    if not math.prod(shape):  # nothing cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape, order)


def array_head(file: BinaryIO, n_bytes: int) -> tuple[tuple[int, ...], np.dtype, Literal["C", "F"]]:
    """Shape, type and order of the numbers in a .npy file, which is read up to the first of them.

    Args:
        file: at its beginning.
        n_bytes: that it has.
    Raises:
        ValueError, and whatever NumPy's parser raises: it is no such file, or has less or more than its header says.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format holds more than numbers")
    shape, is_fortran, dtype = _HEADERS[version](file)
    if dtype.kind not in "biuf" or dtype.hasobject or any(length < 0 for length in shape):
        raise ValueError(f"{shape} of {dtype} are no numbers")
    claimed, found = math.prod(shape) * dtype.itemsize, n_bytes - file.tell()
    if claimed != found:
        raise ValueError(f"its header says {claimed} bytes, it has {found}")
    return shape, dtype, "F" if is_fortran else "C"


def _array(path: Path, mend: str, read: Callable[[BinaryIO, np.dtype, tuple[int, ...], Literal["C", "F"]], np.ndarray]) -> np.ndarray:
    try:
        with open_regular(path) as file:
            shape, dtype, order = array_head(file, os.fstat(file.fileno()).st_size)
            return read(file, dtype, shape, order)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); {mend}") from error
    # a header is a Python literal: damaged ones raise whatever the parser raises
    except Exception as error:
        raise InputError(f"{path} is not an array of numbers ({' '.join(str(error).split())[:200]}); {mend}") from error


def read_table(
    path: Path,
    schema: pa.Schema | None = None,
    *,
    required: Sequence[str] = (),
    n_rows: int | None = None,
    columns: Sequence[str] | None = None,
    mend: str = "copy it anew",
) -> pa.Table:
    """A Parquet table.

    Args:
        path: to read.
        schema: columns that must be there, in types that theirs can be cast to without loss. Further ones may be there.
        required: columns of the schema that must have a value in each row.
        n_rows: that the table must have, if known: compared before anything is read.
        columns: to read, those that it has; None: all.
        mend: what to do when it cannot be read.
    Raises:
        InputError: it cannot be read, or something above does not hold.
    """

    def read(file: pq.ParquetFile, size: int) -> pa.Table:
        names = file.schema_arrow.names
        missing = [name for name in (schema.names if schema else ()) if name not in names]
        if missing:
            raise InputError(f"{path} lacks the columns {', '.join(missing)}; {mend}")
        table = read_within(file, size, columns=None if columns is None else [name for name in columns if name in names]).combine_chunks()
        table.validate(full=True)  # texts that are not UTF-8 among others
        return table

    table = _opened(path, read, n_rows, mend)
    for field in schema or ():
        column = table[field.name]
        if not _may_become(column.type, field.type):
            raise InputError(f"{path} column {field.name} must hold {field.type}, got {column.type}; {mend}")
        try:
            column = column.cast(field.type)
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise InputError(f"{path} column {field.name} must hold {field.type}, got {column.type} ({_line(error)}); {mend}") from error
        if field.name in required and column.null_count:
            raise InputError(f"{path} column {field.name} is empty in {column.null_count} row(s); {mend}")
        table = table.set_column(table.column_names.index(field.name), field.name, column)
    return table


def read_schema(path: Path, *, n_rows: int | None = None, mend: str = "copy it anew") -> pa.Schema:
    """The columns of a Parquet table, whose rows are not read. Arguments and errors as of `read_table`."""
    return _opened(path, lambda file, _: file.schema_arrow, n_rows, mend)


def count_rows(path: Path, mend: str = "copy it anew") -> int:
    """How many rows a Parquet table says it has. Errors as of `read_table`."""
    return _opened(path, lambda file, _: int(file.metadata.num_rows), None, mend)


def _opened(path: Path, read: Callable[[pq.ParquetFile, int], T], n_rows: int | None, mend: str) -> T:
    """What is read of an open Parquet file of that many bytes."""
    try:
        # an open file, because pyarrow takes no path whose bytes are not UTF-8
        with open_regular(path) as opened, pq.ParquetFile(opened) as file:
            if n_rows is not None and file.metadata.num_rows != n_rows:
                raise InputError(f"{path} has {file.metadata.num_rows} rows, expected are {n_rows}; {mend}")
            names = file.schema_arrow.names
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise InputError(f"{path} has the column {twice[0]!r} more than once; {mend}")
            return read(file, os.fstat(opened.fileno()).st_size)
    except OSError as error:
        raise InputError(f"{path} cannot be read as a table ({_line(error)}); {mend}") from error
    except InputError:
        raise
    # beside ArrowException, pyarrow lets out what the schema of a damaged file leads to
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a table ({_line(error)}); {mend}") from error


def read_within(file: pq.ParquetFile, size: int, *, columns: Sequence[str] | None = None, row_group: int | None = None) -> pa.Table:
    """A table, read bit by bit: a few bytes on disk may stand for more than any memory holds.

    Args:
        file: that is open.
        size: of the file, in bytes.
        columns, row_group: what to read; None: all.
    Raises:
        ValueError: it unfolds to more than a table of that size holds.
    """
    most = max(_LEAST_BYTES, _MOST_TIMES * size)
    names = file.schema_arrow.names if columns is None else columns
    schema = pa.schema([file.schema_arrow.field(name) for name in names], file.schema_arrow.metadata)
    batches, n_bytes = [], 0
    for batch in file.iter_batches(_BATCH_ROWS, row_groups=None if row_group is None else [row_group], columns=columns):
        n_bytes += batch.nbytes
        if n_bytes > most:
            raise ValueError(f"it unfolds to more than {most} bytes, which no table of its size on disk holds")
        batches.append(batch)
    return pa.Table.from_batches(batches, schema)


def read_json_lines(path: Path, mend: str = "copy it anew") -> pa.Table:
    """The table of a .jsonl file, an object a line; what a line lacks is null.

    pyarrow's own reader ends the process on a line that is nested deep, and takes texts for dates.

    Raises:
        InputError: it cannot be read, a line is no object, or a column holds values of several types.
    """
    rows: list[dict[str, Any]] = []
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # as Windows marks UTF-8, and .csv and .txt may have it
                row = parse_json(line) if line.strip() else {}
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no object")
                rows += [row] * bool(line.strip())
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    except OSError as error:
        raise InputError(f"{path} cannot be read as a table ({error.strerror}); {mend}") from error
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{path} cannot be read as a table ({_line(error)}); {mend}") from error


def _may_become(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a column of the one type may stand for the other: numbers for numbers, texts for texts, and no value for any."""
    kind = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_null(kind):
        return True
    if pa.types.is_string(wanted):
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return kind == wanted or (_is_number(kind) and _is_number(wanted))


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
