"""Folders of embeddings that other CLIP tools can read and write: `embed` writes them (`shards.embedding`), `source=embeddings` reads them.

The layout is clip-retrieval's: numbered `.npy` parts beside Parquet tables of the same rows. Ours add a manifest, written
last, that names the encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from guardkit.artifacts import read_json
from guardkit.folders import is_unfinished
from guardkit.reading import map_array, read_array, read_table
from guardkit.schema import InputError

MANIFEST, REJECTED = "manifest.json", "rejected.parquet"
_COPY = "copy the shard anew"
_BLOCK = 512  # records embedded between two looks at the clock


def _read_manifest(path: Path) -> dict[str, Any]:
    return read_json(path, "the manifest of an embedding folder", "embed the images into another folder")


@dataclass(frozen=True)
class StoredEmbeddings:
    """What an embedding folder holds.

    Attributes:
        vectors: (n, d) float32 unit vectors; NaN where a stored one was zero or not finite.
        table: the metadata, n rows.
        manifest: None when another tool wrote the folder.
        parts: (n,) int, the number of each row's file.
    """

    vectors: np.ndarray
    table: pa.Table
    manifest: dict[str, Any] | None
    parts: np.ndarray


def read_embedding_folder(folder: Path) -> tuple[np.ndarray, pa.Table, dict[str, Any] | None]:
    """Vectors, table and manifest of a folder; see `read_stored_embeddings`."""
    stored = read_stored_embeddings(folder)
    return stored.vectors, stored.table, stored.manifest


@dataclass(frozen=True)
class EmbeddingParts:
    """The files of an embedding folder, looked at but not read.

    Attributes:
        folder: they are in.
        manifest: None when another tool wrote the folder.
        vectors: number -> file of vectors, in order.
        tables: number -> file of metadata; of all parts, or of none.
        n_rows: in all.
    """

    folder: Path
    manifest: dict[str, Any] | None
    vectors: dict[int, Path]
    tables: dict[int, Path]
    n_rows: int

    def mapped(self) -> Iterator[np.ndarray]:
        """(n, d) floating-point numbers of each part, where they lie; one after the other, because each is an open file."""
        return (map_array(path, _COPY) for path in self.vectors.values())


def find_embedding_parts(folder: Path, *, with_tables: bool = False) -> EmbeddingParts:
    """Looks at the files of an embedding folder, ours or clip-retrieval's.

    Args:
        folder: of the files.
        with_tables: whether there must be metadata.
    Raises:
        InputError: no such folder, or shards that do not fit each other or the manifest.
    """
    folder = Path(folder)
    if is_unfinished(folder):
        raise InputError(f"{folder} is not complete; run python -m guardkit.embed with output_dir={folder} again")
    manifest = _checked_manifest(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    vector_files, table_files = _numbered(folder, "img_emb", ".npy"), _numbered(folder, "metadata", ".parquet")
    if not vector_files:
        found = "holds no embeddings" if manifest else "is no embedding folder: img_emb/img_emb_0.npy is missing"
        raise InputError(f"{folder} {found}; write one with python -m guardkit.embed")
    odd = sorted(set(vector_files) ^ set(table_files))
    if odd and (table_files or with_tables):
        raise InputError(f"{folder} has shards {odd} in only one of img_emb/ and metadata/; copy the folder anew")
    if manifest and manifest["n_shards"] != len(vector_files):
        raise InputError(f"{folder} has {len(vector_files)} shards, its {MANIFEST} says {manifest['n_shards']}; copy the folder anew")
    width, n_rows = None, 0
    for path in vector_files.values():
        shard = map_array(path, _COPY)
        if shard.dtype.kind != "f":
            raise InputError(f"{path} must hold floating-point numbers, got {shard.dtype}; copy the shard anew")
        if shard.ndim != 2 and len(shard):
            raise InputError(f"{path} has shape {shard.shape}, it must have two dimensions; copy the shard anew")
        if not len(shard):
            continue
        if shard.shape[1] != (width or shard.shape[1]):
            raise InputError(f"{path} has {shard.shape[1]} columns, earlier shards {width}; all must come from one encoder")
        width, n_rows = shard.shape[1], n_rows + len(shard)
    if manifest and width not in (None, manifest["dim"]):
        raise InputError(f"{folder} has vectors of {width} columns, its {MANIFEST} says {manifest['dim']}; copy the folder anew")
    if manifest and n_rows != manifest["written"]:
        raise InputError(f"{folder} holds {n_rows} embeddings, its {MANIFEST} says {manifest['written']}; copy the folder anew")
    return EmbeddingParts(folder, manifest, vector_files, table_files, n_rows)


def read_stored_embeddings(folder: Path) -> StoredEmbeddings:
    """Reads an embedding folder, ours or clip-retrieval's. Empty parts are passed over, as long as one has a row.

    Raises:
        InputError: no such folder, or shards that do not fit each other or the manifest.
    """
    found = find_embedding_parts(folder, with_tables=True)
    vectors: list[np.ndarray] = []
    tables: list[pa.Table] = []
    parts: list[np.ndarray] = []
    for number, path in found.vectors.items():
        shard = read_array(path, _COPY)
        table = read_table(found.tables[number], n_rows=len(shard), mend=_COPY)
        if not len(shard):
            continue
        with np.errstate(over="ignore"):  # of numbers that float32 does not hold
            shard = shard.astype(np.float32)
            norms = np.linalg.norm(shard, axis=1, keepdims=True)
        norms[~np.isfinite(norms) | (norms == 0)] = np.nan
        vectors.append(shard / norms)
        tables.append(table)
        parts.append(np.full(len(table), number))
    if not vectors:
        raise InputError(f"{folder} holds no embeddings, all its parts are empty; write some with python -m guardkit.embed")
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"the tables of {found.folder}/metadata do not fit each other ({error}); all must come from one run") from error
    return StoredEmbeddings(np.concatenate(vectors), table, found.manifest, np.concatenate(parts))


def _checked_manifest(path: Path) -> dict[str, Any]:
    manifest = _read_manifest(path)
    counts = ("n_shards", "dim", "given", "written", "rejected")
    wrong = [name for name in counts if type(manifest.get(name)) is not int or manifest[name] < 0]
    wrong += ["encoder_fingerprint"] * (not isinstance(manifest.get("encoder_fingerprint"), str))
    wrong += ["written + rejected = given"] * (not wrong and manifest["written"] + manifest["rejected"] != manifest["given"])
    if wrong:
        raise InputError(f"{path} is not as guardkit wrote it ({', '.join(wrong)}); copy the folder anew")
    return manifest


def _numbered(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """Shards by number, which may be zero-padded, in order."""
    shards: dict[int, Path] = {}
    for path in sorted(folder.glob(f"{kind}/{kind}_*{suffix}")):
        number = _number(path)
        if number in shards or number < 0:
            raise InputError(f"{path} has no number of its own (expected {kind}_<i>{suffix}); move it elsewhere")
        shards[number] = path
    return dict(sorted(shards.items()))


def _number(path: Path) -> int:
    match = re.search(r"_(\d+)$", path.stem)
    return int(match.group(1)) if match else -1
