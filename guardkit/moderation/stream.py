"""Deciding over any number of images, one after the other, in bounded memory: read, known, encoded, decided, written.

Parts of a few thousand inputs are written as they are finished, so that a run that is killed goes on after the last of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guardkit.classifier import GuardClassifier
from guardkit.data.duplicates import perceptual_hash
from guardkit.images import encode_jpeg, open_file, read_frames
from guardkit.limits import MAX_BYTES, check_bytes, shrink
from guardkit.moderation.banks import Bank, pdq_of
from guardkit.moderation.bars import trim_bars
from guardkit.moderation.frames import worst_frame
from guardkit.moderation.inputs import Given
from guardkit.schema import Decision, ImageError
from guardkit.seen import NEAR
from guardkit.stores import KeyValueStore
from guardkit.thresholds import undecided

ACTIONS = ("allow", "review", "block", "error")
_LOADERS = 2  # threads that read and prepare images while the model encodes
_THUMBNAIL_PX = 160


@dataclass(frozen=True)
class Options:
    """How images are read and decided.

    Attributes:
        scope: categories that decide, as `check_scope` gives them; None: all.
        max_pixels: larger images are not decoded, and give an error.
        max_frames: longer animations give an error.
        trim: take letterbox bars away first.
        near: bits of 64 in which the perceptual hashes of near-duplicates differ at most.
    """

    scope: tuple[str, ...] | None = None
    max_pixels: int = 100_000_000
    max_frames: int = 200
    trim: bool = False
    near: int = NEAR


@dataclass(frozen=True)
class Decided:
    """What came out for one input.

    Attributes:
        given: the input.
        decision: of its worst frame.
        frame: the number of that frame, from 0; None of a still image.
        duplicate_of: an earlier input with the same bytes, whose decision this is.
        near_duplicate_of: an earlier input that a viewer would call the same; this one was decided by itself.
        bank: "block_list:sha256" and the like, where a bank decided; "" elsewhere.
        thumbnail: a small JPEG, of what is not allowed.
        sha256: of its bytes, 64 hex digits; "" where they could not be read, or not be used.
    """

    given: Given
    decision: Decision
    frame: int | None = None
    duplicate_of: str | None = None
    near_duplicate_of: str | None = None
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


class Moderator:
    """Decides over inputs in order.

    Args:
        guard: decides.
        options: how.
        banks: of known images, in the order in which they are asked.
        known: decisions of contents that were decided before, by their hash.
    """

    def __init__(self, guard: GuardClassifier, options: Options, banks: Sequence[Bank], known: KeyValueStore) -> None:
        self.guard, self.options, self.banks, self.known = guard, options, banks, known
        self._ids: list[str] = []
        self._hashes = np.zeros(1024, np.uint64)

    def remember(self, ids: Sequence[str], hashes: Sequence[int]) -> None:
        """Inputs of earlier parts, whose near-duplicates may come."""
        for name, value in zip(ids, hashes, strict=True):
            self._note(name, value)

    def decide(self, inputs: Iterable[Given]) -> Iterator[tuple[Decided, int | None]]:
        """Each input's decision, in order, and its perceptual hash where it was decoded."""
        size = self.guard.encoder.batch_size
        with ThreadPoolExecutor(_LOADERS) as loaders:
            stream, waiting = iter(inputs), deque[Future[_Read]]()
            batch: list[_Read] = []
            n_frames = 0
            while True:
                # as many are read ahead as one batch takes, however many frames they have
                waiting.extend(loaders.submit(self._read, given) for given in itertools.islice(stream, max(0, size - len(waiting))))
                if not waiting:
                    break
                one = waiting.popleft().result()
                batch.append(one)
                n_frames += len(one.frames)
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
            # what is known by its bytes need not be decoded; what a run decided that was killed before it was written is decided anew
            before = self.known.get([sha256.hex()], _plain).get(sha256.hex())
            if (before is not None and before["id"] != given.id) or any(bank.match(sha256, ()) for bank in self.banks):
                return _Read(given, "", sha256)
            first: list[int] = []

            def take(image: np.ndarray) -> tuple[torch.Tensor, np.ndarray | None, np.ndarray]:
                if not first:
                    first.append(perceptual_hash(image))
                pdq = pdq_of(image) if any(bank.needs_pixels for bank in self.banks) else None
                return self.guard.encoder.preprocess(trim_bars(image) if self.options.trim else image), pdq, shrink(image, _THUMBNAIL_PX)

            frames = read_frames(data, take, max_pixels=self.options.max_pixels, max_frames=self.options.max_frames)
        except ImageError as error:
            return _Read(given, str(error))
        pixels, pdqs, thumbnails = zip(*frames, strict=True)
        return _Read(given, "", sha256, pixels, first[0], pdqs, thumbnails)

    def _decide(self, batch: Sequence[_Read]) -> list[tuple[Decided, int | None]]:
        """Stored before anybody sees it: what is written into a part can be found again by its bytes."""
        found: list[tuple[Decided, int | None]] = []
        made = iter(self._of_frames([frame for one in batch for frame in one.frames]))
        before = self.known.get([one.sha256.hex() for one in batch if one.sha256], _plain)
        new: dict[str, Any] = {}
        for one in batch:
            mine = [next(made) for _ in one.frames]
            key = one.sha256.hex()
            if one.reason:
                found.append((Decided(one.given, _failed(self.guard, one.reason)), None))
                continue
            matched = next(((bank.name, kind) for bank in self.banks if (kind := bank.match(one.sha256, one.pdqs)) is not None), None)
            if matched is not None:
                small = encode_jpeg(one.thumbnails[0], max_px=_THUMBNAIL_PX) if matched[0] == "block_list" and one.thumbnails else None
                nothing = replace(_failed(self.guard, ""), error=None)
                found.append((Decided(one.given, nothing, bank=":".join(matched), thumbnail=small, sha256=key), one.hash))
                continue
            known = new.get(key) or before.get(key)
            if known is not None and known["id"] != one.given.id:
                found.append((Decided(one.given, _decision(known["decision"]), known["frame"], duplicate_of=known["id"], sha256=key), None))
                continue
            decision, frame = worst_frame(mine)
            near = self._near(one.hash)
            if one.hash is not None:
                self._note(one.given.id, one.hash)
            new[key] = {"id": one.given.id, "frame": frame, "decision": _stored(decision)}
            small = None if decision.action == "allow" else encode_jpeg(one.thumbnails[frame or 0], max_px=_THUMBNAIL_PX)
            found.append((Decided(one.given, decision, frame, None, near, "", small, key), one.hash))
        if new:
            self.known.put({key: json.dumps(value, allow_nan=False).encode() for key, value in new.items()})
        return found

    def _of_frames(self, frames: Sequence[torch.Tensor]) -> list[Decision]:
        """Always equally many at once: a score does not depend, to the last bit, on where a run was stopped before."""
        size = self.guard.encoder.batch_size
        decisions: list[Decision] = []
        for start in range(0, len(frames), size):
            vectors = self.guard.encoder.encode_preprocessed(frames[start : start + size], fixed_batch=True)
            filled = np.concatenate([vectors, np.repeat(vectors[:1], size - len(vectors), axis=0)])
            decisions += self.guard.decide(filled, scope=self.options.scope)[: len(vectors)]
        return decisions

    def _near(self, value: int | None) -> str | None:
        if value is None or not self._ids:
            return None
        near = np.bitwise_count(self._hashes[: len(self._ids)] ^ np.uint64(value)) <= self.options.near
        return self._ids[int(near.argmax())] if near.any() else None

    def _note(self, name: str, value: int) -> None:
        if len(self._ids) == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[len(self._ids)] = value
        self._ids.append(name)


def encoded_bytes(data: bytes | Path) -> bytes:
    """All of an input. Raises ImageError where it cannot be read, is empty or too large."""
    if isinstance(data, bytes):
        check_bytes(len(data))
        return data
    try:
        with open_file(data) as file:
            found = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
    check_bytes(len(found))
    return found


def _failed(guard: GuardClassifier, reason: str) -> Decision:
    return undecided(guard.thresholds, reason)


def _stored(decision: Decision) -> dict[str, Any]:
    said = decision.to_dict()
    return {key: said[key] for key in ("label", "score", "threshold_review", "threshold_block", "categories", "violated", "error")}


def _decision(said: Mapping[str, Any]) -> Decision:
    score = float("nan") if said["score"] is None else said["score"]
    return Decision(
        said["label"], score, said["threshold_review"], said["categories"], said["error"],
        threshold_block=said["threshold_block"], violated=tuple(said["violated"]),
    )  # fmt: skip


def _plain(value: bytes) -> dict[str, Any]:
    """The entry that a stored value is. Raises ValueError where it is none."""
    found = json.loads(value)
    if not isinstance(found, dict) or not {"id", "frame", "decision"} <= found.keys():
        raise ValueError("no decision")
    return found
