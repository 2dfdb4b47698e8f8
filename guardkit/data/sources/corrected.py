"""What people said of a guard's decisions, added to a source of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from guardkit.checks import check_path
from guardkit.data.grouping import content_key, group, load_source
from guardkit.data.sources.base import Loaded, Source
from guardkit.data.sources.parquet import ParquetSource
from guardkit.policy import Policy
from guardkit.schema import ImageError, InputError, Record
from guardkit.storage import is_url

_NAME = "corrections"


class CorrectedSource:
    """A source with the images of corrections.parquet beside its own.

    A corrected image that the source holds as well gets the label that people gave it, in training and test images alike. The others are trained
    on, on top of a budget; where they equal a test image, or look like one, they are left out. Images on which people disagree have no label, and are counted.
    An alarm that was overturned is a safe image with the category that it was taken for, so that arms with look-alikes use it as one.

    Args:
        source: of labelled images.
        corrections: as `guardkit.collect_corrections` writes them, or any other Parquet file with the columns image, label and category; or several.
        policy: whose categories they name; None: that of the source.
    Raises:
        InputError: a file is not there, is none, or names a category that the policy does not have.
    """

    def __init__(self, source: Source, corrections: str | Path | Sequence[str | Path], policy: Policy | None = None) -> None:
        rules = policy if policy is not None else getattr(source, "policy", None)
        if rules is None:
            raise InputError("corrections name categories: give the policy that has them, CorrectedSource(source, file, policy)")
        several = [corrections] if isinstance(corrections, str | Path) else list(corrections)
        self._source = source
        self._corrections = ParquetSource(rules, [_place(one) for one in several], name=_NAME)
        self.policy, self.name = rules, source.name
        self.near_duplicate_distance = getattr(source, "near_duplicate_distance", self._corrections.near_duplicate_distance)
        self.check_images = getattr(source, "check_images", True)
        self.asked: dict[str, Any] = {**source.asked, _NAME: self._corrections.asked}

    def load(self) -> Loaded:
        """Both together, grouped."""
        own, more = load_source(self._source, for_training=False), self._corrections.load()
        said = {content_key(record): record for record in more.train}
        known: set[str] = set()

        def corrected(record: Record) -> Record:
            try:
                key = content_key(record)
            except ImageError:
                return record
            if key not in said or record.content is None:
                return record
            known.add(key)
            return replace(record, label=said[key].label, category=said[key].category, is_corrected=True)

        train, test = [corrected(one) for one in own.train], None if own.test is None else [corrected(one) for one in own.test]
        added = [
            replace(one, id=f"{_NAME}/{one.id}", group=f"{_NAME}/{one.group}", is_corrected=True)
            for key, one in said.items()
            if key not in known
        ]
        joined = replace(
            own,
            train=[*train, *added],
            test=test,
            rejected=[*own.rejected, *(replace(one, id=f"{_NAME}/{one.id}") for one in more.rejected)],
            given=own.given + len(added) + len(more.rejected),
            is_grouped=False,
        )
        return group(joined, check_images=self.check_images, near_duplicate_distance=self.near_duplicate_distance)


def _place(given: str | Path) -> str:
    return str(given) if is_url(given) else str(check_path("source.corrections", given))
