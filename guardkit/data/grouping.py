"""The one way in which a source is loaded: images are looked at once, and what is the same image shares a group.

Whatever is equal or nearly equal is one image to a test: bytes, pixels after resizing and compression, vectors up to rounding. No
such group straddles a split, and none stands in a source's training and test images alike.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from guardkit.checks import check_flag, check_whole
from guardkit.data.duplicates import near_duplicate_groups, near_equal_groups, perceptual_hash
from guardkit.data.sources.base import Loaded, Source, check_source
from guardkit.progress import progress
from guardkit.schema import Content, ImageError, InputError, Record, Rejected

log = logging.getLogger(__name__)

DISTANCE = 4  # bits of 64 in which near-duplicates differ at most
_READERS = 4
_SHOWN = 5


def load_source(source: Source, *, for_training: bool = True) -> Loaded:
    """What a source holds, checked and grouped; every command comes here.

    Our own sources group in their `load`, by their settings; others are grouped here, with `check_images` and
    `near_duplicate_distance` as they have them.

    Args:
        source: of images or embeddings.
        for_training: False where images that are only of no use for training are used too: they are then not among the rejected.
    Raises:
        InputError: what the source raises, something that is no source, or not one image with a label for training.
    """
    check_source(source)
    loaded = source.load()
    if not loaded.is_grouped:
        check = getattr(source, "check_images", True)
        loaded = group(loaded, check_images=check, near_duplicate_distance=getattr(source, "near_duplicate_distance", DISTANCE))
    if not for_training:
        aside = {record.id for record in loaded.set_aside}
        loaded = replace(loaded, rejected=[item for item in loaded.rejected if item.id not in aside])
    elif not loaded.train and not loaded.test:
        raise InputError(loaded.without_labels or f"source={source.name} has no labelled image that can be used{why_rejected(loaded)}")
    for item in loaded.rejected[:_SHOWN]:
        log.warning("%s: rejected (%s)", item.id, item.reason)
    if len(loaded.rejected) > _SHOWN:
        log.warning("... and %d more; all are listed with the results", len(loaded.rejected) - _SHOWN)
    return loaded


def why_rejected(loaded: Loaded) -> str:
    """ " (n of m inputs were rejected, the first is ID: REASON)", to end an error with; "" when none was."""
    if not loaded.rejected:
        return ""
    first = loaded.rejected[0]
    return f" ({len(loaded.rejected)} of {loaded.given} inputs were rejected, the first is {first.id[:100]}: {first.reason})"


def check_image_settings(max_pixels: int, check_images: bool, near_duplicate_distance: int) -> None:
    """Raises InputError unless these settings of a source are usable."""
    check_whole("source.max_pixels", max_pixels, 1)
    check_flag("source.check_images", check_images)
    check_whole("source.near_duplicate_distance", near_duplicate_distance, 0, 15)


def content_key(record: Record) -> str:
    """64 hex digits, equal for equal images (or, where a source holds embeddings, for vectors equal in half precision).

    Raises:
        ImageError: its image cannot be read.
    """
    if record.content is not None:
        return hashlib.sha256(record.content.key.encode()).hexdigest()
    assert record.embedding is not None, f"{record.id} has neither an image nor an embedding"
    # adding zero makes -0 and 0 the same bytes
    return hashlib.sha256((record.embedding.astype("<f2") + np.float16(0)).tobytes()).hexdigest()


def look(content: Content) -> int | str:
    """The perceptual hash of an image, or why it cannot be used."""
    try:
        content.key  # noqa: B018 - reads the bytes, and keeps their hash for the store
        return perceptual_hash(content.load())
    except ImageError as error:
        return str(error)


def group(loaded: Loaded, *, check_images: bool = True, near_duplicate_distance: int = DISTANCE) -> Loaded:
    """Rejects images that cannot be read, and gives what is the same image, or was listed together, one group.

    A group is called after its first record. Training records in a group with a test record leave the training pool. Drawn
    scenes are left as they are: each is drawn from numbers of its own.

    Args:
        loaded: as a source lists it.
        check_images: read every image; without it, bad ones show only in use, and equal images are not found.
        near_duplicate_distance: bits of the 64-bit perceptual hash in which near-duplicates differ at most, in [0, 15].
    Returns:
        The same inputs, counted again: given = train + test + rejected.
    """
    if loaded.is_drawn:
        return replace(loaded, is_grouped=True)
    rejected = list(loaded.rejected)
    records = [*loaded.train, *(loaded.test or [])]
    looked = _look_at(records) if check_images else {}
    looked_at = _look_at_counterfactuals(records) if check_images else {}
    kept: list[Record] = []
    n_train = 0
    for row, record in enumerate(records):
        seen = looked.get(row, record.perceptual_hash)
        if record.embedding is not None and not 0 < np.linalg.norm(record.embedding) < np.inf:
            seen = "its vector is zero or not finite"
        if isinstance(seen, str):
            rejected.append(Rejected(record.id, seen))
            continue
        hashes = looked_at.get(row, record.counterfactual_hashes)
        is_known = (seen, hashes) == (record.perceptual_hash, record.counterfactual_hashes)
        kept.append(record if is_known else replace(record, perceptual_hash=seen, counterfactual_hashes=hashes))
        n_train += row < len(loaded.train)
    names = _group_names(kept, near_duplicate_distance)
    kept = [record if record.group == name else replace(record, group=name) for record, name in zip(kept, names, strict=True)]
    train, test = kept[:n_train], None if loaded.test is None else kept[n_train:]
    first_tested: dict[str, str] = {}
    for record in test or []:
        first_tested.setdefault(record.group, record.id)
    shared = [record for record in train if record.group in first_tested]
    rejected += [
        Rejected(record.id, f"the same image as, or listed together with, the test image {first_tested[record.group]}") for record in shared
    ]
    pairs = loaded.test_pairs
    if pairs is not None and test is not None:
        there = {record.id for record in test}
        pairs = [pair for pair in pairs if pair[0].id in there]
    return replace(
        loaded,
        train=[record for record in train if record.group not in first_tested],
        test=test,
        rejected=rejected,
        test_pairs=pairs,
        set_aside=[*loaded.set_aside, *shared],
        is_grouped=True,
    )


def _look_at(records: Sequence[Record]) -> dict[int, int | str]:
    """By row, what `look` says of the images that nobody has looked at yet."""
    wanted = [(row, record.content) for row, record in enumerate(records) if record.content is not None and record.perceptual_hash is None]
    with ThreadPoolExecutor(_READERS) as readers:
        looks: Iterable[int | str] = readers.map(look, [content for _, content in wanted])
        looks = progress(looks, total=len(wanted), what="checking images") if wanted else looks
        return {row: seen for (row, _), seen in zip(wanted, looks, strict=True)}


def _look_at_counterfactuals(records: Sequence[Record]) -> dict[int, tuple[int | None, ...]]:
    """By row, the hashes of counterfactuals that nobody has looked at yet; one that cannot be read shows in use."""
    wanted = {row: record for row, record in enumerate(records) if record.counterfactuals and not record.counterfactual_hashes}
    seen = {row: [look(content) for content in record.counterfactuals] for row, record in wanted.items()}
    return {row: tuple(one if isinstance(one, int) else None for one in several) for row, several in seen.items()}


def _group_names(records: Sequence[Record], distance: int) -> list[str]:
    """A group for each record: the same for what is equal, nearly equal or listed together."""
    leader: dict[Hashable, Hashable] = {}

    def find(key: Hashable) -> Hashable:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]  # halves the path, or a long group would make it a long chain
            key = leader[key]
        return key

    looks = [(row, value) for row, record in enumerate(records) for value in (record.perceptual_hash, *record.counterfactual_hashes)]
    hashed = [row for row, value in looks if value is not None]
    alike = near_duplicate_groups(np.array([value for _, value in looks if value is not None], np.uint64), distance)
    embedded = [row for row, record in enumerate(records) if record.embedding is not None]
    equal = near_equal_groups([records[row].embedding for row in embedded])  # type: ignore[misc]
    for kind, rows, numbers in (("alike", hashed, alike), ("equal", embedded, equal)):
        for row, number in zip(rows, numbers.tolist(), strict=True):
            leader[find((kind, number))] = find(("group", records[row].group))
    for row in dict.fromkeys(hashed):
        for content in (records[row].content, *records[row].counterfactuals):
            if content is not None:
                leader[find(("content", content.key))] = find(("group", records[row].group))
    names: dict[Hashable, str] = {}
    return [names.setdefault(find(("group", record.group)), record.id) for record in records]
