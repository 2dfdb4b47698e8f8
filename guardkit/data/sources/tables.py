"""Tables of metadata as people have them: CSV as spreadsheets write it, Parquet, JSON lines."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pyarrow as pa

from guardkit.reading import read_json_lines
from guardkit.reading import read_table as read_parquet
from guardkit.schema import InputError

SUFFIXES = (".csv", ".parquet", ".jsonl")
_MEND = "correct it, or give another table"
# what spreadsheets and pandas write for a missing cell
_MISSING = frozenset({"", "#N/A", "N/A", "NA", "NULL", "NaN", "n/a", "nan", "null"})


def read_table(path: Path, column: str) -> tuple[list[str], list[dict[str, Any]]]:
    """Names of the columns, and one map a row. Columns without a name and rows without a value are passed over; such a row is an
    empty map, so that rows keep their numbers.

    Args:
        path: of a .csv, .parquet or .jsonl file.
        column: one that it should have, by which the separator of a CSV file is told.
    Raises:
        InputError: it is no such table.
    """
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise InputError(f"source.metadata {path.name} must be a .csv, .parquet or .jsonl file")
    try:
        if kind == ".csv":
            names, rows = _read_csv(path, column)
        else:
            table = read_parquet(path, mend=_MEND) if kind == ".parquet" else read_json_lines(path, _MEND)
            names, rows = table.column_names, table.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error) as error:
        reason = "not in UTF-8: save it as CSV UTF-8" if isinstance(error, UnicodeDecodeError) else " ".join(str(error).split())[:200]
        raise InputError(f"{path} cannot be read as a table ({reason}); {_MEND}") from error
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} more than once; keep one of them")
    filled = [{name: value for name, value in row.items() if name} for row in rows]
    return [name for name in names if name], [row if any(_is_filled(value) for value in row.values()) else {} for row in filled]


def _is_filled(value: Any) -> bool:
    return value is not None and value == value and str(value).strip() != ""


def _read_csv(path: Path, column: str) -> tuple[list[str], list[dict[str, Any]]]:
    """All cells as text. The separator is a comma, or what spreadsheets put in its place where commas stand in numbers."""
    content = path.read_text(encoding="utf-8-sig")
    first = content.split("\n", 1)[0]
    marks = [mark for mark in ",;\t" if column in _stripped(next(csv.reader([first], delimiter=mark), []))]
    lines = csv.reader(io.StringIO(content, newline=""), delimiter=(marks or [","])[0], strict=True)
    names = _stripped(next(lines, []))
    if not names:
        raise csv.Error("it is empty")
    rows = []
    for cells in lines:
        # a spreadsheet leaves empty cells at the end of a row away, or adds some
        if any(cell.strip() for cell in cells[len(names) :]):
            raise csv.Error(f"line {lines.line_num} has {len(cells)} cells, the first line has {len(names)}")
        row = [None if cell.strip() in _MISSING else cell for cell in cells] + [None] * (len(names) - len(cells))
        rows.append(dict(zip(names, row, strict=False)))
    return names, rows


def _stripped(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]
