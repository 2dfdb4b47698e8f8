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

from guardkit.data.columns import categories_of, corrected_of, labels_of, picked, sharing_groups, together
from guardkit.data.splits import nested_order, split_validation
from guardkit.data.views import EDITED, Pool, StoredPool
from guardkit.schema import InputError, Record, shortened

Batch = dict[str, torch.Tensor]

NEGATIVES = ("counterfactual", "natural", "shuffled", "look_alike", "transplant_safe")
POSITIVES = ("null_edit", "transplant")
TRANSFORMS = ("none", "null_edit", "classic")


@dataclass(frozen=True)
class Arm:
    """One training recipe of a comparison.

    Attributes:
        name: for tables.
        negatives: what the unsafe images are told from: any of "counterfactual" (their own), "natural" (as many safe images, or
            as the run says), "shuffled" (the counterfactuals of as many other unsafe images), "look_alike" (as many safe images that
            the source marks as look-alikes, or that are found by the policy's texts) and "transplant_safe" (safe objects in the places of transplants).
        transform: what every image passes through first: "none", "null_edit" (the editor, with an irrelevant change) or
            "classic" (crops, flips, colour changes).
        variants_per_image: counterfactuals, other edits, or classic views, of each image; None: as the run says.
        positives: what stands beside the unsafe images: any of "null_edit" (themselves, passed through the editor with an
            irrelevant change) and "transplant" (their objects in safe photographs, see `guardkit.data.transplants`).
    """

    name: str
    negatives: tuple[str, ...]
    transform: Literal["none", "null_edit", "classic"] = "none"
    variants_per_image: int | None = None
    positives: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of all its images."""
        return ("unsafe", *self.positives, *self.negatives)

    @property
    def has_views(self) -> bool:
        """Whether it sees something made of an image, of which there may be several."""
        return self.transform != "none" or bool({*EDITED, "null_edit", "transplant", "transplant_safe"} & set(self.kinds))

    @property
    def edits_one_label_only(self) -> bool:
        """Whether only safe images pass through the editor, so that its trace tells the labels apart."""
        return bool(set(EDITED) & set(self.negatives)) and "null_edit" not in self.positives and self.transform != "null_edit"


# conf/experiment has a file for each, which says what it is for
ARMS = (
    Arm("pairs_aug", ("counterfactual",)),
    Arm("unpaired", ("natural",)),
    Arm("pairs_plus", ("counterfactual", "natural")),
    Arm("shuffled_pairs", ("shuffled",)),
    Arm("null_edits", ("natural",), "null_edit"),
    Arm("classic_aug", ("natural",), "classic", 4),
    Arm("look_alikes", ("natural", "look_alike")),
    Arm("pairs_balanced", ("counterfactual", "natural"), positives=("null_edit",)),
    Arm("pairs_transplanted", ("natural", "transplant_safe"), variants_per_image=4, positives=("transplant",)),
)


def arm_named(arm: str | Arm) -> Arm:
    """The arm itself, or the one of `ARMS` with that name.

    Raises:
        InputError: there is none.
    """
    known = {one.name: one for one in ARMS}
    if isinstance(arm, str) and arm not in known:
        raise InputError(f"there is no arm {arm!r}; there are {', '.join(known)}, or give an Arm of your own")
    if not isinstance(arm, str | Arm):
        raise InputError(f"arm must be the name of one or a guardkit.Arm, got {shortened(repr(arm))}")
    return known[arm] if isinstance(arm, str) else arm


def without_effect(
    arms: Sequence[Arm], *, look_alikes: str = "marked", safe_per_unsafe: int | str = 1, variants_per_image: int = 1
) -> list[str]:
    """Settings that were given and that none of the arms has a use for, in sentences.

    Args:
        arms: that are trained.
        look_alikes, safe_per_unsafe, variants_per_image: of the data; with their defaults they are never among them.
    """
    kinds = {kind for arm in arms for kind in arm.kinds}
    who = f"the arm {arms[0].name} uses" if len(arms) == 1 else "none of the arms uses"
    instead = "no" if len(arms) == 1 else "any"
    notes = []
    if look_alikes != "marked" and "look_alike" not in kinds:
        notes.append(f"data.look_alikes={look_alikes} has no effect: {who} {instead} look-alikes; the arm look_alikes does")
    if safe_per_unsafe != 1 and "natural" not in kinds:
        notes.append(
            f"data.safe_per_unsafe={safe_per_unsafe} has no effect: {who} {instead} natural safe images; the arms unpaired and pairs_plus do"
        )
    if variants_per_image != 1 and not any(arm.has_views and arm.variants_per_image is None for arm in arms):
        notes.append(
            f"data.variants_per_image={variants_per_image} has no effect: {who} {instead} edits or other views of an image whose number is not "
            "its own"
        )
    return notes


OF_THE_UNSAFE = ("unsafe", "counterfactual", "null_edit", "transplant", "transplant_safe")
"""Kinds of images that are, or are made of, the labelled unsafe ones; they stand side by side in every batch."""
# in each of these pairs, what is safe was made to differ from what is unsafe by the feature alone
_PAIRS = {"counterfactual": "unsafe", "transplant_safe": "transplant"}


@dataclass(frozen=True)
class Choice:
    """The images of an arm, of one seed and one label budget, by kind: "unsafe", and the arm's positives and negatives.

    For "shuffled" these are other unsafe images, for what is made of the unsafe images (`OF_THE_UNSAFE`) those once more.

    Attributes:
        train: to fit on.
        validation: to choose settings on; they count in the label budget.
    """

    train: dict[str, Sequence[Record]]
    validation: dict[str, Sequence[Record]]

    @property
    def n_safe(self) -> int:
        """Safe images that the source labelled, validation included."""
        return len(self.of("natural")) + len(self.of("look_alike"))

    def of(self, kind: str) -> Sequence[Record]:
        """All images of a kind; none where the arm does not want it."""
        return together(self.train.get(kind, []), self.validation.get(kind, []))


@dataclass(frozen=True)
class Orders:
    """All images of a training pool in the order in which one seed takes them.

    Attributes:
        unsafe, safe: by label.
        look_alikes: those safe ones that look like something unsafe.
    """

    unsafe: Sequence[Record]
    safe: Sequence[Record]
    look_alikes: Sequence[Record]

    def n_corrected(self, label: int) -> int:
        """How many of a label stand first because people corrected them; they come on top of a budget."""
        return int(corrected_of(self.unsafe if label else self.safe).sum())

    @classmethod
    def of(cls, pool: Sequence[Record], seed: int, look_alikes: Sequence[Record] | None = None) -> Orders:
        """The nested orders of both labels, corrected images first. Look-alikes are those given, or those that the source marks by a category."""
        labels = labels_of(pool)
        unsafe, safe = (_corrected_first(nested_order(picked(pool, labels == label), seed)) for label in (1, 0))
        return cls(unsafe, safe, picked(safe, categories_of(safe)[0] >= 0) if look_alikes is None else look_alikes)


def _corrected_first(records: Sequence[Record]) -> Sequence[Record]:
    corrected = corrected_of(records)
    return picked(records, np.argsort(~corrected, kind="stable")) if corrected.any() else records


def n_natural(n_unsafe: int, safe_per_unsafe: int | str, orders: Orders) -> int:
    """How many natural safe images stand beside so many unsafe ones; `safe_per_unsafe` is a number or "all"."""
    return len(orders.safe) if safe_per_unsafe == "all" else n_unsafe * int(safe_per_unsafe)


def choose(orders: Orders, n_unsafe: int, kinds: Sequence[str], safe_per_unsafe: int | str = 1) -> Choice:
    """The first `n_unsafe` unsafe images of a seed, and what the kinds of an arm need.

    Smaller budgets are contained in larger ones, and every arm has the same unsafe images. A kind of which there are
    fewer than asked for is smaller, or empty. Corrected images come on top: in others' places they would leave a guard without ordinary ones.
    """
    n_unsafe += orders.n_corrected(1)
    n_safe = n_natural(n_unsafe, safe_per_unsafe, orders) + orders.n_corrected(0)
    unsafe = orders.unsafe[:n_unsafe]
    ordered = dict.fromkeys(OF_THE_UNSAFE, unsafe) | {"natural": orders.safe}
    if "shuffled" in kinds:
        ordered["shuffled"] = _without(orders.unsafe[n_unsafe:], unsafe)
    if "look_alike" in kinds:
        ordered["look_alike"] = _without(orders.look_alikes, orders.safe[:n_safe] if "natural" in kinds else [])
        if len(ordered["look_alike"]) < min(n_unsafe, len(orders.look_alikes)):
            # where safe images are few, the natural ones, of which there may be more, leave the look-alikes to their kind
            ordered["look_alike"] = orders.look_alikes
            ordered["natural"] = _without(orders.safe, orders.look_alikes[:n_unsafe])
    parts = {kind: split_validation(ordered[kind], n_safe if kind == "natural" else n_unsafe) for kind in kinds}
    return Choice({kind: train for kind, (train, _) in parts.items()}, {kind: validation for kind, (_, validation) in parts.items()})


def _without(records: Sequence[Record], others: Sequence[Record]) -> Sequence[Record]:
    """Records that are in no group with the others."""
    return picked(records, ~sharing_groups(records, others))


def make_batch(pools: Mapping[str, Pool | StoredPool], rows: Mapping[str, np.ndarray], turn: int | None) -> Batch:
    """A batch of the images of an arm.

    Args:
        pools: of "unsafe", and of the arm's positives and negatives.
        rows: which of their records; kinds of `OF_THE_UNSAFE` have the same.
        turn: which view of each, in a round over those that are there; None: every view. A record that has fewer views than
            another is there as often as that one, so that all have the same weight.
    Returns:
        embeddings (n, d); labels (n,); targets (n, k), NaN where a category is unknown; unsafe_rows and counterfactual_rows, (p,)
        where in the batch an unsafe image and its counterfactual stand, or a transplant and its safe half. Views that are not there
        are left out.
    """
    n_turns = 1 if turn is not None else max((pools[kind].n_views for kind, mine in rows.items() if len(mine)), default=1)

    def pick(kind: str) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.tile(rows[kind], n_turns)
        turns = np.repeat(np.arange(n_turns) + (turn or 0), len(rows[kind]))
        return pools[kind].pick(wanted, turns)

    n_categories = len(pools["unsafe"].category_names)
    parts: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    there: dict[str, np.ndarray] = {}
    row_at: dict[str, np.ndarray] = {}  # where in the batch a view stands, if it is there
    first, second = [np.zeros(0, int)], [np.zeros(0, int)]
    for kind in rows:
        vectors, found = pick(kind)
        there[kind], row_at[kind] = found, sum(len(part) for part in parts) + np.cumsum(found) - 1
        other = _PAIRS.get(kind)
        if other is not None and other in there:
            paired = found & there[other]
            first.append(row_at[other][paired])
            second.append(row_at[kind][paired])
        n = int(found.sum())
        parts.append(vectors if n == len(found) else vectors[found])
        if kind == "unsafe" or kind in POSITIVES:
            known = pools[kind].categories[np.tile(rows[kind], n_turns)[found]]
            targets.append(np.where(known[:, None] >= 0, np.arange(n_categories) == known[:, None], np.nan))
            labels.append(np.ones(n))
        else:
            targets.append(np.zeros((n, n_categories)))
            labels.append(np.zeros(n))
    return {
        "embeddings": torch.cat([torch.from_numpy(part) for part in parts]),
        "labels": torch.from_numpy(np.concatenate(labels)).float(),
        "targets": torch.from_numpy(np.concatenate(targets)).float(),
        "unsafe_rows": torch.from_numpy(np.concatenate(first)),
        "counterfactual_rows": torch.from_numpy(np.concatenate(second)),
    }
