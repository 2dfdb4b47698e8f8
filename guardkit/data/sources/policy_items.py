"""One image judged under several policies, listed in an items file: a row an image and policy, as SafeEditBench has it.

Piao et al., 2026, "Towards policy-adaptive image guardrail", arXiv:2603.01228: `image_path`, `safety_label` (safe, unsafe), `policy_name`
("Policy L1") and `policy`, the text of the rules; `x_edited.jpg` is the edited `x.jpg`, and both are judged under each policy. Their data set has
a Parquet file with these columns beside the folders of images, and their code reads a file of JSON lines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardkit.artifacts import hash_file, parse_json
from guardkit.checks import check_path
from guardkit.data.grouping import DISTANCE, check_image_settings, group, why_rejected
from guardkit.data.sources import tables
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.files import Files, printable
from guardkit.data.sources.pairs import EDITED
from guardkit.data.sources.parquet import class_names
from guardkit.data.sources.rows import LabelRule, text
from guardkit.images import MAX_PIXELS, FileContent
from guardkit.local_copies import local
from guardkit.policy import Policy
from guardkit.reading import read_table as read_parquet
from guardkit.schema import UNLABELLED, UNSAFE, InputError, Record, Rejected, shortened

_COLUMNS = {"image_column": "image_path", "label_column": "safety_label", "policy_column": "policy_name"}


class PolicyItemsSource:
    """The images that an items file judges under one policy. Broken rows are rejected, each with its reason.

    An image and its edited version (`x.jpg`, `x_edited.jpg`) are in one group.

    Args:
        policy: whose rows are read: those that name it, in whatever case and with blanks or hyphens ("Policy L1" is policy_l1).
        root: the folder of the images.
        items: the items file inside it: .jsonl, .csv or .parquet. Numbers that stand for class names (a ClassLabel of the Hub) are read as these.
        image_column, label_column, policy_column: of the items file.
        text_column: the rules in words, for `policies_in`; may be missing.
        labels: label -> safe or unsafe; None: safe, unsafe, 0, 1, nsfw, ...
        max_pixels: larger images are rejected.
        check_images: read every image once; without it, bad ones show only in use, and equal ones are not found.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most.
    Raises:
        InputError: no such folder or file, a column that is missing, or no row of this policy.
    """

    name = "policy_items"
    labels_by_policy = True  # another policy, other labels: it is built for each

    def __init__(
        self,
        policy: Policy,
        root: str,
        *,
        items: str = "test.jsonl",
        image_column: str = "image_path",
        label_column: str = "safety_label",
        policy_column: str = "policy_name",
        text_column: str = "policy",
        labels: Mapping[Any, Any] | None = None,
        max_pixels: int = MAX_PIXELS,
        check_images: bool = True,
        near_duplicate_distance: int = DISTANCE,
    ) -> None:
        check_image_settings(max_pixels, check_images, near_duplicate_distance)
        columns = {"image_column": image_column, "label_column": label_column, "policy_column": policy_column}
        self.policy, self._columns, self._labels = policy, columns, LabelRule(labels)
        self.max_pixels, self.check_images, self.near_duplicate_distance = max_pixels, check_images, near_duplicate_distance
        self._table = _read(root, items, columns, text_column)
        self.asked: dict[str, Any] = {
            "source": self.name,
            "root": printable(self._table.root.name),
            "items": self._table.path.name,
            "items_sha256": hash_file(self._table.path),
            **columns,
            "labels": self._labels.labels,
            "max_pixels": max_pixels,
            "check_images": check_images,
            "near_duplicate_distance": near_duplicate_distance,
        }

    @classmethod
    def policies_in(
        cls,
        root: str,
        items: str = "test.jsonl",
        *,
        policy_column: str = "policy_name",
        text_column: str = "policy",
        **others: Any,
    ) -> list[Policy]:
        """The policies that an items file names, each made of its text, in the order in which they first come.

        Args:
            root, items, policy_column, text_column: as of the source.
            others: further arguments of the source; only its columns are looked at.
        Raises:
            InputError: a policy has no text, or rows of one name have different ones.
        """
        columns = {role: others.get(role, usual) for role, usual in _COLUMNS.items()} | {"policy_column": policy_column}
        table = _read(root, items, columns, text_column)
        found: dict[str, tuple[int, str]] = {}
        for number, cells in table.rows:
            name, rules = text(cells.get(policy_column)), text(cells.get(text_column))
            if not name or not rules:
                continue
            first, known = found.setdefault(_own_name(name), (number, rules))
            if known != rules:
                raise InputError(
                    f"{table.path} row {number} gives policy {name!r} another text ({shortened(rules)!r}) than row {first}; "
                    "give both one text, or two names"
                )
        named = list(dict.fromkeys(_own_name(name) for _, cells in table.rows if (name := text(cells.get(policy_column)))))
        bare = [name for name in named if name not in found]
        if bare or not named:
            what = f"has no text of policy {bare[0]!r} in column {text_column!r}" if bare else "names no policy"
            raise InputError(f"{table.path} {what}; set source.text_column, or give the policies as files: policies=[FILE,FILE]")
        return [Policy.of_text(name, found[name][1]) for name in named]

    def load(self) -> Loaded:
        """The images of this policy's rows, checked and grouped. Raises InputError."""
        files = Files(self._table.root)
        rejected = list(self._table.broken)
        labels: dict[str, dict[int, int]] = {}
        others: dict[str, int] = {}
        given = len(rejected)
        for number, cells in self._table.rows:
            whose, name = text(cells.get(self._columns["policy_column"])), text(cells.get(self._columns["image_column"]))
            if whose and _own_name(whose) != self.policy.name:
                others[_own_name(whose)] = others.get(_own_name(whose), 0) + 1
                continue
            given += 1
            label = self._label(cells, number)
            if not whose or not name or isinstance(label, str):
                why = "no policy" if not whose else "no image" if not name else str(label)
                rejected.append(Rejected(f"{self._table.path.name} row {number}", why))
            else:
                labels.setdefault(files.name(name), {})[number] = label
        if not labels:
            has = f"it has rows of {', '.join(sorted(others))}" if others else "it has no usable row"
            first = f" (the first that is broken is {rejected[0].id}: {rejected[0].reason})" if rejected else ""
            raise InputError(
                f"{self._table.path} has no row of policy {self.policy.name!r}; {has}{first}; give one of these policies, or set source.policy_column"
            )
        records = []
        for name, said in labels.items():
            rows = sorted(said)
            if len(set(said.values())) > 1:
                why = f"listed as safe and as unsafe under {self.policy.name}"
                rejected += [Rejected(f"{self._table.path.name} row {row}", why) for row in rows]
                continue
            rejected += [Rejected(f"{self._table.path.name} row {row}", f"repeats row {rows[0]}") for row in rows[1:]]
            path = files.path(name)
            if isinstance(path, str):
                rejected.append(Rejected(f"{self._table.path.name} row {rows[0]}", path))
            else:
                records.append(self._record(name, said[rows[0]], FileContent(path, self.max_pixels)))
        loaded = group(
            Loaded(train=records, test=None, rejected=rejected, given=given),
            check_images=self.check_images,
            near_duplicate_distance=self.near_duplicate_distance,
        )
        if not loaded.train:
            raise InputError(f"{self._table.path} has no image that can be used{why_rejected(loaded)}")
        return loaded

    def _label(self, cells: Mapping[str, Any], number: int) -> int | str:
        """1 or 0, or why there is none."""
        value = cells.get(self._columns["label_column"])
        try:
            label = self._labels.read(value, f"row {number}")
        except InputError:
            return f"label {shortened(text(value))!r} is neither safe nor unsafe"
        return "no label" if label == UNLABELLED else label

    def _record(self, name: str, label: int, content: FileContent) -> Record:
        # rules that are one text are one category
        category = self.policy.category_names[0] if label == UNSAFE and len(self.policy.categories) == 1 else None
        stem, dot, suffix = name.rpartition(".")
        pair = f"{stem.removesuffix(EDITED)}{dot}{suffix}"
        return Record(printable(name), label, category, self.name, pair, content, listed_group=pair)


@dataclass(frozen=True)
class _Table:
    """Rows with their numbers, and those that could not be read."""

    root: Path
    path: Path
    rows: list[tuple[int, dict[str, Any]]]
    broken: list[Rejected]


def _own_name(name: str) -> str:
    """In snake_case, as policies are called."""
    return re.sub(r"[^a-z0-9]+", "_", name.casefold()).strip("_")


def _read(root: str, items: str, columns: Mapping[str, str], text_column: str) -> _Table:
    folder = local("source.root", root)
    path = folder / check_path("source.items", items)
    if not path.is_file():
        raise InputError(f"source.items {items} is not a file in {folder}; give the items file, by its path inside that folder")
    broken: list[Rejected] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    if path.suffix.lower() == ".jsonl":  # line by line: one that is broken costs itself alone
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            if not line.strip():
                continue
            try:
                cells = parse_json(line)
                if not isinstance(cells, dict):
                    raise ValueError(f"a {type(cells).__name__} instead of an object")
            except ValueError as error:
                broken.append(Rejected(f"{path.name} row {number}", f"not a JSON object ({' '.join(str(error).split())[:100]})"))
            else:
                rows.append((number, cells))
        names = list(dict.fromkeys(name for _, cells in rows for name in cells))
    elif path.suffix.lower() == ".parquet":
        table = read_parquet(path, mend="correct it or give another source.items")
        names = table.column_names
        # images that lie in the table too are not needed: the folder has them
        table = table.select([name for name in (*columns.values(), text_column) if name in names])
        meant = class_names(table.schema)
        rows = [
            (number, {name: _named(value, meant.get(name)) for name, value in cells.items()})
            for number, cells in enumerate(table.to_pylist(), 1)
        ]
    else:
        names, plain = tables.read_table(path, columns["image_column"])
        rows = [(number, cells) for number, cells in enumerate(plain, 1) if cells]
    for role, column in columns.items():
        if column not in names:
            first = f" (row 1 is broken: {broken[0].reason})" if broken and not rows else ""
            raise InputError(f"{path} has no column {column!r}; it has {', '.join(names) or 'none'}{first}; set source.{role}")
    return _Table(folder, path, rows, broken)


def _named(value: Any, names: list[str] | None) -> Any:
    """The name that a number stands for, where the file has names for its numbers."""
    return names[value] if names is not None and isinstance(value, int) and 0 <= value < len(names) else value
