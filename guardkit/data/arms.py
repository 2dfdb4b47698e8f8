"""What an arm is: which images it is given within its label budget, and how their views make up a batch.

Pure functions of records, seeds and views. The data module uses them for one training run, the sample-efficiency
experiment for very many, so both train on the same images in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from guardkit.data.splits import nested_order, split_validation
from guardkit.data.views import Views
from guardkit.schema import InputError, Record

Batch = dict[str, torch.Tensor]

NEGATIVES = ("counterfactual", "natural", "shuffled")
TRANSFORMS = ("none", "null_edit", "classic")


@dataclass(frozen=True)
class Arm:
    """One training recipe of a comparison.

    Attributes:
        name: for tables.
        negatives: what the unsafe images are told from: any of "counterfactual" (their own), "natural" (as many safe images)
            and "shuffled" (the counterfactuals of as many other unsafe images).
        transform: what every image passes through first: "none", "null_edit" (the editor, with an irrelevant change) or
            "classic" (crops, flips, colour changes).
        variants_per_image: counterfactuals, or classic views, of each image; None: as the run says.
    """

    name: str
    negatives: tuple[str, ...]
    transform: Literal["none", "null_edit", "classic"] = "none"
    variants_per_image: int | None = None


# conf/experiment has a file for each, which says what it is for
ARMS = (
    Arm("pairs_aug", ("counterfactual",)),
    Arm("unpaired", ("natural",)),
    Arm("pairs_plus", ("counterfactual", "natural")),
    Arm("shuffled_pairs", ("shuffled",)),
    Arm("null_edits", ("natural",), "null_edit"),
    Arm("classic_aug", ("natural",), "classic", 4),
)


def arm_named(arm: str | Arm) -> Arm:
    """The arm itself, or the one of `ARMS` with that name.

    Raises:
        InputError: there is none.
    """
    known = {one.name: one for one in ARMS}
    if isinstance(arm, str) and arm not in known:
        raise InputError(f"there is no arm {arm!r}; there are {', '.join(known)}, or give an Arm of your own")
    return known[arm] if isinstance(arm, str) else arm


@dataclass(frozen=True)
class Split:
    """Labelled images of one kind.

    Attributes:
        train: to fit on.
        validation: to choose settings on; they count in the label budget.
    """

    train: list[Record] = field(default_factory=list)
    validation: list[Record] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """The images of an arm, of one seed and one label budget.

    Attributes:
        unsafe: the labelled unsafe images.
        natural: as many safe ones; empty unless the arm wants them.
        others: further unsafe images whose counterfactuals are wanted; empty unless the arm wants them.
    """

    unsafe: Split
    natural: Split
    others: Split


@dataclass(frozen=True)
class Orders:
    """All images of a training pool in the order in which one seed takes them."""

    unsafe: list[Record]
    safe: list[Record]

    @classmethod
    def of(cls, pool: Sequence[Record], seed: int) -> Orders:
        """The nested orders of both labels."""
        unsafe = nested_order([record for record in pool if record.label == 1], seed)
        return cls(unsafe, nested_order([record for record in pool if record.label == 0], seed))


def choose(orders: Orders, n_unsafe: int, negatives: Sequence[str]) -> Choice:
    """The first `n_unsafe` unsafe images of a seed, and what its negatives need.

    Smaller budgets are contained in larger ones, and every arm has the same unsafe images. A kind of which there are
    fewer than asked for is smaller, or empty.
    """
    unsafe = orders.unsafe[:n_unsafe]
    natural, others = Split(), Split()
    if "natural" in negatives:
        natural = Split(*split_validation(orders.safe, n_unsafe))
    if "shuffled" in negatives:
        taken = {record.group for record in unsafe}
        rest = [record for record in orders.unsafe[n_unsafe:] if record.group not in taken]
        others = Split(*split_validation(rest, n_unsafe))
    return Choice(Split(*split_validation(unsafe, n_unsafe)), natural, others)


def category_numbers(records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
    """(n,) the position of each record's category in `names`; -1 where it is unknown."""
    position = {name: i for i, name in enumerate(names)}
    return np.array([position.get(record.category or "", -1) for record in records], int)


def every_turn(rows: np.ndarray, variants_per_image: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows repeated for every view, and the turn of each: what `assemble` takes to put all views into one batch."""
    return np.tile(rows, variants_per_image), np.repeat(np.arange(variants_per_image), len(rows))


def assemble(
    views: Mapping[str, Views],
    rows: Mapping[str, np.ndarray],
    turns: Mapping[str, np.ndarray] | int,
    categories: np.ndarray,
    n_categories: int,
) -> Batch:
    """A batch of one view per row.

    Args:
        views: of "unsafe" and of some of `NEGATIVES`.
        rows: which of them, for each of these; "counterfactual" has the rows of "unsafe".
        turns: which view, in a round over those that are there: one number for all, or an array like `rows`.
        categories: (n_unsafe,) category numbers of the "unsafe" views, see `category_numbers`.
        n_categories: k.
    Returns:
        embeddings (n, d); labels (n,); targets (n, k), NaN where a category is unknown; unsafe_rows and counterfactual_rows, (p,)
        where in the batch an unsafe image and its counterfactual stand. Views that are not there are left out.
    """

    def pick(name: str) -> tuple[np.ndarray, np.ndarray]:
        return views[name].pick(rows[name], turns if isinstance(turns, int) else turns[name])

    vectors, there = pick("unsafe")
    n = int(there.sum())
    row_at = np.cumsum(there) - 1  # where an unsafe row stands in the batch
    known = categories[rows["unsafe"][there]]
    targets = np.where(known[:, None] >= 0, np.arange(n_categories) == known[:, None], np.nan)
    parts, labels, all_targets = [vectors[there]], [np.ones(n)], [targets]
    first, second = np.zeros(0, int), np.zeros(0, int)
    for name in rows:
        if name == "unsafe":
            continue
        vectors, found = pick(name)
        if name == "counterfactual":
            paired = found & there
            first, second = row_at[paired], sum(len(part) for part in parts) + (np.cumsum(found) - 1)[paired]
        parts.append(vectors[found])
        labels.append(np.zeros(int(found.sum())))
        all_targets.append(np.zeros((int(found.sum()), n_categories)))
    return {
        "embeddings": torch.from_numpy(np.concatenate(parts)),
        "labels": torch.from_numpy(np.concatenate(labels)).float(),
        "targets": torch.from_numpy(np.concatenate(all_targets)).float(),
        "unsafe_rows": torch.from_numpy(first),
        "counterfactual_rows": torch.from_numpy(second),
    }
