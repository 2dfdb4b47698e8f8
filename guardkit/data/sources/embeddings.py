"""Stored embeddings as a source, whoever wrote the folder: guardkit.embed or clip-retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guardkit.data.sources.base import Loaded
from guardkit.embeddings import read_embedding_folder
from guardkit.policy import Policy
from guardkit.schema import InputError, Record

_LABELS = {"safe": 0, "unsafe": 1, "0": 0, "1": 1}


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
        records = []
        for i, vector in enumerate(self._vectors):
            label = _LABELS.get(str(values[self.label_column][i]).lower())
            if label is None:
                raise InputError(f"{self.root} row {i + 1} has label {values[self.label_column][i]!r}; allowed are safe, unsafe, 0 and 1")
            category = values[self.category_column][i] or None
            if label and category:
                self.policy.check_category(category, f"{self.root} row {i + 1}")
            name = str(values["image_path"][i] or i)
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
        return Loaded(train=records, test=None, rejected=[], given=len(records), encoder_fingerprint=self.encoder_fingerprint)
