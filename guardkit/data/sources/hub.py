"""Image data sets in the form of the Hugging Face `datasets` library: from the Hub, or from a folder on disk.

One class serves all of them: what differs between data sets is the names of columns and of values, which are settings
(conf/source/hub.yaml, unsafebench.yaml, ...). A value that the settings do not explain is an error that names it; a row without
an image or a label is rejected and counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from guardkit.data.grouping import DISTANCE, check_image_settings
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.data_card import check_card
from guardkit.data.sources.encoded import load_parts
from guardkit.data.sources.files import path_within
from guardkit.data.sources.rows import RowRule
from guardkit.images import MAX_PIXELS
from guardkit.policy import Policy
from guardkit.schema import InputError

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
        image_column, label_column: where image and label stand. label_column None: labels follow from `categories`, or there are
            none.
        labels: label value -> safe or unsafe; null: to be left out. None: safe, unsafe, 0, 1, nsfw, ...
        default_label: of labels that `labels` does not list; None: they are an error.
        category_column: None: categories are unknown.
        categories: value -> the policy's category, or None for one that this policy does not speak of: its unsafe images are
            left out; values that are not listed must be categories of the policy. Without labels, listed values mean unsafe and
            all others safe.
        source_column, caption_column, group_column: may be None. Rows of one group never straddle a split.
        access: what to do to be let in, shown when the set is gated or missing.
        max_pixels: larger images are rejected.
        check_images: read every image once; without it, bad ones show only in use, and equal ones are not found.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most.
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
        label_column: str | None = "label",
        labels: Mapping[Any, Any] | None = None,
        default_label: str | None = None,
        category_column: str | None = None,
        categories: Mapping[Any, str | None] | None = None,
        source_column: str | None = None,
        caption_column: str | None = None,
        group_column: str | None = None,
        access: str | None = None,
        max_pixels: int = MAX_PIXELS,
        check_images: bool = True,
        near_duplicate_distance: int = DISTANCE,
    ) -> None:
        self.policy, self.dataset, self.name = policy, str(dataset), name
        self.config, self.revision, self.access, self.max_pixels = config, revision, access, max_pixels
        self.splits = {"train": train_split, "test": test_split}
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
        self._rule = RowRule(policy, columns, {"label": "label"}, labels=labels, default_label=default_label, categories=categories)
        self.asked: dict[str, Any] = {
            "source": name,
            "dataset": Path(self.dataset).name if Path(self.dataset).is_dir() else self.dataset,
            "config": config,
            "revision": revision,
            "splits": self.splits,
            **self._rule.asked,
            "max_pixels": max_pixels,
            "check_images": check_images,
            "near_duplicate_distance": near_duplicate_distance,
        }

    def load(self) -> Loaded:
        """Lists the rows, checks and groups their images.

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
        image_column = self._rule.columns["image"]
        return load_parts(
            {role: [_SplitPart(part, self.splits[role] or role, image_column, self._roots())] for role, part in parts.items()},
            self._rule,
            name=self.name,
            where=self.dataset,
            max_pixels=self.max_pixels,
            check_images=self.check_images,
            near_duplicate_distance=self.near_duplicate_distance,
        )

    def _roots(self) -> list[Path]:
        """Where the set's own images may lie: its folder, and where the library puts what it downloads."""
        import datasets
        import huggingface_hub.constants

        folder = Path(self.dataset).expanduser()
        places = [datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, huggingface_hub.constants.HF_HUB_CACHE]
        return [folder] * folder.is_dir() + [Path(place) for place in places]

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


class _SplitPart:
    """A split of a data set; see `Part`."""

    def __init__(self, split: Any, name: str, image_column: str | None, roots: Sequence[Path]) -> None:
        import datasets

        self.names: Sequence[str] = split.column_names
        self._split, self._name, self._image_column, self._roots = split, name, image_column, roots
        if image_column in self.names:
            rows = split.select_columns([image_column])
            if isinstance(split.features[image_column], datasets.Image):
                rows = rows.cast_column(image_column, datasets.Image(decode=False))
            self._images = rows

    def __len__(self) -> int:
        return len(self._split)

    def row_name(self, row: int) -> str:
        """Such as "train/7"."""
        return f"{self._name}/{row}"

    def values(self, column: str) -> list[Any]:
        """All cells of a column."""
        values = self._split.select_columns([column])[:][column]
        names = getattr(self._split.features[column], "names", None)  # a ClassLabel stores numbers that stand for names
        return [names[value] if names and value is not None and value >= 0 else value for value in values]

    def without_image(self) -> Set[int]:
        """None is known."""
        return frozenset()

    def image(self, row: int) -> Any:
        """The image cell of a row."""
        return self._images[row][self._image_column]

    def path(self, name: str) -> Path:
        """The file of the set that a cell without bytes names. Raises ImageError."""
        return path_within(self._roots, name)


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
