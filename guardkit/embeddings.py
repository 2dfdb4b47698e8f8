"""Embeddings that are made once: a read-through store, keyed by the image's bytes and the encoder's fingerprint."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.encoders.base import Encoder
from guardkit.schema import Content, ImageError, InputError, Record, Rejected, unreadable
from guardkit.stores import KeyValueStore

_NORM = "norm:"  # before a content's key: the length of its vector
_UNIT_TOLERANCE = 0.01  # of a vector's length: an encoder may have normalized in half precision
_LOADERS = 2  # threads that read or draw the next chunk while the model encodes the present one


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

    Attributes:
        n_encoded: images encoded so far.
        n_found: images found in the store so far.
        n_damaged: stored vectors so far that were none of this encoder's, and were made anew.
        seconds: spent in `embed`, reading and drawing included.
        encode_seconds: of these, in the encoder, for the `n_encoded` images.
    """

    def __init__(self, encoder: Encoder, cache_dir: Path | None, *, keep_norms: bool = False) -> None:
        self.encoder, self.keep_norms = encoder, keep_norms
        self.n_encoded, self.n_found, self.seconds, self.encode_seconds = 0, 0, 0.0, 0.0
        self._cache_dir = cache_dir
        self._opened: KeyValueStore | None = None
        self._stopped = threading.Event()
        self._turn = threading.Lock()  # of two threads that want the same image, the second finds it stored

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
        with self._store, ThreadPoolExecutor(_LOADERS) as loaders:
            # a key is a hash over a whole file
            keys = [_outcome(future) for future in [loaders.submit(_key, content) for content in contents]]
            found = self._store.get([key for key in keys if isinstance(key, str)], self._vector)
            complete = self._complete(list(found))
            rows: dict[str, list[int]] = {}
            missing: dict[str, Content] = {}
            for row, key in enumerate(keys):
                if isinstance(key, ImageError):
                    failed[row] = key
                    continue
                rows.setdefault(key, []).append(row)
                if key in complete:
                    self.n_found += 1
                    vectors[row] = found[key]
                else:
                    missing.setdefault(key, contents[row])
            if failed and not skip_unreadable:
                return vectors, failed
            for key, made in self._encode(list(missing.items()), loaders):
                if isinstance(made, ImageError):
                    failed |= dict.fromkeys(rows[key], made)
                    if not skip_unreadable:
                        break
                else:  # a vector that only lacked its norm stays what it was, to the last bit
                    vectors[rows[key]] = found.get(key, made)
        return vectors, failed

    def _encode(self, missing: list[tuple[str, Content]], loaders: ThreadPoolExecutor) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        size = self.encoder.batch_size
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        ahead = [loaders.submit(self._read, content) for _, content in chunks[0]] if chunks else []
        for i, chunk in enumerate(chunks):
            if self._stopped.is_set():
                raise CancelledError
            outcomes = [_outcome(future) for future in ahead]
            # the next chunk is read while this one is encoded
            ahead = [loaders.submit(self._read, content) for _, content in chunks[i + 1]] if i + 1 < len(chunks) else []
            images = {key: image for (key, _), image in zip(chunk, outcomes, strict=True) if not isinstance(image, ImageError)}
            if images:
                started = time.perf_counter()
                vectors, norms = self._unit_vectors(list(images.values()))
                self.encode_seconds += time.perf_counter() - started
                self._check(vectors)
                items = {key: vector.astype("<f4").tobytes() for key, vector in zip(images, vectors, strict=True)}
                items |= {_NORM + key: norm.astype("<f4").tobytes() for key, norm in zip(images, norms, strict=False)}
                self._store.put(items)
                self.n_encoded += len(images)
                yield from zip(images, vectors, strict=True)
            yield from ((key, error) for (key, _), error in zip(chunk, outcomes, strict=True) if isinstance(error, ImageError))

    def _unit_vectors(self, images: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """(n, d) unit vectors of preprocessed images, and their (n,) lengths before, or (0,) when nobody asks for them."""
        if not self.keep_norms:
            return self.encoder.encode_preprocessed(images, fixed_batch=True), np.zeros(0, np.float32)
        import torch
        from torch.nn.functional import normalize

        raw = torch.from_numpy(self.encoder.encode_preprocessed(images, fixed_batch=True, normalize=False))
        # by the function that encoders use, so that the vector is the same to the last bit as without norms
        return normalize(raw, dim=-1).numpy(), raw.norm(dim=-1).numpy()

    def _read(self, content: Content) -> Any:
        # preprocessed at once: a batch of photographs at full size would take gigabytes
        return self.encoder.preprocess(content.load())

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


def _key(content: Content) -> str:
    return content.key


def _outcome(future: Future[Any]) -> Any:
    """What it gives, or its ImageError as a value."""
    try:
        return future.result()
    except ImageError as error:
        return error
