"""What people say of pairs: who judged which pair how and when, what follows for training, and whether people agree.

Verdicts are lines of `reviews.jsonl` beside the pair dataset's table. A line is added under a lock and forced to disk
before the reviewer sees the next pair, so neither a crash nor a second reviewer loses one; changing one's mind adds a
line, and the last one of each reviewer counts. A verdict names the images it was given on by their hash: it follows
them into a dataset made anew, and says nothing of other images under the same name.

Knows no table format, no model and no page.
"""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from io import FileIO
from itertools import combinations
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from guardkit.artifacts import append_whole, fingerprint, parse_json
from guardkit.checks import check_choice
from guardkit.images import FileContent
from guardkit.schema import ImageError, InputError

REVIEWS = "reviews.jsonl"
ACCEPT, REJECT, UNSURE = "accept", "reject", "unsure"
VERDICTS = (ACCEPT, REJECT, UNSURE)
UNNAMED = "unnamed"  # the reviewer of verdicts that only the table knew
SHOW = ("accepted", "rejected", "all")
MAX_NAME, MAX_REASON = 60, 1000
_LOCK, _LOCK_TIMEOUT_S = ".reviews.lock", 10.0


@dataclass(frozen=True)
class Review:
    """One verdict of one person.

    Attributes:
        pair_id: of the pair dataset's table.
        images: hash of the two images that were judged, see `pair_hash`.
        reviewer: who.
        verdict: accept (the two images differ in the violation and in nothing that matters), reject or unsure.
        reason: in the reviewer's words; may be empty.
        time: when, in UTC, ISO 8601.
    """

    pair_id: str
    images: str
    reviewer: str
    verdict: str
    reason: str
    time: str


class ReviewLog:
    """The verdicts of one pair dataset, for many readers and writers at once.

    Args:
        folder: of the pair dataset.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / REVIEWS
        self._known: tuple[tuple[int, int, int], list[Review]] = ((0, 0, 0), [])

    def add(self, review: Review) -> None:
        """Returns when the verdict is on disk.

        Raises:
            InputError: another process holds the file for longer than ten seconds.
            OSError: it cannot be written; the file is as it was.
        """
        line = json.dumps(asdict(review), ensure_ascii=False).encode() + b"\n"
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_TIMEOUT_S), open(self.path, "a+b", buffering=0) as file:
                start = _start_of_last_line(file)
                rest = os.pread(file.fileno(), file.tell() - start, start)
                if _parse(rest) is not None:  # somebody's editor left out the last line break
                    line = b"\n" + line
                elif rest:  # a line that a crash cut short was never confirmed to anybody
                    file.truncate(start)
                append_whole(file, line)
        except Timeout as error:
            raise InputError(f"{self.path} is held by another process; try again") from error

    def read(self) -> list[Review]:
        """All verdicts in the order in which they were given; none when there is no file.

        Raises:
            InputError: a line is no verdict; its number is named.
        """
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                state = (status.st_ino, status.st_size, status.st_mtime_ns)
                known, reviews = self._known
                if state == known:
                    return list(reviews)
                data = file.read()
        except FileNotFoundError:
            return []
        reviews = self._parse_all(data)
        self._known = (state, reviews)
        return list(reviews)

    def _parse_all(self, data: bytes) -> list[Review]:
        *lines, rest = data.split(b"\n")
        reviews = []
        for number, line in enumerate(lines, 1):
            review = _parse(line)
            if review is not None:
                reviews.append(review)
            elif line.strip():
                shown = line[:60].decode(errors="replace")
                raise InputError(f"{self.path} line {number} is not a verdict ({shown!r}); mend or delete that line")
        # what does not parse behind the last line break is being written just now, or was cut short by a crash
        last = _parse(rest)
        return reviews if last is None else [*reviews, last]


def reviewer_name(name: Any) -> str:
    """A name as it is kept.

    Raises:
        InputError: no name, one that is too long, or one with control characters.
    """
    text = " ".join(unicodedata.normalize("NFC", str(name if name is not None else "")).split())
    if not 1 <= len(text) <= MAX_NAME or not text.isprintable():
        raise InputError(f"the reviewer's name must have 1 to {MAX_NAME} printable characters, got {text[:80]!r}; give reviewer=NAME")
    return text


def image_file(folder: Path, name: str) -> Path:
    """The path of a dataset's image. Raises ImageError for a name that leads out of the folder."""
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a null character
        raise ImageError(f"no file can have the name {name[:80]!r}") from error
    if not path.is_relative_to(folder.resolve()):
        raise ImageError("path outside the folder")
    return path


def pair_hash(folder: Path, row: Mapping[str, Any]) -> str | None:
    """Names the two images of a pair by their bytes; None when there are not two that can be read."""
    names = (row["file_name"], row["edited_file_name"])
    if None in names:
        return None
    try:
        return fingerprint([FileContent(image_file(folder, name)).key for name in names])
    except ImageError:
        return None


def current_reviews(
    folder: Path, rows: Sequence[Mapping[str, Any]], hashes: Callable[[Path, Mapping[str, Any]], str | None] = pair_hash
) -> dict[str, dict[str, Review]]:
    """What each reviewer last said of the pairs as they are now.

    Args:
        folder: of the pair dataset.
        rows: of its table.
        hashes: gives a pair's hash; to be replaced by one that remembers.
    Returns:
        {pair_id: {reviewer: review}}, in the order of the table; a pair that nobody reviewed is missing, and so is a
        verdict on images that are no longer those of the pair.
    """
    said: dict[str, dict[str, Review]] = {}
    for review in ReviewLog(folder).read():
        said.setdefault(review.pair_id, {})[review.reviewer] = review
    current = {}
    for row in rows if said else ():
        if row["pair_id"] in said:
            images = hashes(folder, row)
            found = {name: review for name, review in said[row["pair_id"]].items() if review.images == images}
            if found:
                current[row["pair_id"]] = found
    return current


def combined(verdicts: Iterable[str]) -> str | None:
    """What several verdicts on a pair amount to: the most cautious one counts. None without any."""
    given = set(verdicts)
    return next((verdict for verdict in (REJECT, UNSURE, ACCEPT) if verdict in given), None)


@dataclass(frozen=True)
class Agreement:
    """How two people who judged the same pairs compare.

    Attributes:
        reviewers: their names, in alphabetical order.
        n: pairs that both judged.
        share: of these, the fraction with the same verdict.
        kappa: Cohen's kappa over accept, reject and unsure; None when both gave one and the same verdict throughout,
            for chance would agree as well.
    """

    reviewers: tuple[str, str]
    n: int
    share: float
    kappa: float | None


def agreement(current: Mapping[str, Mapping[str, Review]]) -> list[Agreement]:
    """Every two reviewers that have a pair in common, those with most in common first.

    Args:
        current: as `current_reviews` gives it.
    Source: Cohen, "A coefficient of agreement for nominal scales" (1960); kappa is scikit-learn's.
    """
    both: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for said in current.values():
        for one, other in combinations(sorted(said), 2):
            first, second = both.setdefault((one, other), ([], []))
            first.append(said[one].verdict)
            second.append(said[other].verdict)
    found = [
        Agreement(names, len(first), sum(a == b for a, b in zip(first, second, strict=True)) / len(first), _kappa(first, second))
        for names, (first, second) in both.items()
    ]
    return sorted(found, key=lambda one: (-one.n, one.reviewers))


class ReviewQueue:
    """The pairs of a dataset in the order of its table, which is the same for every reviewer.

    Args:
        folder: of the pair dataset.
        rows: of its table.
        show: which tries: "accepted" by the verifier, "rejected" ones that have an image, or "all" that have one.
    Raises:
        InputError: no such choice, or nothing to show.
    """

    def __init__(self, folder: Path, rows: Sequence[Mapping[str, Any]], *, show: str = "accepted") -> None:
        check_choice("show", show, SHOW)
        self.folder, self.log, self._rows = Path(folder), ReviewLog(folder), rows
        self.pairs = [row for row in rows if row["edited_file_name"] and show in (row["status"], "all")]
        if not self.pairs:
            raise InputError(f"{folder} has no pair to review with show={show}; there are {len(rows)} tries in all, choose another show")
        self._place = {row["pair_id"]: place for place, row in enumerate(self.pairs)}
        # images of a dataset never change once written, so each is hashed once
        self._hash = cache(lambda place: pair_hash(self.folder, self.pairs[place]))

    def __len__(self) -> int:
        return len(self.pairs)

    def place(self, pair_id: str) -> int:
        """Where a pair stands, from 0. Raises InputError when it is not in the queue."""
        if pair_id not in self._place:
            raise InputError(f"there is no pair {pair_id!r} in this queue; reload the page")
        return self._place[pair_id]

    def reviews(self) -> dict[str, dict[str, Review]]:
        """As `current_reviews`, of the pairs of this queue."""
        return current_reviews(self.folder, self.pairs, lambda _, row: self._hash(self._place[row["pair_id"]]))

    def next_unseen(self, reviewer: str, after: int = -1) -> int | None:
        """The first pair after a place, and then from the start, that this reviewer has not judged; None when all are."""
        current, n = self.reviews(), len(self)
        places = ((after + 1 + step) % n for step in range(n))
        return next((place for place in places if reviewer not in current.get(self.pairs[place]["pair_id"], {})), None)

    def submit(self, pair_id: str, reviewer: str, verdict: str, reason: str = "") -> Review:
        """Keeps a verdict; it is on disk when this returns.

        Raises:
            InputError: an unknown pair or verdict, a bad name, or images that cannot be read.
            OSError: it cannot be written.
        """
        if verdict not in VERDICTS:
            raise InputError(f"a verdict must be one of {', '.join(VERDICTS)}, got {verdict!r}")
        row, name = self.pairs[self.place(pair_id)], reviewer_name(reviewer)
        said = " ".join(reason.encode(errors="replace").decode().split())[:MAX_REASON]  # half a character is none
        if not self.log.path.exists():
            for one in self._rows:  # a table that came without the file: its verdicts are somebody's, and must not go missing
                if one["review"] is not None:
                    self._keep(one, UNNAMED, one["review"], "")
        review = self._keep(row, name, verdict, said)
        if review is None:
            raise InputError(f"the images of pair {pair_id!r} cannot be read, so there is nothing to judge; go on to the next pair")
        return review

    def _keep(self, row: Mapping[str, Any], reviewer: str, verdict: str, reason: str) -> Review | None:
        images = pair_hash(self.folder, row)
        if images is None:
            return None
        review = Review(row["pair_id"], images, reviewer, verdict, reason, datetime.now(UTC).isoformat(timespec="seconds"))
        self.log.add(review)
        return review

    def summary(self) -> dict[str, Any]:
        """Counts and agreement in plain JSON types: pairs, reviewed, combined verdicts, verdicts by reviewer, agreement."""
        current = self.reviews()
        counts: dict[str, Counter[str]] = {}
        for said in current.values():
            for name, review in said.items():
                counts.setdefault(name, Counter())[review.verdict] += 1
        total = Counter(combined(review.verdict for review in said.values()) for said in current.values())
        return {
            "pairs": len(self),
            "reviewed": len(current),
            "combined": {verdict: total[verdict] for verdict in VERDICTS},
            "reviewers": {name: {verdict: counts[name][verdict] for verdict in VERDICTS} for name in sorted(counts)},
            "agreement": [asdict(one) for one in agreement(current)],
        }


def _kappa(first: list[str], second: list[str]) -> float | None:
    if len({*first, *second}) < 2:
        return None
    from sklearn.metrics import cohen_kappa_score

    return float(cohen_kappa_score(first, second))


def _parse(line: bytes) -> Review | None:
    """The verdict that a line holds; None when it holds none."""
    try:
        value = parse_json(line)
        texts = [value[name] for name in Review.__dataclass_fields__]
    except (ValueError, TypeError, KeyError):
        return None
    review = Review(*texts)
    return review if all(isinstance(text, str) for text in texts) and review.verdict in VERDICTS else None


def _start_of_last_line(file: FileIO) -> int:
    """The offset behind the last line break."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        found = os.pread(file.fileno(), end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
