"""What is embedded or decided over: folders, tar files, Parquet files, lists of paths, as shards, each a bounded piece of work.

Inputs come one after the other, in an order that does not change, and nothing is left out: what cannot be an image is an input too, with
the reason. Names are only ever read, nothing is written under them.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import fingerprint, parse_json
from guardkit.checks import check_path, is_list
from guardkit.data.sources.files import printable
from guardkit.data.sources.tables import read_table
from guardkit.limits import MAX_BYTES
from guardkit.schema import Content, InputError

SHARD_INPUTS = 2048  # loose files, or lines of a list, in a shard
_BATCH_ROWS = 64  # of a Parquet file in memory, with their images
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTS = (".txt", ".csv", ".jsonl")
_BESIDE = (".json", ".txt", ".cls")  # what lies beside an image in a shard, and says something of it
_MAX_BESIDE = 1 << 20
_MAX_TOGETHER = 256 << 20  # bytes of images with one name in a shard, that wait for what lies beside them
_MAX_FIELDS = 100  # of the JSON beside an image that become columns; more stay one text
_OF_A_SHARD = (".parquet", "_stats.json")  # what img2dataset writes beside a shard NAME.tar, under the same name


@dataclass(frozen=True)
class Given:
    """One input.

    Attributes:
        id: its path below the folder, its name in the shard after the shard's, its row after the file's; or as the list has it.
        data: encoded bytes, a file, or an image that is read when somebody asks; None: there is none, and `reason` says why.
        reason: see there.
        columns: what else the input says, to be kept beside what comes out.
    """

    id: str
    data: bytes | Path | Content | None
    reason: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


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
        places: folders, tar files, Parquet files, or lists of paths (.txt with a path a line; .csv or .jsonl with a column of them).
        image_column: of Parquet files: the column of encoded images; None: the one there is.
        id_column: of Parquet files and tables of paths: names the rows; None: their number, or the path.
        file_column: of tables of paths.
        outside: a folder that must not lie within what is given, because results are written there.
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
        outside: Path | None = None,
    ) -> None:
        named = list(places) if is_list(places) else [places]
        if not named:
            raise InputError("input is an empty list; give a folder, tar files, Parquet files, or a list of paths")
        self.places = [check_path("input", place) for place in named]
        self.image_column, self.id_column, self.file_column = image_column, id_column, file_column
        for place in self.places:
            if not place.exists():
                raise InputError(f"input={place} is not there; give a folder, a tar file, a Parquet file, or a list of paths")
            if place.is_dir() and outside is not None and outside.resolve().is_relative_to(place.resolve()):
                raise InputError(f"output_dir={outside} lies within input={place}, and would be read as well; choose one elsewhere")
            if not place.is_dir() and not place.name.lower().endswith((*_TAR, *_LISTS, ".parquet")):
                raise InputError(
                    f"input={place} is none of what can be read: a folder, {', '.join(_TAR)}, .parquet, or a list of paths ({', '.join(_LISTS)}); "
                    "for one image give its folder, or call GuardClassifier.predict"
                )

        has_rows = any(
            path.name.lower().endswith((".parquet",) if place.is_dir() else (".parquet", ".csv", ".jsonl"))
            for place in self.places
            for path in (_files(place) if place.is_dir() and id_column is not None else [place])
        )
        if id_column is not None and not has_rows:
            raise InputError(
                f"id_column={id_column} names a column of Parquet files and of tables of paths, and input={self.places[0]} has neither; leave it out"
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
        for number, (name, version, items) in enumerate(self._parts(size)):
            n = len(items) if isinstance(items, (_Loose, _Listed)) else None
            if left is None:
                yield Shard(number, name, version, items, n)
                continue
            n = _counted(items, left) if n is None else n
            yield Shard(number, name, version, items, min(n, left), left)
            left -= min(n, left)
            if not left:
                return

    def _parts(self, size: int) -> Iterator[tuple[str, str, _Tar | _Rows | _Loose | _Listed]]:
        several = len(self.places) > 1
        for place in self.places:
            prefix = f"{printable(place.name)}/" if several else ""
            if place.is_dir():
                yield from self._of_folder(place, prefix, size)
            elif place.name.lower().endswith(_LISTS):
                rows = self._listed(place)
                for first in range(0, len(rows), size):
                    some = tuple(rows[first : first + size])
                    said = [[name, str(path), *_changed(path)] for name, path, _ in some]
                    yield f"{printable(place.name)}, {first + 1} to {first + len(some)}", fingerprint([said]), _Listed(some)
            else:
                yield self._of_file(place, prefix + printable(place.name))

    def _of_folder(self, folder: Path, prefix: str, size: int) -> Iterator[tuple[str, str, _Tar | _Rows | _Loose]]:
        loose: list[tuple[str, Path]] = []
        n_loose = 0

        def put_together() -> _Loose:
            nonlocal n_loose
            n_loose += len(loose)
            made = _Loose(tuple(loose))
            loose.clear()
            return made

        def named(some: _Loose) -> tuple[str, str, _Loose]:
            said = [[name, *_changed(path)] for name, path in some.files]
            return f"{prefix or printable(folder.name) + '/'}, files {n_loose - len(some) + 1} to {n_loose}", fingerprint([said]), some

        for path in _files(folder):
            name = prefix + printable(path.relative_to(folder).as_posix())
            if _is_of_a_shard(path):
                continue
            if path.is_symlink() or not path.name.lower().endswith((*_TAR, ".parquet")):
                loose.append((name, path))
                if len(loose) == size:
                    yield named(put_together())
                continue
            if loose:  # inputs keep their order
                yield named(put_together())
            yield self._of_file(path, name)
        if loose:
            yield named(put_together())

    def _of_file(self, path: Path, name: str) -> tuple[str, str, _Tar | _Rows]:
        version = fingerprint([_changed(path), self.image_column, self.id_column])
        if path.name.lower().endswith(".parquet"):
            return name, version, _Rows(path, name, self.image_column, self.id_column)
        return name, version, _Tar(path, name)

    def _listed(self, path: Path) -> list[tuple[str, Path | None, Mapping[str, Any]]]:
        if path.suffix.lower() == ".txt":
            try:
                lines = path.read_text(encoding="utf-8-sig").split("\n")  # a name may hold U+2028, at which splitlines() ends
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"input={path} cannot be read ({error}); give a list of paths in UTF-8") from error
            rows: list[dict[str, Any]] = [{self.file_column: line.strip()} for line in lines if line.strip()]
        else:
            names, rows = read_table(path, self.file_column)
            if self.file_column not in names:
                raise InputError(f"input={path} has no column {self.file_column!r}; it has {', '.join(names) or 'none'}; set file_column")
            _check_id_column(self.id_column, names, path)
            rows = [row for row in rows if row]
        found: list[tuple[str, Path | None, Mapping[str, Any]]] = []
        for number, row in enumerate(rows, 1):
            file = str(row.get(self.file_column) or "").strip()
            own = {key: value for key, value in row.items() if key not in (self.file_column, self.id_column)}
            name = str(row[self.id_column]) if self.id_column and row.get(self.id_column) is not None else file or f"row {number}"
            found.append((printable(name), path.parent / os.path.expanduser(file) if file else None, own))
        return found


# --- what shards are made of: plain values, which workers elsewhere are sent --------------------------------------------------


@dataclass(frozen=True)
class _Loose:
    """Files, each an input."""

    files: tuple[tuple[str, Path], ...]

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Given]:
        for name, path in self.files:
            yield Given(name, None, "a link, which is not followed") if path.is_symlink() else Given(name, path)


@dataclass(frozen=True)
class _Listed:
    """Lines of a list."""

    rows: tuple[tuple[str, Path | None, Mapping[str, Any]], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Given]:
        return (Given(name, path, "no file name", own) for name, path, own in self.rows)


@dataclass(frozen=True)
class _Rows:
    """A Parquet file, a row an input."""

    path: Path
    name: str
    image_column: str | None
    id_column: str | None

    def __iter__(self) -> Iterator[Given]:
        try:
            with open(self.path, "rb") as opened, pq.ParquetFile(opened) as file:
                schema = file.schema_arrow
                column = self._find_images(schema)
                _check_id_column(self.id_column, schema.names, self.path)
                number = 0
                for batch in file.iter_batches(_BATCH_ROWS):
                    others = batch.drop_columns([column]).to_pylist()
                    images = batch.column(column)
                    for row in range(batch.num_rows):
                        own = others[row]
                        said = own.pop(self.id_column, None) if self.id_column else None
                        identity = f"{self.name}#{number}" if said is None else str(said)
                        number += 1
                        yield Given(printable(identity), *_image(images[row]), own)
        except (pa.ArrowException, OSError) as error:
            yield Given(self.name, None, f"cannot be read as Parquet: {' '.join(str(error).split())[:120]}")

    def _find_images(self, schema: pa.Schema) -> str:
        if self.image_column is not None:
            if self.image_column not in schema.names:
                raise InputError(
                    f"input={self.path} has no column {self.image_column!r}; it has {', '.join(schema.names)}; set image_column"
                )
            return self.image_column
        found = [one.name for one in schema if _may_hold_images(one.type)]
        if len(found) != 1:
            which = f"several that may hold images ({', '.join(found)})" if found else "no column of encoded images"
            raise InputError(f"input={self.path} has {which}; it has {', '.join(schema.names)}; set image_column")
        return found[0]


@dataclass(frozen=True)
class _Tar:
    """A tar file: each image with what lies beside it under the same name, as shards of webdataset and img2dataset have it."""

    path: Path
    name: str

    def __iter__(self) -> Iterator[Given]:
        try:
            with tarfile.open(self.path, "r|*") as tar:
                key, images, beside = "", list[Given](), dict[str, Any]()
                for member in tar:
                    if member.isdir():
                        continue
                    identity = f"{self.name}/{printable(member.name)}"
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
        except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            yield Given(self.name, None, f"the shard ends here: it cannot be read on ({reason})")


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


def _check_id_column(column: str | None, names: Sequence[str], path: Path) -> None:
    if column is not None and column not in names:
        raise InputError(f"input={path} has no column {column!r}; it has {', '.join(names)}; set id_column")


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


def _changed(path: Path | None) -> list[int]:
    """What tells one version of a file from another: size, time of change; nothing of one that is not there."""
    try:
        status = path.lstat() if path is not None else None
    except (OSError, ValueError):
        status = None
    return [] if status is None else [status.st_size, status.st_mtime_ns]


def _is_of_a_shard(path: Path) -> bool:
    end = next((end for end in _OF_A_SHARD if path.name.endswith(end)), None)
    if end is None or not path.with_name(path.name.removesuffix(end) + ".tar").is_file():
        return False
    if end != ".parquet":
        return True
    try:
        with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
            return not any(_may_hold_images(one.type) for one in file.schema_arrow)
    except (pa.ArrowException, OSError):
        return True


def _counted(items: Iterable[Given], most: int) -> int:
    """How many inputs there are, up to `most`."""
    if isinstance(items, _Rows):
        try:
            with open(items.path, "rb") as opened, pq.ParquetFile(opened) as file:
                return int(file.metadata.num_rows)
        except (pa.ArrowException, OSError):
            return 1  # the input that says so
    return sum(1 for _ in islice(iter(items), most))


def _files(folder: Path) -> Iterator[Path]:
    """Every file and link below a folder, hidden ones too, sorted; folders that cannot be listed are an error."""

    def unlisted(error: OSError) -> None:
        raise InputError(
            f"input={folder} holds {printable(str(error.filename))}, which cannot be listed ({error.strerror}); make it readable, or leave it out"
        )

    for parent, folders, files in os.walk(folder, onerror=unlisted):
        links = [one for one in folders if os.path.islink(os.path.join(parent, one))]
        folders[:] = sorted(one for one in folders if one not in links)
        for one in sorted([*files, *links]):
            yield Path(parent) / one
