"""The cells of a sample-efficiency experiment, and the embeddings that all of them share.

A cell is one arm with one kind of head, one label budget and one seed. Its images are chosen by `guardkit.data.arms`, as
in a training run: budgets are nested, every arm of a seed has the same unsafe images, and a fifth of them validates.
Views of images (themselves, counterfactuals, null edits, crops) are made once, by `guardkit.data.views`, and shared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from guardkit.checks import is_whole
from guardkit.counterfactual.pipeline import EditCounts
from guardkit.data.arms import Arm, Batch, Choice, choose, make_batch
from guardkit.data.budget import check_edits, check_transplants, edited, shortage
from guardkit.data.columns import check_listable, sources_of
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.views import EDITED, Pool, ViewMaker
from guardkit.progress import progress
from guardkit.schema import InputError, Record

_RECORDS_AT_ONCE = 256
COUNTS = ("n_train", "n_validation", "n_safe", "n_requested", "n_accepted")


@dataclass(frozen=True)
class Cell:
    """One guard to be trained, up to the strength of its regularisation.

    Attributes:
        arm: name of the arm.
        head: name of the head.
        n_unsafe: label budget, validation included.
        seed: of the labelled subset.
    """

    arm: str
    head: str
    n_unsafe: int
    seed: int

    @property
    def key(self) -> str:
        """Its name in the store of finished cells."""
        return f"{self.arm}|{self.head}|{self.n_unsafe}|{self.seed}"


@dataclass(frozen=True)
class CellData:
    """A cell with what it is fitted to, and what that costs.

    Attributes:
        cell: its name.
        train, validation: batches; the training batch holds every view of every image.
        counts: `COUNTS`: images to fit and to choose on, counterfactuals included; labelled safe images among them; edits that
            were asked for, and those that were kept.
    """

    cell: Cell
    train: Batch
    validation: Batch
    counts: dict[str, int]


class CellError(Exception):
    """A cell cannot be fitted; the message is the reason. The others go on."""


class Stock:
    """All views that a set of cells needs, made once.

    Args:
        data: of any arm; its source, stores and editor are used.
        arms: of the sweep.
        sizes: label budgets, rising.
        seeds: of the subsets.

    Attributes:
        test: the test images and pairs.
        train_sources: where training images come from; test images of others are out of distribution.
        edit_counts: what became of each arm's edits and the seconds they took in this run; what an arm before it has asked
            for already, or what is stored, costs nothing again.
    """

    def __init__(self, data: GuardDataModule, arms: Sequence[Arm], sizes: Sequence[int], seeds: Sequence[int]) -> None:
        self._data, self._arms = data, {arm.name: arm for arm in arms}
        pool = data.load()
        if data.safe_per_unsafe == "all" and any("natural" in arm.kinds for arm in arms):
            check_listable(pool, "a sweep with data.safe_per_unsafe=all", "give a number, such as data.safe_per_unsafe=4")
        self.train_sources = sources_of(pool)
        self._where = f"source={data.source.name}"
        self._names = data.policy.category_names
        kinds = [kind for arm in arms for kind in arm.kinds]
        self._orders = {seed: data.orders(seed, kinds) for seed in seeds}
        self._sizes = tuple(sizes)
        self._refused = {arm.name: self._refusal(arm) for arm in arms}
        cells = [Cell(arm.name, "", size, seed) for arm in arms for size in sizes for seed in seeds]
        reasons = [self.reason_against(cell) for cell in cells]
        if all(reasons):
            raise InputError(
                f"no cell of the sweep can be fitted: {'; '.join(str(one) for one in dict.fromkeys(reasons))}; set sweep.sizes"
            )
        self._pools: dict[str, Pool] = {}  # by the names of views
        self._makers = {
            arm.name: ViewMaker(
                data.store,
                data.pipeline,
                transform=arm.transform,
                variants_per_image=arm.variants_per_image or 1,
                counts=EditCounts(),
            )
            for arm in arms
        }
        for arm in arms:
            self._make(arm)
        self.edit_counts = {name: maker.counts for name, maker in self._makers.items()}
        self.test = data.make_test_set()
        for what, vectors in (("test images", self.test.embeddings), ("test counterfactuals", self.test.counterfactuals)):
            _check_finite(vectors, self._where, what)

    def reason_against(self, cell: Cell) -> str | None:
        """Why the source cannot serve a cell, or None."""
        arm = self._arms[cell.arm]
        orders, ratio = self._orders[cell.seed], self._data.safe_per_unsafe
        return shortage(orders, cell.n_unsafe, arm.kinds, ratio, self._where) or self._refused[arm.name]

    def _refusal(self, arm: Arm) -> str | None:
        """Why the editor can edit none of the images of an arm, or None."""
        orders = next(iter(self._orders.values()))
        everything = Choice({kind: orders.safe if kind in ("natural", "look_alike") else orders.unsafe for kind in arm.kinds}, {})
        try:
            check_transplants(self._data.pipeline, everything, self._where)
            check_edits(self._data.pipeline, edited(everything, arm.transform), self._where)
        except InputError as error:
            return str(error)
        return None

    def data_of(self, cell: Cell) -> CellData:
        """The batches of a cell.

        Raises:
            CellError: too few images, or no negative that could be used.
        """
        reason = self.reason_against(cell)
        if reason:
            raise CellError(reason)
        arm = self._arms[cell.arm]
        choice = self.subset_of(cell)
        train, validation = self._batch(arm, choice.train, None), self._batch(arm, choice.validation, 0)
        requested, accepted = self._edits(arm, choice)
        for label, name in ((1, "unsafe"), (0, "safe")):
            if not (train["labels"] == label).any():
                reasons = "; ".join(f"{count} x {reason}" for reason, count in self.edit_counts[arm.name].rejected.items())
                why = f"all edits were rejected ({reasons} among those of the arm)" if requested and not accepted else "one class only"
                raise CellError(f"no {name} image to train on: {why}")
        counts = (len(train["labels"]), len(validation["labels"]), choice.n_safe, requested, accepted)
        return CellData(cell, train, validation, dict(zip(COUNTS, counts, strict=True)))

    def subset_of(self, cell: Cell) -> Choice:
        """The images of a cell."""
        return choose(self._orders[cell.seed], cell.n_unsafe, self._arms[cell.arm].kinds, self._data.safe_per_unsafe)

    # --- views ---------------------------------------------------------------------------------------------------------

    def _make(self, arm: Arm) -> None:
        """Makes what an arm needs for all sizes and seeds and what no arm before it has made."""
        maker = self._makers[arm.name]
        needed: dict[str, dict[str, Record]] = {}
        kinds: dict[str, str] = {}
        for seed in self._orders:
            served = [size for size in self._sizes if not self.reason_against(Cell(arm.name, "", size, seed))]
            # a smaller budget's images are among a larger one's; not those that are others than the ones it has already
            for size in served if {"shuffled", "look_alike"} & set(arm.kinds) else served[-1:]:
                choice = self.subset_of(Cell(arm.name, "", size, seed))
                for images in (choice.train, choice.validation):
                    for kind, records in images.items():
                        kinds[maker.name(kind)] = kind
                        needed.setdefault(maker.name(kind), {}).update((record.id, record) for record in records)
        for name, wanted in needed.items():
            pool = self._pools.setdefault(name, maker.pool(kinds[name], self._names))
            missing = [record for record in wanted.values() if record not in pool]
            if not missing:
                continue
            chunks = pool.add(missing, partial(maker.make, kinds[name]), _RECORDS_AT_ONCE)
            for chunk in progress(chunks, total=len(chunks), what=f"{arm.name}: {name}"):
                chunk.get()
            _check_finite(pool.vectors(), self._where, name, [record.id for record in pool.records])

    def _pool(self, arm: Arm, kind: str) -> Pool:
        return self._pools[self._makers[arm.name].name(kind)]

    def _batch(self, arm: Arm, images: dict[str, Sequence[Record]], turn: int | None) -> Batch:
        pools = {kind: self._pool(arm, kind) for kind in images}
        return make_batch(pools, {kind: pools[kind].rows(records) for kind, records in images.items()}, turn)

    def _edits(self, arm: Arm, choice: Choice) -> tuple[int, int]:
        """Edits asked for and accepted among the images of a cell."""
        requested = accepted = 0
        for kind in choice.train:
            if kind in (*EDITED, "null_edit") or arm.transform == "null_edit":
                pool = self._pool(arm, kind)
                there = pool.there(pool.rows(choice.of(kind)))
                requested += there.size
                accepted += int(there.sum())
        return requested, accepted


def chosen_sizes(sizes: Sequence[int]) -> list[int]:
    """Label budgets, rising and each once.

    Raises:
        InputError: none, or one that is no whole number of at least 2.
    """
    for size in sizes:
        if not is_whole(size) or size < 2:
            raise InputError(f"sweep.sizes must be whole numbers of at least 2 (one labelled image validates), got {size!r}")
    if not sizes:
        raise InputError("sweep.sizes is empty; give label budgets such as [4,16,64]")
    return sorted(set(sizes))


def _check_finite(vectors: np.ndarray, where: str, what: str, ids: Sequence[str] = ()) -> None:
    flat = vectors.reshape(len(vectors), math.prod(vectors.shape[1:]))
    wrong = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(wrong):
        first = f", the first is {ids[wrong[0]]}" if len(ids) else ""
        raise InputError(
            f"{where}: {len(wrong)} embedding(s) among {what} hold NaN or infinite values{first}; embed those images again or leave them out"
        )
