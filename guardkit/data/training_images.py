"""What a training run notes of the images it used, so that its guard is never tested on them unnoticed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from guardkit.data.datamodule import GuardDataModule
from guardkit.data.unlabelled import Unlabelled
from guardkit.schema import Record
from guardkit.seen import NEAR, SeenImages, sketches
from guardkit.seen_vectors import SeenVectors

_AT_ONCE = 1 << 13


def training_images(data: GuardDataModule, unlabelled: Unlabelled) -> SeenImages:
    """The images of a run that has ended.

    Args:
        data: which it trained and validated on.
        unlabelled: which it looked at without their labels. Those that it trained on as well are listed as such only.
    """
    used = data.used_images()
    near = getattr(data.source, "near_duplicate_distance", NEAR)
    # found in the store, but for those that an arm saw in another form only
    vectors = _embedded(data, [record for _, record in used])
    labelled = [
        (split, record, vector)
        for (split, record), vector in zip(used, vectors, strict=True)
        if vector is None or np.isfinite(vector[0])  # stored embeddings that nobody looked at may be none
    ]
    # of those nothing is left out but a count is given: embedding them all once more for that would be too much
    own = {id(record) for _, record in used}
    others: list[tuple[str, Record, np.ndarray | None]] = [
        ("unlabelled", record, record.embedding) for record in unlabelled.images if id(record) not in own
    ]
    # parts of them were seen, so that the vectors of the whole are not asked for
    lent: list[tuple[str, Record, np.ndarray | None]] = [("train", record, None) for record in data.lent_images()]
    seen = SeenImages.of([*labelled, *lent, *others], near=near)
    return SeenImages(seen.table, near, SeenVectors.of(_stored(data)))


def _stored(data: GuardDataModule) -> Iterator[tuple[str, np.ndarray]]:
    """(split, projections) of what was used and is too much to be listed."""
    for split, table in data.used_tables():
        for start in range(0, len(table), _AT_ONCE):
            vectors = table.vectors(slice(start, start + _AT_ONCE))
            yield split, sketches(vectors[np.isfinite(vectors[:, 0])], np.float32)


def _embedded(data: GuardDataModule, records: list[Record]) -> list[np.ndarray | None]:
    vectors: dict[int, np.ndarray] = {row: record.embedding for row, record in enumerate(records) if record.embedding is not None}
    rows = [row for row in range(len(records)) if row not in vectors]
    # by numbers, which are unique whatever the source calls its images
    numbered = [Record(str(row), 0, None, "", "", records[row].content) for row in rows]
    read, made, _ = data.store.embed_readable(numbered)
    vectors |= {int(record.id): vector for record, vector in zip(read, made, strict=True)}
    return [vectors.get(row) for row in range(len(records))]
