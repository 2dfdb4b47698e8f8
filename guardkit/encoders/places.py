"""Where a model's files are: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from guardkit.schema import InputError

HUB, LOCAL = "hf-hub:", "local-dir:"


def named_folder(weights: object, *, holds: str) -> Path | None:
    """The folder that a setting `encoder.weights` means; None for one on the Hub.

    Args:
        weights: "local-dir:FOLDER", a folder, or "hf-hub:ORG/NAME".
        holds: a file that must be in it.
    Raises:
        InputError: it means neither, or the file is not there.
    """
    if not isinstance(weights, str) or not weights.removeprefix(LOCAL):
        raise InputError(f"encoder.weights must be {HUB}ORG/NAME or {LOCAL}FOLDER, got {weights!r}")
    if weights.startswith(HUB):
        return None
    folder = Path(weights.removeprefix(LOCAL)).expanduser()
    if not folder.is_dir():
        raise InputError(f"encoder.weights: {folder} is no folder here; give {LOCAL}FOLDER, or {HUB}ORG/NAME for a model on the Hub")
    if not (folder / holds).is_file():
        raise InputError(f"encoder.weights: {folder} holds no {holds}; give the folder of one model")
    return folder


def hub_folder(weights: str, patterns: Sequence[str]) -> Path:
    """Fetches files of a model on the Hub, or finds those that were fetched before.

    Args:
        weights: "hf-hub:ORG/NAME".
        patterns: of the files that are needed.
    Raises:
        InputError: no such id, or not to be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(weights.removeprefix(HUB), allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"encoder.weights {weights} could not be fetched from the Hub ({reason}); without a network, save the model's files in a "
            f"folder and give {LOCAL}FOLDER"
        ) from error
