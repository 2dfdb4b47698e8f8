"""Views: the embeddings under which an arm sees its records, made by editor and encoder, chunk by chunk.

A record has one view or several: itself, its counterfactuals, null edits of it, or crops of it. Nothing here knows of
arms, splits or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

import numpy as np
import torch

from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.data.augment import AugmentedContent
from guardkit.data.columns import RecordTable, categories_of, is_large
from guardkit.data.transplants import TransplantContent, transplant
from guardkit.editors.base import Kind, lent
from guardkit.embeddings import EmbeddingStore
from guardkit.schema import Content, InputError, Record

T = TypeVar("T")

BLOCK = 256  # neighbours in a folder of embeddings that are read together: some 400 kB of width 768 in half precision
WINDOW = 128  # blocks whose records are shuffled together, and held: 100 MB of width 768

EDITED = ("counterfactual", "shuffled")  # kinds of images that are there as their counterfactuals
_TRANSPLANTS = {"transplant": True, "transplant_safe": False}  # whether the object is the unsafe one


@dataclass(frozen=True)
class Views:
    """Embeddings of some records, several a record.

    Attributes:
        vectors: (n, v, d) float32; what is not there is zero.
        there: (n, v) bool.
    """

    vectors: np.ndarray
    there: np.ndarray

    def pick(self, rows: np.ndarray, turn: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One view per row, the `turn`-th in a round over those that are there.

        Args:
            rows: which records.
            turn: one for all, or one a row.
        Returns:
            (len(rows), d) vectors and (len(rows),) bool, False where a row has no view at all.
        """
        counts = self.there[rows].sum(axis=1)
        rank = np.cumsum(self.there[rows], axis=1) - 1
        wanted = (rank == (turn % np.maximum(counts, 1))[:, None]) & self.there[rows]
        return self.vectors[rows, wanted.argmax(axis=1)], counts > 0


class Later(Generic[T]):
    """A value that is made once: in the background where there is time for it, else when it is asked for."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._future: Future[T] | None = None

    def start(self, executor: Executor) -> None:
        """Queues it, unless it is made or under way; what failed before is tried again."""
        if self._future is None or self._future.cancelled() or (self._future.done() and self._future.exception()):
            self._future = executor.submit(self._make)

    def get(self) -> T:
        """The value, or the error that it ended with in the background."""
        if self._future is not None:
            with suppress(CancelledError):  # the background work was ended before or while it was made
                return self._future.result()
        made: Future[T] = Future()
        made.set_result(self._make())
        self._future = made
        return made.result()


class Pool:
    """Records whose views are made chunk by chunk. It may grow, though not while a chunk is being made.

    Args:
        n_views: of each record.
        dim: d.
        category_names: of the policy.

    Attributes:
        records: in the order in which they came.
        categories: (n,) the position of each record's category among the names; -1 where it is unknown.
        chunks: in the order in which they should be made.
    """

    def __init__(self, n_views: int, dim: int, category_names: Sequence[str]) -> None:
        self.n_views, self.category_names = n_views, category_names
        self.records: list[Record] = []
        self.categories = np.zeros(0, int)
        self._views = Views(np.zeros((0, n_views, dim), np.float32), np.zeros((0, n_views), bool))
        self._row_of: dict[str, int] = {}
        self.chunks: list[Later[None]] = []
        self._chunk_of = np.zeros(0, int)

    def add(
        self, records: Sequence[Record], make: Callable[[list[Record]], Views], chunk: int, order: np.ndarray | None = None
    ) -> list[Later[None]]:
        """Takes in records whose views are made later, or when they are asked for.

        Args:
            records: new ones.
            make: makes the views of some of them.
            chunk: how many at once.
            order: (n,) in which they are made; None: as they come.
        Returns:
            Their chunks.
        """
        first, n = len(self.records), len(records)
        position = {name: i for i, name in enumerate(self.category_names)}
        self.records += records
        self.categories = np.append(self.categories, np.array([position.get(record.category or "", -1) for record in records], int))
        self._row_of |= {record.id: first + i for i, record in enumerate(records)}
        known = self._views
        self._views = Views(
            np.concatenate([known.vectors, np.zeros((n, *known.vectors.shape[1:]), np.float32)]),
            np.concatenate([known.there, np.zeros((n, self.n_views), bool)]),
        )
        self._chunk_of = np.append(self._chunk_of, np.zeros(n, int))
        order = first + (np.arange(n) if order is None else order)
        added: list[Later[None]] = []
        for start in range(0, n, max(1, chunk)):
            rows = order[start : start + chunk]
            self._chunk_of[rows] = len(self.chunks) + len(added)
            added.append(Later(partial(self._fill, make, rows)))
        self.chunks += added
        return added

    def _fill(self, make: Callable[[list[Record]], Views], rows: np.ndarray) -> None:
        views = make([self.records[row] for row in rows])
        self._views.vectors[rows], self._views.there[rows] = views.vectors, views.there

    def __contains__(self, record: Record) -> bool:
        return record.id in self._row_of

    def rows(self, records: Sequence[Record]) -> np.ndarray:
        """Where records stand in the table of views."""
        return np.array([self._row_of[record.id] for record in records], int)

    def pick(self, rows: np.ndarray, turn: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One view per row, see `Views.pick`, once it is made."""
        return self._made(rows).pick(rows, turn)

    def vectors(self) -> np.ndarray:
        """(n, v, d) embeddings, once all are made; what is not there is zero."""
        return self._made(slice(None)).vectors

    def there(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(len(rows), v) bool: which views there are, once those rows are made."""
        return self._made(rows).there[rows]

    def _made(self, rows: np.ndarray | slice) -> Views:
        """The table, once the chunks that hold `rows` are made."""
        for number in np.unique(self._chunk_of[rows]):
            self.chunks[number].get()
        return self._views


class StoredPool:
    """Records of a large folder of embeddings. One view each; what an epoch needs is read window by window, unless they are few.

    Args:
        records: all of them; they are put in the order in which their folder has them.
        category_names: of the policy.

    Attributes:
        records: in that order.
        categories: (n,) as of a `Pool`.
        chunks: none, because nothing is made ahead.
        unusable: rows of the folder that came up and whose vectors are zero or not finite.
    """

    n_views = 1

    def __init__(self, records: RecordTable, category_names: Sequence[str]) -> None:
        self.category_names = category_names
        self.records = RecordTable(records.columns, np.sort(records.rows))
        codes, names = categories_of(self.records)
        position = {name: i for i, name in enumerate(category_names)}
        # the last one is of those without a category
        self.categories = np.array([*(position.get(name, -1) for name in names), -1], np.int16)[codes]
        self.chunks: list[Later[None]] = []
        self.unusable: set[int] = set()
        self.is_held = not is_large(records)
        self._held: np.ndarray | None = None
        self.end()

    def end(self) -> None:
        """Lets go of the order and of what was held for it."""
        self._order: BlockOrder | None = None
        self._window, self._places, self._vectors, self._room = -1, np.zeros(0, np.int32), torch.empty(0), torch.empty(0)

    def shuffled(self, seed: Sequence[int], own_seed: Sequence[int]) -> BlockOrder:
        """The order of an epoch, see `BlockOrder`, in which records are picked from now on."""
        self._order, self._window = BlockOrder(self.records, seed, own_seed), -1
        return self._order

    def pick(self, rows: np.ndarray, turn: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # noqa: ARG002
        """The embeddings of rows, and whether they mean something, see `Views.pick`."""
        if self.is_held and self._held is None:
            self._held = self.records.vectors()
        vectors = self._in_windows(rows) if self._held is None else self._held[rows]
        there = ~np.isnan(vectors[:, 0])
        if not there.all():
            self.unusable.update(self.records.rows[rows[~there]].tolist())
        return vectors, there

    def _in_windows(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of rows in an epoch's order: a window is read once, from its first record to its last."""
        order = self._order
        windows = np.zeros(0, int) if order is None else order.window_of(rows)
        if order is None or (windows[1:] < windows[:-1]).any():
            return self.records.vectors(rows)  # in nobody's order
        vectors = torch.empty((len(rows), self.records.columns.vectors.width))
        for window in np.unique(windows).tolist():
            start, end = np.searchsorted(windows, [window, window + 1]).tolist()
            if window != self._window:
                self._window, self._places = -1, np.sort(order.places(window))
                if len(self._room) < len(self._places):
                    self._room = self._vectors = torch.empty(0)  # before there is more of it
                    self._room = torch.empty((len(self._places) + len(self._places) // 8, vectors.shape[1]))
                # the same memory again and again is quicker than new one
                stored = self.records.columns.vectors
                self._vectors = torch.from_numpy(stored.take(self.records.rows[self._places], self._room[: len(self._places)].numpy()))
                self._window = window
            places = torch.from_numpy(np.searchsorted(self._places, rows[start:end]))
            torch.index_select(self._vectors, 0, places, out=vectors[start:end])  # other threads go on meanwhile
        return vectors.numpy()

    def there(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """(len(rows), 1) bool: which are not known to be unusable."""
        return ~np.isin(self.records.rows[rows], list(self.unusable))[:, None]


class BlockOrder:
    """A shuffled order of the records of a large folder: blocks of neighbours in random order, and those of `WINDOW` blocks shuffled
    together.

    That is as good for stochastic gradients as a full permutation, also of a folder that is sorted by label, and reads a file block by
    block: Xu et al., 2022, "In-Database Machine Learning with CorgiPile: Stochastic Gradient Descent without Full Data Shuffle" (SIGMOD),
    section 4. Pools of one folder go through its blocks in the same order, so that what one of them has read is at hand for the others.
    Nothing is read and hardly anything computed before the first batch.

    Args:
        records: in the order in which their folder has them.
        seed: of the order of the blocks, the same for all pools of an epoch.
        own_seed: of what is shuffled within.
    """

    def __init__(self, records: RecordTable, seed: Sequence[int], own_seed: Sequence[int]) -> None:
        self._rows = records.rows
        n_blocks = -(-len(records.columns.labels) // BLOCK)
        self._starts = np.searchsorted(self._rows, np.arange(n_blocks + 1) * BLOCK)
        self._blocks = np.random.default_rng(seed).permutation(n_blocks)
        self._turn = np.empty(n_blocks, np.int64)
        self._turn[self._blocks] = np.arange(n_blocks)
        lengths = np.diff(self._starts)[self._blocks]
        # turn at which each window begins, and the number of all
        self._firsts = np.append(np.r_[0, np.cumsum(lengths)][:n_blocks:WINDOW], len(self._rows))
        self._own_seed, self._window = list(own_seed), -1
        self._shuffled = np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, turns: slice | np.ndarray) -> np.ndarray:
        """Places among the records of those whose turn it is, rising within a window: their order in a batch tells nothing."""
        wanted = np.arange(*turns.indices(len(self))) if isinstance(turns, slice) else turns
        found = np.empty(len(wanted), np.int32)
        windows = np.searchsorted(self._firsts, wanted, side="right") - 1
        for window in np.unique(windows).tolist():
            mine = windows == window
            if window != self._window:
                self._window = window
                self._shuffled = np.random.default_rng([*self._own_seed, window]).permutation(self.places(window))
            found[mine] = np.sort(self._shuffled[wanted[mine] - self._firsts[window]])
        return found

    def places(self, window: int) -> np.ndarray:
        """(m,) places of a window's records, block by block."""
        blocks = self._blocks[window * WINDOW : (window + 1) * WINDOW]
        return np.concatenate([np.arange(self._starts[block], self._starts[block + 1], dtype=np.int32) for block in blocks])

    def window_of(self, places: np.ndarray) -> np.ndarray:
        """(m,) the window that each place is in."""
        return self._turn[self._rows[places] // BLOCK] // WINDOW


class ViewMaker:
    """Makes views of records; what was made before comes from the stores.

    Args:
        store: embeds images, each once.
        pipeline: makes counterfactuals and null edits.
        transform: what originals pass through: "none", "null_edit" or "classic".
        variants_per_image: counterfactuals (or classic views) of each record.
        counts: of edits; added to.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        pipeline: CounterfactualPipeline,
        *,
        transform: Literal["none", "null_edit", "classic"],
        variants_per_image: int,
        counts: EditCounts,
    ) -> None:
        self.store, self.pipeline, self.counts = store, pipeline, counts
        self.transform, self.variants_per_image = transform, variants_per_image

    def pool(self, kind: str, category_names: Sequence[str]) -> Pool:
        """A pool for views of a kind: "unsafe", "natural" and "look_alike" are originals, "counterfactual" and "shuffled"
        counterfactuals, "null_edit" edits that change nothing relevant, "transplant" and "transplant_safe" what they are called."""
        several = kind in (*EDITED, "null_edit", *_TRANSPLANTS) or self.transform == "classic"
        n_views = self.variants_per_image if several else 1
        return Pool(n_views, self.store.encoder.dim, category_names)

    def make(self, kind: str, records: list[Record]) -> Views:
        """The views of records of a kind, see `pool`."""
        if kind in EDITED:
            return self.counterfactuals(records)
        if kind == "null_edit":
            return self.edited(records, self.variants_per_image, "null", self.counts)
        if kind in _TRANSPLANTS:
            return self.transplanted(records, _TRANSPLANTS[kind])
        return self.originals(records)

    def name(self, kind: str) -> str:
        """What the views of a kind are called; arms that call them alike may share them."""
        if kind in EDITED:
            return f"counterfactuals, {self.variants_per_image} each"
        if kind == "null_edit" or kind in _TRANSPLANTS:
            return f"{kind}, {self.variants_per_image} each"
        return {"none": "originals", "null_edit": "null edits", "classic": f"classic views, {self.variants_per_image} each"}[self.transform]

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        """(n, d) embeddings; those that the source brings are taken as they are."""
        if isinstance(records, RecordTable) and len(records):
            return records.vectors()
        vectors = np.zeros((len(records), self.store.encoder.dim), np.float32)
        contents: list[Content] = []
        rows: list[int] = []
        for row, record in enumerate(records):
            if record.embedding is not None:
                vectors[row] = record.embedding
            elif record.content is not None:
                rows.append(row)
                contents.append(record.content)
        if contents:
            vectors[rows] = self.store.embed(contents)
        return vectors

    def originals(self, records: list[Record]) -> Views:
        """The records themselves, passed through the transform."""
        if self.transform == "null_edit":
            return self.edited(records, 1, "null", self.counts)
        if self.transform == "classic":
            contents: list[Content] = []
            for record in records:
                if record.content is None:
                    raise InputError("experiment=classic_aug needs images, and the source holds embeddings only")
                contents += [AugmentedContent(record.content, seed) for seed in range(self.variants_per_image)]
            vectors = self.store.embed(contents).reshape(len(records), self.variants_per_image, -1)
            return Views(vectors, np.ones(vectors.shape[:2], bool))
        vectors = self.embed(records)[:, None]
        return Views(vectors, np.ones(vectors.shape[:2], bool))

    def counterfactuals(self, records: list[Record]) -> Views:
        """`variants_per_image` counterfactuals of each record; rejected ones are not there."""
        return self.edited(records, self.variants_per_image, "counterfactual", self.counts)

    def transplanted(self, records: Sequence[Record], is_unsafe: bool) -> Views:
        """`variants_per_image` transplants of each record's object, or safe objects in their places; none of a record without a
        box. They are drawn when they are embedded, and kept nowhere."""
        vectors = np.zeros((len(records), self.variants_per_image, self.store.encoder.dim), np.float32)
        there = np.array([record.content is not None and record.region is not None for record in records])
        contents = self._transplants(records, is_unsafe)
        if contents:
            vectors[there] = self.store.embed(contents).reshape(-1, *vectors.shape[1:])
        return Views(vectors, np.repeat(there[:, None], self.variants_per_image, axis=1))

    def _transplants(self, records: Sequence[Record], is_unsafe: bool) -> list[TransplantContent]:
        return [
            transplant(record.content, record.region, self.pipeline.photographs, seed, is_unsafe=is_unsafe)
            for record in records
            if record.content is not None and record.region is not None
            for seed in range(self.variants_per_image)
        ]

    def lent(self, kinds: Collection[str], records: Sequence[Record]) -> list[Content]:
        """Other images whose parts show, or may show, in views of these kinds of the records."""
        contents: list[Content] = []
        if self.transform == "null_edit" or {*EDITED, "null_edit"} & set(kinds):
            contents += [photograph.content for photograph in lent(self.pipeline.editor)]
        for kind in _TRANSPLANTS.keys() & set(kinds):
            for one in self._transplants(records, _TRANSPLANTS[kind]):
                contents += [one.host, one.donor]
        return contents

    def edited(self, records: Sequence[Record], variants_per_image: int, kind: Kind, counts: EditCounts) -> Views:
        """`variants_per_image` edits of each record, embedded."""
        wanted = [(record, seed) for record in records for seed in range(variants_per_image)]
        tries = self.pipeline.make([record for record, _ in wanted], [seed for _, seed in wanted], kind, counts)
        accepted = [(i, one) for i, one in enumerate(tries) if one is not None and one.accepted]
        vectors = np.zeros((len(wanted), self.store.encoder.dim), np.float32)
        there = np.zeros(len(wanted), bool)
        if accepted:
            rows = [i for i, _ in accepted]
            vectors[rows] = self.store.embed([one for _, one in accepted])
            there[rows] = True
        return Views(vectors.reshape(len(records), variants_per_image, vectors.shape[1]), there.reshape(len(records), variants_per_image))
