"""Pair datasets as a source: unsafe images that bring their counterfactuals along.

What people said of a pair counts for more than what the verifier said: one that a reviewer rejected is left out, one
that was accepted is used even if the verifier rejected it, and of one that nobody was sure of the verifier's word
stands. Of several reviewers the most cautious one counts.

Two layouts: what `python -m guardkit.synthesize` writes, and a plain folder in which `x_edited.jpg` is the counterfactual
of the unsafe `x.jpg` (SafeEditBench's convention; any image type).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from guardkit.checks import check_flag
from guardkit.counterfactual.pair_dataset import MANIFEST, read_pair_dataset
from guardkit.counterfactual.review import ACCEPT, REJECT, UNSURE, Review, current_reviews, image_file
from guardkit.data.grouping import DISTANCE, check_image_settings, group, look
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.files import printable
from guardkit.folders import is_unfinished
from guardkit.images import MAX_PIXELS, SUFFIXES, FileContent
from guardkit.local_copies import local
from guardkit.policy import Policy
from guardkit.schema import ImageError, InputError, Record, Region, Rejected

EDITED = "_edited"


class PairsSource:
    """Unsafe images with counterfactuals. It holds no natural safe images: arms that need some are refused.

    Args:
        policy: whose categories the images violate.
        root: the folder, by its path or by its URL in object storage, of which a copy is made here.
        category: of a plain folder's images, which does not say; None leaves it open.
        max_pixels: larger images are rejected.
        keep_unsure: whether pairs are used that a reviewer was unsure of, and none rejected.
        reviewed_only: whether pairs are left out that nobody reviewed.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most.
    Raises:
        InputError: no such folder, no pair in it, reviews asked of a plain folder, or a dataset made under a policy with other categories.
    """

    name = "pairs"

    def __init__(
        self,
        policy: Policy,
        root: str,
        *,
        category: str | None = None,
        max_pixels: int = MAX_PIXELS,
        keep_unsure: bool = True,
        reviewed_only: bool = False,
        near_duplicate_distance: int = DISTANCE,
    ) -> None:
        self.policy, self.root = policy, local("source.root", root)
        if not self.root.is_dir():
            raise InputError(f"source.root {root} is not a folder; give a pair dataset, or a folder of x.jpg beside x_edited.jpg")
        if category is not None:
            policy.check_category(category, "source.category")
        for name, value in (("keep_unsure", keep_unsure), ("reviewed_only", reviewed_only)):
            check_flag(f"source.{name}", value)
        check_image_settings(max_pixels, True, near_duplicate_distance)
        self.category, self.max_pixels, self.near_duplicate_distance = category, max_pixels, near_duplicate_distance
        self.keep_unsure, self.reviewed_only = keep_unsure, reviewed_only
        self._is_dataset = (self.root / MANIFEST).is_file() or is_unfinished(self.root)
        self._rows, manifest = read_pair_dataset(self.root) if self._is_dataset else ([], {})
        if reviewed_only and not self._is_dataset:
            raise InputError(f"source.reviewed_only needs a pair dataset with reviews; {root} is a plain folder")
        self.asked: dict[str, Any] = {
            "source": self.name,
            "root": printable(self.root.name),
            "category": category,
            "manifest": manifest,
            "reviews": {row["pair_id"]: row["review"] for row in self._rows if row["review"]},
            "keep_unsure": keep_unsure,
            "reviewed_only": reviewed_only,
            "near_duplicate_distance": near_duplicate_distance,
        }

    def load(self) -> Loaded:
        """Lists the pairs and reads every image once."""
        rejected: list[Rejected] = []
        records = list(self._dataset_records(rejected) if self._is_dataset else self._folder_records(rejected))
        if not records:
            raise InputError(
                f"{self.root} holds no usable pair ({len(rejected)} inputs were rejected); expected are accepted pairs, or x.jpg beside x_edited.jpg"
            )
        given = len(records) + len(rejected)
        return group(Loaded(train=records, test=None, rejected=rejected, given=given), near_duplicate_distance=self.near_duplicate_distance)

    def _dataset_records(self, rejected: list[Rejected]) -> Iterable[Record]:
        """One record per unsafe image; pairs that were made towards the unsafe side change places."""
        grouped: dict[str, list[Mapping[str, Any]]] = {}
        reviews = current_reviews(self.root, self._rows)
        for row in self._rows:
            reason = self._left_out(row, reviews.get(row["pair_id"], {}))
            if reason is not None:
                rejected.append(Rejected(row["pair_id"], reason))
                continue
            # an unsafe original may have several counterfactuals; a safe one becomes the counterfactual of each unsafe edit
            grouped.setdefault(row["file_name"] if row["label"] else row["edited_file_name"], []).append(row)
        for unsafe, rows in grouped.items():
            first = rows[0]
            if first["category"]:
                self.policy.check_category(first["category"], f"{self.root} pair {first['pair_id']}")
            safe = [row["edited_file_name"] if row["label"] else row["file_name"] for row in rows]
            box = [first[name] for name in ("x_min", "y_min", "x_max", "y_max")]
            region = None if None in box else (box[0], box[1], box[2], box[3])
            record = self._record(unsafe, safe, first["category"], first["source"], first["file_name"], region, rejected)
            if record is not None:
                yield record

    def _left_out(self, row: Mapping[str, Any], said: Mapping[str, Review]) -> str | None:
        """Why a try is not used; None when it is."""
        review = row["review"]
        if review == REJECT or (review == UNSURE and not self.keep_unsure):
            # the words without their authors, because this list goes where the guard goes
            words = "; ".join(one.reason for one in said.values() if one.verdict == review and one.reason)
            return f"{'rejected' if review == REJECT else 'unsure'} in review: {words or 'no reason given'}"
        if row["status"] != "accepted" and (review != ACCEPT or row["edited_file_name"] is None):
            return f"rejected when it was made: {row['reason']}"
        return "nobody reviewed it" if review is None and self.reviewed_only else None

    def _folder_records(self, rejected: list[Rejected]) -> Iterable[Record]:
        files = sorted(path for path in self.root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        edited = {path.with_name(path.stem.removesuffix(EDITED)): path for path in files if path.stem.endswith(EDITED)}
        for path in files:
            if path.stem.endswith(EDITED):
                continue
            name = path.relative_to(self.root).as_posix()
            counterfactual = edited.pop(path.with_name(path.stem), None)
            if counterfactual is None:
                rejected.append(Rejected(name, f"no counterfactual {path.stem}{EDITED}{path.suffix} beside it"))
                continue
            record = self._record(name, [counterfactual.relative_to(self.root).as_posix()], self.category, self.name, name, None, rejected)
            if record is not None:
                yield record
        rejected += [Rejected(path.relative_to(self.root).as_posix(), "no original beside it") for path in edited.values()]

    def _record(
        self, unsafe: str, safe: list[str], category: str | None, source: str, listed: str, region: Region | None, rejected: list[Rejected]
    ) -> Record | None:
        contents: dict[str, FileContent] = {}
        hashes: dict[str, int] = {}
        for name in [unsafe, *safe]:
            try:
                content = FileContent(image_file(self.root, name), self.max_pixels)
                looked = look(content)
            except ImageError as error:
                looked = str(error)
            if isinstance(looked, str):
                rejected.append(Rejected(name, looked))
            else:
                contents[name], hashes[name] = content, looked
        readable = [name for name in safe if name in contents]
        if unsafe not in contents or not readable:
            if unsafe in contents:
                rejected.append(Rejected(unsafe, "its counterfactual cannot be read"))
            return None
        return Record(
            unsafe,
            1,
            category,
            source,
            listed,
            contents[unsafe],
            region,
            counterfactuals=tuple(contents[name] for name in readable),
            perceptual_hash=hashes[unsafe],
            counterfactual_hashes=tuple(hashes[name] for name in readable),
        )
