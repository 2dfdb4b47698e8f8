"""Tries, and where they are kept: accepted and rejected alike, so that nothing is made twice. Knows no editor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from guardkit.artifacts import KeyValueStore
from guardkit.counterfactual.verifier import Verdict
from guardkit.images import decode_png
from guardkit.schema import ImageError


@dataclass(frozen=True)
class Try:
    """One edit that was tried: a content (of the edited image) that may have been rejected.

    Attributes:
        key: of everything the try depends on.
        seed: of this edit.
        instruction: what the editor was asked for.
        verdict: accepted when its reason is None.
        png: the edited image; None when there is none.
        abstained: the instructor gave no instruction, so that nothing was edited and nothing stored.
    """

    key: str
    seed: int
    instruction: str
    verdict: Verdict
    png: bytes | None = field(repr=False)
    abstained: bool = False

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
    def from_bytes(cls, key: str, seed: int, value: bytes) -> Try:
        """The inverse of `to_bytes`."""
        line, _, png = value.partition(b"\n")
        head = json.loads(line)
        verdict = Verdict(head["reason"], head["flip_score"], head["preservation_score"])
        return cls(key, seed, head["instruction"], verdict, png if head["has_image"] else None)


class TryStore:
    """Tries by their key, on disk or in memory.

    Args:
        cache_dir: where they are kept; None keeps them in memory.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._memory: dict[str, bytes] = {}
        self._disk = None if cache_dir is None else KeyValueStore(Path(cache_dir) / "edits.sqlite", {"format": 1})

    def get(self, seeds: Mapping[str, int]) -> dict[str, Try]:
        """Those of the wanted tries that are there; `seeds` gives the seed of each wanted key."""
        found = self._disk.get(seeds) if self._disk is not None else {key: self._memory[key] for key in seeds if key in self._memory}
        return {key: Try.from_bytes(key, seeds[key], value) for key, value in found.items()}

    def put(self, tries: Sequence[Try]) -> None:
        """Keeps tries, all or none of them."""
        items = {one.key: one.to_bytes() for one in tries}
        if self._disk is None:
            self._memory.update(items)
        else:
            self._disk.put(items)
