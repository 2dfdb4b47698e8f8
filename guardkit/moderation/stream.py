"""Deciding over the images of a shard, one after the other, in bounded memory: read, known, encoded, decided.

A shard knows nothing of others: which inputs are the same as earlier ones is found when all are there, see `joining`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from guardkit.classifier import GuardClassifier
from guardkit.data.duplicates import perceptual_hash
from guardkit.encoders.base import enough
from guardkit.images import encode_jpeg, open_file, read_frames
from guardkit.limits import MAX_BYTES, check_bytes, shrink
from guardkit.moderation.banks import Bank, pdq_of
from guardkit.moderation.bars import trim_bars
from guardkit.moderation.frames import worst_frame
from guardkit.reading_ahead import read_ahead
from guardkit.schema import Content, Decision, ImageError
from guardkit.shards.base import Given, Stored, fetched, n_bytes
from guardkit.thresholds import undecided

ACTIONS = ("allow", "review", "block", "error")
_THUMBNAIL_PX = 160
_KNOWN = 20_000  # contents whose decisions are kept, so that what repeats them soon is not decoded
_NOBODY = Given("", None)  # of what is kept: an input would keep its bytes


@dataclass(frozen=True)
class Options:
    """How images are read and decided.

    Attributes:
        scope: categories that decide, as `check_scope` gives them; None: all.
        max_pixels: larger images are not decoded, and give an error.
        max_frames: longer animations give an error.
        trim: take letterbox bars away first.
    """

    scope: tuple[str, ...] | None = None
    max_pixels: int = 100_000_000
    max_frames: int = 200
    trim: bool = False


@dataclass(frozen=True)
class Decided:
    """What came out for one input.

    Attributes:
        given: the input.
        decision: of its worst frame.
        frame: the number of that frame, from 0; None of a still image.
        hash: of what it looks like, 64 bits; None where it was not decided by itself.
        bank: "block_list:sha256" and the like, where a bank decided; "" elsewhere.
        thumbnail: a small JPEG, of what is not allowed.
        sha256: of its bytes, 64 hex digits; "" where they could not be read, or not be used.
    """

    given: Given
    decision: Decision
    frame: int | None = None
    hash: int | None = None
    bank: str = ""
    thumbnail: bytes | None = None
    sha256: str = ""

    @property
    def action(self) -> str:
        """That of the bank, where one decided."""
        if self.bank:
            return "block" if self.bank.startswith("block") else "allow"
        return self.decision.action


@dataclass(frozen=True)
class _Read:
    """One input, read."""

    given: Given
    reason: str = ""
    sha256: bytes = b""
    frames: tuple[torch.Tensor, ...] = ()
    hash: int | None = None
    pdqs: tuple[np.ndarray | None, ...] = ()
    thumbnails: tuple[np.ndarray, ...] = ()
    vector: np.ndarray | None = None
    known: Decided | None = None


class Moderator:
    """Decides over the inputs of a shard, in order.

    Args:
        guard: decides.
        options: how.
        banks: of known images, in the order in which they are asked.
    """

    def __init__(self, guard: GuardClassifier, options: Options, banks: Sequence[Bank]) -> None:
        self.guard, self.options, self.banks = guard, options, banks
        self._known: dict[bytes, Decided] = {}

    def decide(self, inputs: Iterable[Given]) -> Iterator[Decided]:
        """Each input's decision, in order."""
        size = self.guard.encoder.batch_size
        # as many are read ahead as one batch takes, however many frames they have
        with closing(read_ahead(fetched(inputs), self._read, ahead=size, is_needed=_is_image, n_bytes=n_bytes)) as stream:
            batch: list[_Read] = []
            n_frames = 0
            for given, read in stream:
                if read is None:
                    assert isinstance(given.data, np.ndarray)
                    read = _Read(given, vector=given.data)
                batch.append(read)
                n_frames += len(read.frames)
                if n_frames >= size or len(batch) >= 4 * size:
                    yield from self._decide(batch)
                    batch, n_frames = [], 0
            yield from self._decide(batch)

    def _read(self, given: Given) -> _Read:
        if given.data is None:
            return _Read(given, given.reason)
        try:
            data = encoded_bytes(given.data)
            sha256 = hashlib.sha256(data).digest()
            # what is known by its bytes need not be decoded
            known = self._known.get(sha256)
            if known is not None or any(bank.match(sha256, ()) for bank in self.banks):
                return _Read(given, "", sha256, known=known)
            first: list[int] = []

            def take(image: np.ndarray) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray]:
                if not first:
                    first.append(perceptual_hash(image))
                pdq = pdq_of(image) if any(bank.needs_pixels for bank in self.banks) else None
                return self.guard.encoder.preprocess(trim_bars(image) if self.options.trim else image), pdq, shrink(image, _THUMBNAIL_PX)

            frames = read_frames(
                data, take, max_pixels=self.options.max_pixels, max_frames=self.options.max_frames, at_least=enough(self.guard.encoder)
            )
        except ImageError as error:
            return _Read(given, str(error))
        pixels, pdqs, thumbnails = zip(*frames, strict=True)
        return _Read(given, "", sha256, pixels, first[0], pdqs, thumbnails)

    def _decide(self, batch: Sequence[_Read]) -> list[Decided]:
        found: list[Decided] = []
        made = iter(self._of_frames([frame for one in batch for frame in one.frames]))
        stored = iter(self._of_vectors([one.vector for one in batch if one.vector is not None]))
        for one in batch:
            mine = [next(made) for _ in one.frames]
            key = one.sha256.hex()
            if one.reason:
                found.append(Decided(one.given, _failed(self.guard, one.reason)))
                continue
            if one.vector is not None:
                found.append(Decided(one.given, next(stored)))
                continue
            matched = next(((bank.name, kind) for bank in self.banks if (kind := bank.match(one.sha256, one.pdqs)) is not None), None)
            if matched is not None:
                small = encode_jpeg(one.thumbnails[0], max_px=_THUMBNAIL_PX) if matched[0] == "block_list" and one.thumbnails else None
                nothing = replace(_failed(self.guard, ""), error=None)
                found.append(Decided(one.given, nothing, bank=":".join(matched), thumbnail=small, sha256=key))
                continue
            known = one.known or self._known.get(one.sha256)
            if known is None:
                decision, frame = worst_frame(mine)
                small = None if decision.action == "allow" else encode_jpeg(one.thumbnails[frame or 0], max_px=_THUMBNAIL_PX)
                known = self._known[one.sha256] = Decided(_NOBODY, decision, frame, one.hash, "", small, key)
                if len(self._known) > _KNOWN:
                    del self._known[next(iter(self._known))]  # what repeats it is decided again, and alike
            found.append(replace(known, given=one.given))
        return found

    def _of_frames(self, frames: Sequence[torch.Tensor]) -> list[Decision]:
        size = self.guard.encoder.batch_size
        decisions: list[Decision] = []
        for start in range(0, len(frames), size):
            decisions += self._of_vectors(self.guard.encoder.encode_preprocessed(frames[start : start + size], fixed_batch=True))
        return decisions

    def _of_vectors(self, vectors: Sequence[np.ndarray] | np.ndarray) -> list[Decision]:
        """Always equally many at once: a score does not depend, to the last bit, on where a run was stopped before."""
        size = self.guard.encoder.batch_size
        decisions: list[Decision] = []
        for start in range(0, len(vectors), size):
            some = np.stack(tuple(vectors[start : start + size]))
            filled = np.concatenate([some, np.repeat(some[:1], size - len(some), axis=0)])
            decisions += self.guard.decide(filled, scope=self.options.scope)[: len(some)]
        return decisions


def _is_image(given: Given) -> bool:
    return not isinstance(given.data, np.ndarray)


def encoded_bytes(data: bytes | Path | Stored | Content | np.ndarray) -> bytes:
    """All of an input. Raises ImageError where it cannot be read, is empty or too large, or was given as a vector."""
    if isinstance(data, np.ndarray):
        raise ImageError("there is its embedding, and no image")
    if isinstance(data, bytes):
        check_bytes(len(data))
        return data
    if isinstance(data, Stored):
        return encoded_bytes(data.read())
    assert isinstance(data, Path)
    try:
        with open_file(data) as file:
            found = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    check_bytes(len(found))
    return found


def _failed(guard: GuardClassifier, reason: str) -> Decision:
    return undecided(guard.thresholds, reason)
