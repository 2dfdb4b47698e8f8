"""Who goes where: test, validation, training. Groups (a pair, near-duplicates) are never torn apart, and the first n
of an order are contained in the first m > n of it, so that arms and sizes are compared on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardkit.schema import Record

VALIDATION_EVERY = 5  # every fifth labelled image validates


def split_test(records: Sequence[Record], test_share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Holds out whole groups until `test_share` of each label (and unsafe category) is reached; none with a corrected image.

    Args:
        records: all of a source.
        test_share: fraction in [0, 1).
        seed: of the split, not of the training: every run is tested on the same images.
    Returns:
        Training pool and test set, both in the order of `records`.
    """
    rng = np.random.default_rng([seed, 11])
    corrected = {record.group for record in records if record.is_corrected}
    strata = _strata([record for record in records if record.group not in corrected])
    test_groups: set[str] = set()
    for name in sorted(strata):
        groups = strata[name]
        n_test = min(round(test_share * len(groups)), len(groups) - 1)
        test_groups |= {groups[i] for i in rng.permutation(len(groups))[:n_test]}
    train = [record for record in records if record.group not in test_groups]
    return train, [record for record in records if record.group in test_groups]


def folds(records: Sequence[Record], n_folds: int, seed: int) -> np.ndarray:
    """Divides records into parts of about equal size, whole groups at a time, with about as much of each label and unsafe category.

    Args:
        records: all of a source.
        n_folds: how many parts; with fewer groups some are empty.
        seed: of the division.
    Returns:
        (n,) int, the part of each record.
    """
    rng = np.random.default_rng([seed, 15])
    strata = _strata(records)
    # dealt out in turn, going on from one stratum to the next, so that small ones do not all end in the first part
    dealt = [strata[name][i] for name in sorted(strata) for i in rng.permutation(len(strata[name]))]
    fold_of = {group: place % n_folds for place, group in enumerate(dealt)}
    return np.array([fold_of[record.group] for record in records], int)


def _strata(records: Sequence[Record]) -> dict[str, list[str]]:
    """Groups by label and, of unsafe images, category."""
    strata: dict[str, list[str]] = {}
    seen: set[str] = set()
    for record in records:
        # a group that mixes labels belongs to the stratum of its first record
        if record.group not in seen:
            seen.add(record.group)
            strata.setdefault(f"{record.label} {record.category if record.label else ''}", []).append(record.group)
    return strata


def nested_order(records: Sequence[Record], seed: int) -> list[Record]:
    """A shuffled order whose prefixes are the subsets of a sample-efficiency experiment.

    Records of one group stay next to each other; the order depends on the seed and the records' ids alone.
    """
    by_group: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record.id):
        by_group.setdefault(record.group, []).append(record)
    groups = list(by_group.values())
    order = np.random.default_rng([seed, 12]).permutation(len(groups))
    return [record for i in order for record in groups[i]]


def split_validation(records: Sequence[Record], n: int) -> tuple[list[Record], list[Record]]:
    """The first `n` records of an order, divided into training and validation.

    Every fifth group validates (the first, if there are at least two), so that the division of a longer prefix
    contains that of a shorter one. A group that the limit `n` cuts stays on one side.
    """
    train: list[Record] = []
    validation: list[Record] = []
    ordinal: dict[str, int] = {}
    chosen = list(records[:n])
    for record in chosen:
        position = ordinal.setdefault(record.group, len(ordinal))
        (validation if position % VALIDATION_EVERY == 1 else train).append(record)
    return train, validation
