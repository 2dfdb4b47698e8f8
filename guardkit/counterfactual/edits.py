"""Who edits, who says what is asked for, who judges, and how often: what every function that makes edits is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from guardkit.counterfactual.instructor import Instructor, TemplateInstructor
from guardkit.counterfactual.pipeline import CounterfactualPipeline
from guardkit.counterfactual.verifier import NoVerifier, Verifier
from guardkit.editors.base import Editor
from guardkit.editors.none import NoEditor
from guardkit.embeddings import EmbeddingStore
from guardkit.policy import Policy
from guardkit.schema import InputError

VerifierFactory = Callable[..., Verifier]
"""Called with `store` (of embeddings) and `policy`, makes a verifier."""


@dataclass(frozen=True)
class Edits:
    """How counterfactuals and null edits are made.

    Attributes:
        editor: makes them; by default none can be made, which suits arms that edit nothing.
        instructor: writes what the editor is asked for; by default a template of the policy's words.
        verifier: judges edits, or a function of `store` and `policy` that makes one; by default all that changed the image are kept.
        batch_size: edits asked of the editor at once; `edit_batch_size` of the commands.
        max_tries: how often a rejected edit is tried; `edit_max_tries` of the commands.
    Raises:
        InputError: something that is no editor in place of one.
    """

    editor: Editor = field(default_factory=NoEditor)
    instructor: Instructor = field(default_factory=TemplateInstructor)
    verifier: Verifier | VerifierFactory = field(default_factory=NoVerifier)
    batch_size: int = 16
    max_tries: int = 1

    def __post_init__(self) -> None:
        if not hasattr(self.editor, "edit"):
            raise InputError(f"editor must be an object with a method edit, such as guardkit.InpaintEditor(...), got {self.editor!r}")

    @classmethod
    def of(cls, editor: Editor | Edits | None) -> Edits:
        """Edits as they are given, or those of an editor with the defaults; None: nothing is edited."""
        return editor if isinstance(editor, Edits) else cls() if editor is None else cls(editor)

    def pipeline(self, policy: Policy, store: EmbeddingStore, cache_dir: Path | None) -> CounterfactualPipeline:
        """The way from an image to its counterfactual.

        Args:
            policy: says what is unsafe.
            store: embeds images for verifiers.
            cache_dir: of edits; None keeps them in memory.
        Raises:
            InputError: `batch_size` or `max_tries` is below 1.
        """
        judge = self.verifier if hasattr(self.verifier, "verify") else self.verifier(store=store, policy=policy)
        return CounterfactualPipeline(
            policy,
            self.instructor,
            self.editor,
            judge,  # type: ignore[arg-type]
            cache_dir=cache_dir,
            batch_size=self.batch_size,
            max_tries=self.max_tries,
        )
