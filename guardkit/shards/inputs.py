"""What is embedded or decided over: folders, tar files, Parquet files, lists of paths, as shards, each a bounded piece of work.

Inputs come one after the other, in an order that does not change, and nothing is left out: what cannot be an image is an input too, with
the reason. Names are only ever read, nothing is written under them.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import fingerprint, parse_json
from guardkit.checks import check_path, is_list
from guardkit.data.sources.files import printable
from guardkit.data.sources.tables import read_table
from guardkit.limits import MAX_BYTES
from guardkit.local_copies import local_copy
from guardkit.reading_ahead import read_ahead
from guardkit.schema import Content, ImageError, InputError
from guardkit.storage import check_url, is_url, item, items, joined, local_path, opened, read, unusable_name
from guardkit.storage_errors import ChangedError, MissingError, StorageError, shown

SHARD_INPUTS = 2048  # loose files, or lines of a list, in a shard
_FETCHED_AT_ONCE = 16  # objects of an object storage
_BATCH_ROWS = 64  # of a Parquet file in memory, with their images
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTS = (".txt", ".csv", ".jsonl")
_BESIDE = (".json", ".txt", ".cls")  # what lies beside an image in a shard, and says something of it
_MAX_BESIDE = 1 << 20
_MAX_TOGETHER = 256 << 20  # bytes of images with one name in a shard, that wait for what lies beside them
_MAX_FIELDS = 100  # of the JSON beside an image that become columns; more stay one text
_OF_A_SHARD = (".parquet", "_stats.json")  # what img2dataset writes beside a shard NAME.tar, under the same name


@dataclass(frozen=True)
class Stored:
    """An object in object storage.

    Attributes:
        url: of it.
        version: of when it was listed: another one is not read; None: whichever is there.
        size: in bytes, where it was listed.
    """

    url: str
    version: str | None = None
    size: int = 0

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            ImageError: it is not there, has changed since, or is too large.
            InputError: the storage cannot be asked, which is nothing that another image could do better.
        """
        try:
            return read(self.url, version=self.version, limit=MAX_BYTES)
        except MissingError as error:
            raise ImageError("file does not exist") from error
        except ChangedError as error:
            raise ImageError("it has changed since it was listed") from error


@dataclass(frozen=True)
class Given:
    """One input.

    Attributes:
        id: its path below the folder, its name in the shard after the shard's, its row after the file's; or as the list has it.
        data: encoded bytes, a file, an object, or an image that is read when somebody asks; None: there is none, and `reason` says why.
        reason: see there.
        columns: what else the input says, to be kept beside what comes out.
    """

    id: str
    data: bytes | Path | Stored | Content | None
    reason: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


def fetched(inputs: Iterable[Given]) -> Generator[Given]:
    """The same inputs, in order, objects as their bytes: many are asked for at once, because each takes its time to come."""
    each = read_ahead(inputs, _fetch, ahead=_FETCHED_AT_ONCE, is_needed=_is_stored, n_bytes=n_bytes, n_threads=_FETCHED_AT_ONCE)
    with closing(each):
        for given, found in each:
            yield given if found is None else found


def _is_stored(given: Given) -> bool:
    return isinstance(given.data, Stored)


def n_bytes(given: Given) -> int:
    """Of an input in memory, or of an object that will be."""
    if isinstance(given.data, Stored):
        return given.data.size
    return len(given.data) if isinstance(given.data, bytes) else 0


def _fetch(given: Given) -> Given:
    assert isinstance(given.data, Stored)
    try:
        return replace(given, data=given.data.read())
    except ImageError as error:
        return replace(given, data=None, reason=str(error))


@dataclass(frozen=True)
class Shard:
    """Some of the inputs, which become one piece of the output.

    Attributes:
        number: of its place, from 0.
        name: for people, and the same in every run over the same inputs.
        version: of what it holds; another one means that it changed.
        items: gives its inputs, every time in the same order.
        n: how many there are, where that is known without reading them.
        most: only the first so many count; None: all.
        schema: types of the columns of its inputs; None: they follow from the values.
    """

    number: int
    name: str
    version: str
    items: Iterable[Given]
    n: int | None = None
    most: int | None = None
    schema: pa.Schema | None = None

    def __iter__(self) -> Iterator[Given]:
        return islice(iter(self.items), self.most)


class Inputs:
    """All that was given, shard by shard.

    A tar or Parquet file is a shard; loose files and lines of a list are put together. Beside `NAME.tar` in a folder, `NAME.parquet` and
    `NAME_stats.json` are what img2dataset says of that shard, and no inputs.

    Args:
        places: folders, tar files, Parquet files, or lists (.txt with a path or URL a line, of an image, tar or Parquet file; .csv or .jsonl with
            a column of paths or URLs of images), by path or by URL of an object storage.
        image_column: of Parquet files: the column of encoded images; None: the one there is.
        id_column: of Parquet files and tables of paths: names the rows; None: their number, or the path.
        file_column: of tables of paths.
        outside: a folder, or URL, that must not lie within what is given, because results are written there.
    Raises:
        InputError: a place is not there, or is none of these.
    """

    def __init__(
        self,
        places: str | Path | Sequence[str | Path],
        *,
        image_column: str | None = None,
        id_column: str | None = None,
        file_column: str = "file_name",
        outside: str | Path | None = None,
    ) -> None:
        named: list[str | Path] = list(places) if is_list(places) else [places]  # type: ignore[list-item]
        if not named:
            raise InputError("input is an empty list; give a folder, tar files, Parquet files, or a list of paths")
        self.image_column, self.id_column, self.file_column = image_column, id_column, file_column
        self._places = [_place("input", one) for one in named]
        for place in self._places:
            if place.is_folder and outside is not None and _lies_within(outside, place.at):
                raise InputError(f"output_dir={outside} lies within input={place}, and would be read as well; choose one elsewhere")
            if not place.is_folder and not place.ends_with(*_TAR, *_LISTS, ".parquet"):
                raise InputError(
                    f"input={place} is none of what can be read: a folder, {', '.join(_TAR)}, .parquet, or a list of paths ({', '.join(_LISTS)}); "
                    "for one image give its folder, or call GuardClassifier.predict"
                )
        has_rows = id_column is None or any(
            one.ends_with(".parquet", *(() if place.is_folder else (".csv", ".jsonl")))
            for place in self._places
            for one in (place.files() if place.is_folder else [place])
        )
        if not has_rows:
            raise InputError(
                f"id_column={id_column} names a column of Parquet files and of tables of paths, and input={self._places[0]} has neither; leave it out"
            )

    def __iter__(self) -> Iterator[Given]:
        return chain.from_iterable(self.shards())

    def shards(self, size: int = SHARD_INPUTS, limit: int | None = None) -> Iterator[Shard]:
        """The shards, in order. A tar or Parquet file is read only where a limit must know how many inputs it has.

        Args:
            size: loose files, or lines of a list, in one.
            limit: only the first so many inputs of all.
        """
        left = limit
        for number, (name, version, inputs) in enumerate(self._parts(size)):
            n = len(inputs) if isinstance(inputs, (_Loose, _Listed)) else None
            if left is None:
                yield Shard(number, name, version, inputs, n)
                continue
            n = _counted(inputs, left) if n is None else n
            yield Shard(number, name, version, inputs, min(n, left), left)
            left -= min(n, left)
            if not left:
                return

    def _parts(self, size: int) -> Iterator[tuple[str, str, _Tar | _Rows | _Loose | _Listed]]:
        several = len(self._places) > 1
        for place in self._places:
            prefix = f"{place.name}/" if several else ""
            if place.is_folder:
                yield from self._of_folder(place, prefix, size)
            elif place.ends_with(*_LISTS):
                yield from self._of_list(place, size)
            else:
                yield self._of_file(replace(place, name=prefix + place.name))

    def _of_folder(self, folder: _File, prefix: str, size: int) -> Iterator[tuple[str, str, _Tar | _Rows | _Loose]]:
        files = folder.files()
        there = {one.name for one in files}

        def is_loose(file: _File) -> bool:
            return file.is_link or bool(file.unusable) or not file.ends_with(*_TAR, ".parquet")

        n = 0
        # inputs keep their order: loose files after a shard are others than those before it
        for loose, some in groupby((one for one in files if not _is_of_a_shard(one, there)), is_loose):
            mine = [replace(one, name=prefix + one.name) for one in some]
            if not loose:
                yield from map(self._of_file, mine)
                continue
            for first in range(0, len(mine), size):
                part = tuple(mine[first : first + size])
                name = f"{prefix or folder.name + '/'}, files {n + 1} to {n + len(part)}"
                n += len(part)
                yield name, fingerprint([[one.name, one.version] for one in part]), _Loose(part)

    def _of_file(self, file: _File) -> tuple[str, str, _Tar | _Rows]:
        version = fingerprint([file.version, self.image_column, self.id_column])
        return file.name, version, _Rows(file, self.image_column, self.id_column) if file.ends_with(".parquet") else _Tar(file)

    def _of_list(self, file: _File, size: int) -> Iterator[tuple[str, str, _Tar | _Rows | _Listed]]:
        n = 0
        for is_shard, some in groupby(self._listed(file), lambda row: file.ends_with(".txt") and row.is_shard):
            rows = tuple(some)
            if is_shard:
                for row in rows:
                    assert row.at is not None
                    yield self._of_file(replace(_place(f"a line of input={file}", row.at), name=row.name))
                continue
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                said = [[row.name, str(row.at), row.version] for row in part]
                name = f"{file.name}, {n + 1} to {n + len(part)}"
                n += len(part)
                yield name, fingerprint(said), _Listed(part)

    def _listed(self, file: _File) -> list[_Row]:
        path = file.at if isinstance(file.at, Path) else local_copy(file.at)
        if file.ends_with(".txt"):
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")  # a name may hold U+2028, at which splitlines() ends
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"input={file} cannot be read ({error}); give a list of paths in UTF-8") from error
            rows: list[dict[str, Any]] = [{self.file_column: line.strip()} for line in lines if line.strip()]
        else:
            names, rows = read_table(path, self.file_column)
            if self.file_column not in names:
                raise InputError(f"input={file} has no column {self.file_column!r}; it has {', '.join(names) or 'none'}; set file_column")
            _check_id_column(self.id_column, names, file)
            rows = [row for row in rows if row]
        found: list[_Row] = []
        for number, row in enumerate(rows, 1):
            said = str(row.get(self.file_column) or "").strip()
            own = {key: value for key, value in row.items() if key not in (self.file_column, self.id_column)}
            name = str(row[self.id_column]) if self.id_column and row.get(self.id_column) is not None else said or f"row {number}"
            found.append(_Row(printable(name), _beside(file.at, said), own))
        return found


# --- what shards are made of: plain values, which workers elsewhere are sent --------------------------------------------------


@dataclass(frozen=True)
class _File:
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
            with open(self.at, "rb") as file:
                yield file
        else:
            with opened(self.at, version=self.version or None, ahead=ahead) as file:
                yield file

    def given(self) -> Given:
        """It, as an input."""
        if self.is_link or self.unusable:
            return Given(self.name, None, "a link, which is not followed" if self.is_link else self.unusable)
        return Given(self.name, self.at if isinstance(self.at, Path) else Stored(self.at, self.version or None, self.size))

    def files(self) -> list[_File]:
        """Every file and link below a folder, hidden ones too, in one order wherever it is: of each folder first the files, then the folders, by name.

        Raises:
            InputError: a folder cannot be listed.
        """
        if isinstance(self.at, Path):
            return list(_walked(self.at))
        return [
            _File(printable(one.name), one.url, one.version, unusable=unusable_name(one.name) or "", size=one.size)
            for one in sorted(items(self.at), key=lambda one: _in_order(one.name))
        ]


def _place(setting: str, given: str | Path) -> _File:
    """What a setting names, which must be there."""
    path = None
    if is_url(given):
        url = check_url(setting, str(given))
        path = local_path(url)
        if path is None:
            found = item(url)
            if found is None and not items(url):
                raise InputError(f"{setting}={shown(url)} is not there; give a folder, a tar file, a Parquet file, or a list of paths")
            return _File(printable(url.rpartition("/")[2]), url, "" if found is None else found.version, is_folder=found is None)
    path = path or check_path(setting, given)
    if not path.exists():
        raise InputError(f"{setting}={path} is not there; give a folder, a tar file, a Parquet file, or a list of paths")
    return _File(printable(path.name), path, _changed(path), is_folder=path.is_dir())


def _lies_within(place: str | Path, folder: str | Path) -> bool:
    if isinstance(folder, Path):
        path = local_path(check_url("output_dir", str(place))) if is_url(place) else Path(place)
        return path is not None and path.resolve().is_relative_to(folder.resolve())
    return is_url(place) and f"{str(place).rstrip('/')}/".startswith(f"{folder}/")


def _beside(file: Path | str, said: str) -> Path | str | None:
    """The file or object that a line of a list means; relative ones lie beside the list."""
    if not said:
        return None
    if is_url(said):
        url = check_url("a line of input", said)
        return local_path(url) or url
    return file.parent / os.path.expanduser(said) if isinstance(file, Path) else joined(file.rpartition("/")[0], said)


def _in_order(name: str) -> list[tuple[int, str]]:
    *folders, last = name.split("/")
    return [*((1, one) for one in folders), (0, last)]


@dataclass(frozen=True)
class _Loose:
    """Files, each an input."""

    files: tuple[_File, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Given]:
        return (one.given() for one in self.files)


@dataclass(frozen=True)
class _Row:
    """A line of a list."""

    name: str
    at: Path | str | None
    own: Mapping[str, Any]

    @property
    def is_shard(self) -> bool:
        return str(self.at).lower().endswith((*_TAR, ".parquet"))

    @property
    def version(self) -> str:
        """Of a file; an object is asked when it is read."""
        return _changed(self.at) if isinstance(self.at, Path) else ""


@dataclass(frozen=True)
class _Listed:
    """Lines of a list, each an input."""

    rows: tuple[_Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Given]:
        for row in self.rows:
            yield Given(row.name, Stored(row.at) if isinstance(row.at, str) else row.at, "no file name", row.own)


@dataclass(frozen=True)
class _Rows:
    """A Parquet file, a row an input."""

    file: _File
    image_column: str | None
    id_column: str | None

    def __iter__(self) -> Iterator[Given]:
        name = self.file.name
        try:
            with self.file.opened() as opened, pq.ParquetFile(opened) as file:
                schema = file.schema_arrow
                column = self._find_images(schema)
                _check_id_column(self.id_column, schema.names, self.file)
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS):
                    others = batch.drop_columns([column]).to_pylist()
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
        found = [one.name for one in schema if _may_hold_images(one.type)]
        if len(found) != 1:
            which = f"several that may hold images ({', '.join(found)})" if found else "no column of encoded images"
            raise InputError(f"input={self.file} has {which}; it has {', '.join(schema.names)}; set image_column")
        return found[0]


@dataclass(frozen=True)
class _Tar:
    """A tar file: each image with what lies beside it under the same name, as shards of webdataset and img2dataset have it."""

    file: _File

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


def _check_id_column(column: str | None, names: Sequence[str], file: _File) -> None:
    if column is not None and column not in names:
        raise InputError(f"input={file} has no column {column!r}; it has {', '.join(names)}; set id_column")


def _may_hold_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(one.name == "bytes" and _may_hold_images(one.type) for one in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _image(cell: pa.Scalar) -> tuple[bytes | None, str]:
    value = cell.as_py()
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if isinstance(value, bytes):
        return value, ""
    return None, "no image in this row" if value is None else f"expected encoded bytes, got {type(value).__name__}"


# --- files ------------------------------------------------------------------------------------------------------------


def _changed(path: Path) -> str:
    """What tells one version of a file from another: size, time of change; "" of one that is not there."""
    try:
        status = path.lstat()
    except (OSError, ValueError):
        return ""
    return f"{status.st_size}-{status.st_mtime_ns}"


def _is_of_a_shard(file: _File, there: Set[str]) -> bool:
    end = next((end for end in _OF_A_SHARD if file.name.endswith(end)), None)
    if end is None or file.name.removesuffix(end) + ".tar" not in there:
        return False
    if end != ".parquet":
        return True
    try:
        with file.opened() as opened, pq.ParquetFile(opened) as table:
            return not any(_may_hold_images(one.type) for one in table.schema_arrow)
    except (pa.ArrowException, OSError):
        return True


def _counted(inputs: Iterable[Given], most: int) -> int:
    """How many inputs there are, up to `most`."""
    if isinstance(inputs, _Rows):
        try:
            with inputs.file.opened() as opened, pq.ParquetFile(opened) as file:
                return int(file.metadata.num_rows)
        except (pa.ArrowException, OSError):
            return 1  # the input that says so
    return sum(1 for _ in islice(iter(inputs), most))


def _walked(folder: Path) -> Iterator[_File]:
    def unlisted(error: OSError) -> None:
        raise InputError(
            f"input={folder} holds {printable(str(error.filename))}, which cannot be listed ({error.strerror}); make it readable, or leave it out"
        )

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        links = {one for one in folders if os.path.islink(os.path.join(parent, one))}
        folders[:] = sorted(one for one in folders if one not in links)
        for one in sorted([*files, *links]):
            path = Path(parent) / one
            yield _File(printable(path.relative_to(folder).as_posix()), path, _changed(path), is_link=one in links or path.is_symlink())
