"""Embedding folders as what is decided over: a part is a shard, and its vectors stand for the images, which nobody reads again.

Parts are read as streams, here or in object storage, a few rows at a time. What `embed` could not embed is an input too, with its reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import parse_json
from guardkit.data.columns import WITHOUT_DIRECTION
from guardkit.data.sources.files import printable
from guardkit.embedding_folder import MANIFEST, REJECTED, find_embedding_parts, lacking_metadata, unit_rows
from guardkit.folders import FINISHED, MARK
from guardkit.reading import array_head
from guardkit.schema import InputError
from guardkit.shards.base import Given
from guardkit.shards.files import File, changed, check_id_column
from guardkit.storage import item, joined, read
from guardkit.storage_errors import StorageError

_ROWS = 1024  # of a part in memory
_PATH = "image_path"
_MEND = "copy the folder anew"
_MANIFEST_BYTES = 256 << 20


@dataclass(frozen=True)
class Vectors:
    """A part of an embedding folder, a row an input: a (d,) float32 unit vector, and what the metadata say beside it.

    Attributes:
        vectors, table: the files.
        id_column: of the metadata: names the rows; None: `image_path`, else their number.
    """

    vectors: File
    table: File
    id_column: str | None

    @property
    def name(self) -> str:
        """Of the part, for people."""
        return self.vectors.name

    @property
    def version(self) -> list[str]:
        """Of both files."""
        return [self.vectors.version, self.table.version]

    def count(self) -> int:
        """How many rows there are. Raises InputError as reading does."""
        with _reading(self.vectors), self.vectors.opened() as file:
            return _head(file, self.vectors)[0][0]

    def __iter__(self) -> Iterator[Given]:
        """Raises InputError where nothing says which row is whose: a file is damaged, or has other rows than the other one."""
        with _reading(self.vectors), self.vectors.opened(ahead=True) as file:
            (n, width), dtype, order = _head(file, self.vectors)
            # numbers that lie column by column are no rows before all of them are there
            whole = _numbers(file, dtype, n * width).reshape((n, width), order="F") if order == "F" else None
            number = 0
            for rows in _tables(self.table, self.id_column, n):
                some = slice(number, number + len(rows))
                block = _numbers(file, dtype, len(rows) * width).reshape(-1, width) if whole is None else whole[some]
                for own, vector in zip(rows, unit_rows(block), strict=True):
                    said = own.pop(self.id_column or _PATH, None)
                    name = printable(f"{self.name}#{number}" if said is None or said == "" else str(said))
                    number += 1
                    # a width of 0 has no direction either
                    yield Given(name, vector, "", own) if np.isfinite(vector).any() else Given(name, None, WITHOUT_DIRECTION, own)


@dataclass(frozen=True)
class _OneFile:
    """Rows of which one file knows.

    Attributes:
        file: of them.
    """

    file: File

    @property
    def name(self) -> str:
        """For people."""
        return self.file.name

    @property
    def version(self) -> list[str]:
        """Of the file."""
        return [self.file.version]


@dataclass(frozen=True)
class NotEmbedded(_OneFile):
    """Images that `embed` could not embed, with its reasons and what else was known of them.

    Attributes:
        id_column: see `Vectors`; used where these rows have it.
        n: how many the manifest counts.
    """

    id_column: str | None
    n: int

    def count(self) -> int:
        """How many there are."""
        return self.n

    def __iter__(self) -> Iterator[Given]:
        for own in (row for rows in _tables(self.file, None, self.n) for row in rows):
            name, reason = own.pop("id", None), own.pop("reason", None)
            own.pop("shard", None)  # of the run that embedded
            if self.id_column is not None and own.get(self.id_column) is not None:
                own, name = {_PATH: name, **own}, own.pop(self.id_column)
            yield Given(printable(str(name)), None, str(reason or "it was not embedded"), own)


@dataclass(frozen=True)
class Unmatched(_OneFile):
    """A file of vectors without metadata, or the reverse, in a folder of another tool: rows of which the half is missing."""

    def count(self) -> int:
        """How many rows it has. Raises InputError where it cannot be read."""
        with _reading(self.file), self.file.opened() as file:
            if self.file.ends_with(".npy"):
                return _head(file, self.file)[0][0]
            with pq.ParquetFile(file) as table:
                return int(table.metadata.num_rows)

    def __iter__(self) -> Iterator[Given]:
        other = "metadata" if self.file.ends_with(".npy") else "vectors"
        reason = f"{os.path.basename(self.name)} has no {other} of its number"
        return (Given(f"{self.name}#{number}", None, reason) for number in range(self.count()))


Part = Vectors | NotEmbedded | Unmatched


@dataclass(frozen=True)
class EmbeddingFolder:
    """An embedding folder, looked at but not read.

    Attributes:
        place: where it is, for people.
        encoder: fingerprint of the encoder that made its vectors; None: another tool wrote it, and does not say.
        width: of the vectors; None: no part has any, or nobody has looked yet.
        parts: in order.
    """

    place: str
    encoder: str | None
    width: int | None
    parts: tuple[Part, ...]


def embedding_folder(folder: File, prefix: str = "", id_column: str | None = None) -> EmbeddingFolder | None:
    """The embedding folder that a folder is, one of `guardkit.embed` or of clip-retrieval; None: it holds no vectors.

    Args:
        folder: looked at.
        prefix: of the names of its parts.
        id_column: see `Vectors`.
    Raises:
        InputError: it is not complete, its files do not fit each other or the manifest.
    """
    vectors, tables = _numbered(folder, "img_emb", ".npy"), _numbered(folder, "metadata", ".parquet")
    if not vectors and not (tables and _has(folder, MANIFEST)):
        return None
    if not vectors:
        raise InputError(f"{folder} has metadata/ of an embedding folder, and no vectors in img_emb/; {_MEND}")
    if isinstance(folder.at, Path):
        found = find_embedding_parts(folder.at, with_tables=True, only_matched=True)
        manifest, width = found.manifest, found.width
    else:
        manifest = _manifest(folder)
        width = None if manifest is None else manifest["dim"]
    if manifest is None and not tables:
        raise lacking_metadata(folder)
    odd = sorted(set(vectors) ^ set(tables))
    if odd and (manifest is not None or not set(vectors) & set(tables)):
        raise InputError(f"{folder} has shards {odd} in only one of img_emb/ and metadata/; {_MEND}")
    if manifest is not None and manifest["n_shards"] != len(vectors):
        raise InputError(f"{folder} has {len(vectors)} shards, its {MANIFEST} says {manifest['n_shards']}; {_MEND}")
    parts: list[Part] = []
    for number, file in sorted({**tables, **vectors}.items()):
        file = replace(file, name=prefix + file.name)
        parts.append(Unmatched(file) if number in odd else Vectors(file, tables[number], id_column))
    if manifest is not None and manifest["rejected"]:
        parts.append(NotEmbedded(replace(_beside(folder, REJECTED), name=prefix + REJECTED), id_column, manifest["rejected"]))
    return EmbeddingFolder(str(folder), None if manifest is None else manifest["encoder_fingerprint"], width, tuple(parts))


def _numbered(folder: File, kind: str, end: str) -> dict[int, File]:
    """Files KIND/KIND_<i>END by number, in order."""
    below = _beside(folder, kind)
    if isinstance(below.at, Path) and not below.at.is_dir():
        return {}
    found: dict[int, File] = {}
    for file in below.files():
        match = re.fullmatch(rf"{kind}_(?:.*_)?(\d+){re.escape(end)}", file.name)
        if match is None:
            continue
        number = int(match[1])
        if number in found:
            raise InputError(f"{folder} has {kind}/{file.name} and {found[number].name}, of one number; move one elsewhere")
        found[number] = replace(file, name=f"{kind}/{file.name}", version=_version(file))
    return dict(sorted(found.items()))


def _has(folder: File, name: str) -> bool:
    return (folder.at / name).is_file() if isinstance(folder.at, Path) else item(joined(folder.at, name)) is not None


def _beside(folder: File, name: str) -> File:
    """A file of the folder, whether or not it is there."""
    if isinstance(folder.at, Path):
        return File(name, folder.at / name, changed(Path(os.path.realpath(folder.at / name))))
    url = joined(folder.at, name)
    found = item(url)
    return File(name, url, "" if found is None else found.version)


def _version(file: File) -> str:
    return changed(Path(os.path.realpath(file.at))) if isinstance(file.at, Path) and file.is_link else file.version


def _manifest(folder: File) -> dict[str, Any] | None:
    """That of a folder in object storage, with what is asked of it here; None: another tool wrote the folder."""

    def said(name: str) -> dict[str, Any] | None:
        if not _has(folder, name):
            return None
        file = _beside(folder, name)
        try:
            value = parse_json(read(str(file.at), limit=_MANIFEST_BYTES))
        except StorageError:
            raise
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}); {_MEND}") from error
        if not isinstance(value, dict):
            raise InputError(f"{file} holds no JSON object; {_MEND}")
        return value

    mark, manifest = said(MARK), said(MANIFEST)
    if mark is not None and mark.get("state") != FINISHED:
        raise InputError(f"{folder} is not complete; run python -m guardkit.embed with output_dir={folder} again")
    if manifest is not None:
        wrong = [name for name in ("n_shards", "dim", "rejected") if type(manifest.get(name)) is not int or manifest[name] < 0]
        wrong += ["encoder_fingerprint"] * (not isinstance(manifest.get("encoder_fingerprint"), str))
        if wrong:
            raise InputError(f"{folder}/{MANIFEST} is not as guardkit wrote it ({', '.join(wrong)}); {_MEND}")
    return manifest


# --- reading ----------------------------------------------------------------------------------------------------------


@contextmanager
def _reading(file: File) -> Iterator[None]:
    """What goes wrong with a file, in a line."""
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror or error}); {_MEND}") from error
    # beside ArrowException, pyarrow lets out what the schema of a damaged file leads to, and NumPy what its parser raises
    except Exception as error:
        raise InputError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}); {_MEND}") from error


def _head(file: BinaryIO, name: File) -> tuple[tuple[int, int], np.dtype, str]:
    """Rows and width, type and order of a file of vectors, which is read up to its first number."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    shape, dtype, order = array_head(file, size)
    if dtype.kind != "f" or (len(shape) != 2 and 0 not in shape):
        raise InputError(f"{name} must hold rows of floating-point numbers, got {dtype} of shape {shape}; {_MEND}")
    return (shape[0] if shape else 0, shape[1] if len(shape) == 2 else 0), dtype, order


def _numbers(file: BinaryIO, dtype: np.dtype, n: int) -> np.ndarray:
    data = bytearray()
    while len(data) < n * dtype.itemsize:
        more = file.read(n * dtype.itemsize - len(data))
        if not more:
            raise ValueError("it ends too early")
        data += more
    return np.frombuffer(data, dtype)


def _tables(file: File, id_column: str | None, n: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table that must have n, a few at a time."""
    with _reading(file), file.opened() as opened, pq.ParquetFile(opened) as table:
        if table.metadata.num_rows != n:
            raise InputError(f"{file} has {table.metadata.num_rows} rows, expected are {n}; {_MEND}")
        check_id_column(id_column, table.schema_arrow.names, file)
        batch: pa.RecordBatch
        for batch in table.iter_batches(_ROWS):
            yield batch.to_pylist()
