"""Images in a folder as a source: a metadata file beside them, or one folder per class.

Nothing about the files is trusted. Every input ends up in `train` or in `rejected`, so the counts add up; what makes
the whole data set unusable (no such folder, a missing column, a category that the policy lacks) is an error.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from guardkit.data.duplicates import near_duplicate_groups, perceptual_hash
from guardkit.data.sources.base import Loaded, read_label
from guardkit.images import MAX_PIXELS, SUFFIXES, FileContent
from guardkit.policy import Policy
from guardkit.progress import progress
from guardkit.reading import read_json_lines, read_table
from guardkit.schema import ImageError, InputError, Record, Region, Rejected

log = logging.getLogger(__name__)

METADATA = ("metadata.csv", "metadata.parquet", "metadata.jsonl")
_BOX = ("x_min", "y_min", "x_max", "y_max")
# what people put beside class folders without meaning it as data, by the first part of its name
_PAPERS = frozenset({"citation", "copying", "dataset_infos", "license", "licence", "metadata", "notice", "readme"})
_READERS = 4


@dataclass(frozen=True)
class _Row:
    """An input before its image is looked at."""

    file_name: str
    label: int
    category: str | None
    region: Region | None
    caption: str
    group: str | None


class FolderSource:
    """A folder of labelled images.

    With a metadata file (CSV, Parquet or JSON lines): `file_name`, `label` (safe or unsafe, 0 or 1), and, where known,
    `category`, the box `x_min, y_min, x_max, y_max` of the unsafe feature in fractions of width and height, `caption`
    and `group`; file names are relative to the folder. Without one: a folder `safe`, and folders named like the
    policy's categories, or `unsafe`. Hidden files are passed over, and so are README and licence beside the folders.

    Records share a group when they are near-duplicates of each other, whatever their labels, or are listed with the
    same `group`. A group is called after its first record.

    Args:
        policy: whose categories the images violate.
        root: the folder.
        metadata: a file inside it; None looks for metadata.csv, metadata.parquet, metadata.jsonl.
        categories: folder name -> category; folders that are not listed are safe. A metadata file is then not read.
        max_pixels: larger images are rejected.
        check_images: read every image once; without it, bad images show only in training, and near-duplicates are
            not found.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most.
    Raises:
        InputError: the folder is not there or holds nothing to use.
    """

    name = "folder"

    def __init__(
        self,
        policy: Policy,
        root: str,
        *,
        metadata: str | None = None,
        categories: Mapping[str, str] | None = None,
        max_pixels: int = MAX_PIXELS,
        check_images: bool = True,
        near_duplicate_distance: int = 4,
    ) -> None:
        self.policy, self.root = policy, Path(root).expanduser()
        if not self.root.is_dir():
            raise InputError(
                f"source.root {root} is {'not a folder' if self.root.exists() else 'not there'}; give the folder that holds the images"
            )
        if not isinstance(max_pixels, int) or max_pixels < 1:
            raise InputError(f"source.max_pixels must be a whole number of at least 1, got {max_pixels!r}")
        if not isinstance(near_duplicate_distance, int) or not 0 <= near_duplicate_distance <= 15:
            raise InputError(f"source.near_duplicate_distance must be a whole number in [0, 15], got {near_duplicate_distance!r}")
        if metadata is not None and categories is not None:
            raise InputError(
                f"source.metadata {metadata} and source.categories are both given; labels come from one of them, leave out the other"
            )
        # YAML reads a folder called 0 as a number
        self.categories = {str(folder): category for folder, category in categories.items()} if categories is not None else None
        for folder, category in (self.categories or {}).items():
            policy.check_category(category, f"source.categories[{folder!r}]")
            if folder not in self._folders():
                raise InputError(
                    f"source.categories names the folder {folder!r}, which {self.root} does not have; it has {', '.join(self._folders()) or 'none'}"
                )
        self.max_pixels, self.check_images, self.distance = max_pixels, check_images, near_duplicate_distance
        self.metadata = self._find_metadata(metadata)
        self.fingerprint: dict[str, Any] = {
            "source": self.name,
            "root": self.root.name,
            "metadata": self.metadata.name if self.metadata else None,
            "metadata_sha256": hashlib.sha256(self.metadata.read_bytes()).hexdigest() if self.metadata else None,
            "categories": self.categories,
            "max_pixels": max_pixels,
            "check_images": check_images,
            "near_duplicate_distance": near_duplicate_distance,
        }

    def load(self) -> Loaded:
        """Lists, checks and groups the images.

        Raises:
            InputError: a column, label or category is wrong, or a class has no image left.
        """
        rejected: list[Rejected] = []
        rows = self._metadata_rows(rejected) if self.metadata else self._folder_rows(rejected)
        given = len(rows) + len(rejected)
        if not given and self.metadata:
            raise InputError(f"{self.metadata} has no rows; list the images in it, or give another source.metadata")
        if not given:
            raise InputError(f"{self.root} holds no image and no metadata file ({', '.join(METADATA)}); give a folder of labelled images")
        records = self._check(self._unique(rows, rejected), rejected)
        for item in rejected[:5]:
            log.warning("%s: rejected (%s)", item.id, item.reason)
        if len(rejected) > 5:
            log.warning("... and %d more; all are listed in metrics.json", len(rejected) - 5)
        for label, word in ((1, "unsafe"), (0, "safe")):
            if not any(record.label == label for record in records):
                why = f"all {given} inputs have the other label"
                if rejected:
                    why = f"{len(rejected)} of {given} inputs were rejected, the first is {rejected[0].id[:100]}: {rejected[0].reason}"
                raise InputError(f"{self.root} has no readable {word} image ({why}); a guard needs both labels")
        return Loaded(train=records, test=None, rejected=rejected, given=given)

    # --- listing ------------------------------------------------------------------------------------------------------

    def _visible(self) -> list[Path]:
        """What lies in the root, hidden things aside."""
        try:
            return sorted(path for path in self.root.iterdir() if not path.name.startswith("."))
        except OSError as error:
            raise InputError(f"source.root {self.root} cannot be listed ({error.strerror}); give a folder that you may read") from error

    def _folders(self) -> list[str]:
        return [path.name for path in self._visible() if path.is_dir()]

    def _find_metadata(self, name: str | None) -> Path | None:
        if name is not None:
            path = self.root / name
            if not path.is_file():
                raise InputError(f"source.metadata {name} is not a file in {self.root}")
            return path
        if self.categories is not None:
            return None
        return next((self.root / one for one in METADATA if (self.root / one).is_file()), None)

    def _metadata_rows(self, rejected: list[Rejected]) -> list[_Row]:
        assert self.metadata is not None
        table = _read_table(self.metadata)
        for column in ("file_name", "label"):
            if column not in table.column_names:
                raise InputError(
                    f"{self.metadata} lacks the column {column!r}; it has {', '.join(table.column_names) or 'none'}; add it or rename one"
                )
        boxed = [name for name in _BOX if name in table.column_names]
        if boxed and len(boxed) < 4:
            raise InputError(f"{self.metadata} has only {', '.join(boxed)} of the box columns {', '.join(_BOX)}; give all four or none")
        rows = []
        for number, raw in enumerate(table.to_pylist(), 1):
            label = read_label(raw["label"], f"{self.metadata} row {number}")
            category = _text(raw.get("category")) or None
            if label and category:
                self.policy.check_category(category, f"{self.metadata} row {number}")
            elif category not in self.policy.category_names:
                category = None  # a safe image may look like something that this policy does not speak of
            name = _text(raw["file_name"])
            if not name:
                rejected.append(Rejected(f"row {number}", "no file name"))
                continue
            name = posixpath.normpath(name)
            region = _region(raw) if boxed else None
            if isinstance(region, str):
                rejected.append(Rejected(name, region))
                continue
            rows.append(_Row(name, label, category, region, _text(raw.get("caption")), _text(raw.get("group")) or None))
        return rows

    def _folder_rows(self, rejected: list[Rejected]) -> list[_Row]:
        for path in self._visible():
            if path.is_file() and path.name.lower().split(".")[0] not in _PAPERS:
                is_image = path.suffix.lower() in SUFFIXES
                rejected.append(Rejected(_printable(path.name), "not in the folder of a class" if is_image else _not_an_image(path.name)))
        rows = []
        for folder in self._folders():
            label, category = self._class_of(folder)
            for name in self._files(folder, rejected):
                if name != _printable(name):
                    rejected.append(Rejected(_printable(name), "its name is not valid UTF-8"))
                elif Path(name).suffix.lower() not in SUFFIXES:
                    rejected.append(Rejected(name, _not_an_image(name)))
                else:
                    rows.append(_Row(name, label, category, None, "", None))
        return rows

    def _files(self, folder: str, rejected: list[Rejected]) -> Iterator[str]:
        """Paths, relative to the root, of the files below a folder; what cannot be looked into is rejected."""

        def name(path: str) -> str:
            return Path(path).relative_to(self.root).as_posix()

        def unlisted(error: OSError) -> None:
            rejected.append(Rejected(_printable(name(error.filename)), f"folder cannot be listed: {error.strerror}"))

        for parent, folders, files in os.walk(self.root / folder, onerror=unlisted):
            folders[:] = sorted(one for one in folders if not one.startswith("."))
            for one in folders:
                if os.path.islink(os.path.join(parent, one)):
                    rejected.append(Rejected(_printable(name(os.path.join(parent, one))), "link to a folder, which is not followed"))
            yield from (name(os.path.join(parent, one)) for one in sorted(files) if not one.startswith("."))

    def _class_of(self, folder: str) -> tuple[int, str | None]:
        if self.categories is not None:
            if folder in self.categories:
                return 1, self.categories[folder]
            if folder == "unsafe" or folder in self.policy.category_names:
                raise InputError(
                    f"{self.root} has the folder {folder!r}, which source.categories does not list; folders it leaves out count as safe, "
                    f"which the name denies: list it as {{{folder}: CATEGORY}} or rename it"
                )
            return 0, None
        if folder in self.policy.category_names:
            return 1, folder
        if folder in ("safe", "unsafe"):
            return int(folder == "unsafe"), None
        raise InputError(
            f"{self.root} has the folder {folder!r}; without a metadata file, folders must be called safe, unsafe or like a category of policy "
            f"{self.policy.name!r} ({', '.join(self.policy.category_names)}), or be listed: source.categories={{{folder}: CATEGORY}}"
        )

    # --- checking -----------------------------------------------------------------------------------------------------

    def _unique(self, rows: list[_Row], rejected: list[Rejected]) -> list[_Row]:
        labels: dict[str, set[int]] = {}
        for row in rows:
            labels.setdefault(row.file_name, set()).add(row.label)
        kept: dict[str, _Row] = {}
        for row in rows:
            if len(labels[row.file_name]) > 1:
                rejected.append(Rejected(row.file_name, "listed as safe and as unsafe"))
            elif row.file_name in kept:
                same = row == kept[row.file_name]
                rejected.append(
                    Rejected(row.file_name, "duplicate row" if same else "duplicate row that says something else; the first counts")
                )
            else:
                kept[row.file_name] = row
        return list(kept.values())

    def _check(self, rows: list[_Row], rejected: list[Rejected]) -> list[Record]:
        root = self.root.resolve()
        good: list[tuple[_Row, FileContent]] = []
        for row in rows:
            path = _inside(root, row.file_name)
            if isinstance(path, str):
                rejected.append(Rejected(row.file_name, path))
            else:
                good.append((row, FileContent(path, self.max_pixels)))
        alike = list(range(len(good)))
        if self.check_images:
            with ThreadPoolExecutor(_READERS) as readers:
                looks: Iterable[int | str] = progress(
                    readers.map(_look, [content for _, content in good]), total=len(good), what="checking images"
                )
                looked = list(looks)
            rejected += [Rejected(row.file_name, look) for (row, _), look in zip(good, looked, strict=True) if isinstance(look, str)]
            good = [item for item, look in zip(good, looked, strict=True) if not isinstance(look, str)]
            hashes = [look for look in looked if not isinstance(look, str)]
            alike = near_duplicate_groups(np.array(hashes, np.uint64), self.distance).tolist()
        groups = _merge([row for row, _ in good], alike)
        return [self._record(row, content, group) for (row, content), group in zip(good, groups, strict=True)]

    def _record(self, row: _Row, content: FileContent, group: str) -> Record:
        return Record(row.file_name, row.label, row.category, self.name, group, content, row.region, row.caption)


def _look(content: FileContent) -> int | str:
    """The perceptual hash of an image, or why it cannot be used."""
    try:
        content.key  # noqa: B018 - reads the bytes, and keeps their hash for the store
        return perceptual_hash(content.load())
    except ImageError as error:
        return str(error)


def _inside(root: Path, name: str) -> Path | str:
    """The file that a name means, or why it means none; links are followed, but not out of the root."""
    if name.startswith("/"):
        return "absolute path, where one relative to the folder was expected"
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a null byte, or links that lead in a circle
        return f"not a usable path: {' '.join(str(error).split())[:100]}"
    if name.split("/")[0] == ".." or not path.is_relative_to(root):
        return "path outside the folder"
    return path


def _printable(name: str) -> str:
    """A file name that can be written as UTF-8, as every result file is."""
    return name.encode(errors="backslashreplace").decode()


def _not_an_image(name: str) -> str:
    return f"not an image: its name ends in {Path(name).suffix or 'nothing'}"


def _merge(rows: list[_Row], alike: list[int]) -> list[str]:
    """Group names, such that near-duplicates (equal numbers in `alike`) and members of a listed group share one."""
    leader: dict[str | int, str | int] = {}

    def find(key: str | int) -> str | int:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]  # halves the path, or a long group would make it a long chain
            key = leader[key]
        return key

    for row, number in zip(rows, alike, strict=True):
        if row.group is not None:
            leader[find(row.group)] = find(number)
    name: dict[str | int, str] = {}
    return [name.setdefault(find(number), row.file_name) for row, number in zip(rows, alike, strict=True)]


def _read_table(path: Path) -> pa.Table:
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            table = read_table(path, mend="correct it or give another source.metadata")
        elif kind == ".jsonl":
            table = read_json_lines(path, "correct it or give another source.metadata")
        elif kind == ".csv":
            table = _read_csv(path)
        else:
            raise InputError(f"source.metadata {path.name} must be a .csv, .parquet or .jsonl file")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a table ({' '.join(str(error).split())[:200]}); correct it or give another source.metadata"
        ) from error
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise InputError(f"{path} has the column {twice[0]!r} more than once; keep one of them")
    return table


def _read_csv(path: Path) -> pa.Table:
    # as text, because a type that is guessed from the first rows turns later ones into errors
    parse = pa.csv.ParseOptions(newlines_in_values=True)
    with pa.csv.open_csv(path, parse_options=parse) as reader:
        names = reader.schema.names
    text = pa.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=True)
    return pa.csv.read_csv(path, parse_options=parse, convert_options=text)


def _text(value: Any) -> str:
    """A cell as text; "" for a missing one, which tables made with pandas write as NaN."""
    return "" if value is None or value != value else str(value).strip()


def _region(raw: Mapping[str, Any]) -> Region | str | None:
    """The box, None without one, or what is wrong with it."""
    values = [_text(raw[name]) for name in _BOX]
    if not any(values):
        return None
    try:
        x_min, y_min, x_max, y_max = (float(value) for value in values)
    except ValueError:
        return f"box must have four numbers, got {str(values)[:100]}"
    if not all(math.isfinite(value) for value in (x_min, y_min, x_max, y_max)) or not (0 <= x_min < x_max <= 1 and 0 <= y_min < y_max <= 1):
        return f"box must satisfy 0 <= min < max <= 1, got {', '.join(values)}"
    return x_min, y_min, x_max, y_max
