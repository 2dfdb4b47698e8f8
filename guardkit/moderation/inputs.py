"""What is decided over: every file of a folder, every member of a tar file, every row of a Parquet file, every path of a list.

Inputs come one after the other, in an order that does not change, and nothing is left out: what cannot be an image is an input too, with
the reason. Names are only ever read, nothing is written under them.
"""

from __future__ import annotations

import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import fingerprint
from guardkit.checks import check_path, is_list
from guardkit.data.sources.files import printable
from guardkit.data.sources.tables import read_table
from guardkit.limits import MAX_BYTES
from guardkit.schema import InputError

_BATCH_ROWS = 64  # of a Parquet file in memory, with their images
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_LISTS = (".txt", ".csv", ".jsonl")
_BESIDE = (".json", ".txt", ".cls")  # what lies beside an image in a shard, and says something of it
_MAX_BESIDE = 1 << 20
_MAX_TOGETHER = 256 << 20  # bytes of images with one name in a shard, that wait for what lies beside them


@dataclass(frozen=True)
class Given:
    """One input.

    Attributes:
        id: its path below the folder, its name in the shard after the shard's, its row after the file's; or as the list has it.
        data: encoded bytes, or a file; None: there is none, and `reason` says why.
        reason: see there.
        columns: what else the input says, to be kept beside the decision.
    """

    id: str
    data: bytes | Path | None
    reason: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)


class Inputs:
    """All that was given, file by file.

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
                raise InputError(f"output_dir={outside} lies within input={place}, and would be decided over as well; choose one elsewhere")
            if not place.is_dir() and not place.name.lower().endswith((*_TAR, *_LISTS, ".parquet")):
                raise InputError(
                    f"input={place} is none of what can be decided over: a folder, {', '.join(_TAR)}, .parquet, or a list of paths ({', '.join(_LISTS)}); "
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

    def fingerprint(self) -> str:
        """Of what there is: names, sizes and times of change; 64 hex digits. A run goes on only where it is the same."""
        seen = []
        for place in self.places:
            for path in _files(place) if place.is_dir() else [place]:
                status = path.lstat()
                seen.append([os.fsencode(path).hex(), status.st_size, status.st_mtime_ns])
        return fingerprint([seen, self.image_column, self.id_column, self.file_column])

    def __iter__(self) -> Iterator[Given]:
        several = len(self.places) > 1
        for place in self.places:
            prefix = f"{printable(place.name)}/" if several else ""
            if not place.is_dir():
                yield from self._of_file(place, prefix if place.suffix.lower() not in _LISTS else "", in_folder=False)
                continue
            for path in _files(place):
                yield from self._of_file(path, prefix + printable(path.relative_to(place).as_posix()), in_folder=True)

    def _of_file(self, path: Path, name: str, *, in_folder: bool) -> Iterator[Given]:
        lower = path.name.lower()
        if in_folder and path.is_symlink():
            yield Given(name, None, "a link, which is not followed")
        elif lower.endswith(_TAR):
            yield from _members(path, name if in_folder else printable(path.name))
        elif lower.endswith(".parquet"):
            yield from self._rows(path, name if in_folder else printable(path.name))
        elif not in_folder:
            yield from self._listed(path)
        else:
            yield Given(name, path)

    def _listed(self, path: Path) -> Iterator[Given]:
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
            self._check_id_column(names, path)
            rows = [row for row in rows if row]
        for number, row in enumerate(rows, 1):
            file = str(row.get(self.file_column) or "").strip()
            own = {key: value for key, value in row.items() if key not in (self.file_column, self.id_column)}
            name = str(row[self.id_column]) if self.id_column and row.get(self.id_column) is not None else file or f"row {number}"
            yield Given(printable(name), path.parent / os.path.expanduser(file) if file else None, "no file name", own)

    def _rows(self, path: Path, name: str) -> Iterator[Given]:
        try:
            with open(path, "rb") as opened, pq.ParquetFile(opened) as file:
                schema = file.schema_arrow
                column = self._image_column(schema, path)
                self._check_id_column(schema.names, path)
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

    def _check_id_column(self, names: Sequence[str], path: Path) -> None:
        if self.id_column is not None and self.id_column not in names:
            raise InputError(f"input={path} has no column {self.id_column!r}; it has {', '.join(names)}; set id_column")

    def _image_column(self, schema: pa.Schema, path: Path) -> str:
        if self.image_column is not None:
            if self.image_column not in schema.names:
                raise InputError(f"input={path} has no column {self.image_column!r}; it has {', '.join(schema.names)}; set image_column")
            return self.image_column
        found = [one.name for one in schema if _may_hold_images(one.type)]
        if len(found) != 1:
            which = f"several that may hold images ({', '.join(found)})" if found else "no column of encoded images"
            raise InputError(f"input={path} has {which}; it has {', '.join(schema.names)}; set image_column")
        return found[0]


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


def _members(path: Path, name: str) -> Iterator[Given]:
    """Of a tar file, each image with what lies beside it under the same name, as shards of the WebDataset library have it."""
    try:
        with tarfile.open(path, "r|*") as tar:
            key, images, beside = "", list[Given](), dict[str, Any]()
            for member in tar:
                if member.isdir():
                    continue
                identity = f"{name}/{printable(member.name)}"
                mine = os.path.join(os.path.dirname(member.name), os.path.basename(member.name).split(".")[0])
                if mine != key or sum(len(one.data) for one in images if isinstance(one.data, bytes)) > _MAX_TOGETHER:
                    yield from (Given(one.id, one.data, one.reason, beside) for one in images)
                    key, images, beside = mine, [], {}
                kind = os.path.splitext(member.name)[1].lower()
                if not member.isreg():
                    images.append(Given(identity, None, "no regular file in the shard"))
                elif kind in _BESIDE and member.size <= _MAX_BESIDE:
                    beside = beside | {kind.removeprefix("."): _read(tar, member).decode("utf-8", "replace")}
                elif member.size > MAX_BYTES:
                    images.append(Given(identity, None, f"{member.size} encoded bytes are more than {MAX_BYTES}"))
                else:
                    images.append(Given(identity, _read(tar, member)))
            yield from (Given(one.id, one.data, one.reason, beside) for one in images)
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        yield Given(name, None, f"the shard ends here: it cannot be read on ({' '.join(str(error).split())[:120] or type(error).__name__})")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return b"" if file is None else file.read()


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
