"""Tables that hold encoded images in a column beside their labels: what data sets of the Hugging Face library and Parquet files share."""

from __future__ import annotations

import base64
import binascii
import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from guardkit.data.grouping import group, why_rejected
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.rows import RowRule, text
from guardkit.images import FileContent, bytes_key, read_image
from guardkit.schema import UNLABELLED, ImageError, InputError, Record, Rejected

log = logging.getLogger(__name__)

NO_IMAGE = "no image in this row"


class Part(Protocol):
    """Rows of a table, such as a split.

    Attributes:
        names: of the columns.
    """

    names: Sequence[str]

    def __len__(self) -> int: ...

    def row_name(self, row: int) -> str:
        """A row's id within the source."""
        ...

    def values(self, column: str) -> list[Any]:
        """All cells of a column that holds no images."""
        ...

    def without_image(self) -> Set[int]:
        """Rows without an image, as far as that is known without reading any."""
        ...

    def image(self, row: int) -> Any:
        """The image cell of a row: encoded bytes, a path, text in base64, or a map of `bytes` and `path`. Raises ImageError."""
        ...

    def path(self, name: str) -> Path:
        """The file that an image cell without bytes names. Raises ImageError when it lies outside the data set."""
        ...


@dataclass(frozen=True)
class RowContent:
    """The image of one row, read when somebody asks."""

    part: Part = field(repr=False)
    row: int
    max_pixels: int

    def __str__(self) -> str:
        return self.part.row_name(self.row)

    def _encoded(self) -> bytes | Path:
        value = self.part.image(self.row)
        if isinstance(value, str) and value.isdigit() and int(value) < len(self.part):
            value = self.part.image(int(value))
        if isinstance(value, Mapping):
            named = str(value.get("path") or "")
            value = value.get("bytes") or (self.part.path(named) if named else None)
        if isinstance(value, str):
            return _from_text(value)
        if value is None:
            raise ImageError(NO_IMAGE)
        if not isinstance(value, (bytes, Path)):
            raise ImageError(f"expected an image, encoded bytes or base64, got {type(value).__name__}")
        return value

    @cached_property
    def key(self) -> str:
        """Of the encoded bytes. Raises ImageError."""
        found = self._encoded()
        return FileContent(found, self.max_pixels).key if isinstance(found, Path) else bytes_key(found)

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self._encoded(), max_pixels=self.max_pixels)

    def load_reduced(self, at_least: int) -> np.ndarray:
        """The same, a JPEG decoded at a fraction; see `read_image`."""
        return read_image(self._encoded(), max_pixels=self.max_pixels, at_least=at_least)


def load_parts(
    parts: Mapping[str, Sequence[Part]],
    rule: RowRule,
    *,
    name: str,
    where: str,
    max_pixels: int,
    check_images: bool,
    near_duplicate_distance: int,
) -> Loaded:
    """Lists the rows of "train" and "test", checks and groups their images. A test part without a usable row counts as none.

    Args:
        parts: some of "train" and "test"; each may have several.
        rule: its columns name the role "image" too.
        name: of images that do not say where they come from.
        where: names the data set in errors.
        max_pixels: larger images are rejected.
        check_images, near_duplicate_distance: see `guardkit.data.grouping`.
    Raises:
        InputError: a column is missing, a value is not explained by the settings, or no row is left.
    """
    rejected: list[Rejected] = []
    set_aside: list[Record] = []
    records: dict[str, list[Record]] = {}
    classes: set[str] = set()
    given = 0
    for role, several in parts.items():
        records[role] = []
        for part in several:
            given += len(part)
            records[role] += _records(part, rule, name, where, max_pixels, rejected, set_aside, classes)
    rule.check_classes(classes, where)
    loaded = Loaded(records.get("train", []), records.get("test"), rejected, given, set_aside=set_aside)
    loaded = group(loaded, check_images=check_images, near_duplicate_distance=near_duplicate_distance)
    if not (loaded.train or loaded.test or loaded.set_aside):
        raise InputError(f"{where} has no usable row{why_rejected(loaded)}")
    if loaded.test == [] and (loaded.train or any(record.label == UNLABELLED for record in loaded.set_aside)):
        log.warning("%s has no test image that can be used, so it counts as a set without test images%s", where, why_rejected(loaded))
        loaded = replace(loaded, test=None)
    return loaded


def _records(
    part: Part,
    rule: RowRule,
    name: str,
    where: str,
    max_pixels: int,
    rejected: list[Rejected],
    set_aside: list[Record],
    classes: set[str],
) -> list[Record]:
    """Of the rows that can be used; the others are added to `rejected` and `set_aside`, the classes of all to `classes`."""
    n = len(part)
    at = f"{where} {part.row_name(0).rpartition('/')[0]}" if n else where
    columns = rule.find(part.names, at, needed=("image",))
    values = {role: part.values(column) for role, column in columns.items() if role != "image"}
    why = "no class" if "class" in columns else "no label"
    if "class" not in columns and "label" not in columns and rule.columns["label"] is not None and rule.categories is None:
        why += f" (the table has no column {rule.columns['label']!r}; it has {', '.join(part.names)}; set source.label_column)"
    classes.update(text(value) for value in values.get("class", ()))
    without_image = part.without_image()
    records = []
    for number in range(n):
        row_name = part.row_name(number)
        if number in without_image:
            rejected.append(Rejected(row_name, NO_IMAGE))
            continue
        row = rule.read({role: cells[number] for role, cells in values.items()}, f"{where} {row_name}")
        if isinstance(row, str):
            rejected.append(Rejected(row_name, row))
            continue
        content = RowContent(part, number, max_pixels)
        record = Record(
            row_name,
            row.label,
            row.category,
            row.source or name,
            row.group or row_name,
            content,
            row.region,
            row.caption,
            listed_group=row.group,
        )
        if row.label == UNLABELLED:
            set_aside.append(record)
            rejected.append(Rejected(row_name, row.left_out or why))
        else:
            records.append(record)
    return records


def _from_text(value: str) -> bytes:
    if value.startswith(("http://", "https://")):
        raise ImageError("a web address, and nothing is fetched from there; save the images in a folder and choose source=folder")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("a text that is not base64") from error
