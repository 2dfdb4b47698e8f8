"""What several people said of decisions, and the label that follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guardkit.checks import check_path
from guardkit.policy import Policy
from guardkit.schema import InputError

VERDICTS = ("agree", "overturn", "wrong_category", "unsure")
DISAGREE, UNSURE = "people disagree", "nobody was sure"


@dataclass(frozen=True)
class Verdict:
    """What one person said of one decision.

    Attributes:
        id: of the input.
        verdict: one of `VERDICTS`.
        category: the right one, with "wrong_category".
        reviewer: who said it; may be empty.
    """

    id: str
    verdict: str
    category: str | None
    reviewer: str


@dataclass(frozen=True)
class Correction:
    """The label of an image after people looked at it.

    Attributes:
        label: "safe" or "unsafe"; None where they disagree, or nobody was sure.
        category: it violates, or, of an alarm that was overturned, was taken for.
        why: there is no label; "" where there is one.
    """

    label: str | None
    category: str | None
    why: str = ""


def read_reviews(paths: Sequence[str | Path], policy: Policy) -> dict[str, list[Verdict]]:
    """Verdicts by input, of each person the last.

    Args:
        paths: files of JSON lines, as the page of `moderate` saves them: {"id", "verdict", "category", "reviewer"}.
        policy: that has the categories.
    Raises:
        InputError: a file cannot be read, or a line of it is no verdict.
    """
    found: dict[str, dict[str, Verdict]] = {}
    for given in paths:
        path = check_path("reviews", given)
        try:
            # not splitlines(): a name may hold U+2028 or U+0085, which a browser's JSON leaves as they are
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"reviews={path} cannot be read ({error}); give a file that the page saved") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                one = _verdict(line, f"{path} line {number}", policy)
                found.setdefault(one.id, {})[one.reviewer] = one
    return {name: list(by_person.values()) for name, by_person in found.items()}


def _verdict(line: str, where: str, policy: Policy) -> Verdict:
    try:
        said = json.loads(line)
        if not isinstance(said, dict) or not isinstance(said.get("id"), str) or said.get("verdict") not in VERDICTS:
            raise ValueError("no verdict")
        f"{said['id']}{said.get('reviewer')}".encode()  # half of a surrogate pair is no text, and cannot be written
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no verdict; each line must be JSON with an id and a verdict ({', '.join(VERDICTS)})") from error
    category = said.get("category")
    if said["verdict"] == "wrong_category":
        if not isinstance(category, str):
            raise InputError(f"{where} says wrong_category without the right one; give a category of policy {policy.name!r}")
        policy.check_category(category, where)
    return Verdict(said["id"], said["verdict"], category if isinstance(category, str) else None, str(said.get("reviewer") or ""))


def corrected(decision: Mapping[str, Any], verdicts: Iterable[Verdict]) -> Correction:
    """The label that follows from a decision and what people said of it.

    Args:
        decision: a row of decisions.parquet.
        verdicts: at least one.
    """
    taken_for = next(iter(decision["violated"] or ()), None)
    is_flagged = decision["action"] in ("review", "block")
    found: set[tuple[str, str | None]] = set()
    for one in verdicts:
        if one.verdict == "wrong_category":
            found.add(("unsafe", one.category))
        elif one.verdict != "unsure":
            is_unsafe = is_flagged == (one.verdict == "agree")
            # of an image that was allowed, a person who overturns may say what it violates
            found.add(("unsafe" if is_unsafe else "safe", taken_for if is_flagged else one.category if is_unsafe else None))
    if not found:
        return Correction(None, None, UNSURE)
    if len({label for label, _ in found}) > 1:
        return Correction(None, None, DISAGREE)
    label = next(iter(found))[0]
    categories = {category for _, category in found}
    return Correction(label, categories.pop() if len(categories) == 1 else None)
