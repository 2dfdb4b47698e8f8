"""Scores of many guards on the same images in one pass: each image is read once, and encoded once per encoder.

All guards on one encoder share its embeddings. Embeddings and judgments are stored as they are made, so an evaluation
that is stopped goes on where it was and nothing is asked twice. Knows no metric.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.embeddings import EmbeddingStore
from guardkit.evaluation.benchmark import Benchmark
from guardkit.evaluation.judgments import JudgmentStore
from guardkit.images import load
from guardkit.policy import Policy
from guardkit.progress import progress
from guardkit.schema import Content, EmbeddingGuard, Guard, ImageError, Judgment, Record, Rejected, takes_embeddings
from guardkit.seen import SeenImages

_BLOCK = 512  # records between two looks at the clock
_HELD_BYTES = 1 << 30  # images of a block that are kept for a second consumer; more are read again


@dataclass(frozen=True)
class Contender:
    """A guard that is measured, and what is known of it beside the protocol.

    Attributes:
        name: for tables; unique.
        guard: gives the scores.
        points: named thresholds that were chosen before this benchmark was seen.
        trained_on: sources of its training images; None: unknown.
        origin: where it comes from, for the report.
        policy: under which it was trained; None: none, or unknown.
        training_images: those it was trained and validated on; None: unknown.
    """

    name: str
    guard: Guard
    points: Mapping[str, float] = field(default_factory=dict)
    trained_on: frozenset[str] | None = None
    origin: str = ""
    policy: Policy | None = None
    training_images: SeenImages | None = None


@dataclass(frozen=True)
class Sheet:
    """Scores in columns, ready to be counted.

    Attributes:
        contenders: (g,) what was measured.
        records: (n,) images that could be read, natural ones first.
        labels, scores: (n,) int, and (n, g) probability of unsafe in [0, 1], NaN where a contender abstained.
        n_natural: how many of the records are natural images; the rest are counterfactuals.
        pair_rows: (p, 2) rows of unsafe images and of their counterfactuals.
        similarity: (p,) cosine of the embeddings of a pair; None when no encoder saw them.
        similarity_by: name of that encoder.
        counted: (n,) bool, the images of the natural test set. In a source without safe images the counterfactuals
            stand for them.
        categories: of the policy, in its order.
        reasons: per contender, row -> why it abstained.
        rejected: what could not be read, with reasons.
        embeddings: encoder fingerprint -> (n, d) unit vectors.
        counts: images read, encoded and judged, plain JSON.
        own_seconds: per contender, what it took beside the encoder, and for how many images; none that were found in a store.
        encoder_seconds: encoder fingerprint -> what encoding took, and for how many images.
    """

    contenders: list[Contender]
    records: list[Record]
    labels: np.ndarray
    scores: np.ndarray
    n_natural: int
    pair_rows: np.ndarray
    similarity: np.ndarray | None
    similarity_by: str | None
    counted: np.ndarray
    categories: tuple[str, ...]
    reasons: list[dict[int, str]] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    own_seconds: list[tuple[float, int]] = field(default_factory=list)
    encoder_seconds: dict[str, tuple[float, int]] = field(default_factory=dict)

    def abstentions(self, column: int) -> dict[str, int]:
        """Reasons of one contender, counted."""
        return dict(Counter(self.reasons[column].values()).most_common())


def embedding_stores(contenders: Sequence[Contender], cache_dir: Path | None) -> dict[str, EmbeddingStore]:
    """One store an encoder, by its fingerprint, however many guards and copies of the encoder there are."""
    guards = [one.guard for one in contenders if takes_embeddings(one.guard)]
    raw = {guard.encoder.fingerprint for guard in guards if not guard.is_normalized}
    stores: dict[str, EmbeddingStore] = {}
    for guard in guards:
        name = guard.encoder.fingerprint
        if name not in stores:
            stores[name] = EmbeddingStore(guard.encoder, cache_dir, keep_norms=name in raw)
    return stores


def judgment_stores(contenders: Sequence[Contender], cache_dir: Path | None) -> dict[str, JudgmentStore]:
    """One store for each guard that looks at images itself, by its fingerprint."""
    return {one.guard.fingerprint: JudgmentStore(one.guard, cache_dir) for one in contenders if not takes_embeddings(one.guard)}


def score(
    benchmark: Benchmark,
    contenders: Sequence[Contender],
    stores: Mapping[str, EmbeddingStore],
    judges: Mapping[str, JudgmentStore],
    categories: tuple[str, ...],
) -> Sheet:
    """Scores every image of a benchmark, counterfactuals included, with every contender.

    Args:
        benchmark: its records have contents, or embeddings.
        contenders: measured.
        stores: of their encoders, see `embedding_stores`.
        judges: of those that look at images themselves, see `judgment_stores`.
        categories: of the policy, in its order.
    Raises:
        InputError: an encoder returned values that are not finite, or a guard cannot work at all (an endpoint that
            stays away); what was made before is kept.
    """
    records = [*benchmark.records, *benchmark.counterfactuals]
    said = _Pass(len(records), contenders, stores, judges, benchmark.encoder_fingerprint)
    stream = iter(progress(records, total=len(records), what="scoring images"))
    while block := list(islice(stream, _BLOCK)):
        said.add(block)
    kept = np.array([row for row in range(len(records)) if row not in said.unreadable], int)
    place = {int(row): i for i, row in enumerate(kept)}
    n_given, n_natural = len(benchmark.records), int((kept < len(benchmark.records)).sum())
    pairs = [
        (place[original], place[n_given + i])
        for i, original in enumerate(benchmark.counterfactual_of)
        if original in place and n_given + i in place
    ]
    pair_rows = np.array(pairs, int).reshape(-1, 2)
    embeddings = {name: matrix[kept] for name, matrix in said.embeddings.items()}
    encoder = next((one.guard.encoder for one in contenders if takes_embeddings(one.guard)), None) if pairs else None
    similarity = None
    if encoder is not None:
        unsafe, safe = (embeddings[encoder.fingerprint][rows] for rows in pair_rows.T)
        similarity = (unsafe * safe).sum(axis=1)
    return Sheet(
        contenders=list(contenders),
        records=[records[row] for row in kept],
        labels=np.array([records[row].label for row in kept], int),
        scores=said.scores[kept],
        n_natural=n_natural,
        pair_rows=pair_rows,
        similarity=similarity,
        similarity_by=None if encoder is None else encoder.name,
        counted=np.full(len(kept), True) if benchmark.counterfactuals_are_the_safe_images else np.arange(len(kept)) < n_natural,
        categories=categories,
        reasons=[{place[row]: reason for row, reason in mine.items() if row in place} for mine in said.reasons],
        rejected=[Rejected(records[row].id, reason) for row, reason in sorted(said.unreadable.items())],
        embeddings=embeddings,
        counts={"images": len(records), "scored": len(kept), "unreadable": len(said.unreadable), **said.counts()},
        own_seconds=said.own_seconds(),
        encoder_seconds={name: (store.encode_seconds, store.n_encoded) for name, store in stores.items()},
    )


class LazyImages(Sequence[np.ndarray]):
    """The images of records, each read when asked for: a benchmark's pixels need not fit into memory."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._contents = [record.content for record in records if record.content is not None]

    def __len__(self) -> int:
        return len(self._contents)

    def __getitem__(self, row: Any) -> Any:
        """(h, w, 3) uint8 RGB, or lazily those of a slice. Raises ImageError."""
        if isinstance(row, slice):
            return [content.load() for content in self._contents[row]]
        return self._contents[row].load()


class _Pass:
    """One pass of contenders over n images, a block at a time.

    Attributes:
        scores: (n, g), see `Sheet`.
        reasons: per contender, row -> why it abstained.
        unreadable: row -> why.
        embeddings: encoder fingerprint -> (n, d) unit vectors; zero where there is none.
    """

    def __init__(
        self,
        n: int,
        contenders: Sequence[Contender],
        stores: Mapping[str, EmbeddingStore],
        judges: Mapping[str, JudgmentStore],
        encoder_fingerprint: str | None,
    ) -> None:
        self._contenders, self._stores, self._encoder_fingerprint = contenders, stores, encoder_fingerprint
        self._judges = judges
        self._reads, self._n_done = _Reads(), 0
        self._head_seconds = [(0.0, 0)] * len(contenders)
        self.scores = np.full((n, len(contenders)), np.nan)
        self.reasons: list[dict[int, str]] = [{} for _ in contenders]
        self.unreadable: dict[int, str] = {}
        self.embeddings = {name: np.zeros((n, store.encoder.dim), np.float32) for name, store in stores.items()}

    def add(self, records: list[Record]) -> None:
        """Scores the next images."""
        first = self._n_done
        held = _Held(self._reads, keep=len(self._stores) + len(self._judges) > 1)
        wrapped = [record if record.content is None else replace(record, content=_ReadOnce(record.content, held)) for record in records]
        unreadable: dict[int, str] = {}  # by their rows in the block, as all that follows
        vectors = {name: embed(wrapped, store, unreadable) for name, store in self._stores.items()}
        judgments = {name: _judge(wrapped, judge, unreadable) for name, judge in self._judges.items()}
        for column, contender in enumerate(self._contenders):
            guard, reasons = contender.guard, dict[int, str]()
            if takes_embeddings(guard):
                name = guard.encoder.fingerprint
                matrix, rows = _vectors_for(
                    guard, wrapped, vectors[name], self._stores[name], unreadable, self._encoder_fingerprint, reasons
                )
                started = time.perf_counter()
                values: list[float] = _probabilities(guard, matrix).tolist() if len(rows) else []
                seconds, n = self._head_seconds[column]
                self._head_seconds[column] = seconds + time.perf_counter() - started, n + len(rows)
                said = {int(row): Judgment(value) for row, value in zip(rows, values, strict=True)}
            else:
                said = judgments[guard.fingerprint]
            for row, judgment in said.items():
                self.scores[first + row, column], reason = _checked(judgment)
                if reason:
                    reasons[row] = reason
            self.reasons[column] |= {first + row: reason for row, reason in reasons.items()}
        self.unreadable |= {first + row: reason for row, reason in unreadable.items()}
        for name, matrix in vectors.items():
            self.embeddings[name][first : first + len(records)] = matrix
        self._n_done += len(records)

    def own_seconds(self) -> list[tuple[float, int]]:
        """See `Sheet`."""
        judges = [None if takes_embeddings(one.guard) else self._judges[one.guard.fingerprint] for one in self._contenders]
        return [head if judge is None else (judge.seconds, judge.n_asked) for head, judge in zip(self._head_seconds, judges, strict=True)]

    def counts(self) -> dict[str, Any]:
        """What was read, encoded and judged so far, and what was found in the stores."""
        return {
            "read": self._reads.n,
            "encoders": {
                store.encoder.name: {"encoded": store.n_encoded, "from_store": store.n_found, "guards": _on(self._contenders, name)}
                for name, store in self._stores.items()
            },
            "judges": {
                _on(self._contenders, name)[0]: {"judged": judge.n_asked, "from_store": judge.n_found}
                for name, judge in self._judges.items()
            },
        }


def embed(records: Sequence[Record], store: EmbeddingStore, unreadable: dict[int, str]) -> np.ndarray:
    """(n, d) unit vectors; zero where there is none. Adds rows that cannot be read to `unreadable`."""
    matrix = np.zeros((len(records), store.encoder.dim), np.float32)
    rows = [row for row, record in enumerate(records) if record.content is not None and row not in unreadable]
    if rows:
        # ids are replaced by rows, which are unique whatever the source calls its images
        numbered = [replace(records[row], id=str(row)) for row in rows]
        readable, vectors, failed = store.embed_readable(numbered)
        unreadable |= {int(one.id): one.reason for one in failed}
        matrix[[int(record.id) for record in readable]] = vectors
    for row, record in enumerate(records):
        if record.content is None and record.embedding is not None and len(record.embedding) == store.encoder.dim:
            matrix[row] = record.embedding
    return matrix


def _judge(records: Sequence[Record], judge: JudgmentStore, unreadable: dict[int, str]) -> dict[int, Judgment]:
    rows = [row for row, record in enumerate(records) if row not in unreadable]
    pictures = [row for row in rows if records[row].content is not None]
    judgments = {row: Judgment(math.nan, "looks at images, and the benchmark holds embeddings only") for row in rows}
    contents = [content for row in pictures if (content := records[row].content) is not None]
    for row, outcome in zip(pictures, judge.judge(contents), strict=True):
        if isinstance(outcome, ImageError):
            unreadable[row] = str(outcome)
        else:
            judgments[row] = outcome
    return judgments


def _vectors_for(
    guard: EmbeddingGuard,
    records: Sequence[Record],
    unit: np.ndarray,
    store: EmbeddingStore,
    unreadable: Mapping[int, str],
    encoder_fingerprint: str | None,
    reasons: dict[int, str],
) -> tuple[np.ndarray, np.ndarray]:
    """The embeddings that a guard takes, and their rows; for the other rows a reason is noted."""
    rows = []
    for row, record in enumerate(records):
        if row in unreadable:
            continue
        why = None
        if record.content is None:
            if record.embedding is None or len(record.embedding) != guard.encoder.dim:
                why = f"takes {guard.encoder.dim}-d embeddings, the benchmark holds {0 if record.embedding is None else len(record.embedding)}-d ones"
            elif encoder_fingerprint not in (None, guard.encoder.fingerprint):
                why = "the benchmark's embeddings are of another encoder"
            elif not guard.is_normalized:
                why = "takes embeddings with their length, the benchmark's are unit vectors"
        if why:
            reasons[row] = why
        else:
            rows.append(row)
    chosen = np.array(rows, int)
    matrix = unit[chosen]
    if len(rows) and not guard.is_normalized:
        contents = [content for row in rows if (content := records[row].content) is not None]
        matrix = matrix * store.norms(contents)[:, None]
    return matrix, chosen


def _probabilities(guard: EmbeddingGuard, embeddings: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return torch.sigmoid(guard.logits(torch.from_numpy(np.ascontiguousarray(embeddings))).double()).cpu().numpy()


def _checked(judgment: Judgment) -> tuple[float, str | None]:
    """A score in [0, 1], or NaN with the reason why there is none."""
    if 0 <= judgment.score <= 1:
        return judgment.score, None
    if math.isnan(judgment.score) and judgment.reason:
        return math.nan, judgment.reason
    return math.nan, f"score is {judgment.score}, not a number in [0, 1]"


class _Reads:
    """Counts images read, by any thread."""

    def __init__(self) -> None:
        self.n, self._lock = 0, threading.Lock()

    def add(self) -> None:
        with self._lock:
            self.n += 1


class _Held:
    """Pixels of a block that a second consumer will want."""

    def __init__(self, reads: _Reads, *, keep: bool) -> None:
        self.reads, self.keep, self.room = reads, keep, _HELD_BYTES


class _ReadOnce:
    """A content whose pixels are read when first asked for, and kept while there is room."""

    def __init__(self, content: Content, held: _Held) -> None:
        self._content, self._held = content, held
        self._image: np.ndarray | None = None

    @property
    def key(self) -> str:
        return self._content.key

    def load(self) -> np.ndarray:
        if self._image is not None:
            return self._image
        image = self._content.load()
        self._held.reads.add()
        if self._held.keep and self._held.room >= image.nbytes:
            self._held.room -= image.nbytes
            self._image = image
        return image

    def load_reduced(self, at_least: int) -> np.ndarray:
        """Not kept: nobody else wants these pixels."""
        self._held.reads.add()
        return load(self._content, at_least)


def _on(contenders: Iterable[Contender], fingerprint: str) -> list[str]:
    """Names of the contenders on an encoder, or with a fingerprint of their own."""
    return [one.name for one in contenders if (one.guard.encoder if takes_embeddings(one.guard) else one.guard).fingerprint == fingerprint]
