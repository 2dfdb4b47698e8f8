"""Where a model's files are: a folder, or a repository on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guardkit.hub import hub_folder
from guardkit.local_copies import local
from guardkit.schema import InputError, shortened
from guardkit.storage import is_url

HUB, LOCAL = "hf-hub:", "local-dir:"


def offline(kind: str) -> str:
    """What to do where a model cannot be fetched, for messages.

    Args:
        kind: of the encoder, as in encoder=open_clip.
    """
    fetched = "without a network, run python -m guardkit.fetch on a machine that has one, copy its folder here"
    return f"{fetched} and give encoder={kind} encoder.weights={LOCAL}FOLDER"


def named_folder(weights: object, *, holds: str) -> Path | None:
    """The folder that a setting `encoder.weights` means; None for one on the Hub.

    Args:
        weights: "local-dir:FOLDER", a folder, its URL in object storage, or "hf-hub:ORG/NAME".
        holds: a file that must be in it.
    Raises:
        InputError: it means neither, or the file is not there.
    """
    if not isinstance(weights, str) or not weights.removeprefix(LOCAL):
        raise InputError(f"encoder.weights must be {HUB}ORG/NAME or {LOCAL}FOLDER, got {weights!r}")
    if weights.startswith(HUB):
        return None
    if is_url(weights.removeprefix(LOCAL)):
        weights = str(local("encoder.weights", weights.removeprefix(LOCAL)))
    folder = Path(weights.removeprefix(LOCAL)).expanduser()
    try:
        is_there = folder.is_dir()
    except OSError:  # such as a name that no file system takes
        is_there = False
    if not is_there:
        raise InputError(
            f"encoder.weights: {shortened(str(folder), 200)} is no folder here; give {LOCAL}FOLDER, or {HUB}ORG/NAME for a model on the Hub"
        )
    if not (folder / holds).is_file():
        raise InputError(f"encoder.weights: {folder} holds no {holds}; give the folder of one model")
    return folder


def named_weights(recorded: Mapping[str, Any], text: str, *, holds: str) -> dict[str, Any] | None:
    """What `Movable.named` gives of a model in a folder or on the Hub: the recorded arguments with other weights.

    Args:
        recorded, text: see there.
        holds: a file that a model's folder has; another folder is to be searched.
    """
    path = Path(text).expanduser()
    if path.is_dir() and not (path / holds).is_file():
        return None
    is_bare_id = not text.startswith((HUB, LOCAL)) and not path.exists() and text.count("/") == 1
    return dict(recorded["config"]) | {"weights": f"{HUB}{text}" if is_bare_id else text}


def encoder_folder(weights: str, patterns: Sequence[str], *, remedy: str) -> Path:
    """Fetches files of a model on the Hub, or finds those that were fetched before.

    Args:
        weights: "hf-hub:ORG/NAME".
        patterns: of the files that are needed.
        remedy: what to do where they cannot be had.
    Raises:
        InputError: no such id, or not to be had.
    """
    return hub_folder(
        weights.removeprefix(HUB),
        patterns,
        refusal=f"encoder.weights {weights} could not be fetched from the Hub",
        remedy=remedy,
    )
