"""A guard's decisions as columns of a Hugging Face dataset."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from guardkit.checks import check_flag
from guardkit.classifier import GuardClassifier
from guardkit.schema import InputError
from guardkit.thresholds import check_scope

_ABOUT = ("action", "score", "violated", "error")


def dataset_columns(
    guard: GuardClassifier, *, column: str = "image", prefix: str = "guard_", scope: Sequence[str] | None = None, categories: bool = True
) -> DatasetColumns:
    """A function for `dataset.map(..., batched=True)` that adds decisions and keeps all other columns.

    Args:
        guard: decides.
        column: of the images: Pillow images, or the dictionaries of bytes and path that `datasets.Image(decode=False)` gives. Only those leave
            an image that cannot be decoded to the guard, whose row then says "error"; `datasets` itself stops at it.
        prefix: of the new columns' names.
        scope: categories that count for the decision; None: all.
        categories: whether the score of each category is a column too.
    Returns:
        A function from a batch to its new columns: action ("allow", "review", "block" or "error"), score (NaN where the image could not be
        decided), violated (categories, joined by ", "), error (the reason, or ""), and the score of each category. None and empty lists are
        nowhere among them, because `datasets` takes the type of a column from the first batch.
    Raises:
        InputError: an unknown category; at a call: there is no such column, or a new one is there already.
    """
    return DatasetColumns(guard, column=column, prefix=prefix, scope=scope, categories=categories)


class DatasetColumns:
    """What `dataset_columns` gives. It can be pickled, as far as the guard can, and so works in several processes."""

    def __init__(self, guard: GuardClassifier, *, column: str, prefix: str, scope: Sequence[str] | None, categories: bool) -> None:
        check_scope(scope, guard.policy.category_names)
        check_flag("categories", categories)
        self._guard, self._column, self._prefix, self._scope = guard, column, prefix, scope
        self._names = guard.policy.category_names if categories else ()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The new columns of a batch of columns."""
        if self._column not in batch:
            raise InputError(f"the dataset has no column {self._column!r}; give column= one of {', '.join(batch)}")
        new = [self._prefix + name for name in (*_ABOUT, *self._names)]
        if there := [name for name in new if name in batch]:
            raise InputError(f"the dataset has a column {there[0]!r} already; give another prefix=, or remove it")
        rows = []
        for decision in self._guard.predict([_image(cell) for cell in batch[self._column]], scope=self._scope):
            about = [decision.action, decision.score, ", ".join(decision.violated), decision.error or ""]
            rows.append([*about, *(decision.categories.get(name, math.nan) for name in self._names)])
        return {name: [row[i] for row in rows] for i, name in enumerate(new)}


def _image(cell: Any) -> Any:
    """What the guard is given for a cell of the column."""
    if isinstance(cell, Mapping):
        return cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell
