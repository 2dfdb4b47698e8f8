"""Labelled images in Parquet files, encoded in a column as the Hugging Face Hub lays them out. Needs no library but pyarrow."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import hash_file, open_regular, parse_json
from guardkit.data.grouping import DISTANCE, check_image_settings
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.encoded import load_parts
from guardkit.data.sources.files import path_within
from guardkit.data.sources.rows import RowRule
from guardkit.images import MAX_PIXELS
from guardkit.local_copies import local, url_of
from guardkit.policy import Policy
from guardkit.reading import read_within
from guardkit.schema import ImageError, InputError
from guardkit.storage import is_url

_KEPT_BYTES = 256 << 20  # of images that were read with their row group; the group last read is kept whatever its size
_USUAL = {"label": "label", "category": "category", "caption": "caption", "group": "group", "source": "source"}
# beside ArrowException, pyarrow lets out what the schema of a damaged file leads to
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError, RecursionError)


class ParquetSource:
    """Images and their labels in Parquet files.

    The image column holds maps of `bytes` and `path`, encoded bytes, or text in base64. Numbers that stand for class names (a
    ClassLabel of the Hub) are read as the names. Columns x_min, y_min, x_max and y_max are the box of the unsafe feature in
    fractions of width and height. Images are read a row group at a time, when somebody asks for one.

    Args:
        policy: whose categories the images violate.
        files: a Parquet file, a list of them, or a folder: all below it, hidden ones aside. Of URLs in object storage copies are made here.
        test: the same, of the test images; None: the set has none of its own. Its files are not trained on where `files` is a
            folder that holds them.
        name: for tables, and what images are said to come from that do not say it.
        image_column: must be there.
        label_column, category_column, source_column, caption_column, group_column: may be missing under their usual names.
            label_column None: labels follow from `categories`, or there are none. Rows of one group never straddle a split.
        labels: label value -> safe or unsafe; null: to be left out. None: safe, unsafe, 0, 1, nsfw, ...
        default_label: of labels that `labels` does not list; None: they are an error.
        categories: value -> the policy's category, or None for one that this policy does not speak of: its unsafe
            images are left out. Without labels, listed values mean unsafe and all others safe.
        class_column: says what an image shows: label and category follow from the policy's classes and look-alikes, whose
            category is what they look like; all other classes are safe. None: labels say what is unsafe.
        max_pixels: larger images are rejected.
        check_images: read every image once; without it, bad ones show only in use, and equal ones are not found.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most.
    Raises:
        InputError: a file is not there or no Parquet file, or a setting does not fit the policy.
    """

    def __init__(
        self,
        policy: Policy,
        files: str | Sequence[str],
        *,
        test: str | Sequence[str] | None = None,
        name: str = "parquet",
        image_column: str = "image",
        label_column: str | None = "label",
        labels: Mapping[Any, Any] | None = None,
        default_label: str | None = None,
        category_column: str | None = "category",
        categories: Mapping[Any, str | None] | None = None,
        source_column: str | None = "source",
        caption_column: str | None = "caption",
        group_column: str | None = "group",
        class_column: str | None = None,
        max_pixels: int = MAX_PIXELS,
        check_images: bool = True,
        near_duplicate_distance: int = DISTANCE,
    ) -> None:
        self.policy, self.name, self.max_pixels = policy, name, max_pixels
        check_image_settings(max_pixels, check_images, near_duplicate_distance)
        self.check_images, self.near_duplicate_distance = check_images, near_duplicate_distance
        columns = {
            "image": image_column,
            "label": label_column,
            "category": category_column,
            "source": source_column,
            "caption": caption_column,
            "group": group_column,
        }
        if class_column is not None:
            columns["class"] = class_column
        self._rule = RowRule(policy, columns, _USUAL, labels=labels, default_label=default_label, categories=categories, boxes=True)
        tested = [] if test is None else _files(test, "source.test")
        self._files = {"train": _files(files, "source.files", besides=tested), "test": tested}
        every = [*self._files["train"], *tested]
        twice = next((path for path in every if every.count(path) > 1), None)
        if twice is not None:
            raise InputError(f"{twice} is given twice in source.files and source.test; give each file once")
        self._root = Path(os.path.commonpath([_known_as(path).parent for path in every]))
        self.asked: dict[str, Any] = {
            "source": name,
            **{role: {self._id(path): hash_file(path) for path in paths} for role, paths in self._files.items()},
            **self._rule.asked,
            "max_pixels": max_pixels,
            "check_images": check_images,
            "near_duplicate_distance": near_duplicate_distance,
        }

    def _id(self, path: Path) -> str:
        return _known_as(path).relative_to(self._root).as_posix()

    def load(self) -> Loaded:
        """Lists the rows, checks and groups their images.

        Raises:
            InputError: a file is damaged, a column is missing, or a value is not explained by the settings.
        """
        groups = _RowGroups(self._rule.columns["image"] or "")
        return load_parts(
            {role: [_FilePart(path, self._id(path), groups) for path in paths] for role, paths in self._files.items() if paths},
            self._rule,
            name=self.name,
            where=str(self._root),
            max_pixels=self.max_pixels,
            check_images=self.check_images,
            near_duplicate_distance=self.near_duplicate_distance,
        )


def _files(given: str | Sequence[str], setting: str, besides: Iterable[Path] = ()) -> list[Path]:
    """The files that a setting names, those `besides` left out where it names a folder."""
    found: list[Path] = []
    for one in [given] if isinstance(given, str | Path) else given:
        path = local(setting, one, only=lambda name: name.endswith(".parquet")) if is_url(one) else Path(str(one)).expanduser()
        if path.is_dir():
            below = sorted(file for file in path.rglob("*.parquet") if file.is_file())
            visible = [file for file in below if not any(part.startswith(".") for part in file.relative_to(path).parts)]
            found += [file.resolve() for file in visible if file.resolve() not in set(besides)]
        elif path.is_file():
            found.append(path.resolve())
        else:
            raise InputError(f"{setting} {one} is not there; give a Parquet file, a list of them, or a folder that holds some")
    if not found:
        raise InputError(f"{setting} {given} names no Parquet file; give a file, a list of them, or a folder that holds some")
    return found


def _known_as(path: Path) -> Path:
    """Where a file lies, for its name: a copy's own place says nothing, and is another one for each version."""
    url = url_of(path)
    return path if url is None else Path("/", *url.replace("://", "/").split("/"))


@contextmanager
def _opened(path: Path, metadata: Any = None) -> Iterator[pq.ParquetFile]:
    """The file; what is wrong with it is an InputError."""
    try:
        # an open file, because pyarrow takes no path whose bytes are not UTF-8
        with open_regular(path) as opened, pq.ParquetFile(opened, metadata=metadata) as file:
            yield file
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(
            f"{path} cannot be read as a Parquet file ({' '.join(str(error).split())[:200]}); copy it anew or leave it out"
        ) from error


class _FilePart:
    """The rows of one file; see `Part`."""

    def __init__(self, path: Path, name: str, groups: _RowGroups) -> None:
        self._path, self._name, self._groups = path, name, groups
        with _opened(path) as file:
            self._metadata, schema = file.metadata, file.schema_arrow
        self.names: Sequence[str] = schema.names
        twice = sorted({one for one in schema.names if schema.names.count(one) > 1})
        if twice:
            raise InputError(f"{path} has the column {twice[0]!r} more than once; keep one of them")
        if groups.column in self.names and not _may_hold_images(schema.field(groups.column).type):
            raise InputError(
                f"{path} column {groups.column} holds {schema.field(groups.column).type}; expected are encoded images, "
                "or maps of bytes and path; set source.image_column"
            )
        self._class_names = class_names(schema)
        self._first = [0]
        for number in range(self._metadata.num_row_groups):
            self._first.append(self._first[-1] + self._metadata.row_group(number).num_rows)

    def __len__(self) -> int:
        return self._first[-1]

    def row_name(self, row: int) -> str:
        """Such as "train.parquet/7"."""
        return f"{self._name}/{row}"

    def values(self, column: str) -> list[Any]:
        """All cells of a column."""
        with _opened(self._path, self._metadata) as file:
            values = read_within(file, self._path.stat().st_size, columns=[column])[column].to_pylist()
        names = self._class_names.get(column)
        if names is None:
            return values
        if any(value is not None and not (isinstance(value, int) and value < len(names)) for value in values):
            raise InputError(f"{self._path} column {column} holds values that its {len(names)} class names do not explain; correct it")
        return [names[value] if value is not None and value >= 0 else value for value in values]

    def without_image(self) -> Set[int]:
        """Rows whose cell is empty. Only row groups with empty cells are read for it, as the file's footer counts them."""
        found: set[int] = set()
        for number in range(self._metadata.num_row_groups):
            if _may_be_empty(self._metadata.row_group(number), self._groups.column):
                cells = self._groups.read(self._path, self._metadata, number)
                found.update(self._first[number] + int(row) for row in np.flatnonzero(_is_empty(cells)))
        return found

    def image(self, row: int) -> Any:
        """The image cell of a row."""
        number = next(number for number, end in enumerate(self._first[1:]) if row < end)
        return self._groups.read(self._path, self._metadata, number)[row - self._first[number]].as_py()

    def path(self, name: str) -> Path:
        """The file beside the table that a cell without bytes names. Raises ImageError."""
        return path_within([self._path.parent], name)


class _RowGroups:
    """The images of the row groups last read, for all files of a source and all threads."""

    def __init__(self, column: str) -> None:
        self.column = column
        self._kept: OrderedDict[tuple[Path, int], pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _RowGroups, (self.column,)  # another process reads for itself

    def read(self, path: Path, metadata: Any, number: int) -> pa.ChunkedArray:
        with self._lock:  # or every thread would read the same group
            if (path, number) not in self._kept:
                try:
                    with _opened(path, metadata) as file:
                        self._kept[path, number] = read_within(file, path.stat().st_size, columns=[self.column], row_group=number)[
                            self.column
                        ]
                except InputError as error:
                    raise ImageError(str(error)) from error
            self._kept.move_to_end((path, number))
            while len(self._kept) > 1 and sum(images.nbytes for images in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[path, number]


def _may_be_empty(group: Any, column: str) -> bool:
    """Whether some cell of a row group may hold neither bytes nor a path."""
    leaves = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.split(".")[0] == column]
    return all(leaf.statistics is None or not leaf.statistics.has_null_count or leaf.statistics.null_count for leaf in leaves)


def _is_empty(cells: pa.ChunkedArray) -> np.ndarray:
    """(n,) bool."""
    parts = [cells]
    if pa.types.is_struct(cells.type):
        parts = [part for field, part in zip(cells.type, cells.flatten(), strict=True) if field.name in ("bytes", "path")]
    return np.all([part.is_null().to_numpy() for part in parts], axis=0)


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name in ("bytes", "path") for field in kind)
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
    return any(test(kind) for test in tests)


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """By column, the names that its numbers stand for, as the datasets library notes them."""
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {column: list(about["names"]) for column, about in features.items() if about.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return {}  # another writer's note
