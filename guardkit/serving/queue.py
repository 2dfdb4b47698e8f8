"""The queue of a run of `moderate` for several people: what they say is on disk before they see the next image."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from guardkit.artifacts import append_whole
from guardkit.counterfactual.review import reviewer_name
from guardkit.images import encode_jpeg, read_frames
from guardkit.moderation.collecting import collect_corrections, decided_bytes, read_decisions
from guardkit.moderation.corrections import VERDICTS, Verdict, read_reviews
from guardkit.moderation.gate import Refused
from guardkit.moderation.ordering import queue_order
from guardkit.policy import Policy
from guardkit.schema import Content, ImageError, InputError
from guardkit.shards.base import Stored
from guardkit.shards.inputs import Inputs

REVIEWS, CORRECTIONS = "reviews.jsonl", "corrections.parquet"
MAX_SHOWN = 1000
_PICTURE_PX = 480  # of the longer side


class ModerationQueue:
    """What is not allowed of a run, the most valuable first, and what people say of it.

    Args:
        decided: the folder that `moderate` wrote.
        input: what it decided over; images are read from there, and nothing else is.
        policy: of the guard.
        folder: reviews.jsonl and corrections.parquet are written there, and reviews that it has are gone on with.
    Raises:
        InputError: no such run, or a line of the reviews is no verdict.
    """

    def __init__(self, decided: str | Path, input: str | Path | Sequence[str | Path], policy: Policy, folder: Path) -> None:
        self.decided, self.input, self.policy, self.folder = Path(decided).expanduser(), input, policy, folder
        found = read_decisions(self.decided, f"queue={decided}", policy.category_names)
        ordered = queue_order(found)
        self.n_flagged = len(ordered)
        self.rows = [row for row in ordered if row["action"] != "error"][:MAX_SHOWN]
        wanted = {row["id"]: number for number, row in enumerate(self.rows)}
        # files are read when somebody looks; of what lies within a tar or Parquet file a small picture is kept
        self._places: dict[int, Path | Stored | bytes] = {}
        for given in Inputs(input):
            number = wanted.get(given.id)
            if number is not None and given.data is not None:
                with suppress(ImageError):  # known by a bank, and no image that can be shown
                    self._places[number] = given.data if isinstance(given.data, (Path, Stored)) else _picture(given.data, self.rows[number])
        self._lock = threading.Lock()
        self._said: dict[int, dict[str, Verdict]] = {}
        if (folder / REVIEWS).is_file():
            _mend(folder / REVIEWS)
            for name, verdicts in read_reviews([folder / REVIEWS], policy).items():
                if name in wanted:
                    self._said[wanted[name]] = {one.reviewer: one for one in verdicts}

    def to_dict(self) -> dict[str, Any]:
        """Rows and verdicts, plain JSON."""
        with self._lock:
            return {
                "n_flagged": self.n_flagged,
                "rows": [
                    {
                        "row": number,
                        **{key: row[key] for key in ("id", "action", "score", "frame", "bank", "near_duplicate_of")},
                        "violated": list(row["violated"] or ()),
                        "has_picture": number in self._places,
                        "verdicts": self._verdicts(number),
                    }
                    for number, row in enumerate(self.rows)
                ],
            }

    @property
    def has_verdicts(self) -> bool:
        """Whether anybody said anything, in this run or before."""
        return bool(self._said)

    def picture(self, row: int) -> bytes:
        """A JPEG of at most a few hundred pixels. Raises Refused: no such row, or the image is gone (404)."""
        place = self._places.get(row)
        if place is None:
            raise Refused(404, "there is no picture of this row")
        if isinstance(place, bytes):
            return place
        try:
            return _picture(place, self.rows[row])
        except ImageError as error:
            raise Refused(404, f"the image is not there any more: {error}") from error

    def add(self, row: int, verdict: str, category: str | None, reviewer: str) -> list[dict[str, Any]]:
        """Returns what all say of the row, when the verdict is on disk. Of each person the last one counts.

        Raises:
            Refused: no such row, verdict or category, or a name that is none (422), or it cannot be written (507).
        """
        if not 0 <= row < len(self.rows):
            raise Refused(422, f"there is no row {row}; reload the page")
        if verdict not in VERDICTS or (verdict == "wrong_category") != (category is not None):
            raise Refused(422, f"a verdict must be one of {', '.join(VERDICTS)}, the third with the right category")
        if category is not None and category not in self.policy.category_names:
            raise Refused(422, f"there is no category {category!r}; reload the page")
        try:
            reviewer = reviewer_name(reviewer)
        except InputError as error:
            raise Refused(422, str(error)) from error
        said = Verdict(self.rows[row]["id"], verdict, category, reviewer)
        line = {"id": said.id, "verdict": verdict, "category": category, "reviewer": reviewer, "time": datetime.now(UTC).isoformat()}
        with self._lock:
            with _on_disk(), open(self.folder / REVIEWS, "ab", buffering=0) as file:
                append_whole(file, json.dumps(line).encode() + b"\n")
            self._said.setdefault(row, {})[reviewer] = said
            return self._verdicts(row)

    def corrections(self) -> dict[str, int]:
        """Writes corrections.parquet anew, see `collect_corrections`. Raises Refused: nobody said anything yet (409), or it cannot
        be written (507)."""
        with self._lock:
            if not (self.folder / REVIEWS).is_file():
                raise Refused(409, "nobody has said anything yet")
            with _on_disk():
                return collect_corrections(self.decided, self.folder / REVIEWS, self.input, self.policy, output=self.folder / CORRECTIONS)

    def _verdicts(self, row: int) -> list[dict[str, Any]]:
        return [{"reviewer": one.reviewer, "verdict": one.verdict, "category": one.category} for one in self._said.get(row, {}).values()]


def _picture(source: Path | bytes | Stored | Content | np.ndarray, row: Mapping[str, Any]) -> bytes:
    """A JPEG of the frame that decided. Raises ImageError where it is no longer what was decided."""
    frames = read_frames(decided_bytes(source, row), lambda image: encode_jpeg(image, max_px=_PICTURE_PX))
    return frames[min(row["frame"] or 0, len(frames) - 1)]


def _mend(path: Path) -> None:
    """A line that a crash cut short is no verdict of anybody, and the next one must not be added to it."""
    with open(path, "rb+") as file:
        kept = file.read().rpartition(b"\n")
        file.truncate(len(kept[0]) + len(kept[1]))


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refused(507, f"it cannot be written ({error.strerror or error}); free some space, and say it again") from error
