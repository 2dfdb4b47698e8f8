"""Columns of what inputs say of themselves: any types, any names, never in the place of a column of ours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

_MOST = 256  # columns that the inputs of a shard may have together; beyond them each input's are one text


def own_columns(said: Sequence[Mapping[str, Any]], taken: Collection[str], schema: pa.Schema | None = None) -> dict[str, pa.Array]:
    """Columns of what n inputs say.

    Args:
        said: name -> value, of each input.
        taken: names that are ours; a column that is called so gets `input_` in front.
        schema: types of columns that must be there; None: all follow from the values, and what is of several types is text.
    Returns:
        name -> (n,) values; null where an input does not say.
    """
    names = list(dict.fromkeys([*(schema.names if schema else ()), *(name for one in said for name in one)]))
    if len(names) > _MOST:  # nobody means that many columns
        return {_free("columns", taken): pa.array([str(dict(one)) if one else None for one in said], pa.string())}
    columns: dict[str, pa.Array] = {}
    for name in names:
        kind = schema.field(name).type if schema is not None and name in schema.names else None
        columns[_free(name, {*taken, *columns})] = _column([one.get(name) for one in said], kind)
    return columns


def rows_of(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """What each row says: name -> value. One that Python has no value for, such as a year beyond 9999 or a text that is not UTF-8, is text; the
    second column of a name has `input_` in front."""
    names: list[str] = []
    for name in batch.schema.names:
        names.append(_free(name, names))
    columns = [_values(column) for column in batch.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if columns else [{} for _ in range(batch.num_rows)]


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except Exception:  # whatever the conversion of a type raises
        return [value_of(one) for one in column]


def value_of(scalar: pa.Scalar) -> Any:
    """The value that Python has for it; text where it has none."""
    try:
        return scalar.as_py()
    except Exception:
        if hasattr(scalar, "as_buffer"):
            return scalar.as_buffer().to_pybytes().decode(errors="backslashreplace")
        return str(getattr(scalar, "value", f"no value in Python for {scalar.type}"))


def _free(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name = f"input_{name}"
    return name


def _column(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    if kind is not None:
        return pa.array(values, kind, from_pandas=True)
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):  # of several types
        return pa.array([None if value is None else _printable(value) for value in values], pa.string())


def _printable(value: Any) -> str:
    return str(value).encode(errors="backslashreplace").decode()
