"""The files of each kind that inputs come from: loose ones, tar and Parquet files, lists of paths. Plain values, which workers elsewhere are sent.

Inputs come one after the other, in an order that does not change, and nothing is left out: what cannot be an image is an input too, with
the reason. Names are only ever read, nothing is written under them.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import open_regular, parse_json
from guardkit.checks import check_path
from guardkit.data.sources.files import printable
from guardkit.limits import MAX_BYTES
from guardkit.schema import InputError
from guardkit.shards.base import Given, Stored
from guardkit.shards.columns import rows_of, value_of
from guardkit.storage import check_url, is_url, item, items, joined, local_path, opened, unusable_name
from guardkit.storage_errors import StorageError, shown

_BATCH_ROWS = 64  # of a Parquet file in memory, with their images
TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_BESIDE = (".json", ".txt", ".cls")  # what lies beside an image in a shard, and says something of it
_MAX_BESIDE = 1 << 20
_MAX_TOGETHER = 256 << 20  # bytes of images with one name in a shard, that wait for what lies beside them
_MAX_FIELDS = 100  # of the JSON beside an image that become columns; more stay one text


@dataclass(frozen=True)
class File:
    """A file or folder, here or in object storage.

    Attributes:
        name: of its inputs, or before theirs.
        at: path or URL.
        version: of its bytes; another one means that they changed.
        is_folder, is_link: see there.
        unusable: why its name is none that a file may have; "" where it is.
        size: of an object, in bytes.
    """

    name: str
    at: Path | str
    version: str = ""
    is_folder: bool = False
    is_link: bool = False
    unusable: str = ""
    size: int = 0

    def __str__(self) -> str:
        return str(self.at)

    def ends_with(self, *ends: str) -> bool:
        return str(self.at).lower().endswith(ends)

    @contextmanager
    def opened(self, *, ahead: bool = False) -> Iterator[BinaryIO]:
        """To read; with `ahead` from front to end."""
        if isinstance(self.at, Path):
            with open_regular(self.at) as file:
                yield file
        else:
            with opened(self.at, version=self.version or None, ahead=ahead) as file:
                yield file

    def given(self) -> Given:
        """It, as an input."""
        if self.is_link or self.unusable:
            return Given(self.name, None, "a link, which is not followed" if self.is_link else self.unusable)
        return Given(self.name, self.at if isinstance(self.at, Path) else Stored(self.at, self.version or None, self.size))

    def files(self) -> list[File]:
        """Every file and link below a folder, hidden ones too, in one order wherever it is: of each folder first the files, then the folders, by name.

        Raises:
            InputError: a folder cannot be listed.
        """
        if isinstance(self.at, Path):
            return list(_walked(self.at))
        return [
            File(printable(one.name), one.url, one.version, unusable=unusable_name(one.name) or "", size=one.size)
            for one in sorted(items(self.at), key=lambda one: _in_order(one.name))
        ]


def place_of(setting: str, given: str | Path) -> File:
    """What a setting names, which must be there."""
    path = None
    if is_url(given):
        url = check_url(setting, str(given))
        path = local_path(url)
        if path is None:
            found = item(url)
            if found is None and not items(url):
                raise InputError(f"{setting}={shown(url)} is not there; give a folder, a tar file, a Parquet file, or a list of paths")
            return File(printable(url.rpartition("/")[2]), url, "" if found is None else found.version, is_folder=found is None)
    path = path or check_path(setting, given)
    if not path.exists():
        raise InputError(f"{setting}={path} is not there; give a folder, a tar file, a Parquet file, or a list of paths")
    return File(printable(path.name), path, changed(path), is_folder=path.is_dir())


def beside(file: Path | str, said: str) -> Path | str:
    """The file or object that a line of a list means; relative ones lie beside the list. Raises InputError of a URL of no storage."""
    if is_url(said):
        url = check_url("a line of input", said)
        return local_path(url) or url
    return file.parent / os.path.expanduser(said) if isinstance(file, Path) else joined(file.rpartition("/")[0], said)


def _in_order(name: str) -> list[tuple[int, str]]:
    *folders, last = name.split("/")
    return [*((1, one) for one in folders), (0, last)]


@dataclass(frozen=True)
class Loose:
    """Files, each an input."""

    files: tuple[File, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Given]:
        return (one.given() for one in self.files)


@dataclass(frozen=True)
class Row:
    """A line of a list.

    Attributes:
        name: for people.
        at: what it means; None: nothing.
        own: its other columns.
        why: it means nothing.
    """

    name: str
    at: Path | str | None
    own: Mapping[str, Any]
    why: str = ""

    @property
    def is_shard(self) -> bool:
        return str(self.at).lower().endswith((*TAR, ".parquet"))

    @property
    def version(self) -> str:
        """Of a file; an object is asked when it is read."""
        return changed(self.at) if isinstance(self.at, Path) else ""


@dataclass(frozen=True)
class Listed:
    """Lines of a list, each an input."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Given]:
        for row in self.rows:
            yield Given(row.name, Stored(row.at) if isinstance(row.at, str) else row.at, row.why, row.own)


@dataclass(frozen=True)
class Rows:
    """A Parquet file, a row an input."""

    file: File
    image_column: str | None
    id_column: str | None

    def __iter__(self) -> Iterator[Given]:
        name = self.file.name
        try:
            with self.file.opened() as opened, pq.ParquetFile(opened) as file:
                schema = file.schema_arrow
                column = self._find_images(schema)
                check_id_column(self.id_column, schema.names, self.file)
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS):
                    others = rows_of(batch.drop_columns([column]))
                    images = batch.column(column)
                    for row in range(batch.num_rows):
                        own = others[row]
                        said = own.pop(self.id_column, None) if self.id_column else None
                        identity = f"{name}#{number}" if said is None else str(said)
                        number += 1
                        yield Given(printable(identity), *_image(images[row]), own)
        except (pa.ArrowException, OSError) as error:
            yield Given(name, None, f"cannot be read as Parquet: {' '.join(str(error).split())[:120]}")

    def _find_images(self, schema: pa.Schema) -> str:
        if self.image_column is not None:
            if self.image_column not in schema.names:
                raise InputError(
                    f"input={self.file} has no column {self.image_column!r}; it has {', '.join(schema.names)}; set image_column"
                )
            return self.image_column
        found = [one.name for one in schema if may_hold_images(one.type)]
        if len(found) != 1:
            which = f"several that may hold images ({', '.join(found)})" if found else "no column of encoded images"
            raise InputError(f"input={self.file} has {which}; it has {', '.join(schema.names)}; set image_column")
        return found[0]


@dataclass(frozen=True)
class Tar:
    """A tar file: each image with what lies beside it under the same name, as shards of webdataset and img2dataset have it."""

    file: File

    def __iter__(self) -> Iterator[Given]:
        name = self.file.name
        try:
            with self.file.opened(ahead=True) as opened, tarfile.open(fileobj=opened, mode="r|*") as tar:
                key, images, beside = "", list[Given](), dict[str, Any]()
                for member in tar:
                    if member.isdir():
                        continue
                    identity = f"{name}/{printable(member.name)}"
                    mine = os.path.join(os.path.dirname(member.name), os.path.basename(member.name).split(".")[0])
                    if mine != key or sum(len(one.data) for one in images if isinstance(one.data, bytes)) > _MAX_TOGETHER:
                        yield from _with(images, beside)
                        key, images, beside = mine, [], {}
                    kind = os.path.splitext(member.name)[1].lower()
                    if not member.isreg():
                        images.append(Given(identity, None, "no regular file in the shard"))
                    elif kind in _BESIDE and member.size <= _MAX_BESIDE:
                        beside = beside | {kind.removeprefix("."): _read(tar, member)}
                    elif member.size > MAX_BYTES:
                        images.append(Given(identity, None, f"{member.size} encoded bytes are more than {MAX_BYTES}"))
                    else:
                        images.append(Given(identity, _read(tar, member)))
                yield from _with(images, beside)
        except StorageError:
            raise  # the storage fails, and not the shard
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            yield Given(name, None, f"the shard ends here: it cannot be read on ({reason})")


def _with(images: Sequence[Given], beside: Mapping[str, bytes]) -> Iterator[Given]:
    """The images of one name in a shard, with the columns that follow from what lies beside them."""
    columns: dict[str, Any] = {}
    for kind, data in beside.items():
        said = data.decode("utf-8", "replace")
        fields = _fields(data) if kind == "json" else None
        columns |= {"caption" if kind == "txt" else kind: said} if fields is None else fields
    if "json" in beside and "txt" in beside and (fields := _fields(beside["json"])) and fields.get("caption") is not None:
        columns["caption"] = fields["caption"]  # img2dataset says it twice
    return (replace(one, columns=columns) for one in images)


def _fields(data: bytes) -> dict[str, Any] | None:
    """The fields of a JSON object, what is nested as text; None: it is none, or has more than become columns."""
    try:
        value = parse_json(data)
    except ValueError:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
        return None
    return {name: json.dumps(one, ensure_ascii=False) if isinstance(one, (dict, list)) else one for name, one in value.items() if name}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


def check_id_column(column: str | None, names: Sequence[str], file: File) -> None:
    if column is not None and column not in names:
        raise InputError(f"input={file} has no column {column!r}; it has {', '.join(names)}; set id_column")


def may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(one.name == "bytes" and may_hold_images(one.type) for one in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image(cell: pa.Scalar) -> tuple[bytes | None, str]:
    if isinstance(cell, pa.StructScalar) and cell.is_valid and "bytes" in cell.type.names:
        cell = cell["bytes"]  # what lies beside it may be damaged
    value = value_of(cell)
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value, ""
    return None, "no image in this row" if value is None else f"expected encoded bytes, got {type(value).__name__}"


def changed(path: Path) -> str:
    """What tells one version of a file from another: size, time of change; "" of one that is not there."""
    try:
        status = path.lstat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _walked(folder: Path) -> Iterator[File]:
    def unlisted(error: OSError) -> None:
        raise InputError(
            f"input={folder} holds {printable(str(error.filename))}, which cannot be listed ({error.strerror}); make it readable, or leave it out"
        )

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        links = {one for one in folders if os.path.islink(os.path.join(parent, one))}
        folders[:] = sorted(one for one in folders if one not in links)
        for one in sorted([*files, *links]):
            path = Path(parent) / one
            yield File(printable(path.relative_to(folder).as_posix()), path, changed(path), is_link=one in links or path.is_symlink())
