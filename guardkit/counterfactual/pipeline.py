"""From an unsafe image to its verified counterfactual: instructor, editor, verifier, and the store under them.

Every try passes through the store, accepted or rejected, so nothing is made twice: not in a second epoch, not in a
second run, not by another arm. The key names all that a try depends on: image, policy, instruction, region, editor,
verifier, seed and kind.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from guardkit.artifacts import KeyValueStore, fingerprint
from guardkit.counterfactual.instructor import NULL_INSTRUCTION, Instructor
from guardkit.counterfactual.verifier import Verdict, Verifier, sanity
from guardkit.editors.base import Editor, EditRequest
from guardkit.images import decode_png, encode_png
from guardkit.policy import Policy
from guardkit.schema import ImageError, InputError, Record


@dataclass(frozen=True)
class Try:
    """One edit that was tried: a content (of the edited image) that may have been rejected.

    Attributes:
        key: of everything the try depends on.
        instruction: what the editor was asked for.
        verdict: accepted when its reason is None.
    """

    key: str
    instruction: str
    verdict: Verdict
    png: bytes | None = field(repr=False)

    @property
    def accepted(self) -> bool:
        """Whether the edited image may be used."""
        return self.verdict.reason is None

    def load(self) -> np.ndarray:
        """(h, w, 3) uint8 RGB of the edited image."""
        if self.png is None:
            raise ImageError(f"no edited image: {self.verdict.reason}")
        return decode_png(self.png)

    def to_bytes(self) -> bytes:
        """For the store: a line of JSON, then the PNG."""
        verdict = self.verdict
        head = {
            "instruction": self.instruction,
            "reason": verdict.reason,
            "flip_score": verdict.flip_score,
            "preservation_score": verdict.preservation_score,
            "has_image": self.png is not None,
        }
        return json.dumps(head).encode() + b"\n" + (self.png or b"")

    @classmethod
    def from_bytes(cls, key: str, value: bytes) -> Try:
        """The inverse of `to_bytes`."""
        line, _, png = value.partition(b"\n")
        head = json.loads(line)
        verdict = Verdict(head["reason"], head["flip_score"], head["preservation_score"])
        return cls(key, head["instruction"], verdict, png if head["has_image"] else None)


@dataclass
class EditCounts:
    """requested = accepted + sum of rejected; cache_hits of them were not made anew."""

    requested: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    cache_hits: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict:
        """The counts in the form of metrics.json."""
        return {
            "requested": self.requested,
            "accepted": self.accepted,
            "rejected": dict(sorted(self.rejected.items())),
            "cache_hits": self.cache_hits,
        }


class CounterfactualPipeline:
    """Makes counterfactuals and null edits.

    Args:
        policy: what makes an image unsafe.
        instructor: writes the instruction.
        editor: makes the edit.
        verifier: decides whether it is kept.
        cache_dir: where tries are stored; None keeps them in memory.
        batch_size: how many edits the editor is asked for at once.
    """

    def __init__(
        self,
        policy: Policy,
        instructor: Instructor,
        editor: Editor,
        verifier: Verifier,
        *,
        cache_dir: Path | None,
        batch_size: int = 16,
    ) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"edit batch_size must be a whole number of at least 1, got {batch_size!r}")
        self.policy, self.instructor, self.editor, self.verifier = policy, instructor, editor, verifier
        self.batch_size = batch_size
        self._lock = threading.Lock()
        self._memory: dict[str, bytes] = {}
        self._store = None if cache_dir is None else KeyValueStore(Path(cache_dir) / "edits.sqlite", {"format": 1})

    def make(
        self,
        records: Sequence[Record],
        seeds: Sequence[int],
        kind: Literal["counterfactual", "null"] = "counterfactual",
        counts: EditCounts | None = None,
    ) -> list[Try | None]:
        """One try per record, in order; None where the record has no image to edit (an embedding).

        Args:
            records: what to edit.
            seeds: one per record; the same record and seed give the same try.
            kind: "counterfactual", or "null" for an irrelevant change.
            counts: what happened is added here.
        """
        counts = EditCounts() if counts is None else counts
        # one caller at a time: editors are not expected to be thread-safe, and two callers must not make the same edit
        with self._lock:
            tries: list[Try | None] = []
            for start in range(0, len(records), self.batch_size):
                stop = start + self.batch_size
                tries += self._make_batch(records[start:stop], seeds[start:stop], kind, counts)
            return tries

    def _make_batch(
        self, records: Sequence[Record], seeds: Sequence[int], kind: Literal["counterfactual", "null"], counts: EditCounts
    ) -> list[Try | None]:
        started = time.perf_counter()
        requests: dict[str, EditRequest] = {}
        keys: list[str | None] = []
        for record, seed in zip(records, seeds, strict=True):
            if record.content is None:
                keys.append(None)
                continue
            instruction = self.instructor.instruct(record, self.policy) if kind == "counterfactual" else NULL_INSTRUCTION
            request = EditRequest(record.content, instruction, record.region, seed, kind, record.label)
            key = "edit:" + fingerprint(
                {
                    "image": record.content.key,
                    "region": record.region,
                    "policy": self.policy.digest,
                    "instruction": instruction,
                    "editor": self.editor.config,
                    "verifier": self.verifier.config,
                    "seed": seed,
                    "kind": kind,
                    "label": record.label,
                }
            )
            keys.append(key)
            requests[key] = request
        found = self._get(list(requests))
        tries = {key: Try.from_bytes(key, value) for key, value in found.items()}
        missing = [key for key in requests if key not in tries]
        if missing:
            made = self._edit([requests[key] for key in missing], missing)
            self._put({made_try.key: made_try.to_bytes() for made_try in made})
            tries |= {made_try.key: made_try for made_try in made}
        for name in keys:
            counts.requested += 1
            if name is None:
                counts.rejected["no image: the source holds embeddings only"] += 1
                continue
            counts.cache_hits += name in found
            reason = tries[name].verdict.reason
            if reason is None:
                counts.accepted += 1
            else:
                counts.rejected[reason] += 1
        counts.seconds += time.perf_counter() - started
        return [None if key is None else tries[key] for key in keys]

    def _edit(self, requests: list[EditRequest], keys: list[str]) -> list[Try]:
        results = self.editor.edit(requests)
        if len(results) != len(requests):
            raise RuntimeError(f"editor {self.editor.name} returned {len(results)} results for {len(requests)} requests")
        verdicts: list[Verdict | None] = []
        originals: list[np.ndarray | None] = []
        for request, result in zip(requests, results, strict=True):
            if result.image is None:
                verdicts.append(Verdict(result.reason or "editor gave no reason"))
                originals.append(None)
                continue
            original = request.content.load()
            reason = sanity(original, result.image)
            verdicts.append(Verdict(reason) if reason else None)
            originals.append(original)
        open_ones = [i for i, verdict in enumerate(verdicts) if verdict is None]
        judged = self.verifier.verify(
            [requests[i] for i in open_ones],
            [originals[i] for i in open_ones],  # type: ignore[misc]
            [results[i].image for i in open_ones],  # type: ignore[misc]
        )
        for i, judgement in zip(open_ones, judged, strict=True):
            verdicts[i] = judgement
        tries = []
        for request, result, key, verdict in zip(requests, results, keys, verdicts, strict=True):
            assert verdict is not None
            image = result.image
            storable = image is not None and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            tries.append(Try(key, request.instruction, verdict, encode_png(image) if storable else None))  # type: ignore[arg-type]
        return tries

    def _get(self, keys: list[str]) -> dict[str, bytes]:
        if self._store is None:
            return {key: self._memory[key] for key in keys if key in self._memory}
        return self._store.get(keys)

    def _put(self, items: dict[str, bytes]) -> None:
        if self._store is None:
            self._memory.update(items)
        else:
            self._store.put(items)
