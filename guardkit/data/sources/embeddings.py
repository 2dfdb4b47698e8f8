"""Stored embeddings as a source, whoever wrote the folder: guardkit.embed or clip-retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from guardkit.data.duplicates import near_equal_groups
from guardkit.data.grouping import group, why_rejected
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.files import printable
from guardkit.data.sources.rows import Row, RowRule, text
from guardkit.embedding_folder import read_stored_embeddings
from guardkit.local_copies import local
from guardkit.policy import Policy
from guardkit.schema import UNLABELLED, InputError, Record, Rejected

_PATH = "image_path"
_USUAL = {"category": "category", "caption": "caption", "group": "group", "source": "source", "path": _PATH}


class EmbeddingsSource:
    """A folder of embeddings with labels in its metadata.

    Rows of one `image_path` are one image within a part; in different parts they are if their vectors are equal, else different
    images, the later ones called "PATH#2" and so on.

    Args:
        policy: whose categories the images violate.
        root: the folder, by its path or by its URL in object storage, of which a copy is made here.
        label_column: safe or unsafe, 0 or 1, and the like. None: labels follow from `categories`.
        labels: label value -> safe or unsafe; null: to be left out. None: safe, unsafe, 0, 1, nsfw, ...
        default_label: of labels that `labels` does not list; None: they are an error.
        category_column, caption_column, group_column, source_column: may be missing under their usual names.
        categories: value -> the policy's category, or None for one that this policy does not speak of: its unsafe
            images are left out. Without labels, listed values mean unsafe and all others safe.
    Raises:
        InputError: no such folder, a column that is missing, or a value that nothing explains.
    """

    name = "embeddings"

    def __init__(
        self,
        policy: Policy,
        root: str,
        *,
        label_column: str | None = "label",
        labels: Mapping[Any, Any] | None = None,
        default_label: str | None = None,
        category_column: str | None = "category",
        categories: Mapping[Any, str | None] | None = None,
        caption_column: str | None = "caption",
        group_column: str | None = "group",
        source_column: str | None = "source",
    ) -> None:
        self.policy, self.root = policy, local("source.root", root)
        columns = {
            "label": label_column,
            "category": category_column,
            "caption": caption_column,
            "group": group_column,
            "source": source_column,
            "path": _PATH,
        }
        self._rule = RowRule(policy, columns, _USUAL, labels=labels, default_label=default_label, categories=categories)
        self._stored = read_stored_embeddings(self.root)
        self.encoder_fingerprint: str | None = (self._stored.manifest or {}).get("encoder_fingerprint")
        self.asked: dict[str, Any] = {
            "source": self.name,
            "root": printable(self.root.name),
            "encoder": self.encoder_fingerprint,
            "n": len(self._stored.vectors),
            **self._rule.asked,
        }

    def load(self) -> Loaded:
        """One record per image. Raises InputError."""
        table, vectors = self._stored.table, self._stored.vectors
        columns = self._rule.find(table.column_names, f"{self.root}/metadata")
        values = {role: table.column(column).to_pylist() for role, column in columns.items()}
        paths = values.pop("path", [None] * len(vectors))
        images = self._images([text(path) or str(number) for number, path in enumerate(paths)])
        rows: list[tuple[str, Row, np.ndarray]] = []
        rejected: list[Rejected] = []
        said: dict[str, set[int]] = {}
        for number, (name, vector) in enumerate(zip(images, vectors, strict=True)):
            row = self._rule.read({role: cells[number] for role, cells in values.items()}, f"{self.root} row {number + 1}")
            if isinstance(row, str):
                rejected.append(Rejected(name, row))
                continue
            said.setdefault(name, set()).add(row.label)
            rows.append((name, row, vector))
        kept: dict[str, Record] = {}
        set_aside: dict[str, Record] = {}
        for name, row, vector in rows:
            record = Record(
                id=name,
                label=row.label,
                category=row.category,
                source=row.source or self.name,
                group=row.group or name,
                content=None,
                caption=row.caption,
                embedding=vector,
                listed_group=None if row.group == name else row.group,  # guardkit.embed writes a group for every image
            )
            if row.label == UNLABELLED:
                set_aside[name] = record
                rejected.append(Rejected(name, row.left_out or "no label"))
            elif len(said[name] - {UNLABELLED}) > 1:
                rejected.append(Rejected(name, "listed as safe and as unsafe"))
            elif name in kept:
                rejected.append(Rejected(name, "duplicate row"))
            else:
                kept[name] = record
        loaded = group(
            Loaded(
                train=list(kept.values()),
                test=None,
                rejected=rejected,
                given=len(vectors),
                encoder_fingerprint=self.encoder_fingerprint,
                set_aside=list(set_aside.values()),
            )
        )
        if not loaded.train:
            raise InputError(f"{self.root} has no row that can be used{why_rejected(loaded)}")
        return loaded

    def _images(self, paths: list[str]) -> list[str]:
        """A name for the image of each row, from its path: the same for rows of one image, different for others."""
        often = {path for path, n in Counter(paths).items() if n > 1}
        rows = [row for row, path in enumerate(paths) if path in often and np.isfinite(self._stored.vectors[row, 0])]
        equal = dict(zip(rows, near_equal_groups(self._stored.vectors[rows]).tolist(), strict=True))
        taken = set(paths)
        known: dict[tuple[str, str, int], str] = {}
        used: Counter[str] = Counter()
        names = list(paths)
        for row, path in enumerate(paths):
            if path not in often:
                continue
            keys = [(path, "part", int(self._stored.parts[row]))]
            if row in equal:
                keys.append((path, "vector", equal[row]))
            name = next((known[key] for key in keys if key in known), None)
            if name is None:
                used[path] += 1
                name = path
                while used[path] > 1 and (name := f"{path}#{used[path]}") in taken:
                    used[path] += 1
                taken.add(name)
            known |= {key: known.get(key, name) for key in keys}
            names[row] = name
        return names
