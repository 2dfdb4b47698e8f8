"""Embeddings that are made once: a read-through store, keyed by the image's bytes and the encoder's fingerprint."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.encoders.base import Encoder, enough
from guardkit.images import load
from guardkit.reading_ahead import read_ahead
from guardkit.schema import Content, ImageError, InputError, Record, Rejected, unreadable
from guardkit.stores import KeyValueStore, of_this_machine

_NORM = "norm:"  # before a content's key: the length of its vector
_UNIT_TOLERANCE = 0.01  # of a vector's length: an encoder may have normalized in half precision
_BATCHES_AHEAD = 2  # of prepared images: the model's next one, and the one that is being read
_MOST_WAITING = 16  # batches of stored vectors that wait for a batch of new ones to be full


@dataclass
class _Wanted:
    """A content whose vector is wanted: what came of it, and whether it is to be made."""

    content: Content
    key: str = ""
    outcome: np.ndarray | ImageError | None = None
    is_missing: bool = False


class EmbeddingStore:
    """Embeds contents, each once: what was embedded before is read from disk.

    A chunk is stored as soon as it is encoded, so a process that is killed loses one chunk at most. Chunks always have
    the encoder's batch size, padded if need be: an image's vector is the same to the last bit whether it was encoded
    alone or with others.

    Args:
        encoder: makes the embeddings.
        cache_dir: where they are kept, one file per encoder; None keeps them in memory.
        keep_norms: keep beside each unit vector the length it had, for heads that take embeddings as the model gave
            them (see `norms`). Vectors stay the same to the last bit; one that was stored without its length by an
            earlier run is made again.
        keeps: False: nothing is kept at all, for `stream` over more images than the memory holds vectors of; without hashes of their bytes.

    Attributes:
        n_encoded: images encoded so far.
        n_found: images found in the store so far.
        n_damaged: stored vectors so far that were none of this encoder's, and were made anew.
        seconds: spent in `embed`, reading and drawing included.
        encode_seconds: of these, in the encoder, for the `n_encoded` images.
    """

    def __init__(self, encoder: Encoder, cache_dir: Path | None, *, keep_norms: bool = False, keeps: bool = True) -> None:
        self.encoder, self.keep_norms, self.keeps = encoder, keep_norms, keeps
        self.n_encoded, self.n_found, self.seconds, self.encode_seconds = 0, 0, 0.0, 0.0
        self._cache_dir = cache_dir
        self._opened: KeyValueStore | None = None
        self._under_way: set[str] = set()  # keys of what is being read, or waits for its batch
        self._failed: dict[str, ImageError] = {}
        self._stopped = threading.Event()
        self._turn = threading.Lock()  # of two threads that want the same image, the second finds it stored

    def __getstate__(self) -> dict[str, Any]:
        """What makes one like it: whoever gets the copy opens the file for itself."""
        names = ("encoder", "keep_norms", "keeps", "_cache_dir")
        return {name: self.__dict__[name] for name in names} | {"machine": platform.node()}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        cache_dir = of_this_machine(state["_cache_dir"], state["machine"])
        self.__dict__.update(EmbeddingStore(state["encoder"], cache_dir, keep_norms=state["keep_norms"], keeps=state["keeps"]).__dict__)

    def like(self, encoder: Encoder) -> EmbeddingStore:
        """One of another encoder in the same place."""
        return EmbeddingStore(encoder, self._cache_dir, keep_norms=self.keep_norms, keeps=self.keeps)

    @property
    def n_damaged(self) -> int:
        """See above."""
        return self._opened.n_damaged if self._opened else 0

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """As long as the block lasts, an `embed` that another thread is in ends after its present chunk, with CancelledError."""
        self._stopped.set()
        try:
            yield
        finally:
            self._stopped.clear()

    def embed(self, contents: Sequence[Content]) -> np.ndarray:
        """(n, d) float32 unit vectors, in order.

        Raises:
            ImageError: an image cannot be read, and is named; what was encoded before it is kept.
            InputError: the encoder returned values that are not finite.
        """
        vectors, failed = self._embed(contents)
        if failed:
            row, error = min(failed.items())
            raise unreadable(contents[row], error) from error
        return vectors

    def embed_readable(self, records: Sequence[Record]) -> tuple[list[Record], np.ndarray, list[Rejected]]:
        """Embeds the records whose images can be read.

        Returns:
            Those records, their (n, d) vectors, and the others with reasons.
        Raises:
            InputError: a record has no image, or the encoder returned values that are not finite.
        """
        contents: list[Content] = []
        for record in records:
            if record.content is None:
                raise InputError(f"{record.id} of source {record.source} is an embedding already; choose a source of images")
            contents.append(record.content)
        vectors, failed = self._embed(contents, skip_unreadable=True)
        readable = [record for row, record in enumerate(records) if row not in failed]
        rejected = [Rejected(records[row].id, str(error)) for row, error in sorted(failed.items())]
        return readable, np.delete(vectors, list(failed), axis=0), rejected

    def norms(self, contents: Sequence[Content]) -> np.ndarray:
        """(n,) float32 lengths of what was embedded before: a unit vector times its length is what the model gave.

        Raises:
            ValueError: the store keeps no norms, or a content was not embedded yet.
        """
        keys = [_NORM + content.key for content in contents]
        found = self._store.get(keys, _norm)
        if not self.keep_norms or not found.keys() >= set(keys):
            raise ValueError("norms are known of what a store with keep_norms=True has embedded")
        return np.array([found[key] for key in keys], np.float32)

    def lacking(self, keys: Iterable[str]) -> set[str]:
        """Those contents, by their keys, whose vectors are not stored, or lack their norms where norms are kept."""
        asked = set(keys)
        return asked - self._complete(list(self._store.known(asked, self._vector)))

    def held(self) -> dict[str, bytes]:
        """Vectors and norms of a store in memory, as another one takes them (`take`)."""
        return self._store.held()

    def take(self, items: Mapping[str, bytes]) -> None:
        """Keeps what another store of the same encoder held. What is there already stays."""
        self._store.put(items)

    def _embed(self, contents: Sequence[Content], *, skip_unreadable: bool = False) -> tuple[np.ndarray, dict[int, ImageError]]:
        """(n, d) vectors, and by row why an image could not be read; such a row is zero. Without `skip_unreadable` it
        stops at the first of them, and the vectors are not to be used."""
        with self._turn:
            started = time.perf_counter()
            try:
                return self._find_or_make(contents, skip_unreadable)
            finally:
                self.seconds += time.perf_counter() - started

    def _find_or_make(self, contents: Sequence[Content], skip_unreadable: bool) -> tuple[np.ndarray, dict[int, ImageError]]:
        vectors = np.zeros((len(contents), self.encoder.dim), np.float32)
        failed: dict[int, ImageError] = {}
        with closing(self.stream(contents)) as outcomes:
            for row, outcome in enumerate(outcomes):
                if not isinstance(outcome, ImageError):
                    vectors[row] = outcome
                    continue
                failed[row] = outcome
                if not skip_unreadable:
                    break
        return vectors, failed

    def stream(self, contents: Iterable[Content], n_bytes: Callable[[Content], int] = lambda _: 0) -> Generator[np.ndarray | ImageError]:
        """The (d,) float32 unit vector of each content, in order, or why it cannot be read; for one thread at a time.

        Images are read and prepared ahead of the model, by several threads, across batches; at most two batches of them are in memory,
        whatever `contents` holds.

        Args:
            contents: any number.
            n_bytes: of a content in memory, see `read_ahead`.
        Raises:
            InputError: the encoder returned values that are not finite.
        """
        size = self.encoder.batch_size
        self._under_way.clear()  # of a stream that was left before its end
        with self._store if self.keeps else nullcontext():
            looked_up = self._looked_up(contents, n_bytes) if self.keeps else (_Wanted(content, is_missing=True) for content in contents)
            prepared = read_ahead(
                looked_up,
                self._read,
                ahead=_BATCHES_AHEAD * size,
                is_needed=lambda one: one.is_missing,
                n_bytes=lambda one: n_bytes(one.content),
            )
            waiting: list[_Wanted] = []  # in order; the next batch among them, and what was found between
            batch: list[tuple[_Wanted, Any]] = []
            with closing(prepared):
                for wanted, image in prepared:
                    waiting.append(wanted)
                    if isinstance(image, ImageError):
                        wanted.outcome = image
                    elif wanted.is_missing:
                        batch.append((wanted, image))
                    if len(batch) == size or len(waiting) >= _MOST_WAITING * size:
                        yield from self._encoded(batch, waiting)
                        batch, waiting = [], []
                yield from self._encoded(batch, waiting)

    def _looked_up(self, contents: Iterable[Content], n_bytes: Callable[[Content], int]) -> Iterator[_Wanted]:
        """Contents with their vectors, as far as these are stored."""
        size = self.encoder.batch_size
        keyed = read_ahead(contents, _key, ahead=_BATCHES_AHEAD * size, n_bytes=n_bytes)  # a key is a hash over a whole file
        with closing(keyed):
            while block := list(islice(keyed, size)):
                yield from self._of_block(block)

    def _of_block(self, block: list[tuple[Content, str | ImageError | None]]) -> list[_Wanted]:
        """The same of a few, at one moment: what is stored a little later was under way now."""
        found = self._store.get([key for _, key in block if isinstance(key, str)], self._vector)
        complete = self._complete(list(found))
        wanted: list[_Wanted] = []
        for content, key in block:
            if not isinstance(key, str) or key in self._failed:
                wanted.append(_Wanted(content, outcome=self._failed[key] if isinstance(key, str) else key))
                continue
            self.n_found += key in complete
            is_missing = key not in complete and key not in self._under_way
            if is_missing:
                self._under_way.add(key)
            wanted.append(_Wanted(content, key, found.get(key), is_missing))
        return wanted

    def _encoded(self, batch: list[tuple[_Wanted, Any]], waiting: list[_Wanted]) -> list[np.ndarray | ImageError]:
        """What came of those that wait, once the batch among them is encoded and stored."""
        if batch:
            if self._stopped.is_set():
                raise CancelledError
            started = time.perf_counter()
            vectors, norms = self._unit_vectors([image for _, image in batch])
            self.encode_seconds += time.perf_counter() - started
            self._check(vectors)
            if self.keeps:
                items = {wanted.key: vector.astype("<f4").tobytes() for (wanted, _), vector in zip(batch, vectors, strict=True)}
                items |= {_NORM + wanted.key: norm.astype("<f4").tobytes() for (wanted, _), norm in zip(batch, norms, strict=False)}
                self._store.put(items)
            self.n_encoded += len(batch)
            for (wanted, _), vector in zip(batch, vectors, strict=True):
                if wanted.outcome is None:  # a vector that only lacked its norm stays what it was, to the last bit
                    wanted.outcome = vector
        for wanted in waiting:
            if wanted.is_missing:
                self._under_way.discard(wanted.key)
                if isinstance(wanted.outcome, ImageError) and self.keeps:
                    self._failed[wanted.key] = wanted.outcome
        again = [wanted for wanted in waiting if wanted.outcome is None]  # the same image came a little earlier
        stored = self._store.get([wanted.key for wanted in again], self._vector) if again else {}
        for wanted in again:
            wanted.outcome = self._failed[wanted.key] if wanted.key in self._failed else stored[wanted.key]
        return [wanted.outcome for wanted in waiting if wanted.outcome is not None]

    def _unit_vectors(self, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(n, d) unit vectors of preprocessed images, and their (n,) lengths before, or (0,) when nobody asks for them."""
        if not self.keep_norms:
            return self.encoder.encode_preprocessed(images, fixed_batch=True), np.zeros(0, np.float32)
        import torch
        from torch.nn.functional import normalize

        raw = torch.from_numpy(self.encoder.encode_preprocessed(images, fixed_batch=True, normalize=False))
        # by the function that encoders use, so that the vector is the same to the last bit as without norms
        return normalize(raw, dim=-1).numpy(), raw.norm(dim=-1).numpy()

    def _read(self, wanted: _Wanted) -> Any:
        # preprocessed at once: a batch of photographs at full size would take gigabytes
        try:
            return self.encoder.preprocess(load(wanted.content, enough(self.encoder)))
        except ImageError as error:
            return error

    def _check(self, vectors: np.ndarray) -> None:
        if vectors.shape[1:] != (self.encoder.dim,) or not _are_unit(vectors):
            raise InputError(
                f"encoder {self.encoder.name} returned embeddings that are not finite unit vectors; check its weights and dtype"
            )

    def _complete(self, keys: list[str]) -> set[str]:
        """Of keys whose vectors are stored, those that have a norm too, where norms are kept."""
        if not self.keep_norms:
            return set(keys)
        return {key.removeprefix(_NORM) for key in self._store.known([_NORM + key for key in keys], _norm)}

    def _vector(self, value: bytes) -> np.ndarray:
        """The (d,) vector that a stored value is. Raises ValueError when it is none."""
        vector = np.frombuffer(value, "<f4")
        if len(vector) != self.encoder.dim or not _are_unit(vector[None]):
            raise ValueError("not a unit vector of this encoder")
        return vector

    @property
    def _store(self) -> KeyValueStore:
        # opened at first use: an encoder's fingerprint may cost a hash over its weights
        if self._opened is None:
            encoder = self.encoder
            about = {
                "encoder": encoder.fingerprint,
                "preprocessing": encoder.preprocessing,
                "dtype": "float32",
                "batch_size": encoder.batch_size,
            }
            # another batch size may round differently, so it has a file of its own
            self._opened = KeyValueStore(self._cache_dir, f"embeddings/{encoder.fingerprint[:16]}_{encoder.batch_size}.sqlite", about)
        return self._opened


def _are_unit(vectors: np.ndarray) -> bool:
    # written so that NaN is not
    return bool((np.abs(np.linalg.norm(vectors, axis=1) - 1) <= _UNIT_TOLERANCE).all())


def _norm(value: bytes) -> np.float32:
    """The length that a stored value is. Raises ValueError when it is none."""
    (norm,) = np.frombuffer(value, "<f4")
    if not 0 < norm < np.inf:
        raise ValueError("not the length of a vector")
    return norm


def _key(content: Content) -> str | ImageError:
    try:
        return content.key
    except ImageError as error:
        return error
