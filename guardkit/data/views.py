"""Views: the embeddings under which an arm sees its records, made by editor and encoder, chunk by chunk.

A record has one view or several: itself, its counterfactuals, null edits of it, or crops of it. Nothing here knows of
arms, splits or batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, Literal, TypeVar

import numpy as np

from guardkit.counterfactual.pipeline import CounterfactualPipeline, EditCounts
from guardkit.data.augment import AugmentedContent
from guardkit.editors.base import Kind
from guardkit.embeddings import EmbeddingStore
from guardkit.schema import Content, InputError, Record

T = TypeVar("T")


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
    """Records whose views are made chunk by chunk.

    Args:
        records: whose views.
        variants_per_image: of each.
        dim: d.
        make: makes the views of some of them.
        order: (n,) in which they are made.
        chunk: how many at once.
    """

    def __init__(
        self,
        records: Sequence[Record],
        variants_per_image: int,
        dim: int,
        make: Callable[[list[Record]], Views],
        order: np.ndarray,
        chunk: int,
    ) -> None:
        self.records = list(records)
        self._make = make
        self._views = Views(
            np.zeros((len(records), variants_per_image, dim), np.float32), np.zeros((len(records), variants_per_image), bool)
        )
        self._chunk_of = np.zeros(len(records), int)
        self.chunks: list[Later[None]] = []
        for start in range(0, len(order), max(1, chunk)):
            rows = order[start : start + chunk]
            self._chunk_of[rows] = len(self.chunks)
            self.chunks.append(Later(partial(self._fill, rows)))

    def _fill(self, rows: np.ndarray) -> None:
        views = self._make([self.records[row] for row in rows])
        self._views.vectors[rows], self._views.there[rows] = views.vectors, views.there

    def views(self, rows: np.ndarray | None = None) -> Views:
        """The table, once the chunks that hold `rows` (all of them by default) are made."""
        for number in np.unique(self._chunk_of if rows is None else self._chunk_of[rows]):
            self.chunks[number].get()
        return self._views


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
        self.store, self.pipeline, self.transform, self.variants_per_image, self.counts = (
            store,
            pipeline,
            transform,
            variants_per_image,
            counts,
        )

    def embed(self, records: Sequence[Record]) -> np.ndarray:
        """(n, d) embeddings; those that the source brings are taken as they are."""
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
