"""What guards are measured on: the test images of a source, and the pairs among them."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from itertools import zip_longest

from guardkit.checks import check_choice, check_number
from guardkit.data.columns import check_listable, usable
from guardkit.data.grouping import load_source, why_rejected
from guardkit.data.sources.base import Loaded, Source
from guardkit.data.splits import split_test
from guardkit.schema import SAFE, UNSAFE, InputError, Record, Rejected

SPLITS = ("test", "all")


@dataclass(frozen=True)
class Benchmark:
    """Labelled images, and unsafe ones among them that have a counterfactual.

    Attributes:
        name: of the source.
        records: natural images (or embeddings).
        counterfactuals: as records labelled safe, in the group of their original.
        counterfactual_of: for each counterfactual, the row of its original in `records`.
        rejected: what the source could not use, with reasons.
        given: records + rejected + n_left_out; counterfactuals are not counted.
        chosen: which of the source's images these are, in words.
        counterfactuals_are_the_safe_images: whether the source has no safe image but the counterfactuals, as pair datasets have.
        encoder_fingerprint: of the encoder that made the records' embeddings, where they bring some and it is known.
        n_left_out: records that are not tested on because a guard was trained or validated on them.
    """

    name: str
    records: list[Record]
    counterfactuals: list[Record]
    counterfactual_of: list[int]
    rejected: Sequence[Rejected]
    given: int
    chosen: str
    counterfactuals_are_the_safe_images: bool
    encoder_fingerprint: str | None = None
    n_left_out: int = 0

    def without(self, groups: Set[str]) -> Benchmark:
        """The same without the images of some groups, and their counterfactuals."""
        kept = [row for row, record in enumerate(self.records) if record.group not in groups]
        place = {row: i for i, row in enumerate(kept)}
        pairs = [
            (counterfactual, place[row])
            for counterfactual, row in zip(self.counterfactuals, self.counterfactual_of, strict=True)
            if row in place and counterfactual.group not in groups
        ]
        return replace(
            self,
            records=[self.records[row] for row in kept],
            counterfactuals=[counterfactual for counterfactual, _ in pairs],
            counterfactual_of=[row for _, row in pairs],
            n_left_out=self.n_left_out + len(self.records) - len(kept),
        )


def read_benchmark(source: Source, *, split: str = "test", test_share: float = 0.3, split_seed: int = 0) -> Benchmark:
    """Lists what a source holds to test on.

    Args:
        source: of images or embeddings.
        split: "test": the source's own test images; where it has none, the share that training on this source with the
            same two settings below holds out. "all": everything, those that training would choose from included.
        test_share: fraction in (0, 1).
        split_seed: of that share.
    Raises:
        InputError: a setting out of range, or nothing to test on.
    """
    check_choice("split", split, SPLITS)
    check_number("test_share", test_share, "(0, 1)")
    loaded = load_source(source)
    records, bad, chosen = _choose(loaded, source.name, split, test_share, split_seed)
    if not records:
        raise InputError(
            f"source={source.name} holds no image to test on ({chosen}); choose another split= or source={why_rejected(loaded)}"
        )
    kept = {record.id: row for row, record in enumerate(records)}
    counterfactuals: list[Record] = []
    counterfactual_of: list[int] = []
    for original, counterfactual in _pairs(loaded, records):
        if original.id in kept:
            counterfactuals.append(counterfactual)
            counterfactual_of.append(kept[original.id])
    return Benchmark(
        name=source.name,
        records=records,
        counterfactuals=counterfactuals,
        counterfactual_of=counterfactual_of,
        rejected=[*loaded.rejected, *bad] if bad else loaded.rejected,
        given=len(records) + len(loaded.rejected) + len(bad),
        chosen=chosen,
        counterfactuals_are_the_safe_images=bool(counterfactuals) and not any(record.label == SAFE for record in records),
        encoder_fingerprint=loaded.encoder_fingerprint,
    )


def _choose(loaded: Loaded, name: str, split: str, test_share: float, split_seed: int) -> tuple[list[Record], list[Rejected], str]:
    if split == "all":
        check_listable(loaded.train, f"split=all of source={name}", "choose split=test, which holds some of them out")
        train, bad = usable(loaded.train)
        return [*train, *(loaded.test or [])], bad, f"all images of source={name}, those it trains from included"
    if loaded.test is not None:
        return list(loaded.test), [], f"the test images of source={name}"
    _, test = split_test(loaded.train, test_share, split_seed)
    why = f"source={name} has no test images of its own: the {test_share:.0%} that training holds out with split seed {split_seed}"
    test, bad = usable(test)
    return list(test), bad, why


def _pairs(loaded: Loaded, records: Sequence[Record]) -> list[tuple[Record, Record]]:
    """(original, counterfactual): those that the source knows to be exact, else those that its records bring along."""
    if loaded.test_pairs is not None:
        pairs = loaded.test_pairs
    else:
        pairs = [
            (record, replace(record, id=f"{record.id}#{i}", content=content, counterfactuals=(), region=None, perceptual_hash=seen))
            for record in records
            if record.label == UNSAFE
            for i, (content, seen) in enumerate(zip_longest(record.counterfactuals, record.counterfactual_hashes))
        ]
    return [
        (original, replace(made, id=f"{made.id}#counterfactual", label=SAFE, category=original.category, group=original.group))
        for original, made in pairs
    ]
