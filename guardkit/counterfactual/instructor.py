"""Who writes the edit: from an unsafe image and its policy to an instruction in words. Instructors see no editor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from guardkit.artifacts import fingerprint
from guardkit.policy import Category, Policy
from guardkit.schema import Record

_ARTICLE = re.compile(r"^(an?|the)\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """What an editor is asked for, or why nothing is asked.

    Attributes:
        text: the smallest edit that flips the label, in words; empty when the instructor abstains.
        target: what the result shows, a caption; may be empty.
        reason: why the instructor abstains; None when there is a text.
    """

    text: str
    target: str = ""
    reason: str | None = None


class Instructor(Protocol):
    """Writes edit instructions.

    Attributes:
        name: a short name for tables.
    """

    name: str

    def instruct(self, records: Sequence[Record], seeds: Sequence[int], policy: Policy) -> list[Instruction]:
        """One instruction per record, in order.

        Args:
            records: with contents.
            seeds: one per record; another seed may ask for another edit.
            policy: whose violation is to be removed (from an unsafe record) or brought in (to a safe one).
        """
        ...


class TemplateInstructor:
    """Writes instructions from the policy and what is known of the image, without looking at it.

    Where the caption names one of the category's unsafe texts, the instruction replaces just that by one of its safe
    texts, chosen by the seed; otherwise it is the policy's own edit guidance.
    """

    name = "template"

    def instruct(self, records: Sequence[Record], seeds: Sequence[int], policy: Policy) -> list[Instruction]:
        """One instruction per record; never abstains."""
        return [self._instruct(record, seed, policy) for record, seed in zip(records, seeds, strict=True)]

    def _instruct(self, record: Record, seed: int, policy: Policy) -> Instruction:
        if record.category not in policy.category_names:
            return Instruction("Remove whatever violates the policy: " + " ".join(category.edit for category in policy.categories))
        category = policy[record.category]
        choice = int(fingerprint([record.id, seed])[:12], 16)
        others = category.safe_texts if record.label else category.unsafe_texts
        other = others[choice % len(others)]
        named = _named_in(record.caption, category, record.label)
        if named is None:
            shown = f" The image shows {record.caption}." if record.caption else ""
            return Instruction(category.edit + shown, other)
        start, stop = named.span()
        target = f"{record.caption[:start]}{_bare(other)}{record.caption[stop:]}"
        return Instruction(f"Replace the {named.group()} with {other} of the same colour, and change nothing else.", target)


def _named_in(caption: str, category: Category, label: int) -> re.Match[str] | None:
    """Where a caption names what makes (or, when safe, would not make) the image violate the category."""
    for text in category.unsafe_texts if label else category.safe_texts:
        # a colour may stand between the words, as in "a bare dummy on a red stand"
        words = r"\s+(?:\w+\s+)?".join(re.escape(word) for word in _bare(text).split())
        found = re.search(rf"\b{words}\b", caption, re.IGNORECASE)
        if found:
            return found
    return None


def _bare(text: str) -> str:
    return _ARTICLE.sub("", text)
