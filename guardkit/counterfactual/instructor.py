"""Who writes the edit: from an unsafe image and its policy to an instruction in words."""

from __future__ import annotations

from typing import Protocol

from guardkit.policy import Policy
from guardkit.schema import Record


class Instructor(Protocol):
    """Writes edit instructions.

    Attributes:
        name: a short name for tables.
    """

    name: str

    def instruct(self, record: Record, policy: Policy) -> str:
        """The smallest edit that would remove the violation, one sentence."""
        ...


class TemplateInstructor:
    """Takes the policy's own edit guidance for the image's category, and the caption where there is one."""

    name = "template"

    def instruct(self, record: Record, policy: Policy) -> str:
        """The guidance of the record's category; without a category, that of all of them."""
        if record.category in policy.category_names:
            guidance = policy[record.category].edit
        else:
            guidance = "Remove whatever violates the policy: " + " ".join(category.edit for category in policy.categories)
        return f"{guidance} The image shows {record.caption}." if record.caption else guidance


NULL_INSTRUCTION = "Change nothing that matters to the policy."
