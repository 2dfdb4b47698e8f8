"""Images in a folder as a source: a metadata file beside them, or one folder per class.

Nothing about the files is trusted. Every input ends up in `train` or in `rejected`, so the counts add up; what makes
the whole data set unusable (no such folder, a missing column, a category that the policy lacks) is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from guardkit.data.grouping import DISTANCE, check_image_settings, group, why_rejected
from guardkit.data.sources import tables
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.files import printable
from guardkit.data.sources.places import place_of
from guardkit.data.sources.rows import Row, RowRule, text, word_label
from guardkit.images import MAX_PIXELS, SUFFIXES
from guardkit.policy import Policy
from guardkit.schema import UNLABELLED, UNSAFE, Content, InputError, Record, Rejected

METADATA = ("metadata.csv", "metadata.parquet", "metadata.jsonl")
# what people put beside class folders without meaning it as data, by the first part of its name
_PAPERS = frozenset({"citation", "copying", "dataset_infos", "license", "licence", "metadata", "notice", "readme"})
_SHOWN = 8  # folders in an error
_USUAL = {"file": "file_name", "label": "label", "category": "category", "group": "group", "caption": "caption"}


class FolderSource:
    """A folder of labelled images.

    With a metadata file (CSV, Parquet or JSON lines): `file_name`, `label` (safe or unsafe, 0 or 1, and the like), and, where
    known, `category`, the box `x_min, y_min, x_max, y_max` of the unsafe feature in fractions of width and height, `caption`
    and `group`; file names are relative to the folder. Without one: a folder `safe`, and folders named like the
    policy's categories, or `unsafe`. Hidden files are passed over, and so are README and licence beside the folders.

    Args:
        policy: whose categories the images violate.
        root: the folder, by its path or by its URL in object storage.
        metadata: a file inside it; None looks for metadata.csv, metadata.parquet, metadata.jsonl.
        file_column, label_column, category_column, caption_column, group_column: of the metadata file; the last three may be
            missing there under their usual names. label_column None: labels follow from `categories`, or there are none.
        labels: label, or name of a class folder -> safe or unsafe; null: to be left out. None: safe, unsafe, 0, 1, nsfw, ...
        default_label: of labels that `labels` does not list; None: they are an error.
        categories: category, or name of a class folder -> category of the policy; null: its unsafe images are left out; class folders
            that are not listed are safe. Where they are all folders, a metadata file is read only if `metadata` names it.
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
        file_column: str = "file_name",
        label_column: str | None = "label",
        category_column: str | None = "category",
        caption_column: str | None = "caption",
        group_column: str | None = "group",
        labels: Mapping[Any, Any] | None = None,
        default_label: str | None = None,
        categories: Mapping[Any, str | None] | None = None,
        max_pixels: int = MAX_PIXELS,
        check_images: bool = True,
        near_duplicate_distance: int = DISTANCE,
    ) -> None:
        self.policy, self.root = policy, place_of("source.root", root)
        check_image_settings(max_pixels, check_images, near_duplicate_distance)
        columns = {"label": label_column, "category": category_column, "caption": caption_column, "group": group_column}
        self._rule = RowRule(
            policy,
            {"file": file_column, **columns},
            _USUAL,
            labels=labels,
            default_label=default_label,
            categories=categories,
            boxes=True,
        )
        self.max_pixels, self.check_images, self.near_duplicate_distance = max_pixels, check_images, near_duplicate_distance
        self.metadata = self._find_metadata(metadata)
        if self.metadata is None:
            missing = [folder for folder in self._rule.categories or {} if folder not in self.root.folders()]
            if missing:
                raise InputError(
                    f"source.categories names {_folders(missing)}, which {self.root} does not have; it has {', '.join(self.root.folders()) or 'none'}"
                )
        self.asked: dict[str, Any] = {
            "source": self.name,
            "root": printable(self.root.name),
            "metadata": self.metadata.name if self.metadata else None,
            "metadata_sha256": hashlib.sha256(self.metadata.read_bytes()).hexdigest() if self.metadata else None,
            **self._rule.asked,
            "max_pixels": max_pixels,
            "check_images": check_images,
            "near_duplicate_distance": near_duplicate_distance,
        }

    def load(self) -> Loaded:
        """Lists, checks and groups the images.

        Raises:
            InputError: a column, label or category is wrong, or no image is left.
        """
        rejected: list[Rejected] = []
        found = self._metadata_rows(rejected) if self.metadata else self._folder_rows(rejected)
        given = len(found) + len(rejected)
        if not given and self.metadata:
            raise InputError(f"{self.metadata} has no rows; list the images in it, or give another source.metadata")
        if not given:
            raise InputError(f"{self.root} holds no image and no metadata file ({', '.join(METADATA)}); give a folder of labelled images")
        train: list[Record] = []
        set_aside: list[Record] = []
        for name, row, content in self._contents(_unique(found, rejected), rejected):
            record = Record(
                name, row.label, row.category, self.name, row.group or name, content, row.region, row.caption, listed_group=row.group
            )
            if row.label == UNLABELLED:
                set_aside.append(record)
                rejected.append(Rejected(name, row.left_out or self._why_unlabelled()))
            else:
                train.append(record)
        loaded = Loaded(
            train=train, test=None, rejected=rejected, given=given, set_aside=set_aside, without_labels=self._without_labels(len(found))
        )
        loaded = group(loaded, check_images=self.check_images, near_duplicate_distance=self.near_duplicate_distance)
        if not loaded.train and not loaded.set_aside:
            raise InputError(f"{self.root} has no image that can be used{why_rejected(loaded)}")
        return loaded

    # --- listing ------------------------------------------------------------------------------------------------------

    def _find_metadata(self, name: str | None) -> Path | None:
        if name is not None:
            path = self.root.table(name)
            if path is None:
                raise InputError(f"source.metadata {name} is not a file in {self.root}{self._other_tables()}")
            return path
        if self._rule.categories and set(self._rule.categories) <= set(self.root.folders()):
            return None
        return next((path for one in METADATA if (path := self.root.table(one)) is not None), None)

    def _other_tables(self) -> str:
        """Where labels may stand that nobody pointed at, to end an error with."""
        names = [name for name in self.root.files() if name.lower().endswith(tables.SUFFIXES)]
        return f"; if {names[0]} lists the images, set source.metadata={names[0]}" if names else ""

    def _metadata_rows(self, rejected: list[Rejected]) -> list[tuple[str, Row]]:
        assert self.metadata is not None
        names, raws = tables.read_table(self.metadata, self._rule.columns["file"] or "")
        columns = self._rule.find(names, str(self.metadata), needed=("file",))
        found = []
        for number, raw in enumerate(raws, 1):
            if not raw:
                continue
            name = text(raw[columns["file"]])
            row = self._rule.read({role: raw[column] for role, column in columns.items()}, f"{self.metadata} row {number}")
            if not name:
                rejected.append(Rejected(f"row {number}", "no file name"))
            elif isinstance(row, str):
                rejected.append(Rejected(self.root.spelled(name), row))
            else:
                found.append((self.root.spelled(name), row))
        return found

    def _folder_rows(self, rejected: list[Rejected]) -> list[tuple[str, Row]]:
        found: list[tuple[str, Row]] = []
        for name in self.root.files():
            if name.lower().split(".")[0] not in _PAPERS:
                self._add(name, Row(UNLABELLED), found, rejected)
        if found and not self.root.folders() and self._rule.columns["label"] is not None and self._other_tables():
            raise InputError(
                f"{self.root} holds {len(found)} images and no {' or '.join(METADATA)}{self._other_tables()}, or source.label_column=null to embed without labels"
            )
        for folder, row in self._classes().items():
            for name in self.root.below(folder, rejected):
                self._add(name, row, found, rejected)
        return found

    def _add(self, name: str, row: Row, found: list[tuple[str, Row]], rejected: list[Rejected]) -> None:
        if name != printable(name):
            rejected.append(Rejected(printable(name), "its name is not valid UTF-8"))
        elif Path(name).suffix.lower() not in SUFFIXES:
            rejected.append(Rejected(name, f"not an image: its name ends in {Path(name).suffix or 'nothing'}"))
        else:
            found.append((name, row))

    def _classes(self) -> dict[str, Row]:
        """What each folder says of the images in it.

        Raises:
            InputError: some say nothing, or source.categories counts them as safe and their names deny it; all are named.
        """
        folders = self.root.folders()
        denied = [folder for folder in folders if self._rule.denies(folder)]
        if denied:
            many = "s" * (len(denied) > 1)
            listed = ", ".join(f"{folder}: CATEGORY" for folder in denied)
            raise InputError(
                f"{self.root} has {_folders(denied)}, which source.categories does not list; what it leaves out counts as safe, "
                f"which the name{many} den{'y' if many else 'ies'}: list {'them' if many else 'it'} as {{{listed}}} or rename {'them' if many else 'it'}"
            )
        rows = {folder: self._class_of(folder) for folder in folders}
        known = {folder: row for folder, row in rows.items() if row is not None}
        unknown = [folder for folder in folders if folder not in known]
        if unknown:
            shown = unknown[:_SHOWN]
            more = f" and {len(unknown) - _SHOWN} more" if unknown[_SHOWN:] else ""
            lead = f"{self.root} has " if known else f"{self._no_table()} and no class folder, but "
            raise InputError(
                f"{lead}{_folders(shown)}{more}; without a table, folders must be called safe, unsafe or like a category of policy "
                f"{self.policy.name!r} ({', '.join(self.policy.category_names)}), or be listed: "
                f"source.categories={{{', '.join(f'{folder}: CATEGORY' for folder in shown)}}}, "
                f"source.labels={{{', '.join(f'{folder}: safe' for folder in shown)}}}; source.label_column=null embeds images without "
                f"labels{self._other_tables()}"
            )
        return known

    def _class_of(self, folder: str) -> Row | None:
        """What one folder says; None: nothing."""
        if self._rule.categories is not None:
            return Row(*self._rule.class_of(folder, f"{self.root} has the folder"), left_out=self._rule.why_left_out(folder))
        if self._rule.columns["label"] is None:
            return Row(UNLABELLED)
        own = self.policy.own_name(folder)
        if own in self.policy.category_names:
            return Row(UNSAFE, own)
        if self._rule.labels.lists(folder):
            return Row(self._rule.labels.read(folder, f"{self.root} folder {folder}"), left_out=self._rule.labels.why_left_out(folder))
        label = None if folder.isdigit() else word_label(folder)  # a number may be that of a class
        return None if label is None else Row(label)

    def _no_table(self) -> str:
        return f"{self.root} has no table ({', '.join(METADATA)})"

    def _without_labels(self, n: int) -> str:
        """What to say where labels are needed and none of the n images has one; "" where each has a reason of its own."""
        if self.metadata or self.root.folders() or self._rule.columns["label"] is None:
            return ""
        return (
            f"{self._no_table()} and no class folders, so that nothing says which of its {n} images are unsafe; write {METADATA[0]} "
            f"(file_name,label,category), or sort them into folders called safe, unsafe or like a category of policy {self.policy.name!r} "
            f"({', '.join(self.policy.category_names)})"
        )

    def _why_unlabelled(self) -> str:
        if self.metadata:
            return "no label"
        return "no label: not in the folder of a class" + (self._other_tables() if not self.root.folders() else "")

    def _contents(self, rows: list[tuple[str, Row]], rejected: list[Rejected]) -> Iterator[tuple[str, Row, Content]]:
        for name, row in rows:
            content = self.root.content(name, self.max_pixels)
            if isinstance(content, str):
                rejected.append(Rejected(name, content))
            else:
                yield name, row, content


def _folders(names: Sequence[str]) -> str:
    return f"the folder{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"


def _unique(rows: list[tuple[str, Row]], rejected: list[Rejected]) -> list[tuple[str, Row]]:
    labels: dict[str, set[int]] = {}
    for name, row in rows:
        labels.setdefault(name, set()).add(row.label)
    kept: dict[str, Row] = {}
    for name, row in rows:
        if len(labels[name] - {UNLABELLED}) > 1:
            rejected.append(Rejected(name, "listed as safe and as unsafe"))
        elif name in kept:
            if kept[name].label == UNLABELLED:
                kept[name], row = row, kept[name]
            rejected.append(
                Rejected(name, "duplicate row" if row == kept[name] else "duplicate row that says something else; the first counts")
            )
        else:
            kept[name] = row
    return list(kept.items())
