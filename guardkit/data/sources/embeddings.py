"""Stored embeddings as a source, whoever wrote the folder: guardkit.embed or clip-retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardkit.data.sources.base import Loaded, read_label
from guardkit.embedding_folder import read_embedding_folder
from guardkit.policy import Policy
from guardkit.schema import InputError, Record, Rejected


class EmbeddingsSource:
    """A folder of embeddings with labels in its metadata.

    Args:
        policy: whose categories the images violate.
        root: the folder.
        label_column: safe or unsafe, 0 or 1.
        category_column: may be missing.
    Raises:
        InputError: no such folder, or labels that are missing or unknown.
    """

    name = "embeddings"

    def __init__(self, policy: Policy, root: str, *, label_column: str = "label", category_column: str = "category") -> None:
        self.policy, self.root = policy, Path(root).expanduser()
        self.label_column, self.category_column = label_column, category_column
        self._vectors, self._table, manifest = read_embedding_folder(self.root)
        self.encoder_fingerprint: str | None = (manifest or {}).get("encoder_fingerprint")
        self.fingerprint: dict[str, Any] = {
            "source": self.name,
            "root": self.root.name,
            "encoder": self.encoder_fingerprint,
            "n": len(self._vectors),
        }

    def load(self) -> Loaded:
        """One record per row. Raises InputError."""
        columns = self._table.column_names
        if self.label_column not in columns:
            raise InputError(
                f"{self.root} has no column {self.label_column!r} in its metadata; it has {', '.join(columns)}; set source.label_column"
            )
        names = ("image_path", self.label_column, self.category_column, "source", "group", "caption")
        values = {name: self._table.column(name).to_pylist() if name in columns else [None] * len(self._table) for name in names}
        records: list[Record] = []
        rejected: list[Rejected] = []
        labels: dict[str, set[int]] = {}
        for i, vector in enumerate(self._vectors):
            label = read_label(values[self.label_column][i], f"{self.root} row {i + 1}")
            category = values[self.category_column][i] or None
            if label and category:
                self.policy.check_category(category, f"{self.root} row {i + 1}")
            name = str(values["image_path"][i] or i)
            labels.setdefault(name, set()).add(label)
            records.append(
                Record(
                    id=name,
                    label=label,
                    category=category,
                    source=str(values["source"][i] or self.name),
                    group=str(values["group"][i] or name),
                    content=None,
                    caption=str(values["caption"][i] or ""),
                    embedding=vector,
                )
            )
        kept: dict[str, Record] = {}
        for record in records:
            if len(labels[record.id]) > 1:
                rejected.append(Rejected(record.id, "listed as safe and as unsafe"))
            elif record.id in kept:
                rejected.append(Rejected(record.id, "duplicate row"))
            else:
                kept[record.id] = record
        return Loaded(
            train=list(kept.values()), test=None, rejected=rejected, given=len(self._vectors), encoder_fingerprint=self.encoder_fingerprint
        )
