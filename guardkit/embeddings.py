"""Embeddings that are made once: a read-through store, and folders of embeddings that other CLIP tools can read."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit import __version__
from guardkit.artifacts import KeyValueStore, write_json, written
from guardkit.encoders.base import Encoder
from guardkit.schema import Content, ImageError, InputError, Record, Rejected

MANIFEST, REJECTED = "manifest.json", "rejected.parquet"
UNFINISHED = "manifest.unfinished.json"  # stands in for the manifest while a folder is being written
_LOADERS = 2  # threads that read or draw the next chunk while the model encodes the present one
_BLOCK = 16  # chunks that `embed_readable` hands on at once: enough to read ahead, few enough to hold in memory


class EmbeddingStore:
    """Embeds contents, each once: what was embedded before is read from disk.

    A chunk is stored as soon as it is encoded, so a process that is killed loses one chunk at most. Chunks always have
    the encoder's batch size, padded if need be: an image's vector is the same to the last bit whether it was encoded
    alone or with others.

    Args:
        encoder: makes the embeddings.
        cache_dir: where they are kept, one file per encoder; None keeps them in memory.

    Attributes:
        n_encoded: images encoded so far.
        n_found: images found in the store so far.
        seconds: spent in `embed`, reading and drawing included.
    """

    def __init__(self, encoder: Encoder, cache_dir: Path | None) -> None:
        self.encoder = encoder
        self.n_encoded, self.n_found, self.seconds = 0, 0, 0.0
        self._cache_dir = cache_dir
        self._memory: dict[str, bytes] = {}
        self._disk: KeyValueStore | None = None
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Ends an `embed` that another thread is in after its present chunk, with CancelledError. For good."""
        self._stopped.set()

    def embed(self, contents: Sequence[Content]) -> np.ndarray:
        """(n, d) float32 unit vectors, in order.

        Raises:
            ImageError: an image cannot be read; what was encoded before it is kept.
            InputError: the encoder returned values that are not finite.
        """
        vectors, failed = self._embed(contents)
        if failed:
            row, error = min(failed.items())
            raise ImageError(f"image {row + 1} of {len(contents)} ({_short(contents[row])}): {error}") from error
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
        readable: list[Record] = []
        rejected: list[Rejected] = []
        parts = [np.zeros((0, self.encoder.dim), np.float32)]
        size = _BLOCK * self.encoder.batch_size
        for start in range(0, len(records), size):
            vectors, failed = self._embed(contents[start : start + size], skip_unreadable=True)
            parts.append(np.delete(vectors, list(failed), axis=0))
            for row, record in enumerate(records[start : start + size]):
                if row in failed:
                    rejected.append(Rejected(record.id, str(failed[row])))
                else:
                    readable.append(record)
        return readable, np.concatenate(parts), rejected

    def _embed(self, contents: Sequence[Content], *, skip_unreadable: bool = False) -> tuple[np.ndarray, dict[int, ImageError]]:
        """(n, d) vectors, and by row why an image could not be read; such a row is zero. Without `skip_unreadable` it
        stops at the first of them, and the vectors are not to be used."""
        started = time.perf_counter()
        vectors = np.zeros((len(contents), self.encoder.dim), np.float32)
        failed: dict[int, ImageError] = {}
        try:
            with ThreadPoolExecutor(_LOADERS) as loaders:
                # a key is a hash over a whole file
                keys = [_outcome(future) for future in [loaders.submit(_key, content) for content in contents]]
                found = self._get([key for key in keys if isinstance(key, str)])
                rows: dict[str, list[int]] = {}
                missing: dict[str, Content] = {}
                for row, key in enumerate(keys):
                    if isinstance(key, ImageError):
                        failed[row] = key
                        continue
                    rows.setdefault(key, []).append(row)
                    if key in found:
                        self.n_found += 1
                        vectors[row] = np.frombuffer(found[key], "<f4")
                    else:
                        missing.setdefault(key, contents[row])
                if failed and not skip_unreadable:
                    return vectors, failed
                for key, made in self._encode(list(missing.items()), loaders):
                    if isinstance(made, ImageError):
                        failed |= dict.fromkeys(rows[key], made)
                        if not skip_unreadable:
                            break
                    else:
                        vectors[rows[key]] = made
        finally:
            self.seconds += time.perf_counter() - started
        return vectors, failed

    def _encode(self, missing: list[tuple[str, Content]], loaders: ThreadPoolExecutor) -> Iterator[tuple[str, np.ndarray | ImageError]]:
        size = self.encoder.batch_size
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        ahead = [loaders.submit(content.load) for _, content in chunks[0]] if chunks else []
        for i, chunk in enumerate(chunks):
            if self._stopped.is_set():
                raise CancelledError
            outcomes = [_outcome(future) for future in ahead]
            # the next chunk is read while this one is encoded
            ahead = [loaders.submit(content.load) for _, content in chunks[i + 1]] if i + 1 < len(chunks) else []
            images = {key: image for (key, _), image in zip(chunk, outcomes, strict=True) if not isinstance(image, ImageError)}
            if images:
                vectors = self.encoder.encode_images(list(images.values()), fixed_batch=True)
                self._check(vectors)
                self._put({key: vector.astype("<f4").tobytes() for key, vector in zip(images, vectors, strict=True)})
                self.n_encoded += len(images)
                yield from zip(images, vectors, strict=True)
            yield from ((key, error) for (key, _), error in zip(chunk, outcomes, strict=True) if isinstance(error, ImageError))

    def _check(self, vectors: np.ndarray) -> None:
        if not np.isfinite(vectors).all() or not (np.linalg.norm(vectors, axis=1) > 0.5).all():
            raise InputError(
                f"encoder {self.encoder.name} returned embeddings that are not finite unit vectors; check its weights and dtype"
            )

    def _get(self, keys: list[str]) -> dict[str, bytes]:
        if self._cache_dir is None:
            return {key: self._memory[key] for key in keys if key in self._memory}
        width = 4 * self.encoder.dim
        return {key: value for key, value in self._open(self._cache_dir).get(keys).items() if len(value) == width}

    def _put(self, items: dict[str, bytes]) -> None:
        if self._cache_dir is None:
            self._memory.update(items)
        else:
            self._open(self._cache_dir).put(items)

    def _open(self, cache_dir: Path) -> KeyValueStore:
        if self._disk is None:
            name = self.encoder.fingerprint
            about = {
                "encoder": name,
                "preprocessing": self.encoder.preprocessing,
                "dtype": "float32",
                "batch_size": self.encoder.batch_size,
            }
            # another batch size may round differently, so it has a file of its own
            self._disk = KeyValueStore(Path(cache_dir) / "embeddings" / f"{name[:16]}_{self.encoder.batch_size}.sqlite", about)
        return self._disk


def _key(content: Content) -> str:
    return content.key


def _outcome(future: Future[Any]) -> Any:
    """What it gives, or its ImageError as a value."""
    try:
        return future.result()
    except ImageError as error:
        return error


def _short(content: Content) -> str:
    text = " ".join(repr(content).split())
    return text if len(text) <= 80 else text[:77] + "..."


# --- folders ---------------------------------------------------------------------------------------------------------------


def write_embedding_folder(
    records: Iterable[Record], store: EmbeddingStore, folder: Path, *, rejected: Sequence[Rejected] = (), shard_size: int = 10_000
) -> dict[str, int]:
    """Embeds records into a folder in the layout that clip-retrieval and autofaiss read; the manifest comes last.

    Args:
        records: with contents.
        store: what it holds is not encoded again, so an interrupted run goes on where it was.
        folder: written to; one that another encoder or another tool filled is refused.
        rejected: inputs that were already found unusable, to be listed with the rest.
        shard_size: rows per file.
    Returns:
        Counts: given = written + rejected.
    Raises:
        InputError: the folder holds embeddings of another encoder, or some that guardkit did not write.
    """
    folder = Path(folder)
    _claim(folder, store.encoder)
    refused = list(rejected)
    n_written = n_shards = 0
    stream = iter(records)
    waiting: list[Record] = []
    vectors = np.zeros((0, store.encoder.dim), np.float32)
    block = list(islice(stream, shard_size))
    while block or waiting:
        readable, more, unreadable = store.embed_readable(block)
        refused += unreadable
        waiting += readable
        vectors = np.concatenate([vectors, more])
        block = list(islice(stream, shard_size - len(waiting) % shard_size))
        # a shard is written when it is full, or when nothing more comes
        while len(waiting) >= shard_size or (waiting and not block):
            with written(folder / "img_emb" / f"img_emb_{n_shards}.npy") as temporary:
                np.save(temporary, vectors[:shard_size].astype(np.float16))
            with written(folder / "metadata" / f"metadata_{n_shards}.parquet") as temporary:
                pq.write_table(_metadata(waiting[:shard_size]), temporary)
            n_written, n_shards = n_written + len(waiting[:shard_size]), n_shards + 1
            waiting, vectors = waiting[shard_size:], vectors[shard_size:]
    for stale in [*folder.glob("img_emb/img_emb_*.npy"), *folder.glob("metadata/metadata_*.parquet")]:
        if _number(stale) >= n_shards:
            stale.unlink()
    with written(folder / REJECTED) as temporary:
        pq.write_table(
            pa.table({"id": pa.array([r.id for r in refused], pa.string()), "reason": pa.array([r.reason for r in refused], pa.string())}),
            temporary,
        )
    counts = {"given": n_written + len(refused), "written": n_written, "rejected": len(refused)}
    manifest: dict[str, Any] = {
        "encoder": store.encoder.config | {"name": store.encoder.name},
        "encoder_fingerprint": store.encoder.fingerprint,
        "preprocessing": store.encoder.preprocessing,
        "dim": store.encoder.dim,
        "dtype": "float16",
        "normalized": True,
        "n_shards": n_shards,
        "guardkit_version": __version__,
        **counts,
    }
    write_json(folder / MANIFEST, manifest)
    (folder / UNFINISHED).unlink()
    return counts


def _claim(folder: Path, encoder: Encoder) -> None:
    """Marks a folder as being written, if it is free or ours."""
    marks = [_read_manifest(folder / name) for name in (MANIFEST, UNFINISHED) if (folder / name).is_file()]
    for mark in marks:
        found = mark.get("encoder_fingerprint")
        if found != encoder.fingerprint:
            raise InputError(
                f"{folder} holds embeddings of another encoder ({str(found)[:12]}, not {encoder.fingerprint[:12]}); choose another output_dir"
            )
    if not marks and any(folder.glob("img_emb/*.npy")):
        raise InputError(f"{folder} holds embeddings that another tool wrote (it has no {MANIFEST}); choose another output_dir")
    write_json(folder / UNFINISHED, {"encoder_fingerprint": encoder.fingerprint, "guardkit_version": __version__})
    (folder / MANIFEST).unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); embed the images into another folder") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(manifest).__name__}; embed the images into another folder")
    return manifest


def read_embedding_folder(folder: Path) -> tuple[np.ndarray, pa.Table, dict[str, Any] | None]:
    """Reads an embedding folder, ours or clip-retrieval's.

    Returns:
        (n, d) float32 unit vectors, the metadata table with n rows, and the manifest if there is one.
    Raises:
        InputError: no such folder, shards that do not fit each other, or vectors that are not finite.
    """
    folder = Path(folder)
    if (folder / UNFINISHED).is_file():
        raise InputError(f"{folder} is not complete; run python -m guardkit.embed with output_dir={folder} again")
    manifest = _read_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    vector_files, table_files = _numbered(folder, "img_emb", ".npy"), _numbered(folder, "metadata", ".parquet")
    if not vector_files:
        found = "holds no embeddings" if manifest else "is no embedding folder: img_emb/img_emb_0.npy is missing"
        raise InputError(f"{folder} {found}; write one with python -m guardkit.embed")
    odd = sorted(set(vector_files) ^ set(table_files))
    if odd:
        raise InputError(f"{folder} has shards {odd} in only one of img_emb/ and metadata/; copy the folder anew")
    if manifest and manifest.get("n_shards", len(vector_files)) != len(vector_files):
        raise InputError(f"{folder} has {len(vector_files)} shards, its {MANIFEST} says {manifest['n_shards']}; copy the folder anew")
    vectors: list[np.ndarray] = []
    tables: list[pa.Table] = []
    for number in sorted(vector_files):
        path = vector_files[number]
        try:
            shard = np.load(path, allow_pickle=False)
            table = pq.read_table(table_files[number])
        except (OSError, EOFError, ValueError, pa.ArrowException) as error:
            raise InputError(f"shard {number} of {folder} cannot be read ({error}); copy it anew") from error
        if not isinstance(shard, np.ndarray) or shard.dtype.kind != "f":
            raise InputError(f"{path} must hold floating-point numbers, got {getattr(shard, 'dtype', 'an archive')}; copy the shard anew")
        if shard.ndim != 2 or len(shard) != len(table):
            raise InputError(f"{path} has shape {shard.shape}, its metadata {len(table)} rows; copy the shard anew")
        if vectors and shard.shape[1] != vectors[0].shape[1]:
            raise InputError(f"{path} has {shard.shape[1]} columns, earlier shards {vectors[0].shape[1]}; all must come from one encoder")
        shard = shard.astype(np.float32)
        norms = np.linalg.norm(shard, axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        if len(bad):
            raise InputError(f"{path} row {bad[0]} is not a finite vector ({len(bad)} such rows); embed those images again")
        vectors.append(shard / norms)
        tables.append(table)
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the tables of {folder}/metadata do not fit each other ({error}); all must come from one run") from error
    return np.concatenate(vectors), table, manifest


def _numbered(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """Shards by number, which may be zero-padded."""
    shards: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{kind}/{kind}_*{suffix}")):
        number = _number(path)
        if number in shards or number < 0:
            raise InputError(f"{path} has no number of its own (expected {kind}_<i>{suffix}); move it elsewhere")
        shards[number] = path
    return shards


def _metadata(records: list[Record]) -> pa.Table:
    regions = np.array([record.region or (np.nan,) * 4 for record in records], dtype=float)
    columns: dict[str, Any] = {
        "image_path": [record.id for record in records],
        "label": pa.array([record.label for record in records], pa.int8()),
        "category": pa.array([record.category for record in records], pa.string()),
        "source": [record.source for record in records],
        "group": [record.group for record in records],
        "caption": [record.caption for record in records],
    }
    for i, name in enumerate(("x_min", "y_min", "x_max", "y_max")):
        columns[name] = pa.array(regions[:, i], from_pandas=True)
    return pa.table(columns)


def _number(path: Path) -> int:
    match = re.search(r"_(\d+)$", path.stem)
    return int(match.group(1)) if match else -1
