"""The cells of a sample-efficiency experiment, and the embeddings that all of them share.

A cell is one arm with one kind of head, one label budget and one seed. Its images are chosen by `guardkit.data.arms`, as
in a training run: budgets are nested, every arm of a seed has the same unsafe images, and a fifth of them validates.
Views of images (themselves, counterfactuals, null edits, crops) are made once, by `guardkit.data.views`, and shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from guardkit.checks import is_whole
from guardkit.counterfactual.pipeline import EditCounts
from guardkit.data.arms import Arm, Batch, Choice, Orders, Split, assemble, category_numbers, choose, every_turn
from guardkit.data.budget import check_edits, edited
from guardkit.data.datamodule import GuardDataModule
from guardkit.data.views import ViewMaker, Views
from guardkit.progress import progress
from guardkit.schema import InputError, Record

_RECORDS_AT_ONCE = 256


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
    """What a cell is fitted to, and what it costs.

    Attributes:
        train, validation: batches; the training batch holds every view of every image.
        n_safe: labelled safe images among them.
        n_requested: edits that were asked for.
        n_accepted: those that were kept.
    """

    train: Batch
    validation: Batch
    n_safe: int
    n_requested: int
    n_accepted: int


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
        self.train_sources = {record.source for record in pool}
        self._where = f"source={data.source.name}"
        self._names = data.policy.category_names
        self._orders = {seed: Orders.of(pool, seed) for seed in seeds}
        self._sizes = tuple(sizes)
        self._refused = {arm.name: self._refusal(arm) for arm in arms}
        cells = [Cell(arm.name, "", size, seed) for arm in arms for size in sizes for seed in seeds]
        reasons = [self.reason_against(cell) for cell in cells]
        if all(reasons):
            raise InputError(
                f"no cell of the sweep can be fitted: {'; '.join(str(one) for one in dict.fromkeys(reasons))}; set sweep.sizes"
            )
        self._rows: dict[str, dict[str, int]] = {}
        self._views: dict[str, Views] = {}
        self._categories: dict[str, np.ndarray] = {}
        self.edit_counts: dict[str, EditCounts] = {}
        for arm in arms:
            counts = self.edit_counts.setdefault(arm.name, EditCounts())
            self._make(arm, counts)
        self.test = data.make_test_set()
        for what, vectors in (("test images", self.test.embeddings), ("test counterfactuals", self.test.counterfactuals)):
            _check_finite(vectors, self._where, what)

    def reason_against(self, cell: Cell) -> str | None:
        """Why the source cannot serve a cell, or None."""
        arm, orders = self._arms[cell.arm], self._orders[cell.seed]
        # the same words for every cell, so that they can be said once for all
        if len(orders.unsafe) < cell.n_unsafe:
            return f"more unsafe images are needed than the {len(orders.unsafe)} that {self._where} has for training"
        if "shuffled" in arm.negatives and len(orders.unsafe) < 2 * cell.n_unsafe:
            return (
                f"as many other unsafe images are needed beside the labelled ones, and {self._where} has {len(orders.unsafe)} for training"
            )
        if "natural" in arm.negatives and len(orders.safe) < cell.n_unsafe:
            return f"more safe images are needed than the {len(orders.safe)} that {self._where} has for training"
        return self._refused[arm.name]

    def _refusal(self, arm: Arm) -> str | None:
        """Why the editor can edit none of the images of an arm, or None."""
        orders = next(iter(self._orders.values()))
        everything = Choice(Split(orders.unsafe), Split(orders.safe if "natural" in arm.negatives else []), Split(orders.unsafe))
        try:
            check_edits(self._data.pipeline, edited(everything, arm.negatives, arm.transform), self._where)
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
        choice = choose(self._orders[cell.seed], cell.n_unsafe, arm.negatives)
        train = self._batch(arm, _side(choice, "train"), every_view=True)
        validation = self._batch(arm, _side(choice, "validation"), every_view=False)
        requested, accepted = self._edits(arm, choice)
        for label, name in ((1, "unsafe"), (0, "safe")):
            if not (train["labels"] == label).any():
                reasons = "; ".join(f"{count} x {reason}" for reason, count in self.edit_counts[arm.name].rejected.items())
                why = f"all edits were rejected ({reasons} among those of the arm)" if requested and not accepted else "one class only"
                raise CellError(f"no {name} image to train on: {why}")
        n_safe = len(choice.natural.train) + len(choice.natural.validation)
        return CellData(train, validation, n_safe, requested, accepted)

    def subset_of(self, cell: Cell) -> Choice:
        """The images of a cell."""
        return choose(self._orders[cell.seed], cell.n_unsafe, self._arms[cell.arm].negatives)

    # --- views ---------------------------------------------------------------------------------------------------------

    def _make(self, arm: Arm, counts: EditCounts) -> None:
        """Makes what an arm needs for all sizes and seeds and what no arm before it has made."""
        needed: dict[str, dict[str, Record]] = {}
        for seed, orders in self._orders.items():
            served = [size for size in self._sizes if not self.reason_against(Cell(arm.name, "", size, seed))]
            # a smaller budget's images are among a larger one's, its `others` are not
            for size in served if "shuffled" in arm.negatives else served[-1:]:
                choice = choose(orders, size, arm.negatives)
                for side in ("train", "validation"):
                    for kind, records in _side(choice, side).items():
                        if kind == "unsafe" or kind in arm.negatives:
                            needed.setdefault(self._table(arm, kind), {}).update((record.id, record) for record in records)
        maker = ViewMaker(
            self._data.store, self._data.pipeline, transform=arm.transform, variants_per_image=(arm.variants_per_image or 1), counts=counts
        )
        for table, wanted in needed.items():
            missing = [record for name, record in wanted.items() if name not in self._rows.get(table, {})]
            if not missing:
                continue
            make = maker.counterfactuals if table.startswith("counterfactual") else maker.originals
            parts = [missing[start : start + _RECORDS_AT_ONCE] for start in range(0, len(missing), _RECORDS_AT_ONCE)]
            views = [make(part) for part in progress(parts, total=len(parts), what=f"{arm.name}: {table}")]
            self._keep(table, missing, views)

    def _keep(self, table: str, records: list[Record], views: Iterable[Views]) -> None:
        known = [self._views[table]] if table in self._views else []
        parts = [*known, *views]
        vectors = np.concatenate([part.vectors for part in parts])
        _check_finite(vectors, self._where, table, [*self._rows.get(table, {}), *(record.id for record in records)])
        self._views[table] = Views(vectors, np.concatenate([part.there for part in parts]))
        rows = self._rows.setdefault(table, {})
        rows |= {record.id: len(rows) + i for i, record in enumerate(records)}
        numbers = category_numbers(records, self._names)
        self._categories[table] = np.concatenate([self._categories.get(table, np.zeros(0, int)), numbers])

    @staticmethod
    def _table(arm: Arm, kind: str) -> str:
        """The name of the views of one kind; arms that want the same views share them."""
        if kind in ("counterfactual", "shuffled"):
            return f"counterfactuals, {(arm.variants_per_image or 1)} each"
        return {"none": "originals", "null_edit": "null edits", "classic": f"classic views, {(arm.variants_per_image or 1)} each"}[
            arm.transform
        ]

    def _batch(self, arm: Arm, records: dict[str, list[Record]], *, every_view: bool) -> Batch:
        views, rows, turns = {}, {}, {}
        for kind in ("unsafe", *arm.negatives):
            table = self._table(arm, kind)
            position = self._rows.get(table, {})
            mine = np.array([position[record.id] for record in records[kind]], int)
            if len(mine):
                views[kind], rows[kind] = self._views[table], mine
        n_turns = max(one.vectors.shape[1] for one in views.values()) if every_view and views else 1
        for kind, mine in rows.items():
            rows[kind], turns[kind] = every_turn(mine, n_turns)
        return assemble(views, rows, turns, self._categories[self._table(arm, "unsafe")], len(self._names))

    def _edits(self, arm: Arm, choice: Choice) -> tuple[int, int]:
        """Edits asked for and accepted among the images of a cell."""
        requested = accepted = 0
        for kind in ("unsafe", *arm.negatives):
            if kind in ("counterfactual", "shuffled") or arm.transform == "null_edit":
                table = self._table(arm, kind)
                for side in ("train", "validation"):
                    rows = [self._rows[table][record.id] for record in _side(choice, side)[kind]]
                    there = self._views[table].there[rows]
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


def _side(choice: Choice, side: str) -> dict[str, list[Record]]:
    unsafe = getattr(choice.unsafe, side)
    return {"unsafe": unsafe, "counterfactual": unsafe, "natural": getattr(choice.natural, side), "shuffled": getattr(choice.others, side)}


def _check_finite(vectors: np.ndarray, where: str, what: str, ids: Sequence[str] = ()) -> None:
    flat = vectors.reshape(len(vectors), math.prod(vectors.shape[1:]))
    wrong = np.flatnonzero(~np.isfinite(flat).all(axis=1))
    if len(wrong):
        first = f", the first is {ids[wrong[0]]}" if len(ids) else ""
        raise InputError(
            f"{where}: {len(wrong)} embedding(s) among {what} hold NaN or infinite values{first}; embed those images again or leave them out"
        )
