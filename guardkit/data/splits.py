"""Who goes where: test, validation, training. Groups (a pair, near-duplicates) are never torn apart, and the first n
of an order are contained in the first m > n of it, so that arms and sizes are compared on the same images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guardkit.data.columns import categories_of, corrected_of, groups_of, labels_of, order_of_ids, picked
from guardkit.schema import Record

VALIDATION_EVERY = 5  # every fifth labelled image validates
# more say nothing that these do not: the 95 % interval of a rate is less than a hundredth wide
MOST_VALIDATION = 20_000  # groups of a kind
MOST_TEST = 25_000  # groups of a label and category


def split_test(records: Sequence[Record], test_share: float, seed: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """Holds out whole groups until `test_share` of each label (and unsafe category) is reached, or `MOST_TEST`; none with a corrected image.

    Args:
        records: all of a source.
        test_share: fraction in [0, 1).
        seed: of the split, not of the training: every run is tested on the same images.
    Returns:
        Training pool and test set, both in the order of `records`.
    """
    rng = np.random.default_rng([seed, 11])
    group = groups_of(records)
    strata = _strata(records, group, np.unique(group[corrected_of(records)]))
    is_tested = np.zeros(len(records), bool)  # by group
    for name in sorted(strata):
        groups = strata[name]
        n_test = min(round(test_share * len(groups)), len(groups) - 1, MOST_TEST)
        is_tested[groups[rng.permutation(len(groups))[:n_test]]] = True
    return picked(records, ~is_tested[group]), picked(records, is_tested[group])


def why_few(n: int, n_all: int, test_share: float) -> list[str]:
    """Why `split_test` held out n of n_all records and not the share that was asked for, in a sentence; nothing where it did."""
    if test_share * n_all <= MOST_TEST or n > 0.95 * test_share * n_all:
        return []
    return [
        f"{n} images are held out for tests, less than data.test_share={test_share:g} of {n_all}: {MOST_TEST} groups of a label and category are enough"
    ]


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
    group = groups_of(records)
    strata = _strata(records, group)
    # dealt out in turn, going on from one stratum to the next, so that small ones do not all end in the first part
    dealt = [strata[name][i] for name in sorted(strata) for i in rng.permutation(len(strata[name]))]
    fold_of = np.zeros(len(records), int)
    fold_of[np.array(dealt, int)] = np.arange(len(dealt)) % n_folds
    return fold_of[group]


def _strata(records: Sequence[Record], group: np.ndarray, left_out: np.ndarray | Sequence[int] = ()) -> dict[str, np.ndarray]:
    """Numbers of groups by label and, of unsafe images, category; `group` has that of each record, numbered as they come."""
    # a group that mixes labels belongs to the stratum of its first record
    numbers, first = np.unique(group, return_index=True)
    labels, (categories, names) = labels_of(records)[first], categories_of(records)
    kind = labels * (len(names) + 1) + np.where(labels == 0, 0, categories[first] + 1)
    kind[np.isin(numbers, left_out)] = kind.max(initial=0) + 1
    strata: dict[str, np.ndarray] = {}
    for one in np.unique(kind):
        members = numbers[kind == one]
        if members[0] in left_out:
            continue
        label, category = int(labels[members[0]]), int(categories[first[members[0]]])
        strata[f"{label} {('None' if category < 0 else names[category]) if label else ''}"] = members
    return strata


def nested_order(records: Sequence[Record], seed: int) -> Sequence[Record]:
    """A shuffled order whose prefixes are the subsets of a sample-efficiency experiment.

    Records of one group stay next to each other; the order depends on the seed and the records' ids alone.
    """
    by_id = order_of_ids(records)
    group = groups_of(picked(records, by_id))
    n_groups = int(group.max(initial=-1)) + 1
    order = np.random.default_rng([seed, 12]).permutation(n_groups)
    if n_groups < len(group):
        turn = np.empty(n_groups, int)
        turn[order] = np.arange(n_groups)
        order = np.argsort(turn[group], kind="stable")
    return picked(records, by_id[order])


def split_validation(records: Sequence[Record], n: int) -> tuple[Sequence[Record], Sequence[Record]]:
    """The first `n` records of an order, divided into training and validation.

    Every fifth group validates (the first, if there are at least two) until `MOST_VALIDATION` do, so that the division of a longer
    prefix contains that of a shorter one. A group that the limit `n` cuts stays on one side.
    """
    chosen = records[:n]
    group = groups_of(chosen)
    validates = (group % VALIDATION_EVERY == 1) & (group < VALIDATION_EVERY * MOST_VALIDATION)
    return picked(chosen, ~validates), picked(chosen, validates)
