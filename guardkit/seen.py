"""Which images a guard has seen: enough to know them again, nothing that shows them or names their files.

An image is known again by its content (the hash of its bytes, or of a drawn scene's description), by its looks (a
perceptual hash that resizing and compression hardly change), by the group that its source listed it in, or, where only
an embedding is there, by a few random projections of that. Knows no guard and reads no image.

Images on which thresholds were chosen are listed as well: they say nothing of how a guard does at those thresholds. Images
whose labels were not used (for whitening) are listed under a split of their own: a guard may be tested on them, because it was
never told what they are, but it can be counted how many there were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from guardkit.artifacts import write_table
from guardkit.reading import read_table
from guardkit.schema import ImageError, InputError, Record
from guardkit.seen_vectors import STEPS, SeenVectors

FILE = "training_images.parquet"
LABELLED = ("train", "validation", "calibration")
SPLITS = (*LABELLED, "unlabelled")
NEAR = 4  # bits of a perceptual hash in which near-duplicates differ at most, unless a source says otherwise
_HASH_BYTES = 16
_PROJECTIONS = 32  # of a sketch, in 16 bits
# Storing a unit vector in 16 bits moves it by about 0.0003, another order of sums by less; of drawn scenes, which the
# shipped encoder finds more alike than any photographs, no two are closer than 0.02.
_SAME_VECTOR = 0.005
_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "content": pa.binary(_HASH_BYTES),
        "perceptual_hash": pa.uint64(),
        "listed_group": pa.binary(_HASH_BYTES),
        "sketch": pa.binary(2 * _PROJECTIONS),
    }
)


@dataclass(frozen=True)
class Known:
    """How an image is known again.

    Attributes:
        split: in which it was seen, one of `SPLITS`.
        by: "content", "near-duplicate", "group" or "embedding".
    """

    split: str
    by: str


class SeenImages:
    """A table of images, a row each.

    Args:
        table: with the columns of `training_images.parquet`.
        near: bits in which perceptual hashes of near-duplicates differ at most, in [0, 15].
        vectors: further ones, of millions of stored embeddings, of which nothing else is known.
    """

    def __init__(self, table: pa.Table, near: int = NEAR, vectors: SeenVectors | None = None) -> None:
        self.table, self.near, self.vectors = table, near, vectors or SeenVectors({})

    @classmethod
    def of(cls, images: Iterable[tuple[str, Record, np.ndarray | None]], *, near: int = NEAR) -> SeenImages:
        """Notes images.

        Args:
            images: (split, record, its (d,) unit vector under the guard's encoder, if it is known).
            near: see the class.
        """
        rows = [(split, record, vector) for split, record, vector in images if vector is not None or _content(record) is not None]
        vectors = {i: vector for i, (_, _, vector) in enumerate(rows) if vector is not None}
        of_rows: list[bytes | None] = [None] * len(rows)
        if vectors:
            for i, sketch in zip(vectors, sketches(np.stack(list(vectors.values()))), strict=True):
                of_rows[i] = sketch.tobytes()
        columns = {
            "split": [split for split, _, _ in rows],
            "content": [_content(record) for _, record, _ in rows],
            "perceptual_hash": [record.perceptual_hash for _, record, _ in rows],
            "listed_group": [_group(record) for _, record, _ in rows],
            "sketch": of_rows,
        }
        return cls(pa.table(columns, schema=_SCHEMA), near)

    def __len__(self) -> int:
        return len(self.table) + len(self.vectors)

    def count(self, split: str) -> int:
        """How many images were seen in a split."""
        return self.table.column("split").to_pylist().count(split) + self.vectors.count(split)

    def without(self, split: str) -> SeenImages:
        """The same without the images of one split."""
        return SeenImages(self.table.filter(pc.not_equal(self.table.column("split"), split)), self.near, self.vectors.without(split))

    def joined(self, more: SeenImages) -> SeenImages:
        """The images of both."""
        table = pa.concat_tables([self.table, more.table]).combine_chunks()
        return SeenImages(table, max(self.near, more.near), self.vectors.joined(more.vectors))

    @property
    def has_vectors_only(self) -> bool:
        """Whether some images are known by their embedding alone, so that others have to be embedded to be compared."""
        return self.table.column("content").null_count > 0 or len(self.vectors) > 0

    # --- knowing again ------------------------------------------------------------------------------------------------

    def find(self, records: Sequence[Record], vectors: np.ndarray | None = None) -> list[Known | None]:
        """Says of each record whether its image was seen.

        Embeddings are compared only where one side has nothing else: of two images, their bytes and perceptual hashes decide.

        Args:
            records: images, or embeddings.
            vectors: (n, d) their unit vectors under the guard's encoder, zero where they are not known; None: none is.
        Returns:
            (n,) how it is known; None for one that was not seen. Labelled splits go before "unlabelled".
        """
        found: list[Known | None] = [None] * len(records)
        for labelled in (True, False):
            splits = LABELLED if labelled else SPLITS[len(LABELLED) :]
            part = self.table.filter(pa.array([split in splits for split in self.table.column("split").to_pylist()], pa.bool_()))
            open_rows = [i for i, known in enumerate(found) if known is None]
            if not len(part) or not open_rows:
                continue
            again = self._find(part, [records[i] for i in open_rows], None if vectors is None else vectors[open_rows], labelled)
            for i, known in zip(open_rows, again, strict=True):
                found[i] = known
        self._find_vectors(found, vectors)
        return found

    def _find_vectors(self, found: list[Known | None], vectors: np.ndarray | None) -> None:
        """Of images that were not found in the table, or without their labels only, those that are among the vectors."""
        if vectors is None or not len(self.vectors):
            return
        rows = [i for i, known in enumerate(found) if (known is None or known.split not in LABELLED) and vectors[i].any()]
        if not rows:
            return
        for i, split in zip(rows, self.vectors.find(sketches(vectors[rows]), SPLITS), strict=True):
            if split is not None and (found[i] is None or split in LABELLED):
                found[i] = Known(split, "embedding")

    def _find(self, part: pa.Table, records: list[Record], vectors: np.ndarray | None, labelled: bool) -> list[Known | None]:
        splits = part.column("split").to_pylist()
        contents, hashes, groups, known_vectors = (
            part.column(name).to_pylist() for name in ("content", "perceptual_hash", "listed_group", "sketch")
        )
        by_content = {value: row for row, value in enumerate(contents) if value is not None}
        by_group = {value: row for row, value in enumerate(groups) if value is not None and labelled}
        near = _nearest([record.perceptual_hash for record in records], hashes, self.near)
        alike = _same_vectors(records, vectors, contents, known_vectors)
        found: list[Known | None] = []
        for i, record in enumerate(records):
            ways = (
                ("content", by_content.get(_content(record))),
                ("near-duplicate", near[i]),
                ("group", by_group.get(_group(record))),
                ("embedding", alike[i]),
            )
            found.append(next((Known(splits[row], by) for by, row in ways if row is not None), None))
        return found

    # --- keeping ------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes Parquet."""
        about = {"format": "1", "near": str(self.near)}
        write_table(path, self.table.replace_schema_metadata(about), compression="zstd")

    @classmethod
    def load(cls, path: Path, vectors: Path | None = None) -> SeenImages:
        """Reads what `save` wrote, and where there are some the vectors beside it.

        Raises:
            InputError: a damaged file, or one with other columns, types or values.
        """
        table = read_table(path, mend="copy the folder anew")
        about = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in (table.schema.metadata or {}).items()}
        near = about.get("near", "")
        if not table.schema.equals(_SCHEMA) or about.get("format") != "1" or near not in map(str, range(16)):
            raise InputError(f"{path} is no list of training images as guardkit writes it; copy the folder anew")
        bare = pc.and_(pc.is_null(table.column("content")), pc.is_null(table.column("sketch")))
        if pc.any(bare).as_py():
            raise InputError(f"{path} has a row by which no image can be known again; copy the folder anew")
        unknown = set(table.column("split").to_pylist()) - set(SPLITS)
        if unknown:
            raise InputError(f"{path} has the split {sorted(map(str, unknown))[0]!r}, expected {', '.join(SPLITS)}; copy the folder anew")
        return cls(table.replace_schema_metadata(None), int(near), None if vectors is None else SeenVectors.load(vectors, SPLITS))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:_HASH_BYTES]


def _content(record: Record) -> bytes | None:
    """Of what determines the pixels; None where there are none to be had, as of a file that is gone."""
    if record.content is None:
        return None
    try:
        # without the version of the reader, which stands before the hash: the same bytes are the same image
        return _hash(record.content.key.rpartition(":")[2])
    except ImageError:
        return None


def _group(record: Record) -> bytes | None:
    return None if record.listed_group is None else _hash(record.listed_group)


def _nearest(mine: Sequence[int | None], seen: Sequence[int | None], near: int) -> list[int | None]:
    """For each hash the row of a seen one in at most `near` bits of distance; None: there is none."""
    found: list[int | None] = [None] * len(mine)
    rows = [i for i, value in enumerate(mine) if value is not None]
    values = np.array([mine[i] for i in rows], np.uint64)
    first: dict[int, int] = {}
    for row, value in enumerate(seen):
        if value is not None:
            first.setdefault(value, row)
    for value, row in first.items():
        for i in np.flatnonzero(np.bitwise_count(values ^ np.uint64(value)) <= near):
            if found[rows[i]] is None:
                found[rows[i]] = row
    return found


def _same_vectors(
    records: Sequence[Record], vectors: np.ndarray | None, contents: Sequence[bytes | None], seen: Sequence[bytes | None]
) -> list[int | None]:
    """For each record the row of a seen vector that is the same but for rounding; None: there is none."""
    found: list[int | None] = [None] * len(records)
    known = [row for row, sketch in enumerate(seen) if sketch is not None]
    if vectors is None or not known:
        return found
    from scipy.spatial import cKDTree

    asked = [i for i in range(len(records)) if vectors[i].any()]
    bare = [row for row in known if contents[row] is None]
    for chosen, against in (
        ([i for i in asked if records[i].content is None], known),
        ([i for i in asked if records[i].content is not None], bare),
    ):
        if not chosen or not against:
            continue
        tree = cKDTree(np.frombuffer(b"".join(seen[row] or b"" for row in against), "<i2").reshape(-1, _PROJECTIONS) / STEPS)
        # the mean square of a difference's projections is its own square
        limit = _SAME_VECTOR * _PROJECTIONS**0.5
        distances, nearest = tree.query(sketches(vectors[chosen]) / STEPS, distance_upper_bound=limit)
        for i, distance, row in zip(chosen, distances, nearest, strict=True):
            if distance <= limit:
                found[i] = against[int(row)]
    return found


def sketches(vectors: np.ndarray, dtype: type[np.floating] = np.float64) -> np.ndarray:
    """(n, d) unit vectors -> (n, 32) little-endian int16: projections on random directions, the same in every release.

    In float32 twice as quick, and a step more or less.
    """
    dim = vectors.shape[1]
    bits = np.frombuffer(hashlib.shake_256(f"guardkit sketch {dim}".encode()).digest(dim * _PROJECTIONS // 8), np.uint8)
    directions = np.where(np.unpackbits(bits).reshape(dim, _PROJECTIONS), 1.0, -1.0)
    largest = np.iinfo(np.int16).max
    return np.clip(np.rint(vectors.astype(dtype) @ directions.astype(dtype) * STEPS), -largest, largest).astype("<i2")
