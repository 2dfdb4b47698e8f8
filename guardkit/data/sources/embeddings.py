"""Stored embeddings as a source, whoever wrote the folder: guardkit.embed or clip-retrieval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from guardkit.artifacts import hash_file
from guardkit.checks import check_flag
from guardkit.data.columns import WITHOUT_DIRECTION, Columns, RecordTable, RejectedRows, are_many
from guardkit.data.duplicates import near_equal_groups
from guardkit.data.grouping import why_rejected
from guardkit.data.sources.base import Loaded
from guardkit.data.sources.files import printable
from guardkit.data.sources.rows import Row, RowRule
from guardkit.data.sources.stored_rows import LabelTable, RowReader, shown
from guardkit.data.sources.texts import Texts, as_texts, hashed
from guardkit.embedding_folder import StoredVectors, find_embedding_parts, read_part, table_schema, unmatched_rows
from guardkit.local_copies import local
from guardkit.policy import Policy
from guardkit.schema import UNLABELLED, InputError

_PATH = "image_path"
_LOOKED_AT = 1_000_000  # rows up to which vectors are looked at, unless somebody says otherwise
_AT_ONCE = 1 << 13  # vectors
_USUAL = {"category": "category", "caption": "caption", "group": "group", "source": "source", "path": _PATH}


class EmbeddingsSource:
    """A folder of embeddings with labels in its metadata.

    Rows of one `image_path` are one image within a part; in different parts they are if their vectors are equal, else different
    images, the later ones called "PATH#2" and so on.

    Args:
        policy: whose categories the images violate.
        root: the folder, by its path or by its URL in object storage, of which a copy is made here.
        label_column: safe or unsafe, 0 or 1, and the like. None: labels follow from `categories`.
        labels: label value -> safe or unsafe; null: to be left out. None: safe, unsafe, 0, 1, nsfw, ...
        default_label: of labels that `labels` does not list; None: they are an error.
        category_column, caption_column, group_column, source_column: may be missing under their usual names.
        labels_file: a .parquet, .csv or .jsonl table that says what the images are; the folder's own labels and categories are then not
            read, nor what else the table has a column for. Images that it does not name have no label.
        key_column: of that table, what the folder calls `image_path`.
        check_vectors: look at each vector before training: equal ones are one group, and those that are zero or not finite are rejected.
            Without it, bad ones are left out as they come up, and equal ones are not found. "auto": of up to a million rows.
        categories: value -> the policy's category, or None for one that this policy does not speak of: its unsafe
            images are left out. Without labels, listed values mean unsafe and all others safe.
    Raises:
        InputError: no such folder, a column that is missing, or a value that nothing explains.
    """

    name = "embeddings"

    def __init__(
        self,
        policy: Policy,
        root: str,
        *,
        label_column: str | None = "label",
        labels: Mapping[Any, Any] | None = None,
        default_label: str | None = None,
        category_column: str | None = "category",
        categories: Mapping[Any, str | None] | None = None,
        caption_column: str | None = "caption",
        group_column: str | None = "group",
        source_column: str | None = "source",
        labels_file: str | None = None,
        key_column: str = _PATH,
        check_vectors: bool | Literal["auto"] = "auto",
    ) -> None:
        self.policy, self.root = policy, local("source.root", root)
        columns = {
            "label": label_column,
            "category": category_column,
            "caption": caption_column,
            "group": group_column,
            "source": source_column,
            "path": _PATH,
        }
        self._rule = RowRule(policy, columns, _USUAL, labels=labels, default_label=default_label, categories=categories)
        if check_vectors != "auto":
            check_flag("source.check_vectors (or auto)", check_vectors)
        if not isinstance(key_column, str):
            raise InputError(f"source.key_column must be the name of a column, got {key_column!r}")
        self._parts = find_embedding_parts(self.root, with_tables=True, only_matched=True)
        self._schema = table_schema(self._parts)
        self._numbers = [number for number, size in self._parts.sizes.items() if size]
        is_small = not are_many(self._parts.n_rows)
        self._tables = {number: read_part(self._parts, number, self._schema) for number in self._numbers} if is_small else {}
        self._unmatched = unmatched_rows(self._parts)
        self._vectors = StoredVectors(self._parts)
        self._labels_file = None if labels_file is None else local("source.labels_file", labels_file)
        self._key_column, self.check_vectors = key_column, check_vectors
        self._labels: LabelTable | None = None
        self.encoder_fingerprint: str | None = (self._parts.manifest or {}).get("encoder_fingerprint")
        self.asked: dict[str, Any] = {
            "source": self.name,
            "root": printable(self.root.name),
            "encoder": self.encoder_fingerprint,
            "n": len(self._vectors),
            **self._rule.asked,
        }
        if self._labels_file is not None:
            if not self._labels_file.is_file():
                raise InputError(f"source.labels_file {self._labels_file} is not there; give a .parquet, .csv or .jsonl file")
            self.asked |= {"labels_file": hash_file(self._labels_file), "key_column": key_column}
        if check_vectors != "auto":
            self.asked["check_vectors"] = check_vectors

    @property
    def _looks(self) -> bool:
        """Whether vectors are looked at before training."""
        return len(self._vectors) <= _LOOKED_AT if self.check_vectors == "auto" else self.check_vectors

    def load(self) -> Loaded:
        """Its images in columns, see `guardkit.data.columns`. Raises InputError."""
        said = self._read()
        keys, owner, names = self._name(said)
        status, reasons, set_aside = _judged(said, owner)
        kept = np.flatnonzero(status == 0)
        labels, categories = (
            np.array(column, kind)[said.kinds] for column, kind in zip(said.of_kinds(self.policy), (np.int8, np.int16), strict=True)
        )
        vectors, rejected, codes = self._vectors, np.flatnonzero(status), status[status > 0] - 1
        group_keys = np.where(said.has_group, said.group_keys, keys) if len(said.group_keys) else keys
        if self._looks:
            bad = _without_direction(vectors, kept)
            rejected, codes = np.append(rejected, kept[bad]), np.append(codes, np.full(bad.sum(), len(reasons)))
            kept = kept[~bad]
        groups = np.arange(len(keys), dtype=np.int32)
        groups[kept] = kept[self._grouped(kept, group_keys, is_listed=bool(said.has_group.any()))]
        columns = Columns(
            labels=labels,
            categories=categories,
            category_names=self.policy.category_names,
            sources=said.sources,
            source_names=said.source_names,
            groups=groups,
            names=names,
            captions=said.captions,
            listed=partial(_listed, said.groups),  # and no more of what was read
            name_keys=keys,
            vectors=vectors,
            is_checked=self._looks,
        )
        n_all, reasons = len(keys), [*reasons, WITHOUT_DIRECTION]
        for path, n in self._unmatched.items():
            other = "metadata" if path.suffix == ".npy" else "vectors"
            rejected, codes = np.append(rejected, np.arange(n_all, n_all + n)), np.append(codes, np.full(n, len(reasons)))
            reasons.append(f"{path.name} has no {other} of its number")
            n_all += n
        loaded = Loaded(
            train=RecordTable(columns, kept),
            test=None,
            rejected=RejectedRows(rejected, codes, reasons, partial(self._rejected_names, names, len(keys))),
            given=n_all,
            encoder_fingerprint=self.encoder_fingerprint,
            set_aside=RecordTable(replace(columns, groups=None, made=WeakValueDictionary()), set_aside),
            is_grouped=True,
            notes=[*(self._labels.notes(str(self.root)) if self._labels else []), *self._notes()],
        )
        if not loaded.train:
            raise InputError(f"{self.root} has no row that can be used{why_rejected(loaded)}")
        return loaded

    # --- reading ------------------------------------------------------------------------------------------------------

    def _read(self) -> _Said:
        """What all rows say."""
        parts = self._parts
        reader = RowReader(self._rule, self.name)
        schema, numbers = self._schema, self._numbers
        columns = _there(self._rule, schema.names)
        if self._labels_file is None:
            try:
                self._rule.find(schema.names, f"{self.root}/metadata")
            except InputError as error:
                if "label" in columns:
                    raise
                raise InputError(f"{error}, or give a table of labels as source.labels_file") from error
        else:
            self._labels = LabelTable(self._labels_file, self._key_column, self._rule, reader, schema.names)
            if "path" not in columns:
                raise InputError(
                    f"{self.root}/metadata has no column {_PATH!r}, by which labels are joined; it has {', '.join(schema.names) or 'none'}"
                )
            columns = {role: column for role, column in columns.items() if role not in self._labels.roles | {"label", "category"}}
        n = parts.n_rows
        is_grouped = "group" in columns or (self._labels is not None and "group" in self._labels.roles)
        kinds, sources = np.zeros(n, np.int32), np.zeros(n, np.int16)
        has_group, group_keys = np.zeros(n, bool), np.zeros(n if is_grouped else 0, np.uint64)
        self._path_keys = np.zeros(n, np.uint64)
        held: dict[str, list[pa.Array]] = {"path": [], "group": [], "caption": []}
        first = 0
        for number in numbers:
            size = parts.sizes[number]
            table = self._table(number, sorted(set(columns.values())))
            cells = {role: table.column(column) for role, column in columns.items()}
            texts = {role: as_texts(cells[role]) if role in cells else pa.repeat(pa.scalar("", pa.large_string()), size) for role in held}
            rows = slice(first, first + size)
            self._path_keys[rows] = hashed(_numbered(texts["path"], first))
            kinds[rows], sources[rows] = reader.read(cells, size, str(self.root), first)
            if self._labels is not None:
                kinds[rows], theirs, more = self._labels.join(texts["path"], self._path_keys[rows])
                if "source" in self._labels.roles:
                    sources[rows] = theirs
                texts |= more
            if len(group_keys):
                has_group[rows], group_keys[rows] = np.asarray(pc.binary_length(texts["group"])) > 0, hashed(texts["group"])
            if not are_many(n):
                for role, one in texts.items():
                    held[role].append(one)
            first += size
        firsts = self._vectors.firsts

        def texts_of(role: str) -> Texts:
            def read(part: int) -> pa.Array:
                if self._labels is not None and role in self._labels.roles:
                    paths = as_texts(self._table(numbers[part], [columns["path"]]).column(0))
                    keys = hashed(_numbered(paths, int(firsts[part])))
                    return self._labels.join(paths, keys)[2].get(role, pa.repeat(pa.scalar("", pa.large_string()), len(paths)))
                if role not in columns:
                    return pa.repeat(pa.scalar("", pa.large_string()), parts.sizes[numbers[part]])
                return as_texts(self._table(numbers[part], [columns[role]]).column(0))

            return Texts(read, firsts, held[role] if not are_many(n) else None)

        if self._labels is not None and not self._labels.is_used.any():
            name = texts_of("path")(np.zeros(1, int))[0]
            raise InputError(
                f"{self._labels.path} names none of the {n} images of {self.root}: its first key is {shown(self._labels.first_key)}, the folder's first "
                f"image_path {shown(name)}; set source.key_column to the column that holds the same"
            )
        return _Said(
            kinds,
            list(reader.kinds),
            sources,
            tuple(reader.sources),
            has_group,
            group_keys,
            texts_of("path"),
            texts_of("caption"),
            texts_of("group"),
        )

    def _table(self, number: int, columns: list[str]) -> pa.Table:
        """Some columns of a part's table."""
        return (
            pa.table({})
            if not columns
            else self._tables[number].select(columns)
            if self._tables
            else read_part(self._parts, number, self._schema, columns)
        )

    def _name(self, said: _Said) -> tuple[np.ndarray, np.ndarray, _Names]:
        """Hashes of the names of images; the first row of each row's image; the names themselves."""
        keys, n = self._path_keys, len(self._path_keys)
        order = np.argsort(keys, kind="stable")
        again = np.zeros(n, bool)
        same = keys[order[1:]] == keys[order[:-1]]
        again[order[1:]] |= same
        again[order[:-1]] |= same
        del order, same
        owner = np.arange(n, dtype=np.int32)
        names = _Names(said.paths, {})
        doubtful = np.flatnonzero(again)
        if len(doubtful):
            for row, name in self._images(list(zip(doubtful.tolist(), names(doubtful), strict=True)), np.sort(keys)).items():
                names.other[row] = name
                keys[row] = hashed(pa.array([name], pa.large_string()))[0]
            first: dict[str, int] = {}
            for row, name in zip(doubtful.tolist(), names(doubtful), strict=True):
                owner[row] = first.setdefault(name, row)
        return keys, owner, names

    def _images(self, repeated: list[tuple[int, str]], taken: np.ndarray) -> dict[int, str]:
        """A name for the image of each row whose path repeats: the same for rows of one image, different for others."""
        often = {path for path, n in Counter(path for _, path in repeated).items() if n > 1}
        repeated = [(row, path) for row, path in repeated if path in often]
        rows = np.array([row for row, _ in repeated], int)
        finite = rows[~_without_direction(self._vectors, rows)]
        equal = dict(zip(finite.tolist(), near_equal_groups(self._vectors.take(finite)).tolist(), strict=True))
        part = np.searchsorted(self._vectors.firsts, rows, side="right") - 1
        new: set[str] = set()
        known: dict[tuple[str, str, int], str] = {}
        used: Counter[str] = Counter()
        found: dict[int, str] = {}
        for (row, path), of_part in zip(repeated, part.tolist(), strict=True):
            keys = [(path, "part", of_part)]
            if row in equal:
                keys.append((path, "vector", equal[row]))
            name = next((known[key] for key in keys if key in known), None)
            if name is None:
                used[path] += 1
                name = path
                while used[path] > 1 and ((name := f"{path}#{used[path]}") in new or _holds(taken, name)):
                    used[path] += 1
                new.add(name)
            known |= {key: known.get(key, name) for key in keys}
            found[row] = name
        return found

    def _grouped(self, kept: np.ndarray, group_keys: np.ndarray, *, is_listed: bool) -> np.ndarray:
        """(m,) the place of the first row among `kept` that is in each one's group: listed together, or with an equal vector."""
        several: list[np.ndarray] = []
        if is_listed:
            several.append(np.unique(group_keys[kept], return_inverse=True)[1])
        if self._looks:
            several.append(near_equal_groups(_Rows(self._vectors, kept)))
        group = np.arange(len(kept))
        for numbers in several:
            _, first = np.unique(numbers, return_index=True)
            if len(first) == len(kept):
                continue
            edges = np.arange(len(kept)), first[np.unique(numbers, return_inverse=True)[1]]
            known = np.arange(len(kept)), group
            rows, others = (np.concatenate(both) for both in zip(edges, known, strict=True))
            graph = coo_array((np.ones(len(rows), bool), (rows, others)), shape=(len(kept), len(kept)))
            of = connected_components(graph, directed=False)[1]
            _, first, inverse = np.unique(of, return_index=True, return_inverse=True)
            group = first[inverse]
        return group

    def _rejected_names(self, names: _Names, n: int, rows: np.ndarray) -> list[str]:
        found = names(rows[rows < n])
        start = n
        for path, size in self._unmatched.items():
            mine = rows[(rows >= start) & (rows < start + size)]
            found += [f"{path.name} row {row - start + 1}" for row in mine.tolist()]
            start += size
        return found

    def _notes(self) -> list[str]:
        if self._looks or self.check_vectors is False:
            return []
        return [
            f"the {len(self._vectors)} vectors of {self.root} were not looked at before training: equal ones have no group, and those that are zero or not "
            "finite are left out as they come up; source.check_vectors=true looks at all"
        ]


@dataclass(frozen=True)
class _Said:
    """What n rows say.

    Attributes:
        kinds: (n,) int, positions among `rows`.
        rows: all different labels and categories.
        sources: (n,) int, positions among `source_names`.
        source_names: where rows come from.
        has_group: (n,) bool, which are listed in a group.
        group_keys: (n,) uint64, hashes of the groups; empty where no row is.
        paths, captions, groups: texts of rows.
    """

    kinds: np.ndarray
    rows: list[Row]
    sources: np.ndarray
    source_names: tuple[str, ...]
    has_group: np.ndarray
    group_keys: np.ndarray
    paths: Texts
    captions: Texts
    groups: Texts

    def of_kinds(self, policy: Policy) -> tuple[list[int], list[int]]:
        """Label, and position of the category in the policy (-1: none), of each kind."""
        place = {name: i for i, name in enumerate(policy.category_names)}
        return [row.label for row in self.rows], [place.get(row.category or "", -1) for row in self.rows]


class _Names:
    """Names of images by row: the path, or another where paths repeat, or the row's number.

    Args:
        paths: of rows; "" without one.
        other: row -> name, of those that are called otherwise.
    """

    def __init__(self, paths: Texts, other: dict[int, str]) -> None:
        self._paths, self.other = paths, other

    def __call__(self, rows: np.ndarray) -> list[str]:
        """Of (m,) rising rows."""
        return [self.other.get(row) or path or str(row) for row, path in zip(rows.tolist(), self._paths(rows), strict=True)]


class _Rows:
    """Some rows of stored vectors, as an array has them."""

    def __init__(self, vectors: StoredVectors, rows: np.ndarray) -> None:
        self._vectors, self._rows = vectors, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, places: slice | np.ndarray) -> np.ndarray:
        return self._vectors.take(self._rows[places])


def _numbered(paths: pa.Array, first: int) -> pa.Array:
    """The same with its number where a row has no path; `first` is that of the first."""
    bare = pc.equal(pc.binary_length(paths), 0)
    if not pc.any(bare).as_py():
        return paths
    return pc.if_else(bare, pa.array(np.arange(first, first + len(paths))).cast(pa.large_string()), paths)


def _listed(groups: Texts, rows: np.ndarray) -> list[str | None]:
    """Groups of (m,) rising rows; None without one."""
    return [name or None for name in groups(rows)]


def _holds(taken: np.ndarray, name: str) -> bool:
    """Whether sorted hashes hold that of a name."""
    key = hashed(pa.array([name], pa.large_string()))[0]
    place = int(np.searchsorted(taken, key))
    return place < len(taken) and bool(taken[place] == key)


def _there(rule: RowRule, names: Sequence[str]) -> dict[str, str]:
    """The columns of a rule that a table has, by role."""
    return {role: column for role, column in rule.columns.items() if column is not None and column in names}


def _without_direction(vectors: StoredVectors, rows: np.ndarray) -> np.ndarray:
    """(m,) bool: which vectors are zero or not finite."""
    bad = np.zeros(len(rows), bool)
    for start in range(0, len(rows), _AT_ONCE):
        bad[start : start + _AT_ONCE] = np.isnan(vectors.take(rows[start : start + _AT_ONCE])[:, 0])
    return bad


def _judged(said: _Said, owner: np.ndarray) -> tuple[np.ndarray, list[str], np.ndarray]:
    """What becomes of each row.

    Args:
        said: by them.
        owner: (n,) the first row of the same image.
    Returns:
        (n,) 0: it is used, else 1 + the position of a reason; the reasons; rows without a label, one an image.
    """
    reasons = ["listed as safe and as unsafe", "duplicate row"]
    of_kind = np.zeros(len(said.rows), np.int16)
    for kind, row in enumerate(said.rows):
        if row.label == UNLABELLED:
            reasons.append(row.left_out or "no label")
            of_kind[kind] = len(reasons)
    status = of_kind[said.kinds]
    is_repeated = np.zeros(len(owner), bool)
    again = np.flatnonzero(owner != np.arange(len(owner)))
    is_repeated[again] = is_repeated[owner[again]] = True
    labels: dict[int, set[int]] = {}
    repeated = [(int(row), int(owner[row]), said.rows[said.kinds[row]].label) for row in np.flatnonzero(is_repeated)]
    for _, image, label in repeated:
        labels.setdefault(image, set()).add(label)
    used: set[int] = set()
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for place, image, label in repeated:
        if label == UNLABELLED:
            first.setdefault(image, place)
            last[image] = place
        elif len(labels[image] - {UNLABELLED}) > 1:
            status[place] = 1
        elif image in used:
            status[place] = 2
        else:
            used.add(image)
    aside = [(place, last[image]) for image, place in first.items()]
    places = np.flatnonzero((status > 2) & ~is_repeated)
    rows = np.concatenate([places, np.array([row for _, row in aside], int)])
    order = np.argsort(np.concatenate([places, np.array([place for place, _ in aside], int)]), kind="stable")
    return status, reasons, rows[order]
