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
