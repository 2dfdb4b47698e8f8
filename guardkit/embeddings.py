"""Embeddings that are made once: a read-through store, and folders of embeddings that other CLIP tools can read."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
_LOADERS = 2  # threads that read or draw the next chunk while the model encodes the present one


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

    def embed(self, contents: Sequence[Content]) -> np.ndarray:
        """(n, d) float32 unit vectors, in order.

        Raises:
            ImageError: an image cannot be read; what was encoded before it is kept.
            InputError: the encoder returned values that are not finite.
        """
        started = time.perf_counter()
        keys = [content.key for content in contents]
        found = self._get(keys)
        missing: dict[str, Content] = {key: content for key, content in zip(keys, contents, strict=True) if key not in found}
        self.n_found += len(keys) - len(missing)
        found |= dict(self._encode(list(missing.items())))
        self.seconds += time.perf_counter() - started
        if not keys:
            return np.zeros((0, self.encoder.dim), np.float32)
        return np.stack([np.frombuffer(found[key], "<f4") for key in keys]).astype(np.float32)

    def embed_readable(self, records: Sequence[Record]) -> tuple[list[Record], np.ndarray, list[Rejected]]:
        """Embeds the records whose images can be read.

        Returns:
            Those records, their (n, d) vectors, and the others with reasons.
        """
        readable: list[Record] = []
        rejected: list[Rejected] = []
        vectors: list[np.ndarray] = []
        for start in range(0, len(records), self.encoder.batch_size):
            chunk = list(records[start : start + self.encoder.batch_size])
            while chunk:
                try:
                    vectors.append(self.embed([_Named(record) for record in chunk]))
                    readable += chunk
                    break
                except _Unreadable as error:
                    rejected.append(Rejected(error.record.id, str(error)))
                    chunk = [record for record in chunk if record is not error.record]
        return readable, np.concatenate(vectors) if vectors else np.zeros((0, self.encoder.dim), np.float32), rejected

    def _encode(self, missing: list[tuple[str, Content]]) -> Iterator[tuple[str, bytes]]:
        size = self.encoder.batch_size
        chunks = [missing[start : start + size] for start in range(0, len(missing), size)]
        with ThreadPoolExecutor(_LOADERS) as loaders:
            ahead = [loaders.submit(content.load) for _, content in chunks[0]] if chunks else []
            for i, chunk in enumerate(chunks):
                images = [future.result() for future in ahead]
                # the next chunk is read while this one is encoded
                ahead = [loaders.submit(content.load) for _, content in chunks[i + 1]] if i + 1 < len(chunks) else []
                vectors = self.encoder.encode_images(images, fixed_batch=True)
                self._check(vectors)
                items = {key: vector.astype("<f4").tobytes() for (key, _), vector in zip(chunk, vectors, strict=True)}
                self._put(items)
                self.n_encoded += len(items)
                yield from items.items()

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


class _Unreadable(ImageError):
    def __init__(self, record: Record, reason: str) -> None:
        super().__init__(reason)
        self.record = record


class _Named:
    """A record's content whose errors say which record it was."""

    def __init__(self, record: Record) -> None:
        self._record = record

    @property
    def key(self) -> str:
        try:
            assert self._record.content is not None
            return self._record.content.key
        except ImageError as error:
            raise _Unreadable(self._record, str(error)) from error

    def load(self) -> np.ndarray:
        try:
            assert self._record.content is not None
            return self._record.content.load()
        except ImageError as error:
            raise _Unreadable(self._record, str(error)) from error


# --- folders ---------------------------------------------------------------------------------------------------------------


def write_embedding_folder(
    records: Iterable[Record], store: EmbeddingStore, folder: Path, *, rejected: Sequence[Rejected] = (), shard_size: int = 10_000
) -> dict[str, int]:
    """Embeds records into a folder in the layout that clip-retrieval and autofaiss read; the manifest comes last.

    Args:
        records: with contents.
        store: what it holds is not encoded again, so an interrupted run goes on where it was.
        folder: written to; one that another encoder filled is refused.
        rejected: inputs that were already found unusable, to be listed with the rest.
        shard_size: rows per file.
    Returns:
        Counts: given = written + rejected.
    Raises:
        InputError: the folder holds embeddings of another encoder.
    """
    folder = Path(folder)
    fingerprint = store.encoder.fingerprint
    if (folder / MANIFEST).is_file():
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("encoder_fingerprint")
        if found != fingerprint:
            raise InputError(
                f"{folder} holds embeddings of another encoder ({str(found)[:12]}, not {fingerprint[:12]}); choose another output_dir"
            )
        (folder / MANIFEST).unlink()
    refused = list(rejected)
    n_written = n_shards = 0
    stream = iter(records)
    while shard := list(islice(stream, shard_size)):
        readable, vectors, unreadable = store.embed_readable(shard)
        refused += unreadable
        if not readable:
            continue
        with written(folder / "img_emb" / f"img_emb_{n_shards}.npy") as temporary:
            np.save(temporary, vectors.astype(np.float16))
        with written(folder / "metadata" / f"metadata_{n_shards}.parquet") as temporary:
            pq.write_table(_metadata(readable), temporary)
        n_written, n_shards = n_written + len(readable), n_shards + 1
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
        "encoder_fingerprint": fingerprint,
        "preprocessing": store.encoder.preprocessing,
        "dim": store.encoder.dim,
        "dtype": "float16",
        "normalized": True,
        "n_shards": n_shards,
        "guardkit_version": __version__,
        **counts,
    }
    write_json(folder / MANIFEST, manifest)
    return counts


def read_embedding_folder(folder: Path) -> tuple[np.ndarray, pa.Table, dict[str, Any] | None]:
    """Reads an embedding folder, ours or clip-retrieval's.

    Returns:
        (n, d) float32 unit vectors, the metadata table with n rows, and the manifest if there is one.
    Raises:
        InputError: no such folder, shards that do not fit each other, or vectors that are not finite.
    """
    folder = Path(folder)
    vector_files = {_number(path): path for path in folder.glob("img_emb/img_emb_*.npy")}
    table_files = {_number(path): path for path in folder.glob("metadata/metadata_*.parquet")}
    if not vector_files:
        raise InputError(f"{folder} is no embedding folder: img_emb/img_emb_0.npy is missing; write one with python -m guardkit.embed")
    if set(vector_files) != set(table_files):
        odd = sorted(set(vector_files) ^ set(table_files))
        raise InputError(f"{folder} has shards {odd} in only one of img_emb/ and metadata/; copy the folder anew")
    vectors: list[np.ndarray] = []
    tables: list[pa.Table] = []
    for number in sorted(vector_files):
        path = vector_files[number]
        try:
            shard = np.load(path, allow_pickle=False).astype(np.float32)
            table = pq.read_table(table_files[number])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise InputError(f"shard {number} of {folder} cannot be read ({error}); copy it anew") from error
        if shard.ndim != 2 or len(shard) != len(table):
            raise InputError(f"{path} has shape {shard.shape}, its metadata {len(table)} rows; copy the shard anew")
        if vectors and shard.shape[1] != vectors[0].shape[1]:
            raise InputError(f"{path} has {shard.shape[1]} columns, earlier shards {vectors[0].shape[1]}; all must come from one encoder")
        norms = np.linalg.norm(shard, axis=1, keepdims=True)
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        if len(bad):
            raise InputError(f"{path} row {bad[0]} is not a finite vector ({len(bad)} such rows); embed those images again")
        vectors.append(shard / norms)
        tables.append(table)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) if (folder / MANIFEST).is_file() else None
    return np.concatenate(vectors), pa.concat_tables(tables, promote_options="permissive"), manifest


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
