"""Image data sets in the form of the Hugging Face `datasets` library: from the Hub, or from a folder on disk.

One class serves all of them: what differs between data sets is the names of columns and of values, which are settings
(conf/source/hub.yaml, unsafebench.yaml, ...). Nothing is decoded when the records are listed. A value that the settings
do not explain is an error that names it; a row without an image or a label is rejected and counted.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.data.sources.base import Loaded, read_label
from guardkit.data.sources.data_card import check_card
from guardkit.images import MAX_PIXELS, FileContent, bytes_key, read_image
from guardkit.policy import Policy
from guardkit.schema import ImageError, InputError, Record, Rejected

_SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` leaves


class HubSource:
    """A data set that `datasets` can load: a Hub id, a folder that `save_to_disk` wrote, or one of Parquet files or images.

    Images may be an `Image` column, encoded bytes, or text in base64; a text of digits alone stands for the image of
    that row (as in the Hub sets of UnsafeBench's authors, which store repeated images once).

    Args:
        policy: whose categories the images violate.
        dataset: "organisation/name" on the Hub, or a folder.
        name: for tables, and the default of `source_column`.
        config: of the data set, where it has several.
        revision: of the Hub repository: a tag, a branch or a commit.
        train_split: holds the labelled images to train from; None or missing: there are none.
        test_split: holds the test images; None or missing: the set has no test images of its own.
        image_column, label_column: where image and label stand.
        labels: label value -> "safe" or "unsafe"; None reads safe, unsafe, 0 and 1.
        category_column: None or missing: categories are unknown.
        categories: value -> the policy's category, or None for one that this policy does not speak of; values that are
            not listed must be categories of the policy.
        source_column, caption_column, group_column: may be None. Rows of one group never straddle a split.
        access: what to do to be let in, shown when the set is gated or missing.
        max_pixels: larger images are rejected.
    Raises:
        InputError: `datasets` is not installed, or a setting does not fit the policy.
    """

    def __init__(
        self,
        policy: Policy,
        dataset: str,
        *,
        name: str = "hub",
        config: str | None = None,
        revision: str | None = None,
        train_split: str | None = "train",
        test_split: str | None = "test",
        image_column: str = "image",
        label_column: str = "label",
        labels: Mapping[Any, Any] | None = None,
        category_column: str | None = None,
        categories: Mapping[Any, str | None] | None = None,
        source_column: str | None = None,
        caption_column: str | None = None,
        group_column: str | None = None,
        access: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.policy, self.dataset, self.name = policy, str(dataset), name
        self.config, self.revision, self.access, self.max_pixels = config, revision, access, max_pixels
        self.splits = {"train": train_split, "test": test_split}
        self.columns = {
            "image": image_column,
            "label": label_column,
            "category": category_column,
            "source": source_column,
            "caption": caption_column,
            "group": group_column,
        }
        # YAML reads 0 as a number, and a column of numbers holds numbers: both are compared as text
        self.labels = {str(value): read_label(label, f"source.labels[{value!r}]") for value, label in labels.items()} if labels else None
        self.categories = {str(value): category for value, category in (categories or {}).items()}
        for value, category in self.categories.items():
            if category is not None:
                policy.check_category(category, f"source.categories[{value!r}]")
        self.fingerprint: dict[str, Any] = {
            "source": name,
            "dataset": Path(self.dataset).name if Path(self.dataset).is_dir() else self.dataset,
            "config": config,
            "revision": revision,
            "splits": self.splits,
            "columns": self.columns,
            "labels": self.labels,
            "categories": self.categories,
            "max_pixels": max_pixels,
        }

    def load(self) -> Loaded:
        """Lists the rows; images are read when somebody asks for them.

        Raises:
            InputError: the set cannot be had, a column is missing, or a value is not explained by the settings.
        """
        found = self._open()
        parts = {role: found[split] for role, split in self.splits.items() if split is not None and split in found}
        if not parts:
            raise InputError(
                f"{self.dataset} has the splits {', '.join(found)}, none of which source.train_split={self.splits['train']} or "
                f"source.test_split={self.splits['test']} names; set one of them"
            )
        rejected: list[Rejected] = []
        records = {role: list(self._records(part, self.splits[role] or role, rejected)) for role, part in parts.items()}
        if not any(records.values()):
            raise InputError(f"{self.dataset} has no usable row ({len(rejected)} were rejected{_first(rejected)})")
        train, test = records.get("train", []), records.get("test")
        return Loaded(train=train, test=test, rejected=rejected, given=len(train) + len(test or []) + len(rejected))

    def _open(self) -> Mapping[str, Any]:
        """Splits by name."""
        try:
            import datasets
        except ImportError as error:
            raise InputError(f'source={self.name} needs the datasets library; install it with: pip install "guardkit[hub]"') from error

        folder = Path(self.dataset).expanduser()
        is_saved = any((folder / mark).is_file() for mark in _SAVED)
        if not is_saved:
            check_card(folder)
        try:
            with _without_bars(datasets):
                if is_saved:
                    loaded = datasets.load_from_disk(str(folder))
                else:
                    loaded = datasets.load_dataset(str(folder) if folder.is_dir() else self.dataset, self.config, revision=self.revision)
        except Exception as error:  # the library lets out its own errors, those of the Hub's client, of Arrow and of the network
            raise InputError(self._no_access(folder, error)) from error
        if isinstance(loaded, Mapping):
            return loaded
        # a single data set that was saved without the name of its split
        return {str(loaded.split or self.splits["test"] or self.splits["train"]): loaded}

    def _no_access(self, folder: Path, error: Exception) -> str:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if folder.is_dir():
            return f"{self.dataset} cannot be loaded as a data set ({reason}); give a folder that save_to_disk wrote, or one of Parquet files or images"
        if "gated" in reason.lower():
            advice = f"it is gated: ask for access on https://huggingface.co/datasets/{self.dataset}, then log in with `hf auth login` or set HF_TOKEN"
        elif self.dataset.startswith((".", "/", "~")):
            advice = "there is no such folder"
        else:
            advice = (
                f"see https://huggingface.co/datasets/{self.dataset} whether it is there and open to you; without a network, copy it "
                "elsewhere with datasets.Dataset.save_to_disk and give source.dataset=FOLDER"
            )
        return f"data set {self.dataset} cannot be had ({reason}); {advice}" + (f". {self.access}" if self.access else "")

    def _records(self, part: Any, split: str, rejected: list[Rejected]) -> Iterator[Record]:
        for role in ("image", "label"):
            self._check_column(part, split, role, needed=True)
        values = {role: self._values(part, split, role) for role in self.columns if role != "image"}
        images = _Images(part, self.columns["image"], self.max_pixels)
        for row in range(len(part)):
            name, raw = f"{split}/{row}", values["label"][row]
            if raw is None or raw != raw:
                rejected.append(Rejected(name, f"no {self.columns['label']}"))
                continue
            label = self._label(raw, f"{self.dataset} {name}")
            yield Record(
                id=name,
                label=label,
                category=self._category(values["category"][row], label, f"{self.dataset} {name}"),
                source=_text(values["source"][row]) or self.name,
                group=_text(values["group"][row]) or name,
                content=_RowContent(images, row),
                caption=_text(values["caption"][row]),
            )

    def _check_column(self, part: Any, split: str, role: str, *, needed: bool) -> bool:
        column = self.columns[role]
        if column in part.column_names:
            return True
        if needed:
            raise InputError(
                f"{self.dataset} split {split} has no column {column!r}; it has {', '.join(part.column_names)}; set source.{role}_column"
            )
        return False

    def _values(self, part: Any, split: str, role: str) -> list[Any]:
        column = self.columns[role]
        if column is None or not self._check_column(part, split, role, needed=True):
            return [None] * len(part)
        values = part.select_columns([column])[:][column]
        names = getattr(part.features[column], "names", None)  # a ClassLabel stores numbers that stand for names
        return [names[value] if names and value is not None and value >= 0 else value for value in values]

    def _label(self, raw: Any, where: str) -> int:
        if self.labels is None:
            return read_label(raw, where)
        if str(raw) not in self.labels:
            raise InputError(f"{where} has label {raw!r}, which source.labels does not list; add it there as safe or unsafe")
        return self.labels[str(raw)]

    def _category(self, raw: Any, label: int, where: str) -> str | None:
        value = _text(raw)
        if not value:
            return None
        if value in self.categories:
            return self.categories[value]
        if label:
            self.policy.check_category(value, f"{where} (source.categories may translate it)")
        return value if value in self.policy.category_names else None


class _Images:
    """The encoded images of a split, by row."""

    def __init__(self, part: Any, column: str | None, max_pixels: int) -> None:
        import datasets

        assert column is not None
        rows = part.select_columns([column])
        if isinstance(part.features[column], datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
        self._rows, self._column, self.max_pixels = rows, column, max_pixels

    def __getitem__(self, row: int) -> bytes | Path:
        """Encoded bytes, or a file that holds them. Raises ImageError."""
        value = self._rows[row][self._column]
        if isinstance(value, str) and value.isdigit() and int(value) < len(self._rows):
            value = self._rows[int(value)][self._column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or Path(str(value.get("path") or ""))
        if isinstance(value, str):
            return _from_text(value)
        if value is None or value == Path():
            raise ImageError("no image in this row")
        if not isinstance(value, (bytes, Path)):
            raise ImageError(f"expected an image, encoded bytes or base64, got {type(value).__name__}")
        return value


@dataclass(frozen=True)
class _RowContent:
    """The image of one row, read when somebody asks."""

    images: _Images = field(repr=False)
    row: int

    @cached_property
    def key(self) -> str:
        """Of the encoded bytes. Raises ImageError."""
        found = self.images[self.row]
        return FileContent(found, self.images.max_pixels).key if isinstance(found, Path) else bytes_key(found)

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB. Raises ImageError."""
        return read_image(self.images[self.row], max_pixels=self.images.max_pixels)


def _from_text(value: str) -> bytes:
    if value.startswith(("http://", "https://")):
        raise ImageError("a web address, and nothing is fetched from there; save the images in a folder and choose source=folder")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError("a text that is not base64") from error


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


def _first(rejected: list[Rejected]) -> str:
    return f", the first is {rejected[0].id}: {rejected[0].reason}" if rejected else ""


@contextlib.contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    """Silences the library's own progress bars, which would end up in log files."""
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not shown:
            datasets.enable_progress_bars()
