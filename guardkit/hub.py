"""Repositories on the Hugging Face Hub: some of their files, fetched once. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from guardkit.schema import InputError


def is_hub_id(name: str) -> bool:
    """Whether a text that is no path here may be "ORG/NAME" on the Hub."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def hub_folder(name: str, patterns: Iterable[str], *, refusal: str, remedy: str, revision: str | None = None) -> Path:
    """Fetches files of a repository, or finds those that were fetched before.

    Args:
        name: "ORG/NAME".
        patterns: of the files that are needed.
        refusal: how the message begins where they cannot be had; the reason follows in brackets.
        remedy: what to do then.
        revision: a branch, tag or commit; None: the main branch.
    Returns:
        The folder that holds them.
    Raises:
        InputError: no such repository, or not to be had.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{refusal} ({reason}); {remedy}") from error
