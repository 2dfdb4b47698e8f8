"""Edits and verdicts, and where they are kept: accepted and rejected alike, so that nothing is made twice. Knows no editor.

An edit does not depend on who judges it: with another verifier, or other limits, stored edits are judged anew and none is
made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from guardkit.artifacts import KeyValueStore
from guardkit.counterfactual.verifier import Verdict
from guardkit.images import decode_png
from guardkit.schema import ImageError


@dataclass(frozen=True)
class Edit:
    """What came of an edit request: an image, or why there is none that could be used.

    Attributes:
        key: of everything the edit depends on.
        png: the edited image; None when the editor gave none.
        reason: why it cannot be used, whoever judges; None when it can be judged.
    """

    key: str
    png: bytes | None = field(repr=False)
    reason: str | None


@dataclass(frozen=True)
class Try:
    """One edit that was tried and judged: a content (of the edited image) that may have been rejected.

    Attributes:
        key: of the edit.
        seed: of the edit.
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


class TryStore:
    """Edits and verdicts by their keys, on disk or in memory.

    Args:
        cache_dir: where they are kept; None keeps them in memory.
    """

    def __init__(self, cache_dir: Path | None) -> None:
        self._memory: dict[str, bytes] = {}
        self._disk = None if cache_dir is None else KeyValueStore(Path(cache_dir) / "edits.sqlite", {"format": 2})

    def edits(self, keys: Iterable[str]) -> dict[str, Edit]:
        """Those of the wanted edits that are there."""
        found = {}
        for key, value in self._get(keys).items():
            line, _, png = value.partition(b"\n")
            head = json.loads(line)
            found[key] = Edit(key, png if head["has_image"] else None, head["reason"])
        return found

    def put_edits(self, edits: Iterable[Edit]) -> None:
        """Keeps edits, all or none of them: a line of JSON, then the PNG."""
        self._put(
            {
                one.key: json.dumps({"reason": one.reason, "has_image": one.png is not None}).encode() + b"\n" + (one.png or b"")
                for one in edits
            }
        )

    def verdicts(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Those of the wanted verdicts that are there."""
        return {key: Verdict(**json.loads(value)) for key, value in self._get(keys).items()}

    def put_verdicts(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keeps verdicts, transient ones left out: asking again may give another."""
        self._put({key: json.dumps(asdict(verdict)).encode() for key, verdict in verdicts.items() if not verdict.transient})

    def _get(self, keys: Iterable[str]) -> dict[str, bytes]:
        return self._disk.get(keys) if self._disk is not None else {key: self._memory[key] for key in keys if key in self._memory}

    def _put(self, items: Mapping[str, bytes]) -> None:
        if self._disk is None:
            self._memory.update(items)
        else:
            self._disk.put(items)
