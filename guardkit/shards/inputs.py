"""What is embedded or decided over, from where it lies to shards: folders, tar files, Parquet files, lists of paths, embedding folders."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from guardkit.artifacts import fingerprint, open_regular
from guardkit.checks import is_list
from guardkit.data.sources.files import printable
from guardkit.data.sources.tables import read_table
from guardkit.local_copies import local_copy
from guardkit.schema import InputError
from guardkit.shards.base import Given, Shard
from guardkit.shards.files import TAR, File, Listed, Loose, Row, Rows, Tar, beside, check_id_column, may_hold_images, place_of
from guardkit.shards.vectors import Part, embedding_folder
from guardkit.storage import check_url, is_url, local_path

SHARD_INPUTS = 2048  # loose files, or lines of a list, in a shard
_LISTS = (".txt", ".csv", ".jsonl")
_OF_A_SHARD = (".parquet", "_stats.json")  # what img2dataset writes beside a shard NAME.tar, under the same name


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
        with_vectors: take embedding folders too: of their inputs there is a vector in place of the image. Each part is a shard; what was rejected
            when the images were embedded is one more.
    Raises:
        InputError: a place is not there, or is none of these.

    Attributes:
        embedding_folders: among what is given.
    """

    def __init__(
        self,
        places: str | Path | Sequence[str | Path],
        *,
        image_column: str | None = None,
        id_column: str | None = None,
        file_column: str = "file_name",
        outside: str | Path | None = None,
        with_vectors: bool = False,
    ) -> None:
        named: list[str | Path] = list(places) if is_list(places) else [places]  # type: ignore[list-item]
        if not named:
            raise InputError("input is an empty list; give a folder, tar files, Parquet files, or a list of paths")
        self.image_column, self.id_column, self.file_column = image_column, id_column, file_column
        self._places = [place_of("input", one) for one in named]
        for place in self._places:
            if place.is_folder and outside is not None and _lies_within(outside, place.at):
                raise InputError(f"output_dir={outside} lies within input={place}, and would be read as well; choose one elsewhere")
            if not place.is_folder and not place.ends_with(*TAR, *_LISTS, ".parquet"):
                raise InputError(
                    f"input={place} is none of what can be read: a folder, {', '.join(TAR)}, .parquet, or a list of paths ({', '.join(_LISTS)}); "
                    "for one image give its folder, or call GuardClassifier.predict; of an embedding folder give what holds img_emb/ and metadata/"
                )
        several = len(self._places) > 1
        self._vectors = {
            number: found
            for number, place in enumerate(self._places)
            if place.is_folder
            and (found := embedding_folder(place, f"{place.name}/" if several else "", id_column if with_vectors else None)) is not None
        }
        self.embedding_folders = tuple(self._vectors.values())
        if self.embedding_folders and not with_vectors:
            raise InputError(
                f"input={self.embedding_folders[0].place} is an embedding folder, which holds vectors and no images; give the images themselves"
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

    @property
    def places(self) -> list[str]:
        """Where they are, however that was written."""
        return [str(place.at.resolve()) if isinstance(place.at, Path) else place.at for place in self._places]

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
            n = len(inputs) if isinstance(inputs, (Loose, Listed)) else None
            if left is None:
                yield Shard(number, name, version, inputs, n)
                continue
            n = _counted(inputs, left) if n is None else n
            yield Shard(number, name, version, inputs, min(n, left), left)
            left -= min(n, left)
            if not left:
                return

    def _parts(self, size: int) -> Iterator[tuple[str, str, Tar | Rows | Loose | Listed | Part]]:
        several = len(self._places) > 1
        for number, place in enumerate(self._places):
            prefix = f"{place.name}/" if several else ""
            if number in self._vectors:
                for part in self._vectors[number].parts:
                    yield part.name, fingerprint([*part.version, self.id_column]), part
            elif place.is_folder:
                yield from self._of_folder(place, prefix, size)
            elif place.ends_with(*_LISTS):
                yield from self._of_list(place, size)
            else:
                yield self._of_file(replace(place, name=prefix + place.name))

    def _of_folder(self, folder: File, prefix: str, size: int) -> Iterator[tuple[str, str, Tar | Rows | Loose]]:
        files = folder.files()
        there = {one.name for one in files}

        def is_loose(file: File) -> bool:
            return file.is_link or bool(file.unusable) or not file.ends_with(*TAR, ".parquet")

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
                yield name, fingerprint([[one.name, one.version] for one in part]), Loose(part)

    def _of_file(self, file: File) -> tuple[str, str, Tar | Rows]:
        version = fingerprint([file.version, self.image_column, self.id_column])
        return file.name, version, Rows(file, self.image_column, self.id_column) if file.ends_with(".parquet") else Tar(file)

    def _of_list(self, file: File, size: int) -> Iterator[tuple[str, str, Tar | Rows | Listed]]:
        n = 0
        for is_shard, some in groupby(self._listed(file), lambda row: file.ends_with(".txt") and row.is_shard):
            rows = tuple(some)
            if is_shard:
                for row in rows:
                    assert row.at is not None
                    yield self._of_file(replace(place_of(f"a line of input={file}", row.at), name=row.name))
                continue
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                said = [[row.name, str(row.at), row.version] for row in part]
                name = f"{file.name}, {n + 1} to {n + len(part)}"
                n += len(part)
                yield name, fingerprint(said), Listed(part)

    def _listed(self, file: File) -> list[Row]:
        path = file.at if isinstance(file.at, Path) else local_copy(file.at)
        if file.ends_with(".txt"):
            try:
                with open_regular(path) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig") as texts:
                    lines = texts.read().split("\n")  # a name may hold U+2028, at which splitlines() ends
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"input={file} cannot be read ({error}); give a list of paths in UTF-8") from error
            rows: list[dict[str, Any]] = [{self.file_column: line.strip()} for line in lines if line.strip()]
        else:
            names, rows = read_table(path, self.file_column)
            if self.file_column not in names:
                raise InputError(f"input={file} has no column {self.file_column!r}; it has {', '.join(names) or 'none'}; set file_column")
            check_id_column(self.id_column, names, file)
            rows = [row for row in rows if row]
        found: list[Row] = []
        for number, row in enumerate(rows, 1):
            said = str(row.get(self.file_column) or "").strip()
            own = {key: value for key, value in row.items() if key not in (self.file_column, self.id_column)}
            at, why, name = None, "no file name", f"row {number}"
            if said:
                try:
                    at, name = beside(file.at, said), said
                except InputError as error:  # its number is its name: what is wrong may be a password in it
                    why = str(error)
            if self.id_column and row.get(self.id_column) is not None:
                name = str(row[self.id_column])
            found.append(Row(printable(name), at, own, why))
        return found


def _lies_within(place: str | Path, folder: str | Path) -> bool:
    if isinstance(folder, Path):
        path = local_path(check_url("output_dir", str(place))) if is_url(place) else Path(place)
        return path is not None and path.resolve().is_relative_to(folder.resolve())
    return is_url(place) and f"{str(place).rstrip('/')}/".startswith(f"{folder}/")


def _is_of_a_shard(file: File, there: Set[str]) -> bool:
    end = next((end for end in _OF_A_SHARD if file.name.endswith(end)), None)
    if end is None or file.name.removesuffix(end) + ".tar" not in there:
        return False
    if end != ".parquet":
        return True
    try:
        with file.opened() as opened, pq.ParquetFile(opened) as table:
            return not any(may_hold_images(one.type) for one in table.schema_arrow)
    except (pa.ArrowException, OSError):
        return True


def _counted(inputs: Iterable[Given], most: int) -> int:
    """How many inputs there are, up to `most`."""
    if isinstance(inputs, Part):
        return inputs.count()
    if isinstance(inputs, Rows):
        try:
            with inputs.file.opened() as opened, pq.ParquetFile(opened) as file:
                return int(file.metadata.num_rows)
        except (pa.ArrowException, OSError):
            return 1  # the input that says so
    return sum(1 for _ in islice(iter(inputs), most))
