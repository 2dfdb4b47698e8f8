"""What an arm is: which images it is given within its label budget, and how their views make up a batch.

Pure functions of records, seeds and pools of views. The data module uses them for one training run, the sample-efficiency
experiment for very many, so both train on the same images in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from guardkit.data.splits import nested_order, split_validation
from guardkit.data.views import Pool
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
class Choice:
    """The images of an arm, of one seed and one label budget, by kind: "unsafe", and the arm's negatives.

    For "counterfactual" these are the unsafe images once more, for "shuffled" other unsafe ones: those that are edited.

    Attributes:
        train: to fit on.
        validation: to choose settings on; they count in the label budget.
    """

    train: dict[str, list[Record]]
    validation: dict[str, list[Record]]

    def of(self, kind: str) -> list[Record]:
        """All images of a kind; none where the arm does not want it."""
        return [*self.train.get(kind, []), *self.validation.get(kind, [])]


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
    ordered = {"unsafe": unsafe, "counterfactual": unsafe, "natural": orders.safe}
    if "shuffled" in negatives:
        taken = {record.group for record in unsafe}
        ordered["shuffled"] = [record for record in orders.unsafe[n_unsafe:] if record.group not in taken]
    parts = {kind: split_validation(ordered[kind], n_unsafe) for kind in ("unsafe", *negatives)}
    return Choice({kind: train for kind, (train, _) in parts.items()}, {kind: validation for kind, (_, validation) in parts.items()})


def make_batch(pools: Mapping[str, Pool], rows: Mapping[str, np.ndarray], turn: int | None) -> Batch:
    """A batch of the images of an arm.

    Args:
        pools: of "unsafe", and of the arm's negatives.
        rows: which of their records; "counterfactual" has the rows of "unsafe".
        turn: which view of each, in a round over those that are there; None: every view. A record that has fewer views than
            another is there as often as that one, so that all have the same weight.
    Returns:
        embeddings (n, d); labels (n,); targets (n, k), NaN where a category is unknown; unsafe_rows and counterfactual_rows, (p,)
        where in the batch an unsafe image and its counterfactual stand. Views that are not there are left out.
    """
    n_turns = 1 if turn is not None else max((pools[kind].n_views for kind, mine in rows.items() if len(mine)), default=1)

    def pick(kind: str) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.tile(rows[kind], n_turns)
        turns = np.repeat(np.arange(n_turns) + (turn or 0), len(rows[kind]))
        return pools[kind].views(rows[kind]).pick(wanted, turns)

    vectors, there = pick("unsafe")
    n = int(there.sum())
    row_at = np.cumsum(there) - 1  # where an unsafe row stands in the batch
    known = pools["unsafe"].categories[np.tile(rows["unsafe"], n_turns)[there]]
    n_categories = len(pools["unsafe"].category_names)
    targets = np.where(known[:, None] >= 0, np.arange(n_categories) == known[:, None], np.nan)
    parts, labels, all_targets = [vectors[there]], [np.ones(n)], [targets]
    first, second = np.zeros(0, int), np.zeros(0, int)
    for kind in rows:
        if kind == "unsafe":
            continue
        vectors, found = pick(kind)
        if kind == "counterfactual":
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
