"""Edits and verdicts, and where they are kept: accepted and rejected alike, so that nothing is made twice. Knows no editor.

An edit does not depend on who judges it: with another verifier, or other limits, stored edits are judged anew and none is
made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from guardkit.artifacts import parse_json
from guardkit.counterfactual.verifier import Verdict
from guardkit.images import decode_png
from guardkit.schema import ImageError
from guardkit.stores import KeyValueStore

_PNG = b"\x89PNG\r\n\x1a\n"


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

    def __str__(self) -> str:
        return f"an edited image ({self.instruction})"

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
        self._store = KeyValueStore(cache_dir, "edits.sqlite", {"format": 2})

    def __enter__(self) -> TryStore:
        self._store.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._store.__exit__(*error)

    @property
    def n_damaged(self) -> int:
        """Stored edits and verdicts so far that did not pass their check, and are made anew."""
        return self._store.n_damaged

    def edits(self, keys: Iterable[str]) -> dict[str, Edit]:
        """Those of the wanted edits that are there."""
        return {key: Edit(key, png, reason) for key, (png, reason) in self._store.get(keys, _parsed_edit).items()}

    def put_edits(self, edits: Iterable[Edit]) -> None:
        """Keeps edits, all or none of them: a line of JSON, then the PNG."""
        self._store.put(
            {
                one.key: json.dumps({"reason": one.reason, "has_image": one.png is not None}).encode() + b"\n" + (one.png or b"")
                for one in edits
            }
        )

    def verdicts(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """Those of the wanted verdicts that are there."""
        return self._store.get(keys, _parsed_verdict)

    def put_verdicts(self, verdicts: Mapping[str, Verdict]) -> None:
        """Keeps verdicts, transient ones left out: asking again may give another."""
        self._store.put({key: json.dumps(asdict(verdict)).encode() for key, verdict in verdicts.items() if not verdict.transient})


def _parsed_edit(value: bytes) -> tuple[bytes | None, str | None]:
    """PNG and reason of a stored edit. Raises ValueError when it is none."""
    line, _, png = value.partition(b"\n")
    head = parse_json(line)
    if not isinstance(head, dict) or head.keys() != {"reason", "has_image"} or not isinstance(head["has_image"], bool):
        raise ValueError("not the head of an edit")
    reason, has_image = head["reason"], head["has_image"]
    # pixels are decoded by who looks at them; an edit without any must say why
    if not (isinstance(reason, str) or (reason is None and has_image)) or not (png.startswith(_PNG) if has_image else png == b""):
        raise ValueError("not an edit")
    return png if has_image else None, reason


def _parsed_verdict(value: bytes) -> Verdict:
    """Raises ValueError when the value is none."""
    said = parse_json(value)
    if not isinstance(said, dict) or said.keys() != {one.name for one in fields(Verdict)} or said["transient"] is not False:
        raise ValueError("not a verdict")
    scores = (said["flip_score"], said["preservation_score"])
    if not isinstance(said["reason"], str | None) or not all(score is None or _is_share(score) for score in scores):
        raise ValueError("not a verdict")
    return Verdict(**said)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
